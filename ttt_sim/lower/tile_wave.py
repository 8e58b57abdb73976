"""The mapper for chips that run tiled kernels in waves over many cores (GPUs and their like)."""

from __future__ import annotations

import numpy as np

from ttt_sim.chip import Chip
from ttt_sim.dtypes import DTYPES
from ttt_sim.lower.kernels import Kernels
from ttt_sim.lower.levels import (
    STREAM_STEP_BYTES,
    Work,
    add_attention,
    add_products,
    far_cycles,
    finish,
    no_work,
    slower,
    stream_share,
    transfer_cycles,
)
from ttt_sim.lower.tiles import TileWork, attention, ceil_float, gemm, product_rate
from ttt_sim.lower.traffic import Traffic
from ttt_sim.lower.work import KernelWork
from ttt_sim.ops import OP_KINDS, SCAN_RULE, OpClass, Trace, op_classes
from ttt_sim.units import ceil_div

#: Bytes of an element of a recurrent state (fp32).
STATE_BYTES = 4
#: Elements of a state that one core works on; the columns of a larger one are shared out. Measured states are as large.
CHAIN_ELEMENTS = 128 * 128


def map_kernels(trace: Trace, chip: Chip, kernels: Kernels, traffic: Traffic) -> KernelWork:
    """Cost of every kernel of ``trace`` on ``chip``.

    Raises:
        UnsupportedError: the chip lacks a unit or a dtype that the trace needs.
        CapacityError: no tile fits a core's scratchpad.
    """
    work = no_work(trace, kernels)
    main_cycles = transfer_cycles(chip, chip.main_memory, traffic.main_read_bytes, write=False)
    main_cycles += transfer_cycles(chip, chip.main_memory, traffic.main_write_bytes, write=True)
    main_cycles = slower(main_cycles, stream_share(trace, chip, kernels))
    if chip.backing is not None:
        far = far_cycles(chip, chip.backing, traffic.far_read_bytes, traffic.far_write_bytes)
        main_cycles = np.maximum(main_cycles, far)

    def choose(m: int, n: int, k: int, batch: int, dtype: str, main_cycles: int) -> TileWork:
        return gemm(chip, m=m, n=n, k=k, batch=batch, dtype=dtype, main_cycles=main_cycles)

    add_products(trace, kernels, work, main_cycles[kernels.of_op], choose)
    add_attention(trace, chip, kernels, work, attention)
    _scans(trace, chip, kernels, work)
    return finish(trace, chip, kernels, traffic, work)


def _scans(trace: Trace, chip: Chip, kernels: Kernels, work: Work) -> None:
    """Recurrent chains: one core per state (or part of it), chunks of tokens strictly in order, chains in waves."""
    rules = chip.library
    for op in np.flatnonzero(op_classes(trace) == int(OpClass.SCAN)):
        kind, tokens, chunk = OP_KINDS[int(trace.kind[op])].name, int(trace.m[op]), int(trace.pairs[op])
        states, elements = int(trace.batch[op] * trace.heads[op]), int(trace.n[op] * trace.k[op])
        rule, rate = SCAN_RULE[kind], product_rate(chip, DTYPES[int(trace.dtype[op])])
        chains = states * (ceil_div(elements, CHAIN_ELEMENTS) if kind == "delta_rule" else 1)
        kernel, waves = kernels.of_op[op], ceil_div(chains, chip.cores)
        busy = ceil_float(int(trace.flops[op]) / rate)
        if kind == "delta_rule" or tokens > 1:
            size = max(chunk, 1)
            if kind == "delta_rule":
                size, each = min(chunk or rules.scan_chunk_tokens, rules.scan_chunk_tokens), rules.scan_chunk_cycles
            else:
                chunks = ceil_div(tokens, size)
                each = rule.stages * _stage_cycles(chip, rate / chip.cores)
                each += ceil_float(int(trace.flops[op]) * chip.cores / (states * chunks * rate))
                held, core, cache = STATE_BYTES * rule.states * elements, chip.core_memory, chip.cache
                if core is not None and cache is not None and held > core.capacity_bytes:  # in and out every chunk
                    each += ceil_float(2 * held * chip.cores * chip.clock_hz / cache.read_bytes_per_s)
                    work["cache_bytes"][kernel] += 2 * held * states * chunks
            steps = waves * ceil_div(tokens, size)
            busy = max(busy, waves * rules.scan_start_cycles + steps * each)
        else:  # one token: the states stream through the cores
            state = 2 * STATE_BYTES * rule.states * states * elements
            steps = ceil_div(state, chip.cores * STREAM_STEP_BYTES)
            work["extra"][kernel] += rules.scan_setup_cycles
            if rules.scan_fetch_bytes_per_cycle:
                busy = max(busy, ceil_float(state / (chip.cores * rules.scan_fetch_bytes_per_cycle)))
        work["matrix"][kernel] += busy
        work["items"][kernel], work["waves"][kernel], work["split"][kernel] = chains, waves, 1
        work["steps"][kernel] += steps


def _stage_cycles(chip: Chip, core_rate: float) -> int:
    """Cycles that one of the dependent products of a chunk waits, beside its FLOPs: what is left of a chunk of the
    delta rule after the work of one core on it, over its stages."""
    rules = chip.library
    flops = 6 * rules.scan_chunk_tokens * CHAIN_ELEMENTS
    waiting = rules.scan_chunk_cycles - ceil_float(flops / core_rate)
    return max(waiting // SCAN_RULE["delta_rule"].stages, chip.unit("matrix").startup_cycles)
