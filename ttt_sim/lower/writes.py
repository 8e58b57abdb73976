"""What a chip charges, or refuses, when weights change at run time (``writability``)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ttt_sim.chip import Chip
from ttt_sim.errors import UnsupportedError
from ttt_sim.ops import KIND, OP_KINDS, IntArray, Role, Trace, owners, total_by

BoolArray = npt.NDArray[np.bool_]

#: State of which a call may store a few rows.
_GROWING = (Role.FAST_WEIGHT, Role.KV, Role.CARRY, Role.INDEX)

#: Updates of a model with a hidden layer.
_THROUGH_LAYERS = ("mlp_update", "memory_update", "fast_back")


def writes_fast_weight(trace: Trace) -> BoolArray:
    """Whether each op writes a fast weight, (n_ops,)."""
    return _fast_writes(trace) > 0


def check_mode(trace: Trace, chip: Chip) -> None:
    """Refuse updates that the chip's way of writing rules out.

    Raises:
        UnsupportedError: weights are never written, or only by local rules and the update is not local.
    """
    writing = _fast_writes(trace)
    if not writing.any():
        return
    mode = chip.writability.mode
    if mode == "none":
        kind = OP_KINDS[int(trace.kind[np.flatnonzero(writing)[0]])].name
        raise UnsupportedError(f"{chip.name}: weights cannot be written at run time, which {kind} needs")
    if mode == "local_rule":
        if (trace.kind == KIND["weight_grad"]).any():
            raise UnsupportedError(
                f"{chip.name}: weights change by local rules only, and a gradient that came back through other layers "
                "is not local"
            )
        if np.isin(trace.kind, [KIND[name] for name in _THROUGH_LAYERS]).any():
            raise UnsupportedError(
                f"{chip.name}: weights change by local rules only, and a gradient that came back through a hidden "
                "layer is not local"
            )
        if (writing[trace.kind == KIND["state_copy"]] > 0).any():
            raise UnsupportedError(
                f"{chip.name}: weights change by local rules only, and putting back a stored weight is none"
            )
        if (trace.kind == KIND["delta_norm"]).any():
            raise UnsupportedError(
                f"{chip.name}: weights change by local rules only, and the clip of the update needs a global norm, "
                "which is not local"
            )
        if (writing > 1).any():
            raise UnsupportedError(
                f"{chip.name}: weights change by local rules only, and a master copy beside the weight is not local"
            )


def padding_bytes(trace: Trace, chip: Chip) -> IntArray:
    """Bytes that each write reads and writes beyond its own because the memory replaces more at once, (n_entries,).

    Rows that a call adds to the state of a sequence lie next to each other; they are rounded up to the granularity of
    the main memory. Writes of a whole tensor are aligned.
    """
    if chip.writability.granularity not in ("row", "tile"):
        return np.zeros(trace.write_bytes.size, dtype=np.int64)
    unit = chip.main_memory.write_granularity_bytes
    grows = np.array([tensor.role in _GROWING for tensor in trace.tensors], dtype=np.bool_)[trace.write_tensor]
    size = np.array([tensor.nbytes for tensor in trace.tensors], dtype=np.int64)[trace.write_tensor]
    sequences = np.array([tensor.shape[0] if len(tensor.shape) > 1 else 1 for tensor in trace.tensors], dtype=np.int64)[
        trace.write_tensor
    ]
    run = -(-trace.write_bytes // np.maximum(sequences, 1))
    padded = np.maximum(sequences * (-(-run // unit) * unit) - trace.write_bytes, 0)
    return np.where(grows & (trace.write_bytes > 0) & (trace.write_bytes < size), padded, 0)


def reupload_bytes(trace: Trace, chip: Chip, of_op: IntArray, n: int) -> IntArray:
    """Bytes that each of ``n`` kernels loads through the host, 0 but in mode ``reupload``."""
    if chip.writability.mode != "reupload":
        return np.zeros(n, dtype=np.int64)
    fast = np.array([tensor.role == Role.FAST_WEIGHT for tensor in trace.tensors], dtype=np.bool_)
    kernel = of_op[owners(trace.write_ptr)]
    chosen = fast[trace.write_tensor]
    nbytes = total_by(kernel[chosen], trace.write_bytes[chosen], n)
    if chip.writability.granularity == "device":
        resident = sum(t.nbytes for t in trace.tensors if t.role in (Role.WEIGHT, Role.FAST_WEIGHT))
        nbytes = np.where(nbytes > 0, resident, 0)
    return nbytes


def reupload_cycles(chip: Chip, nbytes: IntArray) -> IntArray:
    """Cycles of kernels that load ``nbytes`` through the host, 0 for none."""
    rules = chip.writability
    fixed = chip.cycles(rules.reupload_s)
    moved = np.zeros_like(nbytes)
    if rules.reupload_bytes_per_s:
        moved = np.ceil(nbytes / (rules.reupload_bytes_per_s / chip.clock_hz)).astype(np.int64)
    return np.where(nbytes > 0, fixed + moved, 0)


def _fast_writes(trace: Trace) -> IntArray:
    """Fast weights that each op writes."""
    fast = np.array([tensor.role == Role.FAST_WEIGHT for tensor in trace.tensors], dtype=np.int64)
    return total_by(owners(trace.write_ptr), fast[trace.write_tensor], trace.n_ops)
