"""Properties of every trace: possible, complete, and independent of how its calls are cut."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.trace_tools import TOY, is_kind, operands, totals
from ttt_sim.model import Call, Scenario, TTTSettings
from ttt_sim.ops import Hazard, Phase, Role, Trace, dependencies
from ttt_sim.trace_check import verify
from ttt_sim.workload import CONTEXT_METHODS, METHODS, build_trace, closed_forms

SMALL = st.integers(min_value=1, max_value=60)
SPLITS = st.lists(SMALL, min_size=1, max_size=6)
CHUNKS = st.sampled_from([1, 2, 5, 16, 32, 200])
BATCHES = st.sampled_from([1, 3])


@st.composite
def ttt_settings(draw: st.DrawFn) -> TTTSettings:
    return TTTSettings(
        layers=(0, 2),
        chunk_tokens=draw(CHUNKS),
        target=draw(st.sampled_from(["hidden_states", "input_embed"])),
        convolution=draw(st.sampled_from(["symmetric", "causal"])),
        projection=draw(st.booleans()),
        clip=draw(st.sampled_from([None, 1e-5])),
        carry=draw(st.sampled_from(["official", "ring", "keep_z", "online"])),
        weight_write=draw(st.sampled_from(["official", "fused", "resident", "master", "tile_wise"])),
    )


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    """Calls one after another, some left out between, from an empty state or not."""
    position, calls = draw(st.sampled_from([0, 0, 7, 64])), []
    for tokens in draw(SPLITS):
        calls.append(Call(position=position, tokens=tokens, logits=draw(st.booleans())))
        position += tokens + draw(st.sampled_from([0, 0, 0, 13]))
    return Scenario(batch=draw(BATCHES), dtype="bf16", calls=tuple(calls))


def split(pieces: list[int], batch: int = 1) -> Scenario:
    starts = np.cumsum([0, *pieces]).tolist()
    calls = tuple(Call(position=p, tokens=m, logits=False) for p, m in zip(starts, pieces, strict=False))
    return Scenario(batch=batch, dtype="bf16", calls=calls)


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    method = METHODS[draw(st.sampled_from(CONTEXT_METHODS))]
    settings = method.settings(draw(st.sampled_from([1, 16, 48])), None, draw(ttt_settings()))
    return build_trace(TOY, settings, draw(scenarios()))


@given(traces())
def test_generated_traces_are_possible(trace):
    verify(trace)


def edges_one_by_one(trace: Trace) -> set[tuple[int, int, int]]:
    """Dependencies found op by op, from the definitions alone."""
    writer: dict[tuple[str, int], int] = {}
    readers: dict[tuple[str, int], set[int]] = {}
    in_place = {tensor.name for tensor in trace.tensors if tensor.in_place}
    found: dict[tuple[int, int], int] = {}

    def add(op: int, on: int | None, hazard: Hazard) -> None:
        if on is not None and on != op:
            found[op, on] = min(found.get((op, on), len(Hazard)), int(hazard))

    for op in range(trace.n_ops):
        for name, version, _ in operands(trace, op, "read"):
            add(op, writer.get((name, version)), Hazard.RAW)
            readers.setdefault((name, version), set()).add(op)
        for name, version, _ in operands(trace, op, "write"):
            if name in in_place:
                add(op, writer.get((name, version - 1)), Hazard.WAW)
                for reader in readers.get((name, version - 1), set()):
                    add(op, reader, Hazard.WAR)
            writer[name, version] = op
    return {(op, on, hazard) for (op, on), hazard in found.items()}


@given(traces())
def test_dependencies_follow_from_versions(trace):
    found = dependencies(trace)
    owner = np.repeat(np.arange(trace.n_ops), np.diff(found.ptr))
    listed = list(zip(owner.tolist(), found.idx.tolist(), found.hazard.tolist(), strict=True))
    assert listed == sorted(listed, key=lambda edge: edge[:2])  # rising, each pair once
    assert set(listed) == edges_one_by_one(trace)
    assert len(listed) == len(set(listed))
    assert (found.idx < owner).all()


@given(traces())
def test_every_op_is_tied_to_the_others(trace):
    """All but embeddings and first copies wait for something, and only ends of a call are waited for by nobody."""
    found = dependencies(trace)
    free = np.diff(found.ptr) == 0
    assert not (free & ~is_kind(trace, "embedding", "fast_init")).any()


@given(traces())
def test_weight_writes_wait_for_every_apply_of_the_version_before(trace):
    found = dependencies(trace)
    for op in np.flatnonzero(trace.phase == Phase.WEIGHT_WRITE).tolist():
        waits = set(found.idx[found.ptr[op] : found.ptr[op + 1]].tolist())
        for name, version, _ in operands(trace, op, "write"):
            for other in np.flatnonzero(is_kind(trace, "fast_apply")[:op]).tolist():
                if (name, version - 1) in [entry[:2] for entry in operands(trace, other, "read")]:
                    assert other in waits


@given(SPLITS, ttt_settings(), BATCHES)
def test_recompute_free_flops_do_not_depend_on_the_split(pieces, ttt, batch):
    """With hidden rows kept, each token passes the MLP once and each full chunk is updated once."""
    ttt = TTTSettings(**{**{f: getattr(ttt, f) for f in ttt.__dataclass_fields__}, "carry": "keep_z"})
    tokens = sum(pieces)
    trace = build_trace(TOY, METHODS["ttt"].settings(None, None, ttt), split(pieces, batch))
    updates = tokens // ttt.chunk_tokens * 2 * closed_forms.update_flops(TOY, ttt)
    forward = tokens * closed_forms.linear_flops_per_token(TOY) + closed_forms.attention_flops(TOY, tokens)
    assert int(trace.flops.sum()) == batch * (forward + updates)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), ttt_settings())
def test_official_forward_flops_of_aligned_calls_do_not_depend_on_the_split(chunks, ttt):
    whole, cut = (
        build_trace(TOY, METHODS["ttt"].settings(None, None, ttt), split(pieces))
        for pieces in ([sum(chunks) * ttt.chunk_tokens], [n * ttt.chunk_tokens for n in chunks])
    )
    for phase in Phase:
        assert totals(whole, whole.phase == phase)[:2] == totals(cut, cut.phase == phase)[:2]


@given(SPLITS, ttt_settings())
def test_fast_weights_end_at_the_version_of_the_last_full_chunk(pieces, ttt):
    trace = build_trace(TOY, METHODS["ttt"].settings(None, None, ttt), split(pieces))
    written = {name: version for op in range(trace.n_ops) for name, version, _ in operands(trace, op, "write")}
    for tensor in trace.tensors:
        if tensor.role == Role.FAST_WEIGHT:
            assert written[tensor.name] == sum(pieces) // ttt.chunk_tokens


@given(SPLITS, ttt_settings(), st.sampled_from(CONTEXT_METHODS))
def test_sequences_of_a_batch_share_only_weights(pieces, ttt, name):
    """Three sequences move three times what one moves, but for the weights, and compute three times as much."""
    settings = METHODS[name].settings(16, None, ttt)
    one, three = (build_trace(TOY, settings, split(pieces, batch)) for batch in (1, 3))
    assert (three.flops == 3 * one.flops).all()
    assert (three.vector_ops == 3 * one.vector_ops).all()
    assert np.array_equal(one.read_ptr, three.read_ptr)
    shared = np.array([tensor.role == Role.WEIGHT for tensor in one.tensors])[one.read_tensor]
    looked_up = is_kind(one, "embedding")[np.repeat(np.arange(one.n_ops), np.diff(one.read_ptr))]
    shared &= ~looked_up  # an embedding row per token
    assert (three.read_bytes == np.where(shared, 1, 3) * one.read_bytes).all()
    assert (three.write_bytes == 3 * one.write_bytes).all()
