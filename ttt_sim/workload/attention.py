"""The attention half of a layer, and what it keeps: a full KV cache or a window of it, as it is or quantised.

A full cache grows in place: a call appends its rows and then attends to all rows, so every key is read in the cache's
format. A window is a ring buffer of w rows, too small for the rows of a long call. So a call attends to the ring as
earlier calls left it (w - 1 rows at most) and to its own rows before they are stored, then overwrites the oldest rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from ttt_sim.data_files import did_you_mean
from ttt_sim.dtypes import DTYPES
from ttt_sim.errors import ConfigError, UnsupportedError
from ttt_sim.model import KVSettings, Model, Parallel, Scenario
from ttt_sim.ops import IntArray, Num, Role
from ttt_sim.workload.builder import Read, Segment, TraceBuilder, Write, n_bytes

#: Formats that cost work to store and to read, and those of them that share a scale and zero point in groups.
_QUANTISED = ("fp8", "int8", "fp4", "int4")
_GROUPED = ("fp4", "int4")
_SCALE_BYTES = 2
#: Lane operations per element: multiply by a scale and add a zero point.
_QUANTISE_LANES = 2


def check_kv(kv: KVSettings) -> None:
    """Raise :class:`ConfigError` for settings of the cache that cannot be."""
    allowed = tuple(dtype for dtype in DTYPES if dtype != "tf32")
    if kv.dtype not in allowed:
        hint = did_you_mean(kv.dtype, allowed)
        raise ConfigError(f"KV dtype {kv.dtype!r} is unknown{hint}; allowed: {', '.join(allowed)}")
    if kv.window_tokens is not None and kv.window_tokens < 1:
        raise ConfigError(f"attention window is {kv.window_tokens} tokens, expected at least 1")
    if kv.group < 1:
        raise ConfigError(f"KV quantisation group is {kv.group} elements, expected at least 1")


def kv_token_bytes(model: Model, kv: KVSettings) -> int:
    """Bytes that one layer keeps of one token of one sequence: key, value and their scales."""
    return 2 * packed_bytes(kv, model.n_kv_heads * model.head_dim, heads=model.n_kv_heads)


def packed_bytes(kv: KVSettings, width: int, *, heads: int) -> int:
    """Bytes of ``width`` elements of one token, of ``heads`` heads, in the format of the cache with their scales."""
    scales = 0
    if kv.dtype in _GROUPED:
        scales = 2 * _SCALE_BYTES * -(-width // kv.group)  # a scale and a zero point
    elif kv.dtype in _QUANTISED and kv.per_token_scale:
        scales = _SCALE_BYTES * heads
    return int(n_bytes(width, kv.dtype)) + scales


def dequantise_lanes(kv: KVSettings, elements: Num) -> Num:
    """Lane operations in which ``elements`` are quantised, or read back."""
    return _QUANTISE_LANES * elements if kv.dtype in _QUANTISED else 0


def kept_tokens(kv: KVSettings, tokens: int) -> int:
    """Tokens of which attention keeps keys and values after ``tokens``."""
    return tokens if kv.window_tokens is None else min(tokens, kv.window_tokens)


def kv_bytes(model: Model, kv: KVSettings, tokens: int) -> int:
    """KV state of one sequence after ``tokens`` tokens, all layers."""
    return model.n_layers * kv_token_bytes(model, kv) * kept_tokens(kv, tokens)


def stored_tokens(kv: KVSettings, positions: IntArray) -> IntArray:
    """Tokens from before calls at ``positions`` that their rows see, where those are not stored first."""
    return positions if kv.window_tokens is None else np.minimum(positions, kv.window_tokens - 1)


def visible_pairs(kv: KVSettings, positions: IntArray, rows: int) -> IntArray:
    """Query-key pairs that ``rows`` new rows see after ``positions`` earlier ones: the sum of min(w, p + i)."""
    if kv.window_tokens is None:
        return rows * positions + rows * (rows + 1) // 2
    growing = np.clip(kv.window_tokens - positions, 0, rows)  # rows whose window is not full yet
    return growing * positions + growing * (growing + 1) // 2 + (rows - growing) * kv.window_tokens


def attention_weights(model: Model) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of an attention layer, as (outputs, inputs)."""
    q_width, kv_width, d = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim, model.d_model
    weights: dict[str, tuple[int, ...]] = {
        "attn_norm": (d,), "q_proj": (q_width, d), "k_proj": (kv_width, d), "v_proj": (kv_width, d),
        "qk_norm": (2, model.head_dim), "o_proj": (d, q_width),
    }  # fmt: skip
    if not model.qk_norm:
        del weights["qk_norm"]
    return weights


def held_by_chip(scenario: Scenario, kv: KVSettings) -> int:
    """Tokens of a sequence of which a chip keeps keys and values, at most.

    Raises:
        UnsupportedError: a chip of a context-parallel group would hold no key.
    """
    cp, training = scenario.parallel.cp, scenario.task == "train"
    kept = kept_tokens(kv, scenario.calls[0].position if training else scenario.context_tokens)
    fewest = kept_tokens(kv, scenario.calls[0].position + 1)
    if fewest < cp and not scenario.shares_prompt:
        raise UnsupportedError(f"{cp} chips cannot share {fewest} keys of a sequence: each must hold at least one")
    if scenario.shares_prompt:  # the last tokens, which a window keeps, are all on the last chip
        return min(kept, scenario.calls[0].tokens)
    return -(-kept // cp)


def declare_kv(builder: TraceBuilder, model: Model, kv: KVSettings, scenario: Scenario) -> None:
    """Declare the caches, with room for what they hold at the end. Version 0 is what they hold at the start, and all of
    it where a step of training reads them, which stores nothing.

    Raises:
        UnsupportedError: a chip of a context-parallel group would hold no key.
    """
    tokens = held_by_chip(scenario, kv)
    builder.declare(
        "kv",
        (scenario.batch, tokens, 2, model.n_kv_heads, model.head_dim),
        kv.dtype,
        Role.KV,
        layers=range(model.n_layers),
        size=scenario.batch * tokens * kv_token_bytes(model, kv),
        initial_version=0,
        in_place=kv.window_tokens is not None,
    )


class Cache(Protocol):
    """What stands in place of a cache of its own for every sequence."""

    def declare(self, builder: TraceBuilder) -> None:
        """Declare what is kept."""

    def emit_ahead(self, s: Segment, batch: int) -> None:
        """Ops before all others of the layer."""

    def emit(self, s: Segment, batch: int, q: Read, k: Read, v: Read) -> None:
        """F6 and F7 of ``batch`` sequences: store keys and values that are to be kept, write ``attn_core``."""


class Project(Protocol):
    """Emits a product of rows with a weight: :meth:`ttt_sim.workload.transformer.Decoder.project`."""

    def __call__(self, s: Segment, name: str, sources: Sequence[Read], out: Write, /, *, n: int, k: int) -> None: ...


def emit_attention(
    s: Segment, model: Model, kv: KVSettings, batch: int, dtype: str, parallel: Parallel, project: Project, *,
    cached: bool = True, cache: Cache | None = None, beside: Callable[[Read, Read, Read], Read] | None = None,
    shares_prompt: bool = False,
) -> None:  # fmt: skip
    """Ops F1 to F9, from ``layer_input`` to ``attended``, the residual stream in the middle of the layer.

    ``cached`` False: nothing is kept of the calls, as in training; those after position 0 see a cache from before.
    ``cache``: another one than that of a layer. ``beside``: emits another branch from queries, keys and values, after
    the core and before a window loses rows; returns what ``o_proj`` reads. ``shares_prompt``: the call is a
    context-parallel chip's part of a prompt.

    Raises:
        UnsupportedError: a question over a window that context-parallel chips share.
    """
    m, h = s.run.tokens, model.head_dim
    rows, d = batch * m, model.d_model
    q_width, kv_width = model.n_heads * h, model.n_kv_heads * h

    def size(*shape: int) -> int:
        return int(n_bytes(int(np.prod(shape)), dtype))

    if cache is not None:
        cache.emit_ahead(s, batch)
    stream: Read = ("layer_input", size(rows, d))
    normed = s.buffer("attn_normed", (batch, m, d), dtype)
    s.op("attn_norm", reads=[stream, ("attn_norm.weight", size(d))], writes=[normed], dtype=dtype, m=rows, n=d)
    q, k, v = (
        s.buffer(name, (batch, m, width), dtype) for name, width in (("q", q_width), ("k", kv_width), ("v", kv_width))
    )
    for out, width in ((q, q_width), (k, kv_width), (v, kv_width)):
        project(s, f"{out[0]}_proj", [normed], out, n=width, k=d)
    if model.qk_norm:
        normed_q, normed_k = (
            s.buffer("q_normed", (batch, m, q_width), dtype),
            s.buffer("k_normed", (batch, m, kv_width), dtype),
        )
        # The 2 h norm weights are left out of the byte count, as in the operation list.
        s.op(
            "qk_norm", reads=[q, k, ("qk_norm.weight", 0)], writes=[normed_q, normed_k],
            dtype=dtype, m=rows * (model.n_heads + model.n_kv_heads), n=h,
        )  # fmt: skip
        q, k = normed_q, normed_k
    rotated_q, rotated_k = (
        s.buffer("q_rotated", (batch, m, q_width), dtype),
        s.buffer("k_rotated", (batch, m, kv_width), dtype),
    )
    # Sequences advance together, so one row of cosines and sines serves all of them.
    s.op(
        "rope", reads=[q, k, ("rope_table", size(2 * m, h))], writes=[rotated_q, rotated_k],
        dtype=dtype, m=rows, n=q_width + kv_width,
    )  # fmt: skip
    mixed: Read = ("attn_core", size(rows, q_width))
    if not cached:
        stored = stored_tokens(kv, s.run.positions)
        emit_core(s, model, kv, batch, dtype, rotated_q, stored + m, stored=stored, fresh=(rotated_k, v))
    elif cache is not None:
        cache.emit(s, batch, rotated_q, rotated_k, v)
    elif shares_prompt:
        emit_shared_prompt(s, model, kv, batch, dtype, rotated_q, rotated_k, v, parallel)
    elif parallel.cp > 1 and kv.window_tokens is not None and m > 1:
        raise UnsupportedError(
            "several tokens after a window are not modelled on context-parallel chips, each of which has a part of it"
        )
    elif kv.window_tokens is None or m == 1:
        # One new row takes the slot of the token that leaves the window with it, so it may be stored before the core.
        emit_append(s, model, kv, batch, dtype, rotated_k, v)
        keys = s.run.positions + m
        if kv.window_tokens is not None:
            keys = np.minimum(keys, kv.window_tokens)
        if parallel.cp == 1:
            emit_core(s, model, kv, batch, dtype, rotated_q, keys, stored=keys, fresh=())
        else:
            keys = -(-keys // parallel.cp)
            emit_core(s, model, kv, batch, dtype, rotated_q, keys, stored=keys, fresh=(), pairs=m * keys)
            emit_joined_parts(s, rows * q_width, dtype, parallel)
    else:
        stored = stored_tokens(kv, s.run.positions)
        emit_core(s, model, kv, batch, dtype, rotated_q, stored + m, stored=stored, fresh=(rotated_k, v))
        if beside is not None:
            mixed, beside = beside(rotated_q, rotated_k, v), None
        emit_append(s, model, kv, batch, dtype, rotated_k, v)
    if beside is not None:
        mixed = beside(rotated_q, rotated_k, v)
    projected = s.buffer("attn_projected", (batch, m, d), dtype)
    project(s, "o_proj", [mixed], projected, n=d, k=q_width)
    if parallel.tp > 1:
        summed = s.buffer("attn_summed", (batch, m, d), dtype)
        s.op("allreduce", reads=[projected], writes=[summed], dtype=dtype, m=rows * d, n=1, heads=parallel.tp)
        projected = summed
    s.op(
        "attn_residual", reads=[stream, projected], writes=[s.buffer("attended", (batch, m, d), dtype)],
        dtype=dtype, m=rows, n=d,
    )  # fmt: skip


def emit_joined_parts(s: Segment, elements: int, dtype: str, parallel: Parallel) -> None:
    """P1: every chip of a context-parallel group has its part of the keys; their parts of ``attn_core`` become one."""
    core: Write = ("attn_core", int(n_bytes(elements, dtype)))
    s.op(
        "allreduce", reads=[core], writes=[core], dtype=dtype, m=elements, n=1, heads=parallel.cp,
        kv_heads=parallel.tp * parallel.cp,
    )  # fmt: skip


def emit_step_to_next(s: Segment, source: Read, received: Write, rows: int, dtype: str, parallel: Parallel) -> None:
    """P4: ``rows`` of all sequences arrive from the chip before, which reads them from ``source``."""
    s.op(
        "kv_ring", reads=[source], writes=[received], dtype=dtype, m=rows, n=1, heads=parallel.cp,
        kv_heads=parallel.tp * parallel.cp,
    )  # fmt: skip


def emit_shared_prompt(
    s: Segment, model: Model, kv: KVSettings, batch: int, dtype: str, q: Read, k: Read, v: Read, parallel: Parallel, *,
    filled: tuple[Read, ...] = (), found: tuple[Read, ...] = (),
) -> None:  # fmt: skip
    """F6 and F7 of the last of ``cp`` chips that share a prompt, which sees the tokens of all others.

    Full attention: keys and values go around the ring, one step beside the core over the part that came before
    (ring attention, arXiv 2310.01889). A window needs the last w - 1 tokens before this chip's: as many steps as chips
    hold them, the last one of the rest. ``filled``, ``found``: what storing and reading the chip's own part read
    besides.
    """
    m, ranks = s.run.tokens, parallel.cp
    token_bytes = kv_token_bytes(model, kv)
    width = model.n_heads * model.head_dim
    carried: Read = ("attn_core", int(n_bytes(batch * m * width, dtype)))

    def step(source: Read, tokens: int) -> Write:
        """P4: ``tokens`` rows of every sequence arrive from the chip before."""
        shape, size = (batch, tokens, 2, model.n_kv_heads, model.head_dim), batch * tokens * token_bytes
        received = s.buffer("kv_received", shape, kv.dtype, size=size)
        emit_step_to_next(s, source, received, batch * tokens, dtype, parallel)
        return received

    own = batch * m * token_bytes
    if kv.window_tokens is not None:
        fresh = (k, v)
        halo = min(kv.window_tokens - 1, (ranks - 1) * m)
        sizes = [min(m, halo - start) for start in range(0, halo, m)]  # rows of the chip before, and on
        reads: list[Read] = []
        if halo:
            emit_append(s, model, kv, batch, dtype, k, v)
        for i, tokens in enumerate(sizes):
            name, size = step((reads[-1][0] if reads else "kv", batch * tokens * token_bytes), tokens)
            reads.append((name, size, len(sizes) - 1 - i))
        keys = np.full_like(s.run.positions, halo + m)
        emit_core(s, model, kv, batch, dtype, q, keys, stored=keys - m, fresh=(*reads, *fresh), cached=())
        if not halo:
            emit_append(s, model, kv, batch, dtype, k, v)
        return
    emit_append(s, model, kv, batch, dtype, k, v, also=filled)
    keys = np.full_like(s.run.positions, m)
    received: Read = ("kv", own)
    emit_core(s, model, kv, batch, dtype, q, keys, stored=keys, fresh=(), pairs=keys * (m + 1) // 2, also=found)
    for _ in range(ranks - 1):
        received = step(received, m)
        emit_core(
            s, model, kv, batch, dtype, q, keys, stored=keys, fresh=(received, carried), cached=(), pairs=keys * m
        )


def emit_append(
    s: Segment, model: Model, kv: KVSettings, batch: int, dtype: str, k: Read, v: Read, *, family: str = "kv",
    also: tuple[Read, ...] = (),
) -> None:  # fmt: skip
    """F6: store the rows that are kept. The read of the cache costs nothing, it puts appends in order.

    ``also``: what is read beside the rows.
    """
    rows = batch * kept_tokens(kv, s.run.tokens)
    width = model.n_kv_heads * model.head_dim
    size = int(n_bytes(rows * width, dtype))
    s.op(
        "kv_append",
        reads=[(k[0], size), (v[0], size), (family, 0), *also],
        writes=[(family, rows * kv_token_bytes(model, kv))],
        dtype=dtype,
        m=rows,
        n=2 * width,
        extra_lanes=dequantise_lanes(kv, 2 * rows * width),
    )


def emit_core(
    s: Segment,
    model: Model,
    kv: KVSettings,
    batch: int,
    dtype: str,
    q: Read,
    keys: IntArray,
    *,
    stored: IntArray,
    fresh: tuple[Read, ...],
    cached: tuple[Read, ...] | None = None,
    pairs: Num | None = None,
    also: tuple[Read, ...] = (),
    together: bool = False,
    writes: tuple[Write, ...] | None = None,
) -> None:
    """F7 over ``keys`` rows, ``stored`` of them from the cache and the rest from ``fresh`` rows of this call.

    ``cached``: where the stored rows are read instead of the layer's own cache; ``pairs`` that the rows see, if not all
    that a window or the causal order allows; ``also``: what else is read. ``together``: the rows of all sequences see
    the same keys, which are read once, as if they were rows of one sequence. ``writes``: instead of ``attn_core``.
    """
    m, h = s.run.tokens, model.head_dim
    if together:
        m, batch = batch * m, 1
    if writes is None:
        writes = (s.buffer("attn_core", (batch, m, model.n_heads * h), dtype),)
    if cached is None:
        cached = (("kv", batch * kv_token_bytes(model, kv) * stored),) if stored.any() else ()
    s.op(
        "attention",
        reads=[q, *cached, *fresh, *also],
        writes=writes,
        dtype=dtype,
        batch=batch,
        m=m,
        n=keys,
        k=h,
        heads=model.n_heads,
        kv_heads=model.n_kv_heads,
        pairs=visible_pairs(kv, s.run.positions, m) if pairs is None else pairs,
        extra_lanes=dequantise_lanes(kv, 2 * batch * model.n_kv_heads * h * stored),
    )
