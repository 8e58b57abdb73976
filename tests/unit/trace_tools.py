"""What tests ask of a trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ttt_sim.model import Call, MethodSettings, Model, Scenario
from ttt_sim.ops import KIND, OP_COLUMNS, OP_KINDS, Trace
from ttt_sim.workload import METHODS, build_trace

Mask = npt.NDArray[np.bool_]

#: The model of hand counts, written out so that it does not depend on a file.
TOY = Model(
    name="toy", family="qwen3", n_layers=4, d_model=64, d_ff=192, n_heads=4, n_kv_heads=2, head_dim=16, vocab_size=256,
    tied_embeddings=True, qk_norm=True, max_context_tokens=4096,
)  # fmt: skip


class Totals(NamedTuple):
    flops: int
    vector_ops: int
    read_bytes: int
    write_bytes: int


def kv_trace(model: Model, scenario: Scenario, *, window: int | None = None) -> Trace:
    method = METHODS["kv" if window is None else "kv_window"]
    return build_trace(model, method.settings(window, None, None), scenario)


def one_call(position: int, tokens: int, *, batch: int = 1, logits: bool = False, dtype: str = "bf16") -> Scenario:
    return Scenario(batch=batch, dtype=dtype, calls=(Call(position=position, tokens=tokens, logits=logits),))


def is_kind(trace: Trace, *names: str) -> Mask:
    return np.isin(trace.kind, [KIND[name] for name in names])


def totals(trace: Trace, mask: Mask) -> Totals:
    read_owner = np.repeat(np.arange(trace.n_ops), np.diff(trace.read_ptr))
    write_owner = np.repeat(np.arange(trace.n_ops), np.diff(trace.write_ptr))
    return Totals(
        flops=int(trace.flops[mask].sum()),
        vector_ops=int(trace.vector_ops[mask].sum()),
        read_bytes=int(trace.read_bytes[mask[read_owner]].sum()),
        write_bytes=int(trace.write_bytes[mask[write_owner]].sum()),
    )


def kinds(trace: Trace, mask: Mask | None = None) -> list[str]:
    """Names of op kinds in program order."""
    codes = trace.kind if mask is None else trace.kind[mask]
    return [OP_KINDS[code].name for code in codes.tolist()]


def operands(trace: Trace, op: int, column: str) -> list[tuple[str, int, int]]:
    """(tensor name, version, bytes) of the reads or writes of one op."""
    ptr, tensor, version, nbytes = (
        getattr(trace, f"{column}_{part}") for part in ("ptr", "tensor", "version", "bytes")
    )
    entries = range(int(ptr[op]), int(ptr[op + 1]))
    return [(trace.tensors[int(tensor[i])].name, int(version[i]), int(nbytes[i])) for i in entries]


def scalars(trace: Trace, op: int, *, without: tuple[str, ...] = ()) -> dict[str, int]:
    return {name: int(getattr(trace, name)[op]) for name in OP_COLUMNS if name not in without}


def assert_calls_equal_themselves_alone(whole: Trace, settings: MethodSettings, calls: Sequence[Call]) -> None:
    """Each call of a trace of ``calls`` on TOY (batch 2, bf16) equals the trace of that call by itself."""
    op = 0
    for call in calls:
        alone = build_trace(TOY, settings, Scenario(batch=2, dtype="bf16", calls=(call,)))
        for i in range(alone.n_ops):
            assert scalars(whole, op, without=("step",)) == scalars(alone, i, without=("step",))
            for column in ("read", "write"):
                named = [(name, size) for name, _, size in operands(whole, op, column)]
                assert named == [(name, size) for name, _, size in operands(alone, i, column)]
            op += 1
    assert op == whole.n_ops
