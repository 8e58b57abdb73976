"""From a trace and a chip to a program: fusion, residency, tiling, cutting into tasks. All rounding happens here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ttt_sim.chip import Chip
from ttt_sim.errors import ConfigError
from ttt_sim.lower import in_memory, static_dataflow, systolic, tile_wave
from ttt_sim.lower.emit import emit
from ttt_sim.lower.kernels import Kernels, form_kernels
from ttt_sim.lower.spill import spill, with_host_memory
from ttt_sim.lower.traffic import Traffic, resolve_traffic
from ttt_sim.lower.work import KernelWork
from ttt_sim.lower.writes import check_mode
from ttt_sim.ops import Trace, dependencies
from ttt_sim.program import Program

#: Tasks per op unless more detail is asked for.
DEFAULT_DETAIL = 16

Mapper = Callable[[Trace, Chip, Kernels, Traffic], KernelWork]

#: One mapper per execution style of a chip file.
MAPPERS: Mapping[str, Mapper] = {
    "tile_wave": tile_wave.map_kernels,
    "systolic": systolic.map_kernels,
    "static_dataflow": static_dataflow.map_kernels,
    "in_memory": in_memory.map_kernels,
    "event_driven": in_memory.map_kernels,
}


#: Dataflow of the matrix unit that a style needs, None where any will do.
_DATAFLOW: Mapping[str, str | None] = {
    "systolic": "weight_stationary", "static_dataflow": None, "in_memory": "in_array", "event_driven": "in_array",
}  # fmt: skip


def find_mapper(chip: Chip) -> Mapper:
    """The mapper of the chip's execution style; raises :class:`ConfigError` where the chip's matrix unit is of another
    style."""
    if chip.execution in _DATAFLOW:
        wanted = _DATAFLOW[chip.execution]
        if not chip.has_unit("matrix") or wanted not in (None, chip.unit("matrix").dataflow):
            of = f" of dataflow {wanted}" if wanted else ""
            raise ConfigError(f"{chip.name}: execution {chip.execution} needs a matrix unit{of}")
    return MAPPERS[chip.execution]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Lowered:
    """A program, and the decisions that led to it."""

    kernels: Kernels
    traffic: Traffic
    work: KernelWork
    program: Program


def lower(
    trace: Trace, chip: Chip, *, detail: int = DEFAULT_DETAIL, overlap: bool = True, spill_bytes: int = 0
) -> Lowered:
    """Lower ``trace`` to ``chip`` with at most ``detail`` tasks per op.

    ``overlap`` False forbids that an update runs beside other work; ``spill_bytes`` of weights and state lie in the
    backing memory.

    Raises:
        ConfigError: the chip cannot run the trace (execution style, units or dtypes), or has no backing memory.
        UnsupportedError: the chip lacks a property that the trace needs.
        CapacityError: a tile or a pinned tensor does not fit on chip.
    """
    if detail < DEFAULT_DETAIL:
        raise ConfigError(f"detail is {detail}, expected at least {DEFAULT_DETAIL}")
    if spill_bytes and chip.backing is None:
        raise ConfigError(f"{chip.name}: has no backing memory to hold {spill_bytes} bytes")
    chip = with_host_memory(chip, trace)
    mapper = find_mapper(chip)
    check_mode(trace, chip)
    kernels = form_kernels(trace, chip, dependencies(trace), overlap=overlap)
    traffic = spill(trace, kernels, resolve_traffic(trace, chip, kernels), spill_bytes)
    work = mapper(trace, chip, kernels, traffic)
    program = emit(chip, kernels, work, traffic.needs_main, detail=detail)
    return Lowered(kernels=kernels, traffic=traffic, work=work, program=program)
