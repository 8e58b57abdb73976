"""Writing weights on a chip, in plain text: what its file says about it, and one update of a fast weight simulated."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping

import numpy as np

from ttt_sim.chip import Chip, MemoryLevel, WriteMode
from ttt_sim.dtypes import tensor_bytes
from ttt_sim.errors import CapacityError, ConfigError
from ttt_sim.model import KVSettings, Model, TTTSettings
from ttt_sim.model_config import load_model
from ttt_sim.ops import Role, Trace
from ttt_sim.power import throttled_seconds
from ttt_sim.show import WIDTH
from ttt_sim.simulation import simulate_trace
from ttt_sim.units import format_bytes, format_seconds, format_si
from ttt_sim.update_cost import SECONDS_PER_DAY, CellWrites, cell_writes, lifetime_days, update_cost
from ttt_sim.workload.builder import Run, Segment, TraceBuilder
from ttt_sim.workload.chunk_update import ChunkUpdate
from ttt_sim.workload.fast_state import CONV_TAPS
from ttt_sim.workload.transformer import Decoder

#: The model whose down projection is updated: 2560 x 9728.
MODEL = "Qwen3-4B"

_MODES: Mapping[WriteMode, str] = {
    "free": "ordinary stores",
    "static_schedule": "only where the compiled program plans it",
    "reupload": "the chip drains and the host uploads weights again",
    "local_rule": "only by a local learning rule",
    "program_verify": "pulses with verification",
    "none": "weights are never written",
}


def update_trace(model: Model, ttt: TTTSettings, dtype: str) -> Trace:
    """One update of one sequence in the first layer of ``model`` from a full chunk, and nothing else."""
    decoder = Decoder(model=model, kv=KVSettings(), batch=1, dtype=dtype)
    update, rows, d, f = ChunkUpdate(decoder=decoder, ttt=ttt), ttt.chunk_tokens, model.d_model, model.d_ff
    builder = TraceBuilder(1)
    shapes = {"ttt_conv.weight": (d, CONV_TAPS), "ttt_proj.weight": (d, d)}
    for name, shape in shapes.items():
        builder.declare(name, shape, dtype, Role.WEIGHT, layers=[0], initial_version=0)
    for name, width in (("targets", d), ("hidden", f)):
        builder.declare(name, (rows, width), dtype, Role.CARRY, layers=[0], initial_version=0)
    for name, size in update.weights():
        builder.declare(
            name, (d, f), ttt.fast_dtype, Role.FAST_WEIGHT, layers=[0], size=int(size), initial_version=0, in_place=True
        )
    run = Run(first_step=0, positions=np.zeros(1, dtype=np.int64), tokens=rows, logits=False)
    segment = Segment(builder, run, [0])
    targets, hidden = ("targets", decoder.size(rows, d)), ("hidden", decoder.size(rows, f))
    update.emit_chunk(segment, 0, [targets], [hidden])
    builder.add_run(run, [(segment, 0)])
    return builder.build({})


def describe_writing(chip: Chip) -> list[str]:
    """Lines of the section "Writing weights" of ``ttt_sim show``."""
    lines = [*_rules(chip), *_memories(chip), *_update(chip)]
    return [
        part for line in lines for part in textwrap.wrap(line, WIDTH, initial_indent="  ", subsequent_indent="    ")
    ]


def _rules(chip: Chip) -> Iterator[str]:
    rules = chip.writability
    least = "everything on the device" if rules.granularity == "device" else f"at least one {rules.granularity}"
    yield f"mode {rules.mode}: {_MODES[rules.mode]}; a write replaces {least}"
    if rules.mode == "none":
        return
    if rules.mode == "reupload":
        rate = (
            "" if rules.reupload_bytes_per_s is None else f" + bytes at {format_si(rules.reupload_bytes_per_s, 'B/s')}"
        )
        yield f"drain and re-upload: {format_seconds(rules.reupload_s)}{rate}"
    beside = "beside reads of other weights" if rules.overlap else "while nothing else runs (drain)"
    old = "a new version is written beside reads of the old one (shadow bank)"
    yield f"{beside}; {old if rules.shadow_bank else 'reads of the old version end first'}"
    if rules.accumulate:
        yield "the memory adds a delta to what it holds; the old weight is not read out"


def _memories(chip: Chip) -> Iterator[str]:
    for level in chip.memories:
        if level.endurance_writes is not None or not level.volatile or level.write_pulses > 1:
            yield f"{level.name}: {'volatile' if level.volatile else 'keeps its contents'}, {_wear(level)}"


def _wear(level: MemoryLevel) -> str:
    lasts = "no endurance stated" if level.endurance_writes is None else f"{level.endurance_writes:g} writes per cell"
    return lasts if level.write_pulses == 1 else f"{lasts}, {level.write_pulses:g} pulses per write"


def _update(chip: Chip) -> Iterator[str]:
    """One update of the model's down projection, in the chip's default format, by itself."""
    model, dtype = load_model(MODEL), chip.default_dtype
    ttt = TTTSettings(fast_dtype=dtype)
    d, f = model.d_model, model.d_ff
    title = f"one update of {d} x {f} in {dtype} ({model.name}, down projection, chunk of {ttt.chunk_tokens:,} tokens)"
    if chip.writability.mode == "none":
        yield f"{title}: impossible"
        return
    try:
        result = simulate_trace(chip, update_trace(model, ttt, dtype))
    except (ConfigError, CapacityError) as error:
        yield f"{title}: not simulated: {error}"
        return
    if result.peak_memory_bytes() > chip.main_memory.capacity_bytes:
        need, have = format_bytes(result.peak_memory_bytes()), format_bytes(chip.main_memory.capacity_bytes)
        yield f"{title}: does not fit, it needs {need} and {chip.main_memory.name} has {have}"
        return
    once = np.ones(1)
    cost = update_cost(result, once, 1)
    assert cost is not None
    seconds = throttled_seconds(chip, result.seconds, cost.energy_j)
    alone = ", on a device that holds nothing else" if chip.writability.granularity == "device" else ""
    yield f"{title}, simulated alone{alone}, the delta in ops of its own:"
    limited = ", at the power limit" if seconds > result.seconds else ""
    moved = f"{format_bytes(int(cost.read_bytes))} read, {format_bytes(int(cost.write_bytes))} written"
    energy = f"{format_si(cost.energy_j, 'J')} besides idle power"
    yield f"  {format_seconds(seconds)}{limited}; {energy}; {chip.main_memory.name}: {moved}"
    for writes in cell_writes(result, once):
        if writes.role == Role.FAST_WEIGHT:
            size = format_bytes(tensor_bytes(d * f, dtype))
            yield f"  wear: each cell of {size} in {writes.memory.name} is written once; {_life(writes, seconds)}"


def _life(writes: CellWrites, seconds: float) -> str:
    days = lifetime_days(writes, seconds)
    if days is None:
        return "it does not wear out"
    updates = days * SECONDS_PER_DAY / seconds
    return f"worn out after {updates:.4g} updates, {format_seconds(days * SECONDS_PER_DAY)} of them back to back"
