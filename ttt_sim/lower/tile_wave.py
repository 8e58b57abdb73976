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
from ttt_sim.ops import KIND, OpClass, Trace, op_classes
from ttt_sim.units import ceil_div

#: Bytes of an element of a recurrent state (fp32).
STATE_BYTES = 4


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
    """Recurrent chains: one core per sequence and state, chunks of tokens strictly in order, chains in waves."""
    rules = chip.library
    for op in np.flatnonzero(op_classes(trace) == int(OpClass.SCAN)):
        chains, tokens = int(trace.batch[op] * trace.heads[op]), int(trace.m[op])
        kernel, waves = kernels.of_op[op], ceil_div(chains, chip.cores)
        rate = product_rate(chip, DTYPES[int(trace.dtype[op])])
        busy = ceil_float(int(trace.flops[op]) / rate)
        steps = waves * ceil_div(tokens, rules.scan_chunk_tokens)
        if trace.kind[op] == KIND["delta_rule"]:
            chain = rules.scan_start_cycles + rules.scan_chunk_cycles * ceil_div(tokens, rules.scan_chunk_tokens)
            busy = max(busy, waves * chain)
        else:  # one token: the states stream through the cores
            state = 2 * STATE_BYTES * chains * int(trace.n[op] * trace.k[op])
            steps = ceil_div(state, chip.cores * STREAM_STEP_BYTES)
            work["extra"][kernel] += rules.scan_setup_cycles
            if rules.scan_fetch_bytes_per_cycle:
                busy = max(busy, ceil_float(state / (chip.cores * rules.scan_fetch_bytes_per_cycle)))
        work["matrix"][kernel] += busy
        work["items"][kernel], work["waves"][kernel], work["split"][kernel] = chains, waves, 1
        work["steps"][kernel] += steps
