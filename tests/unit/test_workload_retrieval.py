"""Retrieval, against closed forms and hand counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.unit.lower_tools import chip
from tests.unit.trace_tools import TOY, is_kind, kinds, operands, totals
from ttt_sim.errors import ConfigError, UnsupportedError
from ttt_sim.grid import make_point
from ttt_sim.lower import lower
from ttt_sim.model import Parallel, Scenario
from ttt_sim.ops import Role, Trace
from ttt_sim.simulation import simulate_point
from ttt_sim.system import holdings
from ttt_sim.trace_check import verify
from ttt_sim.workload import METHODS, build_trace, state_per_sequence
from ttt_sim.workload import closed_forms as forms
from ttt_sim.workload.method import set_options

#: A small encoder: 2 layers, width 32, MLP 96, heads of 8, vectors of 64; passages of 10 tokens, of which 3 are read.
SMALL = {
    "passage_tokens": "10", "top_k": "3", "dimension": "64", "code_bytes": "8", "encoder_layers": "2",
    "encoder_width": "32", "encoder_ff": "96", "encoder_heads": "4", "encoder_vocab": "100", "degree": "4", "hops": "5",
    "construction": "12", "lists": "6", "probes": "2",
}  # fmt: skip
B, Q, D = 3, 7, 64
INDEXES = ("flat", "ivf_pq", "graph")


def trace(scenario: Scenario, **options: str) -> Trace:
    settings = set_options(METHODS["rag"].settings(None, None, None), SMALL | options)
    built = build_trace(TOY, settings, scenario)
    verify(built)
    return built


def ask(tokens: int, parallel: Parallel | None = None, **options: str) -> Trace:
    held = min(tokens, 30)
    scenario = Scenario.ask(held, Q, batch=B, parallel=parallel or Parallel())
    return trace(replace(scenario, taken_tokens=tokens), **options)


def index(tokens: int, call_tokens: int = 40, parallel: Parallel | None = None, **options: str) -> Trace:
    scenario = Scenario.prefill(tokens, batch=B, call_tokens=call_tokens)
    return trace(replace(scenario, task="index", parallel=parallel or Parallel()), **options)


def encoder(tokens: int) -> int:
    return forms.encoder_flops(2, 32, 96, tokens, D)


def index_reads(built: Trace) -> int:
    """Bytes read of the index."""
    role = np.array([int(t.role) for t in built.tensors])[built.read_tensor]
    return int(built.read_bytes[role == int(Role.INDEX)].sum())


def search(name: str, vectors: int) -> forms.Search:
    if name == "flat":
        return forms.flat_search(vectors, D)
    if name == "graph":
        return forms.graph_search(vectors, D, 4, 5)
    return forms.ivf_pq_search(vectors, D, min(6, vectors), 2, 8)


# --- asking -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", INDEXES)
@pytest.mark.parametrize("tokens", [25, 30, 400])
def test_a_question_is_encoded_searched_for_and_read_with_what_was_found(name: str, tokens: int) -> None:
    built = ask(tokens, index=name)
    read = min(tokens, 30) + Q
    model = forms.linear_flops_per_token(TOY) * read + forms.attention_flops(TOY, read) + 2 * 64 * 256
    vectors = -(-tokens // 10)
    found = search(name, vectors)
    assert int(built.flops.sum()) == B * (encoder(Q) + found.flops + model)
    # centroids and codebooks are of all sequences, everything else of each
    common = (min(6, vectors) + 256) * D * 2 if name == "ivf_pq" else 0
    assert index_reads(built) == B * (found.read - common) + common


@pytest.mark.parametrize("name", INDEXES)
def test_a_corpus_is_kept_once_for_all_sequences(name: str) -> None:
    built = ask(400, index=name, passages="1000")
    sizes = {
        "flat": {"vectors": 1000 * D * 2},
        "ivf_pq": {"codes": 1000 * 8, "centroids": 6 * D * 2, "codebooks": 256 * D * 2},
        "graph": {"vectors": 1000 * D * 2, "links": 1000 * 4 * 4},
    }
    kept = {t.name: t.nbytes for t in built.tensors if t.role == Role.INDEX}
    assert kept == {f"index.{part}": size for part, size in sizes[name].items()}
    found = search(name, 1000)
    together = {"flat": found.read, "graph": B * found.read, "ivf_pq": (6 + 256) * D * 2 + 1000 * 8}
    assert index_reads(built) == together[name]  # three times a third of the codes, rounded up, are all of them
    settings = set_options(METHODS["rag"].settings(None, None, None), SMALL | {"index": name, "passages": "1000"})
    state = state_per_sequence(TOY, settings, 400, "bf16")
    assert (state.index_bytes, state.shared_bytes) == (0, sum(sizes[name].values()))


def test_hand_count_of_a_flat_search() -> None:
    built = ask(95)
    scan, best = (int(np.argmax(is_kind(built, kind))) for kind in ("index_scan", "top_k"))
    assert [size for _, _, size in operands(built, scan, "read")] == [B * D * 2, B * 10 * D * 2]
    assert [size for _, _, size in operands(built, scan, "write")] == [B * 10 * 4]
    assert int(built.vector_ops[best]) == 2 * B * 10
    assert [size for _, _, size in operands(built, best, "write")] == [B * 3 * 8]
    prompt = int(np.flatnonzero(is_kind(built, "embedding"))[1])
    assert ("index.found", 0, B * 3 * 8) in operands(built, prompt, "read")  # passages are known after the search


def test_a_walk_waits_for_the_memory_at_every_hop() -> None:
    built = ask(400, index="graph")
    walk = int(np.argmax(is_kind(built, "graph_search")))
    assert (int(built.heads[walk]), int(built.n[walk])) == (5, 20)
    launches = []
    for latency in ("0 ns", "100 ns"):
        lowered = lower(built, chip("tiny_gpu", **{"memories.hbm.latency": latency}))
        launches.append(int(lowered.work.launch_cycles[lowered.kernels.of_op[walk]]))
    assert launches[1] - launches[0] == 5 * 100  # at 1 GHz


def test_a_search_visits_no_node_twice() -> None:
    built = ask(95, index="graph")  # 10 nodes
    walk = int(np.argmax(is_kind(built, "graph_search")))
    assert (int(built.heads[walk]), int(built.n[walk])) == (3, 10)


def test_chips_of_a_group_search_parts_and_gather_the_best() -> None:
    whole, half = ask(400), ask(400, Parallel(tp=2))
    scans = [totals(b, is_kind(b, "index_scan")).flops for b in (whole, half)]
    assert scans[0] == 2 * scans[1]
    order = kinds(half)
    assert order[order.index("index_scan") :][:4] == ["index_scan", "top_k", "allgather", "top_k"]
    with pytest.raises(UnsupportedError, match="context-parallel"):
        ask(400, Parallel(cp=2))


def test_stages_share_the_layers_of_the_encoder() -> None:
    held = holdings(ask(400), TOY.n_layers, pipelined=True)
    plain = holdings(build_trace(TOY, METHODS["kv"].settings(None, None, None), Scenario.decode((36,), batch=B)), 4,
                     pipelined=True)  # fmt: skip
    more = (held.parts - plain.parts)[0].tolist()
    layer = 2 * (4 * 32 * 32 + 2 * 32 * 96 + 4 * 32)
    assert more == [2 * (100 * 32 + D * 32), layer, 0, layer, 0, 0]  # two layers beside four
    assert int((held.parts - plain.parts)[1, 0]) == B * 40 * D * 2


# --- making an index --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "call"), [(95, 40), (95, 7), (80, 40), (9, 40), (100, 64)])
def test_every_passage_is_encoded_and_written_once(tokens: int, call: int) -> None:
    built = index(tokens, call)
    whole, rest = divmod(tokens, 10)
    flops = whole * encoder(10) + (encoder(rest) if rest else 0)
    assert int(built.flops.sum()) == B * flops
    written = totals(built, is_kind(built, "index_write"))
    assert written.write_bytes == B * (whole + bool(rest)) * D * 2
    assert sum(t.nbytes for t in built.tensors if t.role == Role.INDEX) == written.write_bytes
    per_call = max(call // 10, 1)
    assert int(built.step.max()) + 1 == -(-whole // per_call) + bool(rest)


def test_hand_counts_of_adding_to_an_index() -> None:
    quantised = index(95, index="ivf_pq")
    rows = B * 10
    adding = is_kind(quantised, "index_scan", "pq_table")
    assert totals(quantised, adding).flops == rows * 2 * D * (6 + 256)
    best = totals(quantised, is_kind(quantised, "top_k")).vector_ops
    assert best == 2 * rows * (6 + 8 * 256)
    assert totals(quantised, is_kind(quantised, "index_write")).write_bytes == rows * 8
    graph = index(200, index="graph")  # 20 nodes, 12 of which are visited for each
    assert totals(graph, is_kind(graph, "graph_search")).flops == B * 20 * 2 * 12 * D
    assert set(graph.heads[is_kind(graph, "graph_search")]) == {3}
    assert totals(graph, is_kind(graph, "index_write")).write_bytes == B * 20 * (D * 2 + 4 * 4)


def test_chips_of_a_group_share_the_passages_of_a_call() -> None:
    whole, half = index(80), index(80, parallel=Parallel(tp=2))
    assert int(whole.flops.sum()) == 2 * int(half.flops.sum())


# --- state and phases -------------------------------------------------------------------------------------------------


def test_what_a_user_keeps() -> None:
    method = METHODS["rag"]
    settings = method.settings(None, None, None)
    state = state_per_sequence(TOY, settings, 32768, "bf16")
    kappa = int(forms.kv_bytes_per_token(TOY))
    assert (state.kv_bytes, state.index_bytes, state.shared_bytes) == (4096 * kappa, 64 * 1024 * 2, 0)
    assert method.held_tokens(settings, 32768) == 4096
    assert method.held_tokens(settings, 1000) == 1000


def test_decode_goes_on_after_what_was_found() -> None:
    found, plain = (
        simulate_point(make_point("h100", "toy", method, context=context, options=options)).record
        for method, context, options in (("rag", 32768, SMALL), ("kv", 30, {}))
    )
    assert found["cycles"] == plain["cycles"]
    asked = simulate_point(make_point("h100", "toy", "rag", phase="ask", context=32768, question=Q, options=SMALL))
    assert asked.result is not None
    assert asked.result.trace.meta["calls"] == [[0, 37, True]]


@pytest.mark.parametrize("name", INDEXES)
@pytest.mark.parametrize("phase", ["index", "ask", "decode"])
@pytest.mark.parametrize("chip_name", ["tiny_gpu", "tiny_cim", "tiny_pcm", "tiny_spatial"])
def test_engines_agree(chip_name: str, phase: str, name: str) -> None:
    point = make_point(
        chip_name, "toy", "rag", phase=phase, context=95, batch=2, options=SMALL | {"index": name}, chunk=16  # type: ignore[arg-type]
    )  # fmt: skip
    assert simulate_point(replace(point, compare_engines=True)).record["fits"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"index": "hnsw"}, "'hnsw' is not one of flat, ivf_pq, graph"),
        ({"top_k": "0"}, "top_k is 0, expected at least 1"),
        ({"passages": "0"}, "passages is 0, expected at least 1"),
        ({"code_bytes": "60"}, "code_bytes is 60, which does not divide dimension 1024"),
        ({"encoder_heads": "7"}, "encoder_heads is 7, which does not divide encoder_width 768"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        set_options(METHODS["rag"].settings(None, None, None), options)
