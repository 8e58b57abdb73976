"""The process model: hand-worked streams, queueing theory, conservation, memory."""

from itertools import pairwise

import numpy as np
import pytest

from tests.unit.serving_tools import FixedTimes, byte_per_token, request, served_by
from ttt_sim.serving.requests import PS_PER_S, poisson_requests
from ttt_sim.serving.server import Server, Swap
from ttt_sim.serving.steps import Room


def stream(count: int = 300, rate: float = 0.05, seed: int = 0, prompt: int = 40, output: int = 20) -> tuple:
    """Requests whose times are some tens of ps where ``rate`` is per ps."""
    return poisson_requests(count=count, rate_per_s=rate * PS_PER_S, prompt=prompt, output=output, seed=seed)


def test_one_request_by_hand() -> None:
    """A prompt of 10 tokens in calls of 4, and 3 outputs: 3 calls, then 2 steps; token 12 completes a chunk."""
    server = served_by([request(100, 10, 3)], FixedTimes(call=7, step=5, chunk=12, extra=2), call_tokens=4)
    assert [(s.kind, s.start_ps, s.ps, s.tokens) for s in server.steps] == [
        ("prefill", 100, 7, 4), ("prefill", 107, 7, 4), ("prefill", 114, 7, 2), ("decode", 121, 5, 1),
        ("decode", 126, 7, 1),
    ]  # fmt: skip
    (one,) = server.served
    assert (one.admitted_ps, one.first_token_ps, one.finished_ps) == (100, 121, 133)
    assert [gaps.tolist() for gaps in server.gaps_ps] == [[5], [7]]


def test_prompts_come_first_by_hand() -> None:
    """The second request comes in the middle of a step, waits for its end, and holds the first one up."""
    server = served_by([request(0, 4, 4), request(12, 4, 2)], FixedTimes(call=10, step=5))
    assert [(s.kind, s.start_ps, s.batch) for s in server.steps] == [
        ("prefill", 0, 1), ("decode", 10, 1), ("prefill", 15, 1), ("decode", 25, 2), ("decode", 30, 1),
    ]  # fmt: skip
    first, second = server.served
    assert (first.first_token_ps, first.finished_ps, first.longest_gap_ps) == (10, 35, 15)
    assert (second.admitted_ps, second.first_token_ps, second.finished_ps) == (15, 25, 30)


def test_alternating_bounds_what_a_long_prompt_holds_up() -> None:
    requests = [request(0, 4, 9), request(1, 40, 2)]
    gaps = {}
    for policy in ("prefill_first", "alternate"):
        server = served_by(requests, FixedTimes(call=10, step=5), call_tokens=4, policy=policy)
        gaps[policy] = server.served[0].longest_gap_ps
        assert all(one.made == one.request.output_tokens for one in server.served)
    assert gaps == {"prefill_first": 10 * 10 + 5, "alternate": 10 + 5}


def test_chunks_complete_at_steps_of_their_own() -> None:
    """Two sequences in one batch reach the ends of their chunks of 8 at different steps."""
    server = served_by([request(0, 5, 12), request(0, 7, 12)], FixedTimes(call=1, step=10, chunk=8, extra=3))
    completing = [(s.batch, s.completing) for s in server.steps if s.kind == "decode"]
    # tokens held: 5 to 15 and 7 to 17; with the token of the step, 8 and 16 are ends
    assert completing == [(2, {0: 1, 2: 1, 8: 1, 10: 1}.get(i, 0)) for i in range(11)]
    assert [s.ps for s in server.steps if s.completing] == [13] * 4


@pytest.mark.parametrize("load", [0.3, 0.7, 0.85])
def test_one_token_requests_are_an_m_d_1_queue(load: float) -> None:
    """Mean wait of Pollaczek and Khinchine, rho D / (2 (1 - rho)), within four standard errors by batch means, which
    are less than a tenth of it."""
    service, n, batches = 1000, 40_000, 20
    requests = stream(n, load / service, seed=7, prompt=1, output=1)
    requests = tuple(request(r.arrival_ps, 5, 1) for r in requests)
    server = served_by(requests, FixedTimes(call=service), most=1)
    waits = np.array([one.finished_ps - service - one.request.arrival_ps for one in server.served])
    expected = load * service / (2 * (1 - load))
    means = waits.reshape(batches, -1).mean(axis=1)
    error = means.std(ddof=1) / np.sqrt(batches)
    assert error < 0.1 * expected
    assert abs(waits.mean() - expected) < 4 * error
    assert all(step.ps == service for step in server.steps)
    busy = sum(step.ps for step in server.steps) / max(one.finished_ps for one in server.served)
    assert busy == pytest.approx(load, rel=0.02)


def in_system(server: Server) -> float:
    """Time average of the number of requests between arrival and end, summed up event by event."""
    events = sorted(
        [(one.request.arrival_ps, 1) for one in server.served] + [(one.finished_ps, -1) for one in server.served]
    )
    total = number = 0
    for (time, change), (then, _) in pairwise(events):
        number += change
        total += number * (then - time)
    return total / (events[-1][0] - events[0][0])


def test_littles_law() -> None:
    """L = lambda W for the whole system, and for the decoding sequences: steps against gaps."""
    server = served_by(stream(), FixedTimes(call=30, step=11, chunk=16, extra=4), most=12)
    span = max(one.finished_ps for one in server.served) - server.served[0].request.arrival_ps
    mean_latency = np.mean([one.finished_ps - one.request.arrival_ps for one in server.served])
    assert in_system(server) == pytest.approx(len(server.served) / span * mean_latency, rel=1e-12)
    # a sequence is in decode steps, or held up by calls, from its first token to its last
    decoding = sum(one.finished_ps - one.first_token_ps for one in server.served)
    assert sum(int(gaps.sum()) for gaps in server.gaps_ps) == decoding
    prefills = [(s.start_ps, s.start_ps + s.ps) for s in server.steps if s.kind == "prefill"]
    held_up = sum(
        sum(end - start for start, end in prefills if one.first_token_ps <= start and end <= one.finished_ps)
        for one in server.served
    )
    assert sum(s.ps * s.batch for s in server.steps if s.kind == "decode") + held_up == decoding


def assert_conserved(server: Server) -> None:
    """Every request ends with what it asked for, the server does one thing at a time and is idle only without work."""
    assert len(server.served) == len(server.requests)
    for one in server.served:
        assert one.made == one.request.output_tokens
        assert one.request.arrival_ps <= one.admitted_ps < one.first_token_ps <= one.finished_ps
        assert one.tokens == one.request.tokens
    made = sum(one.request.output_tokens for one in server.served)
    put_in = {kind: sum(s.tokens for s in server.steps if s.kind == kind) for kind in ("prefill", "decode")}
    recomputes = sum(one.recomputes for one in server.served)
    assert made == put_in["decode"] + len(server.served) + recomputes
    prompts = sum(one.request.prompt_tokens for one in server.served)
    assert put_in["prefill"] == prompts + server.recomputed_tokens + recomputes
    ends = 0
    for step in server.steps:
        assert step.start_ps >= ends
        if step.start_ps > ends:  # idle: nobody was there
            assert all(
                not one.request.arrival_ps < step.start_ps < one.finished_ps
                for one in server.served
                if one.finished_ps > ends and one.request.arrival_ps < step.start_ps
            )
        ends = step.start_ps + step.ps
    assert max(one.finished_ps for one in server.served) == ends


def test_requests_and_tokens_are_conserved() -> None:
    assert_conserved(served_by(stream(), FixedTimes(call=30, step=11), most=12, call_tokens=16))
    assert_conserved(served_by(stream(rate=0.001), FixedTimes(call=30, step=11), policy="alternate"))


@pytest.mark.parametrize("fixed", [0, 50])
@pytest.mark.parametrize("way", ["recompute", "host", "small host"])
def test_memory_is_never_exceeded(fixed: int, way: str) -> None:
    """A memory for a handful of sequences: the youngest leave and come back; first come, first admitted."""
    swap = {
        "recompute": None,
        "host": Swap(ps_per_byte=0.5, latency_ps=3, pj_per_byte=2.0, capacity=None),
        "small host": Swap(ps_per_byte=0.5, latency_ps=3, pj_per_byte=2.0, capacity=150 + fixed),
    }[way]
    requests = stream(rate=0.02)
    room = byte_per_token(max(r.tokens for r in requests) + 4 + fixed, page_tokens=4, fixed=fixed)
    server = served_by(requests, FixedTimes(call=30, step=11), room=room, swap=swap)
    assert max(step.used_bytes for step in server.steps) <= room.for_state
    assert_conserved(server)
    admitted = [one.admitted_ps for one in server.served]
    assert admitted == sorted(admitted)
    swaps, recomputes = (sum(getattr(one, name) for one in server.served) for name in ("swaps", "recomputes"))
    moved = {kind: [s for s in server.steps if s.kind == kind] for kind in ("swap_out", "swap_in")}
    assert len(moved["swap_out"]) == len(moved["swap_in"]) == swaps
    assert sum(s.ps for s in moved["swap_out"]) == sum(s.ps for s in moved["swap_in"])
    assert (swaps > 0, recomputes > 0) == {"recompute": (False, True), "host": (True, False)}.get(way, (True, True))
    if swap is not None:
        nbytes = (sum(s.ps for s in moved["swap_out"]) - 3 * swaps) / 0.5
        others = sum(s.kind in ("prefill", "decode") for s in server.steps)
        assert server.dynamic_pj == 2 * 2 * nbytes + others


def test_state_that_does_not_grow_never_has_to_leave() -> None:
    """Fast weights alone: as many sequences as fit, whatever their length."""
    sizes = np.array([0, 200], dtype=np.int64)
    server = served_by(
        stream(rate=0.05), FixedTimes(call=30, step=11),
        room=Room(capacity=1000, weights=0, activations=0, page_tokens=4096, state_bytes=sizes),
    )  # fmt: skip
    assert max(step.batch for step in server.steps) == 5
    assert not any(one.recomputes for one in server.served)
    assert_conserved(server)


def test_same_stream_same_steps() -> None:
    first, again = (
        served_by(stream(), FixedTimes(call=30, step=11, chunk=16, extra=4), room=byte_per_token(700)) for _ in range(2)
    )
    assert first.steps == again.steps
    assert [one.finished_ps for one in first.served] == [one.finished_ps for one in again.served]
