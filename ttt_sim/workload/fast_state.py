"""What In-Place TTT keeps per sequence: fast weights and the rows of the open chunk. The one place that says how much.

``carry`` policies (:data:`ttt_sim.model.Carry`), with C - 1 open rows at most:

* official: inputs and targets of every TTT layer, also where the two are equal.
* ring: inputs; targets only if they are not the inputs, once for all layers since they are the token embeddings.
* keep_z: hidden rows and targets.
* online: the accumulated delta, the targets that the convolution still spans, and hidden rows that wait for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ttt_sim.dtypes import tensor_bytes
from ttt_sim.model import Model, TTTSettings

#: Width of the depthwise convolution of the targets.
CONV_TAPS = 5
MASTER_DTYPE = "fp32"
#: Up to C terms are summed in the online accumulator, too many for a 16-bit format.
ACCUMULATOR_DTYPE = "fp32"


@dataclass(frozen=True, slots=True, kw_only=True)
class CarryBuffer:
    """``rows`` x ``width`` elements per sequence; ``shared``: once for all TTT layers instead of one per layer."""

    name: str
    rows: int
    width: int
    dtype: str
    shared: bool = False

    @property
    def size_bytes(self) -> int:
        return tensor_bytes(self.rows * self.width, self.dtype)


def conv_lookahead(ttt: TTTSettings) -> int:
    """Rows after a row that its convolution needs; the rest of the taps are rows before it."""
    return CONV_TAPS // 2 if ttt.convolution == "symmetric" else 0


def own_targets(ttt: TTTSettings) -> bool:
    """Targets are the layer's inputs."""
    return ttt.target == "hidden_states"


def outer_first(model: Model, ttt: TTTSettings) -> bool:
    """The outer product of targets and hidden rows comes before the projection.

    The cheaper order where C u (d + f) >= d f (C + u), u rows of a weight being fast: C >= f if all of them are. The
    projection mixes columns of targets, so the outer product then has all d rows.
    """
    if not ttt.projection or ttt.contraction == "project_first":
        return False
    chunk, d, f, rows = ttt.chunk_tokens, model.d_model, model.d_ff, ttt.rows_of(model)
    return ttt.contraction == "outer_first" or chunk * rows * (d + f) >= d * f * (chunk + rows)


def target_columns(model: Model, ttt: TTTSettings) -> int:
    """Columns of the targets that an update needs: all that a projection mixes, or one for each fast row."""
    return model.d_model if ttt.projection else ttt.rows_of(model)


def value_columns(model: Model, ttt: TTTSettings) -> int:
    """Columns of the values that are multiplied with hidden rows: before the projection if that comes later."""
    return model.d_model if outer_first(model, ttt) else ttt.rows_of(model)


def carry_buffers(model: Model, ttt: TTTSettings, dtype: str) -> tuple[CarryBuffer, ...]:
    """Buffers of the open chunk; activations have ``dtype``. Empty ones are left out."""
    rows, d, f, width = ttt.chunk_tokens - 1, model.d_model, model.d_ff, target_columns(model, ttt)
    shared = not own_targets(ttt)
    if ttt.carry == "online":
        span, pending = min(rows, CONV_TAPS - 1), min(rows, conv_lookahead(ttt))
        buffers = [
            CarryBuffer(name="carry_targets", rows=span, width=width, dtype=dtype, shared=shared),
            CarryBuffer(name="carry_hidden", rows=pending, width=f, dtype=dtype),
            CarryBuffer(
                name="accumulator", rows=value_columns(model, ttt) if rows else 0, width=f, dtype=ACCUMULATOR_DTYPE
            ),
        ]
    elif ttt.carry == "keep_z":
        buffers = [
            CarryBuffer(name="carry_hidden", rows=rows, width=f, dtype=dtype),
            CarryBuffer(name="carry_targets", rows=rows, width=width, dtype=dtype, shared=shared),
        ]
    else:
        buffers = [CarryBuffer(name="carry_inputs", rows=rows, width=d, dtype=dtype)]
        if ttt.carry == "official":
            buffers.append(CarryBuffer(name="carry_targets", rows=rows, width=width, dtype=dtype))
        elif shared:
            buffers.append(CarryBuffer(name="carry_targets", rows=rows, width=width, dtype=dtype, shared=True))
    return tuple(buffer for buffer in buffers if buffer.rows)


def carry_bytes(model: Model, ttt: TTTSettings, dtype: str) -> int:
    """The open chunk of one sequence at its largest."""
    n_layers = len(ttt.layers_of(model))
    return sum(b.size_bytes * (1 if b.shared else n_layers) for b in carry_buffers(model, ttt, dtype))


def layer_weight_bytes(model: Model, ttt: TTTSettings) -> dict[str, int]:
    """Bytes of each fast tensor of one layer and sequence."""
    elements = ttt.rows_of(model) * model.d_ff
    weights = {"fast_weight": tensor_bytes(elements, ttt.fast_dtype)}
    if ttt.weight_write == "master":
        weights["fast_master"] = tensor_bytes(elements, MASTER_DTYPE)
    return weights


def fast_weight_bytes(model: Model, ttt: TTTSettings) -> int:
    """Fast weights of one sequence."""
    return len(ttt.layers_of(model)) * sum(layer_weight_bytes(model, ttt).values())
