"""What can go wrong while a trace executes."""

from __future__ import annotations


class ExecutionError(Exception):
    """An op met memory that is not what the trace says. Found by :mod:`ttt_sim.replay.execute`, which adds the op."""
