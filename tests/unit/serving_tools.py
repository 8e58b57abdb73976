"""Traces of steps out of lockstep, put together from lockstep ones, and servers without a chip."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ttt_sim.chip import Chip
from ttt_sim.model import MethodSettings, Model, Scenario
from ttt_sim.ops import IntArray, Trace
from ttt_sim.serving.requests import Request
from ttt_sim.serving.server import Server, Swap
from ttt_sim.serving.steps import Cost, Room
from ttt_sim.simulation import simulate_trace
from ttt_sim.trace_io.table import RawTable, assemble, cells_of, tensor_row
from ttt_sim.workload import build_trace

Row = dict[str, Any]


def lockstep_seconds(chip: Chip, trace: Trace) -> list[float]:
    """Seconds of every step, from a simulation."""
    finish = simulate_trace(chip, trace).step_finish_cycles()
    return [float(cycles) / chip.clock_hz for cycles in np.diff(finish, prepend=0)]


def decode_trace(model: Model, method: MethodSettings, positions: Sequence[int], batch: int) -> Trace:
    return build_trace(model, method, Scenario.decode(tuple(positions), batch=batch))


def rows_of(trace: Trace) -> list[Row]:
    cells = cells_of(trace)
    return [{name: column[i] for name, column in cells.items()} for i in range(trace.n_ops)]


def trace_of(rows: Sequence[Row], tensors: Sequence[Row]) -> Trace:
    numbered = [{**row, "op": i, "after": ""} for i, row in enumerate(rows)]
    return assemble(
        RawTable(
            path=Path("mixed"), columns={name: [row[name] for row in numbered] for name in numbered[0]},
            n_ops=len(numbered), place_of_op=str, tensors=[(row["name"], row) for row in tensors],
        )
    )  # fmt: skip


def operands(text: str) -> list[tuple[str, int, int]]:
    """(tensor, version, bytes) of a cell."""
    found = []
    for entry in filter(None, text.split(";")):
        name, _, rest = entry.rpartition("@")
        version, _, nbytes = rest.partition(":")
        found.append((name, int(version), int(nbytes)))
    return found


def cell(entries: Sequence[Sequence[Any]]) -> str:
    return ";".join(f"{name}@{version}:{nbytes}" for name, version, nbytes in entries)


def at_positions(trace: Trace, step: int, groups: Sequence[tuple[int, int]]) -> Trace:
    """``trace`` of full attention with ``step`` in groups of (sequences, tokens held): an attention core for each."""
    rows: list[Row] = []
    parts: dict[str, list[tuple[str, int, int]]] = {}
    for row in rows_of(trace):
        if row["step"] == step and row["kind"] == "attention":
            (query, version, q_bytes), (cache, kv_version, kv_bytes) = operands(row["reads"])
            ((core, core_version, core_bytes),) = operands(row["writes"])
            total, keys = row["batch"], row["n"]
            for number, (sequences, held) in enumerate(groups):
                name = core if not number else f"{core}.{number}"
                parts.setdefault(core, []).append((name, core_version, core_bytes * sequences // total))
                reads = [
                    (query, version, q_bytes * sequences // total),
                    (cache, kv_version, kv_bytes * sequences * (held + 1) // (total * keys)),
                ]
                share = {"batch": sequences, "n": held + 1, "pairs": held + 1, "position": held}
                costs = {
                    key: row[key] * sequences * (held + 1) // (total * keys)
                    for key in ("flops", "vector_ops", "exp_ops", "rsqrt_ops", "div_ops")
                }  # fmt: skip
                rows.append({**row, **share, **costs, "reads": cell(reads), "writes": cell(parts[core][-1:])})
            continue
        if row["step"] == step and row["kind"] == "o_proj":
            reads = [part for read in operands(row["reads"]) for part in parts.get(read[0], [read])]
            row = {**row, "reads": cell(reads)}
        rows.append(row)
    tensors = [tensor_row(tensor) for tensor in trace.tensors]
    known = {row["name"]: row for row in tensors}
    tensors += [
        {**known[core], "name": name, "initial_version": version - 1}
        for core, found in parts.items()
        for name, version, _ in found[1:]
    ]
    return trace_of(rows, tensors)


def with_updates(ordinary: Trace, step: int, boundary: Trace, boundary_step: int) -> Trace:
    """``step`` of an ordinary trace with what TTT layers of ``boundary_step`` do to complete a chunk, after the weights
    of the layer have been applied. The boundary's tensors are others than those of the ordinary trace."""
    extra: dict[int, list[Row]] = {}
    for row in rows_of(boundary):
        updates = row["phase"] != "forward" or row["kind"] == "carry_append"
        if row["step"] == boundary_step and row["layer"] >= 0 and updates:
            extra.setdefault(row["layer"], []).append(row)
    made: set[tuple[str, int]] = set()
    first: dict[str, int] = {}
    for row in (row for found in extra.values() for row in found):
        for name, version, _ in operands(row["reads"]):
            if (name, version) not in made:
                first.setdefault(name, version)
        made |= {(name, version) for name, version, _ in operands(row["writes"])}
        for name, version, _ in operands(row["writes"]):
            first.setdefault(name, version - 1)
    rows = []
    for row in rows_of(ordinary):
        rows.append(row)
        if row["step"] == step and row["kind"] == "fast_apply":
            for other in extra[row["layer"]]:
                renamed = {
                    column: cell(
                        [(f"own.{name}", version, nbytes) for name, version, nbytes in operands(other[column])]
                    )
                    for column in ("reads", "writes")
                }
                rows.append({**other, **renamed, "step": step, "position": row["position"]})
    tensors = [tensor_row(tensor) for tensor in ordinary.tensors]
    for tensor in boundary.tensors:
        if tensor.name in first:
            own = {**tensor_row(tensor), "name": f"own.{tensor.name}", "initial_version": first[tensor.name]}
            tensors.append(own)
    return trace_of(rows, tensors)


class FixedTimes:
    """Steps of fixed times: a prefill call, a decode step, and what a completed chunk adds, in ps."""

    def __init__(self, *, call: int = 0, step: int = 0, chunk: int | None = None, extra: int = 0) -> None:
        self.call, self.step, self.chunk, self.extra = call, step, chunk, extra

    def ordinary(self, positions: IntArray) -> Cost:
        return Cost(self.step, 1)

    def n_completing(self, positions: IntArray) -> int:
        return 0 if self.chunk is None else int(sum((p + 1) % self.chunk == 0 for p in positions.tolist()))

    def added(self, positions: IntArray) -> Cost:
        return Cost(self.n_completing(positions) * self.extra, 0)

    def prefill(self, position: int, tokens: int, *, logits: bool) -> Cost:
        return Cost(self.call, 1)


def byte_per_token(capacity: int, *, page_tokens: int = 1, fixed: int = 0, longest: int = 4096) -> Room:
    """A memory in which a sequence takes ``fixed`` bytes and one for every token."""
    pages = np.arange(-(-longest // page_tokens) + 1, dtype=np.int64)
    sizes = np.where(pages > 0, fixed + pages * page_tokens, 0)
    return Room(capacity=capacity, weights=0, activations=0, page_tokens=page_tokens, state_bytes=sizes)


def served_by(
    requests: Sequence[Request],
    times: Any,
    *,
    room: Room | None = None,
    most: int = 1000,
    call_tokens: int = 1 << 20,
    swap: Swap | None = None,
    policy: Any = "prefill_first",
) -> Server:
    server = Server(
        requests=requests, times=times, room=room or byte_per_token(1 << 40), most_sequences=most,
        call_tokens=call_tokens, swap=swap, policy=policy,
    )  # fmt: skip
    server.run()
    return server


def request(arrival: int, prompt: int, output: int) -> Request:
    return Request(arrival_ps=arrival, prompt_tokens=prompt, output_tokens=output)
