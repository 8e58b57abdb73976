"""Input files to types; nothing else in the project reads them."""

from ttt_sim.config.chip_file import build_chip, chip_names, load_chip, read_chip_file
from ttt_sim.config.chip_schema import chip_json_schema

__all__ = ["build_chip", "chip_json_schema", "chip_names", "load_chip", "read_chip_file"]
