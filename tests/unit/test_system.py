"""Several chips: what each runs and holds, what transfers take, the pace of a pipeline, the least system."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from ttt_sim.chip import Chip, Link
from ttt_sim.config import load_chip
from ttt_sim.errors import ConfigError, UnsupportedError, WorkloadError
from ttt_sim.grid import make_point
from ttt_sim.lower import lower
from ttt_sim.lower.kernels import STREAMS
from ttt_sim.lower.levels import link_to, stage_link, transfer_seconds
from ttt_sim.lower.work import LINK
from ttt_sim.model import Model, Parallel, Scenario, TTTSettings, shard, stage_starts
from ttt_sim.model_config import load_model, load_ttt
from ttt_sim.ops import BETWEEN_CHIPS, KIND, OP_KINDS, OpClass, Trace, op_classes
from ttt_sim.simulation import UNMEASURED_KINDS, rows_at_once, simulate_point, simulate_trace
from ttt_sim.system import _room, arrange, holdings, least_system, microbatches_of, period_cycles, pipeline_cycles
from ttt_sim.trace_check import verify
from ttt_sim.workload import CONTEXT_METHODS, METHODS, build_trace, closed_forms

TOY, TTT = load_model("toy"), load_ttt("toy")
CHUNK = TTT.chunk_tokens
D, F, L = TOY.d_model, TOY.d_ff, TOY.n_layers
LINK_1 = Link(name="wire", topology="switch", bytes_per_s=1e9, latency_s=1e-6)


def linked(**changes: object) -> Chip:
    """tiny_gpu with a link to others."""
    return replace(load_chip("tiny_gpu"), links=(replace(LINK_1, **changes),))  # type: ignore[arg-type]


def trace_of(
    method: str, parallel: Parallel, *, tokens: int = 4 * CHUNK, ttt: TTTSettings = TTT, decode: bool = False
) -> Trace:
    settings = METHODS[method].settings(2 * CHUNK, None, ttt)
    if decode:
        scenario = Scenario.decode((tokens,), batch=2, parallel=parallel)
    else:
        scenario = Scenario.prefill(tokens, batch=2, call_tokens=tokens, parallel=parallel)
    return build_trace(TOY, settings, scenario)


def of_kind(trace: Trace, *kinds: str) -> np.ndarray:
    return np.flatnonzero(np.isin(trace.kind, [KIND[kind] for kind in kinds]))


def read_bytes(trace: Trace, op: int) -> int:
    return int(trace.read_bytes[trace.read_ptr[op] : trace.read_ptr[op + 1]].sum())


# --- what one chip runs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("decode", [False, True])
def test_one_chip_has_no_transfers(method: str, decode: bool) -> None:
    trace = trace_of(method, Parallel(), decode=decode)
    assert not of_kind(trace, *BETWEEN_CHIPS).size


@pytest.mark.parametrize("method", ["kv", "ttt", "ttt_window"])
def test_two_chips_share_every_product_but_the_targets(method: str) -> None:
    whole, part = trace_of(method, Parallel()), trace_of(method, Parallel(tp=2))
    for kind in (
        "q_proj",
        "k_proj",
        "attention",
        "o_proj",
        "gate_proj",
        "down_proj",
        "fast_apply",
        "delta_gemm",
        "lm_head",
    ):
        assert 2 * part.flops[of_kind(part, kind)].sum() == whole.flops[of_kind(whole, kind)].sum(), kind
    for kind in ("attn_norm", "target_conv", "target_proj"):
        assert part.flops[of_kind(part, kind)].sum() == whole.flops[of_kind(whole, kind)].sum(), kind


def test_sums_of_a_tensor_parallel_group() -> None:
    trace = trace_of("kv", Parallel(tp=2), tokens=16)
    sums, gathers = of_kind(trace, "allreduce"), of_kind(trace, "allgather")
    # the embedding, and attention and MLP of each layer: 2 sequences x 16 rows x d in bf16
    assert [read_bytes(trace, op) for op in sums] == [2 * 16 * D * 2] * (1 + 2 * L)
    assert [read_bytes(trace, op) for op in gathers] == [2 * TOY.vocab_size // 2 * 2]
    assert set(trace.heads[sums]) == {2}


def test_a_clipped_delta_needs_the_norm_of_all_parts() -> None:
    trace = trace_of("ttt", Parallel(tp=2), ttt=replace(TTT, clip=1.0))
    sums = [op for op in of_kind(trace, "allreduce") if read_bytes(trace, op) == 2 * 4]  # a number per sequence
    assert len(sums) == of_kind(trace, "delta_norm").size > 0
    for op, norm in zip(sums, of_kind(trace, "delta_norm"), strict=True):
        assert op == norm + 1


def test_fast_weights_are_cut_along_the_hidden_columns() -> None:
    parts = {tp: trace_of("ttt", Parallel(tp=tp)) for tp in (1, 2)}
    sizes = {tp: {t.nbytes for t in trace.tensors if t.name.endswith("fast_weight")} for tp, trace in parts.items()}
    assert sizes == {1: {2 * D * F * 2}, 2: {2 * D * F}}


@pytest.mark.parametrize(("tp", "what"), [(3, "4 query heads"), (8, "4 query heads")])
def test_chips_that_cannot_share_a_model(tp: int, what: str) -> None:
    model = replace(TOY, n_heads=4, n_kv_heads=2, d_ff=512)
    with pytest.raises(WorkloadError, match=f"tp: {tp} chips cannot share {what}"):
        shard(model, tp)


def test_kv_heads_are_copied_where_there_are_fewer_than_chips() -> None:
    model = replace(TOY, n_heads=8, n_kv_heads=2, d_ff=512)
    assert (shard(model, 4).n_heads, shard(model, 4).n_kv_heads) == (2, 1)


# --- pipelines --------------------------------------------------------------------------------------------------------


def flat_model(layers: int, *, vocab_layers: int) -> Model:
    """Layers of equal size, and tables of ``vocab_layers`` times that size."""
    model = replace(TOY, n_layers=layers, tied_embeddings=False)
    return replace(model, vocab_size=vocab_layers * model.block_parameters // layers // model.d_model)


def test_stages_hold_about_as_many_parameters() -> None:
    # parts: 3 1 1 1 1 1 1 3; two stages of 6, four of 3
    assert stage_starts(flat_model(6, vocab_layers=3), 2) == (3,)
    assert stage_starts(flat_model(6, vocab_layers=3), 4) == (0, 3, 6)
    assert stage_starts(flat_model(6, vocab_layers=3), 1) == ()
    assert len(stage_starts(flat_model(6, vocab_layers=3), 8)) == 7
    with pytest.raises(WorkloadError, match="pp: 9 stages are more than the 8 parts"):
        stage_starts(flat_model(6, vocab_layers=3), 9)


def test_activations_move_between_stages() -> None:
    trace = trace_of("kv", Parallel(pp=2), tokens=16)
    sends = of_kind(trace, "stage_send")
    assert [read_bytes(trace, op) for op in sends] == [2 * 16 * D * 2]
    starts = stage_starts(TOY, 2)
    assert trace.layer[sends] == starts[0] - 1


@pytest.mark.parametrize("method", ["kv", "ttt_window"])
def test_stages_add_up_to_the_model(method: str) -> None:
    trace = trace_of(method, Parallel(pp=2), decode=True)
    held = holdings(trace, L, pipelined=True)
    starts = stage_starts(TOY, 2)
    weights = sum(t.nbytes for t in trace.tensors if t.name.startswith("layers.0.") and "kv" not in t.name)
    assert weights > 0
    table = TOY.vocab_size * D * 2
    whole = sum(t.nbytes for t in trace.tensors if t.role.name in ("WEIGHT", "KV", "FAST_WEIGHT", "CARRY"))
    shared = int(held.everywhere.sum())
    copies = table if TOY.tied_embeddings else 0  # the head of a tied model has a copy of the table
    assert sum(held.by_stage(starts)) == whole + copies + shared  # what all stages hold is there twice
    assert sum(held.by_stage(starts, 2)) - sum(held.by_stage(starts)) == sum(
        t.nbytes * (1 if t.name.startswith("layers.") else 2)
        for t in trace.tensors
        if t.role.name in ("KV", "FAST_WEIGHT", "CARRY")
    )


def test_calls_pass_the_stages_in_order() -> None:
    # One microbatch: 0-2, 2-5; second call 2-3, 5-9. Two: 0-2, 2-5; 2-4, 5-8; 4-5, 8-12; 5-6, 12-16.
    stages = np.array([[2, 3], [1, 4]], dtype=np.int64)
    assert pipeline_cycles(stages, 1) == 9
    assert pipeline_cycles(stages, 2) == 16


def test_a_step_takes_its_way_or_the_slowest_stage() -> None:
    stages = np.array([[2, 3], [5, 1]], dtype=np.int64)
    assert period_cycles(np.array([6, 6], dtype=np.int64), stages, 2).tolist() == [6, 10]


def test_stages_hold_what_the_trace_sends_between() -> None:
    """Copied KV heads make layers larger beside the tables, which moves the cuts."""
    model = replace(TOY, n_heads=8, n_kv_heads=1, n_layers=6, vocab_size=2048)
    parallel = Parallel(tp=8, pp=3)
    found = simulate_point(make_point(linked(), model, "kv", phase="decode", context=256, batch=3, parallel=parallel))
    assert found.result is not None
    trace = found.result.trace
    cuts = sorted(int(layer) + 1 for layer in set(trace.layer[of_kind(trace, "stage_send")]))
    held = holdings(trace, model.n_layers, pipelined=True).by_stage(cuts, 3)
    assert found.record["peak_memory_bytes"] == max(held) + found.result.peak_temporary_bytes()


# --- context parallelism ----------------------------------------------------------------------------------------------


def test_the_last_chip_sees_all_tokens() -> None:
    ranks, m = 4, CHUNK
    trace = trace_of("kv", Parallel(cp=ranks))
    cores = of_kind(trace, "attention")
    pairs = trace.pairs[cores].reshape(L, ranks)
    assert pairs.tolist() == [[m * (m + 1) // 2] + [m * m] * (ranks - 1)] * L
    kv = 2 * m * 2 * TOY.n_kv_heads * TOY.head_dim * 2
    assert [read_bytes(trace, op) for op in of_kind(trace, "kv_ring")] == [kv] * (ranks - 1) * L


def test_a_window_needs_the_tokens_before_it() -> None:
    ranks, m, window = 4, CHUNK, 2 * CHUNK
    trace = trace_of("kv_window", Parallel(cp=ranks))
    cores = of_kind(trace, "attention")
    assert set(trace.n[cores]) == {window - 1 + m}
    assert set(trace.pairs[cores]) == {m * window}
    row = 2 * 2 * TOY.n_kv_heads * TOY.head_dim * 2
    # the whole part of the chip before, and all but one token of the one before that
    assert [read_bytes(trace, op) for op in of_kind(trace, "kv_ring")] == [m * row, (m - 1) * row] * L


@pytest.mark.parametrize(
    ("window", "steps"),  # tokens of each step to the last of 4 chips with 16 tokens each
    [
        (1, []),
        (2, [1]),
        (CHUNK, [CHUNK - 1]),
        (CHUNK + 1, [CHUNK]),
        (CHUNK + 2, [CHUNK, 1]),
        (3 * CHUNK, [CHUNK, CHUNK, CHUNK - 1]),
        (3 * CHUNK + 1, [CHUNK] * 3),
        (4 * CHUNK, [CHUNK] * 3),
        (100 * CHUNK, [CHUNK] * 3),
        (None, [CHUNK] * 3),
    ],
)
def test_a_window_reaches_over_as_many_chips_as_hold_it(window: int | None, steps: list[int]) -> None:
    ranks, m, model = 4, CHUNK, replace(TOY, vocab_size=64 * CHUNK)
    settings = METHODS["kv" if window is None else "kv_window"].settings(window, None, TTT)
    trace = build_trace(model, settings, Scenario.prefill(ranks * m, batch=2, parallel=Parallel(cp=ranks)))
    verify(trace)
    ring, cores = of_kind(trace, "kv_ring"), of_kind(trace, "attention")
    row = int(closed_forms.kv_bytes_per_token(model)) // L
    assert [read_bytes(trace, op) for op in ring] == [2 * tokens * row for tokens in steps] * L
    assert (len(steps), sum(steps)) == closed_forms.ring_transfers(m, ranks, window)
    seen = closed_forms.visible_pairs(m, (ranks - 1) * m, window)
    assert trace.pairs[cores].sum() == L * seen
    assert trace.flops[cores].sum() == 2 * closed_forms.attention_flops(model, m, (ranks - 1) * m, window)
    # keys and values of a core: what the steps brought, and the chip's own
    keys = sum(read_bytes(trace, op) for op in cores if trace.layer[op] == 0)
    queries = 2 * m * model.n_heads * model.head_dim * 2
    carried = 0 if window is not None else len(steps)
    assert keys == 2 * (sum(steps) + m) * row + queries * (1 + 2 * carried)


def test_deltas_of_other_chips_arrive_before_a_weight_is_applied(engine: str) -> None:
    layers = len(TTT.layers_of(TOY))
    trace = trace_of("ttt", Parallel(cp=2))  # two chunks on each chip
    scans = of_kind(trace, "delta_scan")
    assert scans.size == layers
    assert [read_bytes(trace, op) for op in scans] == [2 * D * F * 2] * layers
    assert of_kind(trace, "delta_sum").size == 2 * layers
    assert of_kind(trace, "weight_write").size == (1 + 2) * layers  # what was scanned, and the deltas of two chunks
    result = simulate_trace(linked(), trace, engine=engine)
    start, finish = result.kernel_span()
    of_op = result.lowered.kernels.of_op
    for layer in TTT.layers_of(TOY):
        scan = scans[trace.layer[scans] == layer][0]
        applies = of_kind(trace, "fast_apply")
        first = applies[trace.layer[applies] == layer][0]
        assert start[of_op[first]] >= finish[of_op[scan]]


def test_ring_steps_run_beside_attention() -> None:
    trace = trace_of("kv", Parallel(cp=4), tokens=4 * 256)
    lowered = lower(trace, linked())
    streams = {STREAMS[s] for s in lowered.kernels.stream[lowered.kernels.of_op[of_kind(trace, "kv_ring")]]}
    assert streams == {"transfer"}
    beside = simulate_trace(linked(), trace).cycles
    longest = int(lowered.work.cycles[:, LINK].sum())
    alone = simulate_trace(linked(bytes_per_s=1e15, latency_s=0.0), trace).cycles
    assert beside < alone + longest  # some of the ring is hidden


def test_prompts_are_whole_chunks() -> None:
    with pytest.raises(UnsupportedError, match=f"multiples of {4 * CHUNK} tokens"):
        trace_of("ttt", Parallel(cp=4), tokens=4 * CHUNK + 4)


def test_keys_are_shared_while_decoding() -> None:
    whole, part = (trace_of("kv", Parallel(cp=cp), decode=True) for cp in (1, 4))
    cores = of_kind(part, "attention")
    assert set(part.n[cores]) == {-(-(4 * CHUNK + 1) // 4)}
    joins = of_kind(part, "allreduce")
    assert [read_bytes(part, op) for op in joins] == [2 * TOY.n_heads * TOY.head_dim * 2] * L
    same = of_kind(whole, "down_proj")
    assert (part.flops[of_kind(part, "down_proj")] == whole.flops[same]).all()


def test_what_only_ttt_runs_on_several_chips_is_unmeasured() -> None:
    kinds: dict[str, set[str]] = {}
    for method in ("kv", "ttt"):
        traces = [trace_of(method, parallel) for parallel in (Parallel(), Parallel(tp=2, cp=2))]
        kinds[method] = {OP_KINDS[kind].name for trace in traces for kind in set(trace.kind.tolist())}
    assert kinds["ttt"] - kinds["kv"] <= set(UNMEASURED_KINDS)
    assert not kinds["kv"] & set(UNMEASURED_KINDS)


@pytest.mark.parametrize(
    ("method", "context", "window", "cp", "keys"),
    [("kv", 4, 64, 4, 4), ("kv", 3, 64, 4, 3), ("kv_window", 64, 3, 4, 3), ("ttt_window", 64, 4, 4, 4)],
)
def test_every_chip_holds_a_key_while_decoding(method: str, context: int, window: int, cp: int, keys: int) -> None:
    """Decode begins with the keys of the context, of which a window keeps its last."""
    point = make_point(
        linked(), TOY, method, phase="decode", context=context, window=window, ttt=TTT, parallel=Parallel(cp=cp)
    )  # fmt: skip
    record = simulate_point(point).record
    assert record["fits"] == (keys >= cp)
    expected = "" if keys >= cp else f"{cp} chips cannot share {keys} keys of a sequence: each must hold at least one"
    assert record["missing"] == expected


# --- transfers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "topology", "count", "ranks", "seconds"),
    [
        ("allreduce", "switch", 1, 4, 6e-6 + 2 * 3 / 4 * 1e6 / 1e9),
        ("allreduce", "torus", 6, 4, 6e-6 + 2 * 3 / 4 * 1e6 / 0.5e9),  # three of six links
        ("allreduce", "torus", 2, 4, 6e-6 + 2 * 3 / 4 * 1e6 / 1e9),
        ("allgather", "switch", 1, 4, 3e-6 + 3 * 1e6 / 1e9),
        ("kv_ring", "switch", 4, 4, 1e-6 + 1e6 / 1e9),
        ("kv_ring", "point_to_point", 4, 4, 1e-6 + 1e6 / 0.25e9),
        ("stage_send", "ring", 2, 2, 1e-6 + 1e6 / 0.5e9),
        ("delta_scan", "switch", 1, 4, 3e-6 + 1e6 / 1e9),
    ],
)
def test_times_of_transfers(kind: str, topology: str, count: int, ranks: int, seconds: float) -> None:
    link = replace(LINK_1, topology=topology, count=count)  # type: ignore[arg-type]
    assert transfer_seconds(link, kind, 1_000_000, ranks) == pytest.approx(seconds, rel=1e-12)


def test_every_transfer_between_chips_has_a_time() -> None:
    transfers = [kind.name for kind in OP_KINDS if kind.op_class == OpClass.COLLECTIVE]
    assert all(transfer_seconds(LINK_1, kind, 1000, 2) > 0 for kind in transfers)
    assert set(transfers) | {"delta_sum", "state_join", "state_read"} == BETWEEN_CHIPS


def test_the_nearest_link_that_reaches_is_used() -> None:
    near, far = replace(LINK_1, name="near", peers=7), replace(LINK_1, name="far")
    chip = replace(load_chip("tiny_gpu"), links=(near, far))
    assert [link_to(chip, n).name for n in (1, 7, 8)] == ["near", "near", "far"]
    with pytest.raises(UnsupportedError, match="needs links to 8 other chips and the file has links to 7 others at"):
        link_to(replace(chip, links=(near,)), 8)


@pytest.mark.parametrize(
    ("stage_chips", "links"),  # from each stage to the next, on nodes of eight
    [
        (1, ["near"] * 7 + ["far"] + ["near"] * 7 + ["far"]),
        (2, ["near", "near", "near", "far", "near"]),
        (3, ["near", "far", "near", "far"]),  # two stages in a node, two chips of it idle
        (4, ["near", "far", "near", "far"]),
        (5, ["far", "far"]),
        (8, ["far", "far"]),
        (16, ["far", "far"]),
    ],
)
def test_stages_in_a_node_use_its_link(stage_chips: int, links: list[str]) -> None:
    near, far = replace(LINK_1, name="near", peers=7), replace(LINK_1, name="far")
    chip = replace(load_chip("tiny_gpu"), links=(near, far))
    assert [stage_link(chip, stage_chips, i).name for i in range(len(links))] == links
    alone = replace(chip, links=(near,))
    assert [stage_link(alone, stage_chips, i).name for i in range(links.index("far"))] == links[: links.index("far")]
    with pytest.raises(UnsupportedError, match="the file has links to 7 others at most"):
        stage_link(alone, stage_chips, links.index("far"))


def test_a_pipeline_over_nodes_is_held_up_where_it_leaves_one(engine: str) -> None:
    """Four stages of two chips on nodes of four: the slow link carries one of three transfers of every step."""
    near = replace(LINK_1, name="near", peers=3)
    far = replace(LINK_1, name="far", latency_s=1e-3)
    chip = replace(load_chip("tiny_gpu"), links=(near, far))
    trace = trace_of("kv", Parallel(tp=2, pp=4), tokens=16)
    sends = of_kind(trace, "stage_send")
    found = simulate_trace(chip, trace, engine=engine)
    sent = found.lowered.work.link_bytes[found.lowered.kernels.of_op[sends]]
    nbytes = 2 * 16 * D * 2
    assert sent.tolist() == [[nbytes, 0], [0, nbytes], [nbytes, 0]]
    alike = simulate_trace(replace(chip, links=(near, replace(far, latency_s=1e-6))), trace, engine=engine)
    assert found.cycles - alike.cycles == chip.cycles(1e-3) - chip.cycles(1e-6)


def sent_by(method: str, parallel: Parallel, *, decode: bool, tokens: int, batch: int, window: int) -> int:
    """Bytes that a chip sends in one call, all stages together; TOY has eight query and four KV heads."""
    tp, pp, cp, rows = parallel.tp, parallel.pp, parallel.cp, batch * (1 if decode else -(-tokens // parallel.cp))

    def ring(ranks: int, nbytes: int) -> int:  # 2 (n - 1) / n of a sum
        return -(-2 * (ranks - 1) * nbytes // ranks)

    sent = (2 * L + 1) * ring(tp, rows * D * 2) + (tp - 1) * batch * -(-TOY.vocab_size // tp) * 2
    sent += (pp - 1) * rows * D * 2
    if decode:
        return sent + (L * ring(cp, batch * (8 // tp) * TOY.head_dim * 2) if cp > 1 else 0)
    part = -(-tokens // cp)
    seen = (cp - 1) * part if not method.endswith("window") else min(window - 1, (cp - 1) * part)
    sent += L * batch * seen * 2 * max(4 // tp, 1) * TOY.head_dim * 2
    if method.startswith("ttt") and cp > 1:  # a delta of every TTT layer
        sent += len(TTT.layers_of(TOY)) * batch * D * F // tp * 2
    return sent


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("method", ["kv", "kv_window", "ttt", "ttt_window"])
def test_bytes_on_links_are_those_of_the_closed_form(method: str, decode: bool) -> None:
    model, tokens, batch, window = replace(TOY, n_heads=8, n_kv_heads=4), 8 * CHUNK, 2, CHUNK + 3
    for tp, pp, cp in itertools.product((1, 2, 8), (1, 3), (1, 4)):
        parallel = Parallel(tp=tp, pp=pp, cp=cp)
        if decode:
            scenario = Scenario.decode((tokens,), batch=batch, parallel=parallel)
        else:
            scenario = Scenario.prefill(tokens, batch=batch, call_tokens=tokens, parallel=parallel)
        trace = build_trace(model, METHODS[method].settings(window, None, TTT), scenario)
        expected = sent_by(method, parallel, decode=decode, tokens=tokens, batch=batch, window=window)
        assert int(lower(trace, linked()).work.link_bytes.sum()) == expected, parallel


@pytest.mark.parametrize("method", ["kv", "ttt", "ttt_window"])
@pytest.mark.parametrize("parallel", [Parallel(tp=2, pp=3), Parallel(pp=3, cp=2), Parallel(tp=2, pp=2, cp=2)])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_faster_links_are_never_slower_and_energies_add_up(method: str, parallel: Parallel, phase: str) -> None:
    records = []
    for bytes_per_s in (1e8, 1e9, 1e10, 1e13):
        point = make_point(
            linked(bytes_per_s=bytes_per_s, energy_j_per_byte=1e-9), TOY, method, context=4 * CHUNK, batch=4, ttt=TTT,
            window=2 * CHUNK, parallel=parallel, phase=phase,  # type: ignore[arg-type]
        )  # fmt: skip
        records.append(simulate_point(point).record)
    seconds = [float(str(record["seconds"])) for record in records]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > seconds[-1]
    for record in records:
        parts = [float(str(v)) for name, v in record.items() if name.startswith("energy_") and name.endswith("_j")]
        total = float(str(record["energy_j"]))
        assert sum(parts) - total + float(str(record["idle_energy_j"])) == pytest.approx(total, rel=1e-12)
        assert record["energy_wire_j"] == records[0]["energy_wire_j"] > 0  # type: ignore[operator]


@pytest.mark.parametrize("method", ["kv", "ttt", "ttt_window"])
@pytest.mark.parametrize("parallel", [Parallel(tp=2), Parallel(pp=2), Parallel(cp=2), Parallel(tp=2, pp=2, cp=2)])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_engines_agree_on_systems(method: str, parallel: Parallel, phase: str) -> None:
    point = make_point(
        linked(), TOY, method, phase=phase, context=4 * CHUNK, batch=2, ttt=TTT, window=2 * CHUNK, parallel=parallel  # type: ignore[arg-type]
    )  # fmt: skip
    record = simulate_point(replace(point, compare_engines=True)).record
    assert record["fits"], record
    assert record["chips"] == parallel.chips


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("parallel", [Parallel(cp=2), Parallel(cp=4), Parallel(tp=2, pp=2, cp=2)])
@pytest.mark.parametrize("method", CONTEXT_METHODS)
def test_chips_keep_all_that_they_move(method: str, parallel: Parallel, decode: bool) -> None:
    """No op moves more of a tensor than it has: scales of received keys and a whole window included."""
    tokens, model = 8 * CHUNK, replace(TOY, vocab_size=64 * CHUNK)
    scenario = Scenario.decode((tokens,), parallel=parallel) if decode else Scenario.prefill(tokens, parallel=parallel)
    verify(build_trace(model, METHODS[method].settings(2 * CHUNK, None, TTT), scenario))


@pytest.mark.parametrize(("tokens", "cp", "enough"), [(128, 500, 64), (128, 128, 64), (9, 6, 5), (3, 3, 2)])
def test_a_prompt_is_not_longer_on_more_chips(tokens: int, cp: int, enough: int) -> None:
    """A chip that would have no token of the prompt must not be given one."""
    record = record_of(phase="prefill", context=tokens, cp=cp)
    assert not record["fits"]
    assert f"{cp} chips cannot share a prompt of {tokens} tokens" in str(record["missing"])
    assert str(record["missing"]).endswith(f"enough for {enough}")
    assert record_of(phase="prefill", context=tokens, cp=enough)["fits"]


def test_a_window_is_on_the_last_chip_of_a_prompt() -> None:
    window = 2 * CHUNK
    row = 2 * TOY.n_kv_heads * TOY.head_dim * 2
    for decode, tokens in ((False, window), (True, window // 4)):
        trace = trace_of("kv_window", Parallel(cp=4), tokens=16 * CHUNK, decode=decode)
        assert {t.nbytes for t in trace.tensors if t.role.name == "KV"} == {2 * tokens * row}


def test_parts_of_a_context_lie_beyond_the_group_that_shares_a_layer() -> None:
    """Two chips of each tensor-parallel group are near each other, the two parts of the context are not."""
    near, far = replace(LINK_1, name="near", peers=1), replace(LINK_1, name="far")
    chip = replace(load_chip("tiny_gpu"), links=(near, far))
    trace = trace_of("kv", Parallel(tp=2, cp=2))
    lowered = lower(trace, chip)
    for kind, link in (("kv_ring", 1), ("allreduce", 0)):
        kernels = lowered.kernels.of_op[of_kind(trace, kind)]
        assert (lowered.work.link_bytes[kernels, link] > 0).all(), kind
        assert not lowered.work.link_bytes[kernels, 1 - link].any(), kind


# --- records and choice of a system -----------------------------------------------------------------------------------


def record_of(**options: object) -> dict[str, object]:
    usual: dict[str, object] = {"phase": "decode", "context": 256, "batch": 4, "ttt": TTT, "window": 64}
    chip = replace(linked(), price=replace(load_chip("tiny_gpu").price, per_hour_usd=3600.0, as_of="2026"))
    return dict(simulate_point(make_point(chip, TOY, "kv", **usual | options)).record)  # type: ignore[arg-type]


def test_rent_and_idle_power_of_all_chips() -> None:
    record = record_of(tp=2)
    seconds = float(str(record["seconds"]))
    assert record["cost_usd_per_million_tokens"] == pytest.approx(2 * seconds / 4 * 1e6)
    assert record["idle_energy_j"] == pytest.approx(2 * load_chip("tiny_gpu").power.idle_w * seconds)


def test_operations_of_all_chips() -> None:
    alone, shared = record_of(), record_of(tp=2)
    assert shared["flops"] == alone["flops"]
    piped = record_of(pp=2)
    assert (piped["microbatches"], piped["flops"]) == (2, alone["flops"])


@pytest.mark.parametrize(("batch", "pp"), [(4, 2), (5, 2), (5, 4), (1, 3)])
def test_places_to_spare_are_no_updates(batch: int, pp: int) -> None:
    """Every sequence updates a layer once per chunk of its tokens, whatever the microbatches."""
    for phase in ("prefill", "decode"):
        point = make_point(
            linked(), TOY, "ttt", phase=phase, context=4 * CHUNK, batch=batch, ttt=TTT, parallel=Parallel(pp=pp)
        )  # fmt: skip
        record = simulate_point(point).record
        tokens_per_s = float(str(record["tokens_per_s"]))
        assert record["updates_per_s"] == pytest.approx(tokens_per_s / CHUNK, rel=1e-9), phase


def test_least_system_of_a_model() -> None:
    chip = linked()
    kv = METHODS["kv"].settings(None, None, None)
    weights = 2 * TOY.parameters

    def least(capacity: int) -> Parallel | None:
        small = replace(chip, memories=(replace(chip.main_memory, capacity_bytes=capacity), *chip.memories[1:]))
        return least_system(small, TOY, [kv])

    assert least(2 * weights) == Parallel()
    found = least(int(0.75 * weights))
    assert found is not None
    assert found.chips == 2
    assert least(weights // 1000) is None
    alone = replace(chip, links=(), memories=(replace(chip.main_memory, capacity_bytes=int(0.75 * weights)),))
    assert least_system(alone, TOY, [kv]) is None
    behind = replace(chip.main_memory, name="behind", scope="backing")
    assert least_system(replace(alone, memories=(behind, *alone.memories)), TOY, [kv]) == Parallel()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"chips": 1}, Parallel()),
        ({"chips": 2}, Parallel(tp=2)),
        ({"tp": 2}, Parallel(tp=2)),
        ({"chips": 4, "cp": 2}, Parallel(tp=2, cp=2)),
        ({"chips": 4, "pp": 2}, Parallel(tp=2, pp=2)),
        ({"chips": 4, "tp": 1}, Parallel(pp=4)),
        ({"cp": 4}, Parallel(cp=4)),
        ({"chips": 3}, Parallel(pp=3)),
    ],
)
def test_arrangements(given: dict[str, int], expected: Parallel) -> None:
    assert arrange(replace(TOY, n_heads=4, n_kv_heads=2, n_layers=6), **given) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"chips": 0}, "chips: 0 must be at least 1"),
        ({"chips": 3, "tp": 2}, "chips: 3 is not tp 2 = 2"),
        ({"chips": 8, "tp": 2, "pp": 2}, "chips: 8 is not tp 2 x pp 2 = 4"),
        ({"tp": 3}, "tp: 3 chips cannot share .* evenly; numbers that can: 1, 2, 4"),
        ({"pp": 99}, "pp: 99 stages, but .* has 8 parts"),
        ({"cp": 10**20}, "cp: 1(0{20}) chips, but contexts of toy have [0-9]+ tokens at most"),
    ],
)
def test_arrangements_that_cannot_be(given: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        arrange(replace(TOY, n_heads=4, n_kv_heads=2, n_layers=6), **given)


def test_what_is_kept_does_not_depend_on_the_class_of_the_op() -> None:
    """Collectives compute nothing and move what they read."""
    trace = trace_of("ttt", Parallel(tp=2, cp=2))
    between = op_classes(trace) == int(OpClass.COLLECTIVE)
    assert between.any()
    assert not trace.flops[between].any()


@pytest.mark.parametrize(("batch", "pp", "parts"), [(1, 4, 1), (4, 4, 4), (5, 4, 3), (8, 4, 4), (9, 4, 3), (3, 1, 1)])
def test_microbatches(batch: int, pp: int, parts: int) -> None:
    """Five sequences in parts of two need three parts, not four."""
    assert microbatches_of(batch, Parallel(pp=pp)) == parts


def test_gpus_beyond_a_node_use_the_network_between_nodes() -> None:
    h100 = load_chip("h100")
    assert [link_to(h100, partners).name for partners in (1, 7, 8, 31)] == ["nvlink", "nvlink", "nic", "nic"]
    with pytest.raises(ConfigError, match="chips: 3000 would be 750 stages, but toy has 6 parts"):
        arrange(TOY, chips=3000)


def test_the_least_system_has_room_for_the_chunk_that_a_step_computes_again() -> None:
    """Chips with little memory: the step that completes a chunk runs the MLP on all its rows, unless they were kept."""
    usual = make_point("groq_lpu", "Qwen3-4B", "ttt_window", phase="decode", context=32768)
    assert rows_at_once(usual) == 1024
    assert simulate_point(usual).record["fits"]
    assert rows_at_once(make_point("groq_lpu", "Qwen3-4B", "kv_window", phase="decode", context=32768)) == 1
    kept = make_point(
        "groq_lpu", "Qwen3-4B", "ttt_window", phase="decode", context=32768, ttt=TTTSettings(carry="keep_z")
    )
    assert rows_at_once(kept) == 1


def test_room_for_deltas_is_that_of_the_rows_that_are_fast() -> None:
    """Two deltas of u f elements, or one of d f before its projection and one after."""
    chip, d, f = load_chip("tiny_gpu"), TOY.d_model, TOY.d_ff
    plain = _room(chip, TOY, [METHODS["kv"].settings(None, None, None)], 7, "bf16")
    for changes, rows in (
        ({}, 2 * d), ({"update_rows": 16}, 32), ({"update_rows": 16, "contraction": "outer_first"}, d + 16),
    ):  # fmt: skip
        settings = METHODS["ttt"].settings(None, None, replace(TTT, **changes))
        assert _room(chip, TOY, [settings], 7, "bf16") - plain == rows * f * 2
