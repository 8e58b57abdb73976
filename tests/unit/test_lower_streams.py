"""Kernels side by side: fusion, the update stream, write-after-read order. Worked out by hand on tiny_gpu.

See test_lower_cycles.py for the rates.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.lower_tools import HandTrace, add_residual, chip
from ttt_sim.lower.kernels import FORWARD_STREAM, UPDATE_STREAM
from ttt_sim.lower.work import READ as READ_LEVEL
from ttt_sim.ops import Phase, Role, Trace
from ttt_sim.program import READ
from ttt_sim.simulation import simulate_trace


def residual_and_norm() -> Trace:
    """z = x + y, then w = norm(z), on 64 rows of 512 (64 KiB each)."""
    t = HandTrace()
    t.weight("x", 65536)
    t.weight("y", 65536)
    t.weight("norm", 1024)
    add_residual(t, "x", "y", "z")
    t.tensor("w", 65536)
    t.op("mlp_norm", m=64, n=512, reads=[("z", 0, 65536), ("norm", 0, 1024)], writes=[("w", 0, 65536)])
    return t.build()


def test_two_row_wise_ops_without_fusion(engine):
    # First kernel: z stays in the cache, so it ends with its last lanes. Read 2048, cache 768 and lanes 512 in
    # thirds: the last third of cache (256) and lanes (171) follows the loads: 2475. Second: read 1024 / 64 = 16, of
    # which the first of three steps is 5; cache (2 * 65536 + 1024) / 256 = 516, a step 172; lanes 4 * 32768 / 64 =
    # 2048; 64 roots / 16 = 4, the last step 2; write 1024, the last step 342.
    result = simulate_trace(chip(mapping__fusion="none"), residual_and_norm(), engine=engine)
    start, finish = result.kernel_span()
    assert finish.tolist() == [2048 + 256 + 171, 2475 + 5 + 172 + 2048 + 2 + 342]
    assert start.tolist() == [0, 2475]


def test_two_row_wise_ops_fused(engine):
    # One kernel: read 2064, cache (196608 + 1024) / 256 = 772, lanes 512 + 2048, roots 4, write 1024 in four steps.
    # Fill: 516 of read, 193 of cache; drain: 1 of the roots, 256 of the write.
    result = simulate_trace(chip(mapping__fusion="vector"), residual_and_norm(), engine=engine)
    assert result.lowered.work.cycles[:, READ_LEVEL:].tolist() == [[2064, 772, 0, 2560, 4, 0, 1024]]
    assert result.cycles == 516 + 193 + 2560 + 1 + 256


# --- the update beside the forward stream -----------------------------------------------------------------------------


def forward_gemm(t: HandTrace) -> None:
    """The GEMM of 3520 cycles (read 512, cache 384, matrix 2112, write 512, one step) on operands of its own."""
    t.weight("a", 16384)
    t.weight("b", 16384)
    t.tensor("c", 32768)
    t.op("down_proj", m=128, n=128, k=64, reads=[("a", 0, 16384), ("b", 0, 16384)], writes=[("c", 0, 32768)], layer=1)


def update_chain(t: HandTrace) -> None:
    """Delta GEMM of 64 x 64 x 64, scale, add into the fast weight W (8192 B each).

    Delta GEMM: 4 tiles of 32 x 32, each 512 + 16 on a core: 528; read 256; cache A twice, B twice, C: 40960 / 256 =
    160; the delta stays in the cache: 944 in turn. Scale and add (one kernel): read W 128, cache 3 * 8192 / 256 = 96,
    lanes 2 * 4096 / 64 = 128, write 128: 480.
    """
    t.weight("values", 8192)
    t.weight("hidden", 8192)
    t.tensor("delta", 8192, Role.GRADIENT)
    t.tensor("scaled", 8192, Role.GRADIENT)
    t.tensor("W", 8192, Role.FAST_WEIGHT, exists=True)
    t.op(
        "delta_gemm", m=64, n=64, k=64, reads=[("values", 0, 8192), ("hidden", 0, 8192)], writes=[("delta", 0, 8192)],
        phase=Phase.BACKWARD, chunk=0,
    )  # fmt: skip
    t.op(
        "delta_scale", m=64, n=64, reads=[("delta", 0, 8192)], writes=[("scaled", 0, 8192)],
        phase=Phase.BACKWARD, chunk=0,
    )  # fmt: skip
    t.op(
        "weight_write", m=64, n=64, reads=[("scaled", 0, 8192), ("W", 0, 8192)], writes=[("W", 1, 8192)],
        phase=Phase.WEIGHT_WRITE, chunk=0,
    )  # fmt: skip


def chain_and_gemm() -> Trace:
    t = HandTrace()
    update_chain(t)
    forward_gemm(t)
    return t.build()


def test_weight_write_chain_alone(engine):
    t = HandTrace()
    update_chain(t)
    result = simulate_trace(chip(), t.build(), engine=engine)
    assert result.lowered.kernels.of_op.tolist() == [0, 1, 1]
    assert result.lowered.work.cycles[:, READ_LEVEL:].tolist() == [
        [256, 160, 528, 0, 0, 0, 0],
        [128, 96, 0, 128, 0, 0, 128],
    ]
    assert result.cycles == 944 + 480


def test_update_runs_beside_the_forward_stream(engine):
    # Forward GEMM F and update U start together; F has priority on every unit.
    # bus    F 0-512, U 512-768; cache F 512-896, U 896-1056; matrix F 896-3008, U 3008-3536; bus F writes 3008-3520.
    # Then scale and add: 3536 + 480.
    result = simulate_trace(chip(), chain_and_gemm(), engine=engine)
    assert result.lowered.kernels.stream.tolist() == [UPDATE_STREAM, UPDATE_STREAM, FORWARD_STREAM]
    start, finish = result.kernel_span()
    assert start.tolist() == [512, 3536, 0]
    assert finish.tolist() == [3536, 4016, 3520]
    assert result.cycles == 4016


def test_forward_work_waits_for_one_piece_of_an_update(engine):
    # Update U, 128 x 128 x 128 in two steps: loads and cache in halves of 512 and 320, matrix of 2080, stores of 256.
    # Forward F, then G, each 128 x 128 x 64 in one: 512, 384, 2112, 512.
    # bus     F 0-512, U 512-1024, U 1024-1536, F writes 3008-3520, G 3520-4032, U writes 5088-5344, G writes 7200-7712
    # cache   F 512-896, U 1024-1344, U 1536-1856, G 4032-4416
    # matrix  F 896-3008, U 3008-5088, G 5088-7200, U 7200-9280; then U writes 9280-9536
    t = HandTrace()
    for name, size in (("values", 32768), ("hidden", 32768), ("a", 16384), ("b", 16384), ("d", 16384), ("e", 16384)):
        t.weight(name, size)
    t.tensor("delta", 32768, Role.GRADIENT)
    t.op(
        "delta_gemm", m=128, n=128, k=128, reads=[("values", 0, 32768), ("hidden", 0, 32768)],
        writes=[("delta", 0, 32768)], phase=Phase.BACKWARD, chunk=0,
    )  # fmt: skip
    for left, right, out in (("a", "b", "c"), ("d", "e", "f")):
        t.tensor(out, 32768)
        t.op(
            "down_proj", m=128, n=128, k=64, reads=[(left, 0, 16384), (right, 0, 16384)], writes=[(out, 0, 32768)],
            layer=1,
        )  # fmt: skip
    result = simulate_trace(chip(), t.build(), engine=engine)
    start, finish = result.kernel_span()
    assert result.lowered.kernels.stream.tolist() == [UPDATE_STREAM, FORWARD_STREAM, FORWARD_STREAM]
    assert start.tolist() == [512, 0, 3520]
    assert finish.tolist() == [9536, 3520, 7712]


@pytest.mark.parametrize("how", ["overlap off", "chip cannot"])
def test_without_overlap_the_update_takes_its_turn(how, engine):
    beside = how != "overlap off"
    result = simulate_trace(
        chip(**({"writability__overlap": "false"} if beside else {})), chain_and_gemm(), engine=engine, overlap=beside
    )
    assert set(result.lowered.kernels.stream.tolist()) == {FORWARD_STREAM}
    assert result.cycles == 944 + 480 + 3520


def apply_then_write() -> Trace:
    """The forward GEMM reads W version 0, then a ready delta is added into W (16384 B each).

    The add, on its own: read the delta 256 (W is in the cache), cache 3 * 16384 / 256 = 192, lanes 8192 / 64 = 128,
    write 256.
    """
    t = HandTrace()
    t.weight("hidden", 16384)
    t.weight("delta", 16384)
    t.tensor("W", 16384, Role.FAST_WEIGHT, exists=True)
    t.tensor("out", 32768)
    t.op(
        "fast_apply", m=128, n=128, k=64, reads=[("hidden", 0, 16384), ("W", 0, 16384)], writes=[("out", 0, 32768)],
        chunk=0,
    )  # fmt: skip
    t.op(
        "weight_write", m=64, n=128, reads=[("delta", 0, 16384), ("W", 0, 16384)], writes=[("W", 1, 16384)],
        phase=Phase.WEIGHT_WRITE, chunk=0,
    )  # fmt: skip
    return t.build()


def test_a_write_in_place_waits_for_its_readers(engine):
    result = simulate_trace(chip(), apply_then_write(), engine=engine)
    start, _ = result.kernel_span()
    assert start.tolist() == [0, 3520]
    assert result.cycles == 3520 + 256 + 192 + 128 + 256


def test_a_shadow_bank_takes_the_new_version_at_once(engine):
    # bus: apply reads 0-512, add reads 512-768; cache: apply 512-896, add 896-1088; lanes 1088-1216; bus: add writes
    # 1216-1472, long before the apply writes (3008-3520).
    result = simulate_trace(chip(writability__shadow_bank="true"), apply_then_write(), engine=engine)
    start, finish = result.kernel_span()
    assert start.tolist() == [0, 512]
    assert finish.tolist() == [3520, 1472]


def test_readers_of_the_new_version_wait_for_the_write_even_with_a_shadow_bank(engine):
    t = HandTrace()
    update_chain(t)
    t.weight("x", 8192)
    t.tensor("y", 8192)
    t.op("fast_apply", m=64, n=64, k=64, reads=[("x", 0, 8192), ("W", 1, 8192)], writes=[("y", 0, 8192)], chunk=1)
    result = simulate_trace(chip(writability__shadow_bank="true"), t.build(), engine=engine)
    start, finish = result.kernel_span()
    assert start[2] == finish[1] == 944 + 480


def test_without_serial_kernels_only_loads_run_ahead(engine):
    # A product c of some 66,000 cycles, then w = c + u. u may be loaded meanwhile; idle lanes and stores may not start.
    # Two channel groups make loads and stores the only major levels of w within 16 tasks.
    t = HandTrace()
    t.weight("a", 262144)
    t.weight("b", 524288)
    t.weight("u", 65536)
    t.tensor("c", 65536)
    t.op(
        "down_proj",
        m=128,
        n=256,
        k=1024,
        reads=[("a", 0, 262144), ("b", 0, 524288)],
        writes=[("c", 0, 65536)],
    )
    add_residual(t, "c", "u", "w")
    static = chip("tiny_turnaround", mapping__serial_kernels="false", overheads__op_launch="0 ns")
    result = simulate_trace(static, t.build(), engine=engine)
    program, start = result.lowered.program, result.timeline.start_cycles
    _, (ended, _) = result.kernel_span()
    second, load = program.op == 1, program.kind == READ
    assert start[second & load].min() < ended
    assert start[second & ~load].min() >= ended


# --- which ops join ---------------------------------------------------------------------------------------------------


def kernels_of(fusion: str, kinds: list[tuple[str, Phase, int]]) -> list[int]:
    """Kernel of each of a row of ops that read weights only; (kind, phase, chunk)."""
    t = HandTrace()
    for i, (kind, phase, chunk) in enumerate(kinds):
        t.weight(f"in{i}", 4096)
        t.tensor(f"out{i}", 4096)
        heads, pairs = (1, 32 * 33 // 2) if kind == "attention" else (0, 0)
        t.op(
            kind, m=32, n=32, k=32, reads=[(f"in{i}", 0, 4096)], writes=[(f"out{i}", 0, 2048)], phase=phase,
            chunk=chunk, heads=heads, kv_heads=heads, pairs=pairs,
        )  # fmt: skip
    return simulate_trace(chip(mapping__fusion=fusion), t.build()).lowered.kernels.of_op.tolist()


LAYER = [
    "attn_norm", "q_proj", "k_proj", "v_proj", "qk_norm", "rope", "kv_append", "attention", "o_proj", "attn_residual",
    "mlp_norm", "gate_proj", "up_proj", "silu_mul", "down_proj", "mlp_residual", "attn_norm",
]  # fmt: skip


@pytest.mark.parametrize(
    ("fusion", "groups"),
    [
        ("none", [[kind] for kind in LAYER]),
        (
            "vector",
            [["attn_norm"], ["q_proj", "k_proj", "v_proj"], ["qk_norm", "rope", "kv_append"], ["attention"], ["o_proj"],
             ["attn_residual", "mlp_norm"], ["gate_proj", "up_proj"], ["silu_mul"], ["down_proj"],
             ["mlp_residual", "attn_norm"]],
        ),
        (
            "epilogue",  # a GEMM stores its output tile once; norms need whole rows and so stand alone
            [["attn_norm"], ["q_proj", "k_proj", "v_proj"], ["qk_norm", "rope", "kv_append"], ["attention"],
             ["o_proj", "attn_residual"], ["mlp_norm"], ["gate_proj", "up_proj", "silu_mul"],
             ["down_proj", "mlp_residual"], ["attn_norm"]],
        ),
        ("layer", [LAYER[:-1], LAYER[-1:]]),
    ],
)  # fmt: skip
def test_fusion_levels(fusion, groups):
    expected = [i for i, group in enumerate(groups) for _ in group]
    assert [kind for group in groups for kind in group] == LAYER
    assert kernels_of(fusion, [(kind, Phase.FORWARD, -1) for kind in LAYER]) == expected


def test_ops_of_different_chunks_and_phases_stay_apart():
    scale, write = ("delta_scale", Phase.BACKWARD), ("weight_write", Phase.WEIGHT_WRITE)
    assert kernels_of("vector", [(*scale, 0), (*write, 0)]) == [0, 0]
    assert kernels_of("vector", [(*scale, 0), (*write, 1)]) == [0, 1]
    gate, again = ("gate_proj", Phase.FORWARD, -1), ("up_proj", Phase.RECOMPUTE, -1)
    assert kernels_of("vector", [gate, again]) == [0, 1]


def test_ops_of_different_calls_stay_apart():
    t = HandTrace()
    for name in "xyu":
        t.weight(name, 65536)
    for step, (a, b, out) in enumerate((("x", "y", "z"), ("y", "u", "v"))):
        t.tensor(out, 65536)
        kind = ("mlp_residual", "attn_norm")[step]
        t.op(kind, m=64, n=512, reads=[(a, 0, 65536), (b, 0, 65536)], writes=[(out, 0, 65536)], step=step)
    assert simulate_trace(chip(), t.build()).lowered.kernels.of_op.tolist() == [0, 1]


def test_siblings_are_one_gemm(engine):
    # q, k, v of 32 rows: columns side by side are one product of width 3 * 32, cut into 3 tiles of 32 x 32 rather
    # than thrice 1.
    t = HandTrace()
    t.weight("x", 2048)
    for name in "qkv":
        t.weight(f"W{name}", 2048)
        t.tensor(name, 2048)
        t.op(f"{name}_proj", m=32, n=32, k=32, reads=[("x", 0, 2048), (f"W{name}", 0, 2048)], writes=[(name, 0, 2048)])
    result = simulate_trace(chip(), t.build(), engine=engine)
    assert result.lowered.kernels.n == 1
    # x is read once: 4 * 2048 B, not 6 * 2048
    assert result.lowered.work.main_read_bytes.tolist() == [4 * 2048]
    assert result.lowered.work.items.tolist() == [12]  # 2 x 6 tiles of 16 x 16 keep 4 cores busy: 3 * 132 < 528


def test_streams_do_not_change_what_is_computed():
    beside, in_turn = (simulate_trace(chip(), chain_and_gemm(), overlap=overlap) for overlap in (True, False))
    assert np.array_equal(beside.lowered.work.flops, in_turn.lowered.work.flops)
    assert beside.summary()["main_read_bytes"] == in_turn.summary()["main_read_bytes"]
