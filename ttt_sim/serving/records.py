"""What a run of a server says: one record of a method, rows of requests, percentiles, sustainable rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ttt_sim.ops import IntArray
from ttt_sim.serving.requests import PS_PER_S, Request, offered_per_s
from ttt_sim.serving.server import Server
from ttt_sim.serving.steps import PJ_PER_J, Machine, Room, StepTimes

if TYPE_CHECKING:
    import pandas as pd

#: Names and shares of the percentiles of every duration.
PERCENTILES: Mapping[str, tuple[int, int]] = {"median": (1, 2), "p99": (99, 100), "worst": (1, 1)}
#: Durations that percentiles are given of.
DURATIONS = ("first_token", "between_tokens", "decode_step", "latency")
SECONDS_PER_HOUR = 3600
#: Positions of a request at which the time of its steps is sampled for the sustainable rate.
_SAMPLES = 8

#: Columns of the record of a method, in order.
RECORD_COLUMNS: tuple[str, ...] = (
    "method", "chip", "variant", "model", "dtype", "chips", "fits", "reason", "requests", "prompt_tokens",
    "output_tokens", "offered_per_s", "sustainable_per_s", "load_frac", "sustained", "seconds", "requests_per_s",
    "tokens_per_s", "busy_frac", "prefill_frac", "decode_frac", "swap_frac", "mean_batch", "largest_batch",
    "most_sequences", "full_batch", "room_bytes", "used_bytes", "swaps", "recomputes", "recomputed_tokens",
    "completed_chunks", "completing_steps", "boundary_added_seconds",
    *(f"{name}_{percentile}_seconds" for name in DURATIONS for percentile in PERCENTILES),
    "energy_j_per_token", "cost_usd_per_million_tokens", "full_load_chip_seconds_per_million_tokens",
    "full_load_cost_usd_per_million_tokens", "cost_ratio", "cost_ratio_at_this_load",
)  # fmt: skip
REQUEST_COLUMNS: tuple[str, ...] = (
    "method", "request", "arrival_s", "prompt_tokens", "output_tokens", "admitted_s", "first_token_s", "finished_s",
    "first_token_seconds", "mean_gap_seconds", "longest_gap_seconds", "latency_seconds", "swaps", "recomputes",
)  # fmt: skip
STEP_COLUMNS: tuple[str, ...] = (
    "method", "start_s", "seconds", "kind", "batch", "tokens", "completing", "waiting", "used_bytes",
)  # fmt: skip


def percentile(ordered: IntArray, share: tuple[int, int]) -> int | None:
    """The smallest of ``ordered`` values that so large a share of them does not exceed; None without values."""
    part, whole = share
    return int(ordered[-(-ordered.size * part // whole) - 1]) if ordered.size else None


@dataclass(frozen=True, slots=True, kw_only=True)
class FullLoad:
    """A server that never waits. ``batch`` sequences go on together: as many as the memory holds of the mean size, or
    the limit. ``ps_per_request``: the server's time for one of them, prompt and steps."""

    batch: int
    ps_per_request: float

    @property
    def requests_per_s(self) -> float:
        """Largest rate that can be sustained."""
        return PS_PER_S / self.ps_per_request


def full_load(requests: Sequence[Request], times: StepTimes, room: Room, most_sequences: int) -> FullLoad:
    """The steady state of these requests in any order: every prompt is computed once, a decode step serves a full
    batch, a chunk is completed every C tokens of a sequence.

    A request counts with its decode steps, of which the times are sampled at evenly spaced positions.
    """
    prompts = np.array([request.prompt_tokens for request in requests], dtype=np.int64)
    decodes = np.array([request.output_tokens - 1 for request in requests], dtype=np.int64)
    prefill_ps = sum(times.prompt(tokens).ps for tokens in prompts.tolist())
    total = int(decodes.sum())
    if not total:
        return FullLoad(batch=1, ps_per_request=prefill_ps / len(requests))
    held = int((room.of(prompts + decodes // 2) * decodes).sum()) // total
    batch = max(min(room.for_state // held, most_sequences), 1) if held else most_sequences
    steps_ps = 0  # in Python's integers: the sum may leave 64 bits
    for i in range(_SAMPLES):
        at = prompts + decodes * (2 * i + 1) // (2 * _SAMPLES)
        steps_ps += sum(a * b for a, b in zip(times.lockstep_ps(batch, at).tolist(), decodes.tolist(), strict=True))
    decode_ps = steps_ps / (_SAMPLES * batch)
    chunk = times.machine.chunk_tokens
    if chunk is not None:
        number = times.mean_number(prompts + decodes // 2, decodes)
        decode_ps += total * times.completing(1, number).ps / chunk
    return FullLoad(batch=batch, ps_per_request=(prefill_ps + decode_ps) / len(requests))


def most_held(room: Room, tokens: int, most_sequences: int | None = None) -> int:
    """Sequences of ``tokens`` tokens that the memory holds, ``most_sequences`` at most."""
    size = room.of_one(tokens)
    held = max(room.for_state, 0) // size if size else 0
    return held if most_sequences is None else min(held, most_sequences)


def server_record(server: Server, machine: Machine, full: FullLoad) -> dict[str, object]:
    """The record of a finished run, all but what compares it with another method."""
    requests, steps, room = server.requests, server.steps, server.room
    end = max(one.finished_ps for one in server.served)
    span_ps = end - requests[0].arrival_ps
    made = sum(one.made for one in server.served)
    spent = {
        kind: sum(step.ps for step in steps if step.kind.startswith(kind)) for kind in ("prefill", "decode", "swap")
    }
    decodes = [step for step in steps if step.kind == "decode"]
    offered = offered_per_s(requests)
    chips, chip = machine.parallel.chips, machine.chip
    seconds = span_ps / PS_PER_S
    energy = server.dynamic_pj / PJ_PER_J + chips * chip.power.idle_w * seconds
    rent = chip.price.per_hour_usd
    full_seconds = full.ps_per_request * len(requests) / made / PS_PER_S * chips * 1e6
    mean_tokens = sum(one.request.prompt_tokens + one.request.output_tokens // 2 for one in server.served) // len(
        requests
    )
    record = identity(machine) | {
        "fits": True, "reason": "", "requests": len(requests),
        "prompt_tokens": sum(request.prompt_tokens for request in requests), "output_tokens": made,
        "offered_per_s": offered, "sustainable_per_s": full.requests_per_s,
        "load_frac": None if offered is None else offered / full.requests_per_s,
        "sustained": offered is not None and offered <= full.requests_per_s,
        "seconds": seconds, "requests_per_s": len(requests) / seconds, "tokens_per_s": made / seconds,
        "busy_frac": sum(spent.values()) / span_ps,
        **{f"{kind}_frac": ps / span_ps for kind, ps in spent.items()},
        "mean_batch": sum(step.batch * step.ps for step in decodes) / spent["decode"] if decodes else None,
        "largest_batch": max((step.batch for step in decodes), default=0),
        "most_sequences": most_held(room, max(mean_tokens, 1)), "full_batch": full.batch,
        "room_bytes": room.for_state, "used_bytes": max(step.used_bytes for step in steps),
        "swaps": sum(one.swaps for one in server.served),
        "recomputes": sum(one.recomputes for one in server.served), "recomputed_tokens": server.recomputed_tokens,
        "completed_chunks": sum(step.completing for step in decodes),
        "completing_steps": sum(step.completing > 0 for step in decodes),
        "boundary_added_seconds": None if machine.chunk_tokens is None else server.times.completing(1).ps / PS_PER_S,
    }  # fmt: skip
    gaps = np.concatenate(server.gaps_ps) if server.gaps_ps else np.zeros(0, dtype=np.int64)
    durations: Mapping[str, IntArray] = {
        "first_token": _array(one.first_token_ps - one.request.arrival_ps for one in server.served),
        "between_tokens": gaps,
        "decode_step": _array(step.ps for step in decodes),
        "latency": _array(one.finished_ps - one.request.arrival_ps for one in server.served),
    }
    for name, values in durations.items():
        ordered = np.sort(values)
        for title, share in PERCENTILES.items():
            found = percentile(ordered, share)
            record[f"{name}_{title}_seconds"] = None if found is None else found / PS_PER_S
    return record | {
        "energy_j_per_token": energy / made,
        "cost_usd_per_million_tokens": _rented(rent, chips * seconds / made * 1e6),
        "full_load_chip_seconds_per_million_tokens": full_seconds,
        "full_load_cost_usd_per_million_tokens": _rented(rent, full_seconds),
    }


def identity(machine: Machine) -> dict[str, object]:
    """Columns that say what served."""
    return {
        "method": machine.method.name, "chip": machine.chip.name, "variant": machine.chip.variant,
        "model": machine.model.name, "dtype": machine.dtype, "chips": machine.parallel.chips,
    }  # fmt: skip


def _array(values: object) -> IntArray:
    return np.fromiter(values, dtype=np.int64)  # type: ignore[call-overload, no-any-return]


def _rented(per_hour_usd: float | None, chip_seconds: float) -> float | None:
    return None if per_hour_usd is None else per_hour_usd / SECONDS_PER_HOUR * chip_seconds


def request_rows(method: str, server: Server) -> list[dict[str, object]]:
    """A row per request, in order of arrival."""
    rows: list[dict[str, object]] = []
    for one in server.served:
        arrival, decoding = one.request.arrival_ps, one.finished_ps - one.first_token_ps
        gaps = one.request.output_tokens - 1
        rows.append({
            "method": method, "request": one.number, "arrival_s": arrival / PS_PER_S,
            "prompt_tokens": one.request.prompt_tokens, "output_tokens": one.request.output_tokens,
            "admitted_s": one.admitted_ps / PS_PER_S, "first_token_s": one.first_token_ps / PS_PER_S,
            "finished_s": one.finished_ps / PS_PER_S, "first_token_seconds": (one.first_token_ps - arrival) / PS_PER_S,
            "mean_gap_seconds": decoding / gaps / PS_PER_S if gaps else None,
            "longest_gap_seconds": one.longest_gap_ps / PS_PER_S if gaps else None,
            "latency_seconds": (one.finished_ps - arrival) / PS_PER_S, "swaps": one.swaps, "recomputes": one.recomputes,
        })  # fmt: skip
    return rows


def step_frame(method: str, server: Server) -> pd.DataFrame:
    """A row per step, in order."""
    import pandas as pd

    frame = pd.DataFrame(server.steps)
    frame.insert(0, "method", method)
    frame.insert(1, "start_s", frame.pop("start_ps") / PS_PER_S)
    frame.insert(2, "seconds", frame.pop("ps") / PS_PER_S)
    return frame[list(STEP_COLUMNS)]
