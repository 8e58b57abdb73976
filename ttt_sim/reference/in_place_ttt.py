"""In-Place TTT (arXiv 2604.06169): the down projection of a gated MLP is a fast weight.

Row-vector convention, one sequence, chunk i of C tokens; x are the inputs of the MLP, t its targets, both (C, d):

    Z   = silu(x Wg^T) * (x Wu^T)       (C, f)   hidden rows; Wg, Wu (f, d) are frozen
    O_i = Z_i W_i^T                     (C, d)   apply
    A_i = dwconv5(t_i)                  (C, d)   depthwise convolution inside the chunk, zero outside it; taps (d, 5)
    V_i = A_i P                         (C, d)   P (d, d) as stored, not transposed; V_i = A_i without a projection
    D_i = V_i^T Z_i                     (d, f)   minus the gradient of the loss -<Z W^T, V>
    W_(i+1) = W_i + eta D_i                      after the apply of the same chunk; W_0 is the trained down projection

Rounding, R() to the format of the result, as in the released code (github.com/ByteDance-Seed/In-Place-TTT, commit
be2324829b0e), where a product sums wide and rounds once:

    G = R(x Wg^T)  U = R(x Wu^T)  S = R(silu(G))  Z = R(S * U)  O = R(Z W^T)  A = R(conv)
    project first (C < f):   V = R(A P),    D = R(V^T Z)
    outer first (C >= f):    Q = R(A^T Z),  D = R(P^T Q)
    E = R(eta D),  W <- R(W + E)

With ``update_rows`` u only W[:u] is fast: D, V, E and O have u rows or columns, P (d, u), taps (u, 5) without a
projection, and the rest of an output is R(Z W_0[u:]^T), of all sequences together. Q keeps d rows.

Three forms compute the same: :class:`StreamingMlp` call by call, :func:`parallel` all chunks at once, and
:func:`context_parallel` on devices that own consecutive chunks. They differ in how the sum of the deltas is rounded.
Arrays have a leading batch of independent sequences: x (batch, tokens, d), W (batch, d, f).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from ttt_sim.reference import elementary
from ttt_sim.reference.checks import FloatArray, InputError, as_count
from ttt_sim.reference.exact import row_dot
from ttt_sim.reference.formats import BFLOAT16, FLOAT32, Format, round_to, wide_format
from ttt_sim.reference.meter import Meter, OpCount

TAPS = 5

Contraction = Literal["auto", "project_first", "outer_first"]
Convolution = Literal["symmetric", "causal"]
Carry = Literal["official", "ring", "keep_z", "online"]
Write = Literal["official", "fused", "master"]
_CHOICES = {"contraction": Contraction, "convolution": Convolution, "carry": Carry, "write": Write}


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpWeights:
    """Trained weights: ``gate``, ``up`` (f, d), ``down`` (d, f), ``conv`` (d, 5), ``projection`` (d, d) or None;
    of ``update_rows`` u, ``projection`` (d, u) or, without one, ``conv`` (u, 5)."""

    gate: FloatArray
    up: FloatArray
    down: FloatArray
    conv: FloatArray
    projection: FloatArray | None

    @property
    def d_model(self) -> int:
        return int(self.gate.shape[1])

    @property
    def d_ff(self) -> int:
        return int(self.gate.shape[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class TTTOptions:
    """``chunk`` C in tokens and ``rate`` eta of the update, and the choices that paper and code leave open.

    ``contraction``: order of the products of the delta; ``auto`` takes the cheaper one, as the released code does.
    ``convolution``: the code pads both sides (symmetric), the paper says causal. ``clip``: largest Frobenius norm of a
    delta. ``carry``: what is kept of the open chunk; ``official`` and ``ring`` keep inputs and compute the hidden rows
    of a chunk again when it is full, ``keep_z`` keeps hidden rows, ``online`` adds each row to a wide accumulator
    as soon as its convolution is complete. ``write``: ``official`` rounds delta, scaled delta and sum one after the
    other; ``fused`` adds the wide product to the weight and rounds once; ``master`` is fused into a float32 copy, of
    which the weight that is applied is the rounded shadow. ``own_targets``: t are the layer's own inputs, so a carry
    other than the official one need not keep them twice. ``update_rows``: the first rows of W that are fast, None for
    all.
    """

    chunk: int
    rate: float
    contraction: Contraction = "auto"
    convolution: Convolution = "symmetric"
    clip: float | None = None
    carry: Carry = "official"
    write: Write = "official"
    own_targets: bool = True
    dtype: Format = BFLOAT16
    fast_dtype: Format = BFLOAT16
    update_rows: int | None = None

    def __post_init__(self) -> None:
        as_count("chunk", self.chunk)
        if self.update_rows is not None:
            as_count("update_rows", self.update_rows)
        if not np.isfinite(self.rate):
            raise InputError(f"rate: is {self.rate!r}, expected a finite number")
        if self.clip is not None and not (np.isfinite(self.clip) and self.clip > 0):
            raise InputError(f"clip: is {self.clip!r}, expected a finite number above 0")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in get_args(choices):
                raise InputError(f"{name}: is {getattr(self, name)!r}, expected one of {', '.join(get_args(choices))}")

    def outer_first(self, d_model: int, d_ff: int) -> bool:
        """Whether the outer product comes before the projection: no dearer when C d f + d f u <= C d u + C u f, for all
        rows of a weight when the chunk is at least d_ff long."""
        if self.contraction != "auto":
            return self.contraction == "outer_first"
        u = d_model if self.update_rows is None else self.update_rows
        projection_last = self.chunk * d_model * d_ff + d_model * d_ff * u
        return projection_last <= self.chunk * d_model * u + self.chunk * u * d_ff

    @property
    def delta_dtype(self) -> Format:
        """A delta has the format of the weight that it is added to."""
        return FLOAT32 if self.write == "master" else self.fast_dtype

    @property
    def lookahead(self) -> int:
        """Rows after a row that its convolution reaches."""
        return TAPS // 2 if self.convolution == "symmetric" else 0

    @property
    def recomputes(self) -> bool:
        """Hidden rows of an open chunk are computed again when the chunk is full."""
        return self.carry in ("official", "ring")


@dataclass(slots=True)
class FastWeight:
    """The fast weight of a batch of sequences: ``applied`` (batch, u, f), u of d rows being fast, and its float32
    ``master``, if any."""

    applied: FloatArray
    master: FloatArray | None = None


# --- one chunk --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkRule:
    """The equations above for rows of a batch; ``layer`` and ``meter`` are for counting only."""

    weights: MlpWeights
    options: TTTOptions
    meter: Meter = field(default_factory=Meter)
    layer: int = -1

    def count(self, kind: str, chunk: int = -1) -> OpCount:
        return self.meter.op(kind, layer=self.layer, chunk=chunk)

    @property
    def fast_rows(self) -> int:
        """Rows of W that are fast."""
        u = self.options.update_rows
        return self.weights.d_model if u is None else u

    @property
    def target_columns(self) -> int:
        """Columns of the targets that an update needs: all that a projection mixes, or one for each fast row."""
        return self.fast_rows if self.weights.projection is None else self.weights.d_model

    def initial(self, batch: int) -> FastWeight:
        """W_0: every sequence gets a copy of the fast rows of the trained down projection."""
        o, c = self.options, self.count("fast_init")
        down = c.read(self.weights.down[: self.fast_rows], o.dtype)
        copies = np.repeat(down[None], batch, axis=0)
        if o.write == "master":
            master = c.write(copies, FLOAT32)
            return FastWeight(c.write(master, o.fast_dtype), master)
        return FastWeight(c.write(copies, o.fast_dtype))

    def hidden(self, x: FloatArray) -> FloatArray:
        """Z = R(R(silu(G)) * U); x (batch, n, d) to (batch, n, f)."""
        q, halves = self.options.dtype, []
        for kind, w in (("gate_proj", self.weights.gate), ("up_proj", self.weights.up)):
            c = self.count(kind)
            rows = c.read(x, q).reshape(-1, x.shape[-1])
            y = c.product(rows, c.read(w, q).T, q)
            halves.append(c.write(y, q).reshape(*x.shape[:-1], -1))
        return self._gated(*halves)

    def _gated(self, gate: FloatArray, up: FloatArray) -> FloatArray:
        q, c = self.options.dtype, self.count("silu_mul")
        s = round_to(elementary.silu(c.read(gate, q)), q, "silu")
        c.lanes += 5 * gate.size  # negate, exp, add, divide, multiply
        c.exps += gate.size
        c.divisions += gate.size
        return c.write(s * c.read(up, q), q)

    def apply(self, z: FloatArray, w: FastWeight, chunk: int = -1) -> FloatArray:
        """O = R(Z W^T), with the weight of each sequence."""
        o, c = self.options, self.count("fast_apply", chunk)
        w_t = np.swapaxes(c.read(w.applied, o.fast_dtype), -1, -2)
        return c.write(c.product(c.read(z, o.dtype), w_t, o.dtype), o.dtype)

    def with_frozen(self, fast: FloatArray, z: FloatArray) -> FloatArray:
        """Outputs (batch, n, d): those of the fast rows, and Z W_0^T of the others."""
        q, trained = self.options.dtype, self.weights.down[self.fast_rows :]
        if not trained.size:
            return fast
        c = self.count("down_proj")
        y = c.write(c.product(c.read(z, q).reshape(-1, z.shape[-1]), c.read(trained, q).T, q), q)
        return np.concatenate([fast, y.reshape(*z.shape[:-1], -1)], axis=-1)

    def convolved(self, t: FloatArray, chunk: int = -1, rows: slice = slice(None)) -> FloatArray:
        """A = R(sum over taps j of K[:, j] t[row + j - 2]) (causal: j - 4), ``rows`` of it; zero outside ``t``."""
        q, c = self.options.dtype, self.count("target_conv", chunk)
        after = self.options.lookahead
        padded = np.pad(c.read(t, q), ((0, 0), (TAPS - 1 - after, after), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, TAPS, axis=1)[:, rows]  # (batch, n, d, taps)
        c.flops += 2 * windows.size
        return c.write(row_dot(windows, c.read(self.weights.conv, q), q, "target_conv"), q)

    def target_values(self, a: FloatArray, chunk: int = -1) -> FloatArray:
        """V = R(A P) where the projection comes first, else A."""
        p, q = self.weights.projection, self.options.dtype
        if p is None or self._projects_after:
            return a
        c = self.count("target_proj", chunk)
        rows = c.read(a, q).reshape(-1, a.shape[-1])
        return c.write(c.product(rows, c.read(p, q), q), q).reshape(*a.shape[:-1], self.fast_rows)

    def update(self, w: FastWeight, t: FloatArray, z: FloatArray, chunk: int = -1) -> FastWeight:
        """W_(i+1) from the targets and hidden rows of a whole chunk."""
        o, q = self.options, self.options.dtype
        v = self.target_values(self.convolved(t, chunk), chunk)
        if self._projects_after:
            c = self.count("outer_gemm", chunk)
            outer = c.write(self._outer(c, v, z, o.delta_dtype), o.delta_dtype)
            return self._project_and_add(w, outer, o.delta_dtype, chunk)
        if o.write == "official" or o.clip is not None:
            c = self.count("delta_gemm", chunk)
            delta = c.write(self._outer(c, v, z, o.delta_dtype), o.delta_dtype)
            return self.add(w, delta, o.delta_dtype, chunk)
        c = self.count("delta_write", chunk)
        return self._accumulate(c, w, self._outer(c, v, z, wide_format(q)), o.rate)

    def delta(self, t: FloatArray, z: FloatArray) -> FloatArray:
        """D of a whole chunk in its own format, without the write."""
        o = self.options
        v = self.target_values(self.convolved(t))
        outer = self._outer(self.count("delta_gemm"), v, z, o.delta_dtype)
        if not self._projects_after:
            return outer
        return self._projected(self.count("outer_proj"), outer, o.delta_dtype, o.delta_dtype)

    @property
    def _projects_after(self) -> bool:
        return self.weights.projection is not None and self.options.outer_first(self.weights.d_model, self.weights.d_ff)

    def _outer(self, c: OpCount, v: FloatArray, z: FloatArray, fmt: Format) -> FloatArray:
        """V^T Z (batch, d or u, f)."""
        q = self.options.dtype
        return c.product(np.swapaxes(c.read(v, q), -1, -2), c.read(z, q), fmt)

    def _projected(self, c: OpCount, outer: FloatArray, outer_dtype: Format, fmt: Format) -> FloatArray:
        """P^T Q (batch, u, f)."""
        p = self.weights.projection
        assert p is not None
        p_t = np.repeat(c.read(p, self.options.dtype).T[None], outer.shape[0], axis=0)
        return c.product(p_t, c.read(outer, outer_dtype), fmt)

    def _project_and_add(self, w: FastWeight, outer: FloatArray, outer_dtype: Format, chunk: int) -> FastWeight:
        """D = R(P^T Q) and the write."""
        o = self.options
        if o.write == "official" or o.clip is not None:
            c = self.count("outer_proj", chunk)
            delta = c.write(self._projected(c, outer, outer_dtype, o.delta_dtype), o.delta_dtype)
            return self.add(w, delta, o.delta_dtype, chunk)
        c = self.count("delta_write", chunk)
        return self._accumulate(c, w, self._projected(c, outer, outer_dtype, wide_format(o.dtype)), o.rate)

    def clipped_rate(self, delta: FloatArray, delta_dtype: Format, chunk: int = -1) -> float | FloatArray:
        """eta, for each sequence times clip / norm where its delta is longer than the clip."""
        o = self.options
        if o.clip is None:
            return o.rate
        c, wide = self.count("delta_norm", chunk), wide_format(o.dtype)
        flat = c.read(delta, delta_dtype).reshape(delta.shape[0], delta.shape[1] * delta.shape[2])
        norm = round_to(np.sqrt(row_dot(flat, flat, wide, "delta_norm")), wide)
        c.lanes += 2 * flat.size  # multiply, add
        longer = norm > o.clip
        return o.rate * np.where(longer, o.clip / np.where(longer, norm, 1.0), 1.0)[:, None, None]

    def add(self, w: FastWeight, delta: FloatArray, delta_dtype: Format, chunk: int = -1) -> FastWeight:
        """W + eta D, where D has the format ``delta_dtype``."""
        o, rate = self.options, self.clipped_rate(delta, delta_dtype, chunk)
        if o.write == "official":
            c = self.count("delta_scale", chunk)
            scaled = c.write(rate * c.read(delta, delta_dtype), o.delta_dtype)
            c.lanes += delta.size
            c = self.count("weight_write", chunk)
            c.lanes += delta.size
            return FastWeight(c.write(c.read(w.applied, o.fast_dtype) + c.read(scaled, o.delta_dtype), o.fast_dtype))
        c = self.count("weight_write", chunk)
        return self._accumulate(c, w, c.read(delta, delta_dtype), rate)

    def _accumulate(self, c: OpCount, w: FastWeight, delta: FloatArray, rate: float | FloatArray) -> FastWeight:
        """W + eta D in one pass, one rounding for the sum."""
        o = self.options
        old, kept_dtype = (w.applied, o.fast_dtype) if w.master is None else (w.master, FLOAT32)
        c.lanes += 2 * delta.size  # scale, add
        new = c.write(c.read(old, kept_dtype) + rate * delta, kept_dtype)
        return FastWeight(new) if w.master is None else FastWeight(c.write(new, o.fast_dtype), new)


def _check_rows(x: FloatArray, t: FloatArray, batch: int, d: int) -> None:
    """Raise :class:`InputError` unless ``x`` and ``t`` are finite, (batch, n, d) each, with n of at least 1."""
    if x.ndim != 3 or x.shape[0] != batch or x.shape[1] < 1 or x.shape[2] != d:
        raise InputError(f"x: shape is {x.shape}, expected ({batch}, at least 1, {d})")
    if t.shape != x.shape:
        raise InputError(f"t: shape is {t.shape}, expected {x.shape}, that of x")
    for name, rows in (("x", x), ("t", t)):
        if not np.isfinite(rows).all():
            raise InputError(f"{name}: found an infinity or not a number, expected finite numbers")


# --- streaming form ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class OpenChunk:
    """Rows of the unfinished chunk, (batch, rows, ...) each: how many, and what the carry policy keeps of them."""

    rows: int
    inputs: FloatArray
    targets: FloatArray
    hidden: FloatArray
    accumulator: FloatArray


class StreamingMlp:
    """The MLP of one TTT layer, fed call by call; the control flow of the released inference code.

    A call brings m rows after the r rows of an open chunk. While r + m < C the MLP runs on the new rows with the
    current weight. Otherwise it runs on all r + m rows (again, where the carry recomputes), chunk by chunk: apply, and
    update if the chunk is full. Any split of a stream into calls gives the same bits; the online carry, which rounds
    its accumulator after every call, the same but for that rounding.
    """

    def __init__(
        self, weights: MlpWeights, options: TTTOptions, batch: int = 1, meter: Meter | None = None, layer: int = -1
    ) -> None:
        self.options = options
        self.batch = batch
        self.rule = ChunkRule(weights=weights, options=options, meter=meter or Meter(), layer=layer)
        self._weights = weights
        #: Every version of the fast weight, W_0 first; chunk i is applied with version i.
        self.versions: list[FastWeight] = []
        self._position = 0
        self.reset()

    def reset(self) -> None:
        """Start a new document: the trained weight and no open chunk."""
        b, d, f = self.batch, self._weights.d_model, self._weights.d_ff
        summed = d if self.rule._projects_after else self.rule.fast_rows
        self.versions = []
        self._position = 0
        self.open = OpenChunk(
            rows=0,
            inputs=np.zeros((b, 0, d)),
            targets=np.zeros((b, 0, self.rule.target_columns)),
            hidden=np.zeros((b, 0, f)),
            accumulator=np.zeros((b, summed, f)),
        )

    @property
    def weight(self) -> FloatArray:
        """The current weight (batch, u, f)."""
        if self.versions:
            return self.versions[-1].applied
        down = round_to(self._weights.down[: self.rule.fast_rows], self.options.fast_dtype, "fast_init")
        return np.repeat(down[None], self.batch, axis=0)

    @np.errstate(over="ignore")  # an infinity is an error where it is rounded
    def __call__(self, x: FloatArray, t: FloatArray) -> FloatArray:
        """Inputs and targets (batch, m, d) of the next m tokens to outputs (batch, m, d).

        Raises:
            InputError: a wrong shape, a value that is not finite, or a result beyond the range of its format.
        """
        _check_rows(x, t, self.batch, self._weights.d_model)
        if not self.versions:
            self.versions.append(self.rule.initial(self.batch))
        t = t[..., : self.rule.target_columns]
        full = self.open.rows + x.shape[1] >= self.options.chunk
        y = self._complete(x, t) if full else self._extend(x, t)
        self._position += x.shape[1]
        return y

    def _extend(self, x: FloatArray, t: FloatArray) -> FloatArray:
        """The chunk stays open."""
        o, state, chunk = self.options, self.open, self._position // self.options.chunk
        if o.carry == "official":
            state.inputs, state.targets = self._joined(x, t)
        z = self.rule.hidden(x)
        y = self.rule.apply(z, self.versions[-1], chunk)
        if o.carry == "online":
            self._fold(t, z, chunk)
        elif o.carry != "official":
            self._keep(x, t, z)
        else:
            state.rows += x.shape[1]
        return self.rule.with_frozen(y, z)

    def _complete(self, x: FloatArray, t: FloatArray) -> FloatArray:
        """The first chunk is full, and perhaps more of them."""
        o, size, m = self.options, self.options.chunk, x.shape[1]
        state, r = self.open, self.open.rows
        first = self._position // size
        if o.carry == "official" and r:
            x, t = self._joined(x, t)
        elif o.recomputes:
            x, t = np.concatenate([state.inputs, x], axis=1), np.concatenate([state.targets, t], axis=1)
        elif o.carry == "keep_z":
            t = np.concatenate([state.targets, t], axis=1)
        z = self.rule.hidden(x)
        if o.carry == "keep_z":
            z = np.concatenate([state.hidden, z], axis=1)
        n_chunks = -(-(r + m) // size)
        outputs = []
        for i in range(n_chunks):
            begin, end = i * size, min((i + 1) * size, r + m)
            new_from = max(begin, r)  # rows before this one had their outputs in earlier calls
            if o.recomputes:
                rows = z[:, begin:end]
                padded = np.pad(rows, ((0, 0), (0, size - rows.shape[1]), (0, 0)))
                outputs.append(self.rule.apply(padded, self.versions[-1], first + i)[:, new_from - begin : end - begin])
            else:
                skipped = r if o.carry == "online" else 0  # rows that z does not hold
                outputs.append(self.rule.apply(z[:, new_from - skipped : end - skipped], self.versions[-1], first + i))
            if o.carry == "online" and (begin < r or end - begin < size):
                self._fold(t[:, new_from - r : end - r], z[:, new_from - r : end - r], first + i)
            elif end - begin == size:
                skipped = r if o.carry == "online" else 0
                part = slice(begin - skipped, end - skipped)
                self.versions.append(self.rule.update(self.versions[-1], t[:, part], z[:, part], first + i))
        if o.carry != "online":
            self._save_rest(x, t, z, (r + m) % size)
        return self.rule.with_frozen(np.concatenate(outputs, axis=1), z[:, z.shape[1] - m :])

    def _joined(self, x: FloatArray, t: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Official carry: new buffers that hold the open rows and the new ones; twice, also where t is x."""
        q, c = self.options.dtype, self.rule.count("carry_append")
        inputs = np.concatenate([c.read(self.open.inputs, q), x], axis=1)
        targets = np.concatenate([c.read(self.open.targets, q), t], axis=1)
        return c.write(inputs, q), c.write(targets, q)

    def _keep(self, x: FloatArray, t: FloatArray, z: FloatArray) -> None:
        """Carry without copies: new rows go to the end of the buffers."""
        state = self.open
        if self.options.carry == "ring":
            state.inputs = np.concatenate([state.inputs, x], axis=1)
        else:
            state.hidden = np.concatenate([state.hidden, z], axis=1)
        state.targets = np.concatenate([state.targets, t], axis=1)
        state.rows += x.shape[1]
        self._count_kept(x, t, z)

    def _save_rest(self, x: FloatArray, t: FloatArray, z: FloatArray, rows: int) -> None:
        """Keep the rows after the last full chunk."""
        b, d, f = self.batch, self._weights.d_model, self._weights.d_ff
        state, kept = self.open, slice(t.shape[1] - rows, None)
        state.rows, state.targets = rows, t[:, kept]
        state.inputs = x[:, kept] if self.options.recomputes else np.zeros((b, 0, d))
        state.hidden = np.zeros((b, 0, f)) if self.options.recomputes else z[:, kept]
        if rows and self.options.carry == "official":
            q, c = self.options.dtype, self.rule.count("carry_append")
            c.write(state.inputs, q)
            c.write(state.targets, q)
        elif rows:
            self._count_kept(state.inputs, state.targets, state.hidden)

    def _count_kept(self, x: FloatArray, t: FloatArray, z: FloatArray) -> None:
        """Count rows that are stored in the layer's own buffers; targets of all layers are the caller's to store."""
        o = self.options
        stored = [x] if o.carry == "ring" else [z]
        if o.carry != "ring" and o.own_targets:
            stored.append(t)
        c = self.rule.count("carry_append")
        for rows in stored:
            c.write(rows, o.dtype)

    def _fold(self, t: FloatArray, z: FloatArray, chunk: int) -> None:
        """Online carry: new rows of one chunk. A row enters the accumulator once its convolution is complete."""
        o, state, before = self.options, self.open, self.open.rows
        after = before + t.shape[1]
        full = after == o.chunk
        done, ready = max(0, before - o.lookahead), after if full else max(0, after - o.lookahead)
        # Rows of the chunk from ``base`` on; what lies before no longer reaches a row that waits.
        base = before - state.targets.shape[1]
        targets = np.concatenate([state.targets, t], axis=1)
        hidden = np.concatenate([state.hidden, z], axis=1)
        if ready > done:
            a = self.rule.convolved(targets, chunk, slice(done - base, ready - base))
            v = self.rule.target_values(a, chunk)
            c, wide = self.rule.count("online_update", chunk), wide_format(o.dtype)
            old = c.read(state.accumulator, wide) if done else np.zeros_like(state.accumulator)
            rows = c.read(hidden[:, : ready - done], o.dtype)
            product = c.product(np.swapaxes(c.read(v, o.dtype), -1, -2), rows, wide)
            state.accumulator = c.write(old + product, wide)
        if full:
            self.versions.append(self._written(chunk))
            kept_targets = kept_hidden = 0
        else:
            kept_targets, kept_hidden = min(after, TAPS - 1), min(after, o.lookahead)
        state.rows = 0 if full else after
        state.targets = targets[:, targets.shape[1] - kept_targets :]
        state.hidden = hidden[:, hidden.shape[1] - kept_hidden :]
        if not full:
            self._count_folded(min(t.shape[1], kept_targets), min(t.shape[1], kept_hidden))

    def _count_folded(self, targets: int, hidden: int) -> None:
        o, state = self.options, self.open
        if not (targets and o.own_targets) and not hidden:
            return
        c = self.rule.count("carry_append")
        if o.own_targets:
            c.write(state.targets[:, state.targets.shape[1] - targets :], o.dtype)
        c.write(state.hidden[:, state.hidden.shape[1] - hidden :], o.dtype)

    def _written(self, chunk: int) -> FastWeight:
        """The next version from the accumulated product of a full chunk."""
        wide, rule = wide_format(self.options.dtype), self.rule
        if rule._projects_after:
            return rule._project_and_add(self.versions[-1], self.open.accumulator, wide, chunk)
        return rule.add(self.versions[-1], self.open.accumulator, wide, chunk)


# --- parallel forms ---------------------------------------------------------------------------------------------------

#: Outputs (batch, n, d) and all versions of the weight.
Outcome = tuple[FloatArray, list[FloatArray]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _AllChunks:
    """What all chunks of a prompt compute without any fast weight. ``z`` (batch, chunks, C, f), the last chunk padded
    with zero rows; ``scaled`` (batch, full chunks, u, f): E = R(eta D)."""

    rule: ChunkRule
    z: FloatArray
    scaled: FloatArray
    tokens: int

    @staticmethod
    def of(weights: MlpWeights, options: TTTOptions, x: FloatArray, t: FloatArray) -> _AllChunks:
        _check_rows(x, t, x.shape[0] if x.ndim else 1, weights.d_model)
        size, (batch, n, _) = options.chunk, x.shape
        n_chunks, n_full = -(-n // size), n // size
        rule = ChunkRule(weights=weights, options=options)
        z = rule.hidden(np.pad(x, ((0, 0), (0, n_chunks * size - n), (0, 0)))).reshape(batch, n_chunks, size, -1)
        full_t = t[:, : n_full * size, : rule.target_columns].reshape(batch * n_full, size, rule.target_columns)
        delta = rule.delta(full_t, z[:, :n_full].reshape(batch * n_full, size, weights.d_ff))
        scaled = round_to(rule.clipped_rate(delta, options.delta_dtype) * delta, options.delta_dtype, "delta_scale")
        return _AllChunks(rule=rule, z=z, scaled=scaled.reshape(batch, n_full, *delta.shape[1:]), tokens=n)

    def first_weight(self) -> FloatArray:
        return self.rule.initial(self.z.shape[0]).applied

    def apply(self, versions: list[FloatArray]) -> FloatArray:
        """y (batch, n, d), chunk i with version i."""
        batch, n_chunks, size, f = self.z.shape
        stacked = np.stack(versions[:n_chunks], axis=1).reshape(batch * n_chunks, -1, f)
        y = self.rule.apply(self.z.reshape(-1, size, f), FastWeight(stacked))
        rows = slice(self.tokens)
        z = self.z.reshape(batch, n_chunks * size, f)[:, rows]
        return self.rule.with_frozen(y.reshape(batch, n_chunks * size, -1)[:, rows], z)


@np.errstate(over="ignore")
def parallel(weights: MlpWeights, options: TTTOptions, x: FloatArray, t: FloatArray) -> Outcome:
    """All chunks at once, as in training: y (batch, n, d) and every version of the weight (batch, u, f).

    The sum W_0 + E_0 + E_1 + ... is kept wide (float32, or float64 for float64 weights), and each partial sum is
    rounded where it is stored; the streaming form rounds the sum itself after every chunk.

    Raises:
        InputError: as :class:`StreamingMlp`.
    """
    chunks, fast = _AllChunks.of(weights, options, x, t), options.fast_dtype
    total = chunks.first_weight()
    versions = [total]
    for i in range(chunks.scaled.shape[1]):
        total = round_to(total + chunks.scaled[:, i], wide_format(fast), "weight_write")
        versions.append(round_to(total, fast, "weight_write"))
    return chunks.apply(versions), versions


@np.errstate(over="ignore")
def context_parallel(
    weights: MlpWeights, options: TTTOptions, x: FloatArray, t: FloatArray, *, devices: int
) -> Outcome:
    """The three stages of the paper's context-parallel algorithm; device j owns consecutive whole chunks.

    (1) Each device computes Z and D of its chunks and the running sums of its E. (2) Exclusive scan over devices: each
    adds its total to what the device before it sends. (3) A device adds W_0, the scan's result and its running sums,
    rounds, and applies. All sums are kept wide. Returns what :func:`parallel` returns.

    Raises:
        InputError: as :class:`StreamingMlp`; or fewer chunks than devices.
    """
    chunks, fast = _AllChunks.of(weights, options, x, t), options.fast_dtype
    wide, n_chunks, n_full = wide_format(fast), chunks.z.shape[1], chunks.scaled.shape[1]
    if not 1 <= as_count("devices", devices) <= n_chunks:
        raise InputError(f"devices: is {devices}, expected at most {n_chunks}, the number of chunks")

    def plus(a: FloatArray, b: FloatArray) -> FloatArray:
        return round_to(a + b, wide, "weight_write")

    w_0 = chunks.first_weight()
    scan = np.zeros_like(w_0)
    versions: list[FloatArray] = []
    for owned in np.array_split(np.arange(n_chunks), devices):
        local = np.zeros_like(w_0)
        for i in owned.tolist():
            versions.append(round_to(plus(plus(w_0, scan), local), fast, "weight_write"))
            if i < n_full:
                local = plus(local, chunks.scaled[:, i])
        scan = plus(scan, local)
    if n_full == n_chunks:  # the delta of the last chunk matters only to what follows the prompt
        versions.append(round_to(plus(w_0, scan), fast, "weight_write"))
    return chunks.apply(versions), versions


def by_document(
    run: Callable[[FloatArray, FloatArray], Outcome], x: FloatArray, t: FloatArray, lengths: Sequence[int]
) -> list[Outcome]:
    """``run(x, t)`` on each document of a packed row of documents; every one starts from the trained weight.

    Raises:
        InputError: lengths that do not add up to the tokens of ``x``.
    """
    if sum(lengths) != x.shape[1] or any(n < 1 for n in lengths):
        raise InputError(f"lengths: {tuple(lengths)} add up to {sum(lengths)}, expected {x.shape[1]} positive tokens")
    ends = np.cumsum(np.array(lengths, dtype=np.int64)).tolist()
    return [run(x[:, end - n : end], t[:, end - n : end]) for n, end in zip(lengths, ends, strict=True)]
