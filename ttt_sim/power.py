"""What power does to time: a chip at its limit takes as long as its energy needs."""

from __future__ import annotations

from ttt_sim.chip import Chip


def throttled_seconds(chip: Chip, seconds: float, dynamic_j: float) -> float:
    """``seconds``, or the longer time in which ``dynamic_j`` and idling draw no more than the limit.

    Dynamic energy does not change with the clock here: a chip that slows down at the same voltage.
    """
    spare_w = chip.power.limit_w - chip.power.idle_w
    if dynamic_j <= spare_w * seconds:
        return seconds
    return dynamic_j / spare_w
