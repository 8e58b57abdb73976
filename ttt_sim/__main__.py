"""``python -m ttt_sim``."""

import sys

from ttt_sim.cli import main

if __name__ == "__main__":
    sys.exit(main())
