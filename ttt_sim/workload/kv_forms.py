"""Other places for keys and values than a cache in one piece for each sequence: blocks that a table finds, a prefix
that all sequences share, a memory behind the main one.

Paged: memory is given out in blocks of tokens, so a sequence keeps whole blocks and is read in pieces of a block and
head. Shared prefix: the first tokens are the same in all sequences; they run once, are kept once and, with the rows of
all sequences together, read once. The outputs of both parts of the keys are joined by the sums of their exponentials.
Offloaded: keys and values lie behind the main memory and cross its link in every call; a call may fetch them layer by
layer ahead of their use, into two buffers in turn.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from ttt_sim.errors import ConfigError, UnsupportedError
from ttt_sim.model import KVSettings, MethodSettings, Model, Scenario, TTTSettings
from ttt_sim.ops import Num, Role, Trace
from ttt_sim.workload.attention import (
    Cache,
    declare_kv,
    emit_append,
    emit_core,
    emit_joined_parts,
    emit_shared_prompt,
    held_by_chip,
    kv_bytes,
    kv_token_bytes,
)
from ttt_sim.workload.builder import Read, Segment, TraceBuilder, Write
from ttt_sim.workload.kv_cache import DEFAULT_KV_DTYPE
from ttt_sim.workload.method import Method, State, options_of
from ttt_sim.workload.transformer import Decoder, decoder_trace

#: An entry of a block table: where a block lies.
TABLE_ENTRY_BYTES = 8
#: Exponentials of a row of scores are summed in this format.
SUM_DTYPE = "fp32"
#: Buffers for keys and values that are fetched ahead: one is used while the other is filled.
FETCH_SLOTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedOptions:
    """``block_tokens`` of a sequence lie together; 16 is the usual default of serving engines."""

    block_tokens: int = 16

    def __post_init__(self) -> None:
        if self.block_tokens < 1:
            raise ConfigError(f"option block_tokens is {self.block_tokens}, expected at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixOptions:
    """``shared_tokens`` at the start of a context that all sequences have in common; None: half of the context."""

    shared_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.shared_tokens is not None and self.shared_tokens < 1:
            raise ConfigError(f"option shared_tokens is {self.shared_tokens}, expected at least 1 or none")

    def of(self, tokens: int) -> int:
        """Shared ones of ``tokens`` tokens."""
        return tokens // 2 if self.shared_tokens is None else min(self.shared_tokens, tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadOptions:
    """``prefetch``: keys and values of a layer are fetched beside the work before they are used."""

    prefetch: bool = True


def _blocks(tokens: Num, block_tokens: int) -> Num:
    return -(-tokens // block_tokens)


def _without_cp(scenario: Scenario, what: str) -> None:
    if scenario.parallel.cp > 1:
        raise UnsupportedError(f"{what} is not modelled on context-parallel chips; kv_paged and kv are")


@dataclass(frozen=True, slots=True, kw_only=True)
class Paged:
    """Blocks of tokens and a table of them, the same for all layers. The host makes entries; calls read them."""

    model: Model
    kv: KVSettings
    scenario: Scenario
    block_tokens: int

    def declare(self, builder: TraceBuilder) -> None:
        batch, blocks = self.scenario.batch, int(_blocks(held_by_chip(self.scenario, self.kv), self.block_tokens))
        builder.declare(
            "kv", (batch, blocks * self.block_tokens, 2, self.model.n_kv_heads, self.model.head_dim), self.kv.dtype,
            Role.KV, layers=range(self.model.n_layers),
            size=batch * blocks * self.block_tokens * kv_token_bytes(self.model, self.kv), initial_version=0,
        )  # fmt: skip
        builder.declare(
            "block_table", (batch, blocks, TABLE_ENTRY_BYTES), "int8", Role.KV, layers=None, initial_version=0
        )

    def emit_ahead(self, s: Segment, batch: int) -> None:
        """Nothing is fetched ahead."""

    def emit(self, s: Segment, batch: int, q: Read, k: Read, v: Read) -> None:
        parallel, m = self.scenario.parallel, s.run.tokens
        dtype, entry = self.scenario.dtype, batch * TABLE_ENTRY_BYTES
        if self.scenario.shares_prompt:  # each chip has a table of its own part, in whose order it sends it on
            table: Read = ("block_table", entry * _blocks(m, self.block_tokens))
            emit_shared_prompt(s, self.model, self.kv, batch, dtype, q, k, v, parallel, filled=(table,), found=(table,))
            return
        keys = -(-(s.run.positions + m) // parallel.cp)
        found = _blocks(keys, self.block_tokens)
        filled = found - np.maximum(keys - m, 0) // self.block_tokens  # blocks that rows are added to
        emit_append(s, self.model, self.kv, batch, dtype, k, v, also=(("block_table", entry * filled),))
        rows: Read = ("kv", batch * kv_token_bytes(self.model, self.kv) * keys)
        emit_core(
            s, self.model, self.kv, batch, dtype, q, keys, stored=keys, fresh=(), cached=(rows,),
            also=(("block_table", entry * found),), pairs=None if parallel.cp == 1 else m * keys,
        )  # fmt: skip
        if parallel.cp > 1:
            emit_joined_parts(s, batch * m * self.model.n_heads * self.model.head_dim, dtype, parallel)


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedPrefix:
    """``shared`` first tokens are kept once for all sequences, what follows for each."""

    model: Model
    kv: KVSettings
    scenario: Scenario
    shared: int

    def declare(self, builder: TraceBuilder) -> None:
        own = self.scenario.context_tokens - self.shared
        for name, sequences, tokens in (("kv_shared", 1, self.shared), ("kv", self.scenario.batch, own)):
            if tokens:
                builder.declare(
                    name, (sequences, tokens, 2, self.model.n_kv_heads, self.model.head_dim), self.kv.dtype, Role.KV,
                    layers=range(self.model.n_layers), size=sequences * tokens * kv_token_bytes(self.model, self.kv),
                    initial_version=0,
                )  # fmt: skip

    def emit_ahead(self, s: Segment, batch: int) -> None:
        """Nothing is fetched ahead."""

    def emit(self, s: Segment, batch: int, q: Read, k: Read, v: Read) -> None:
        model, kv, dtype, m = self.model, self.kv, self.scenario.dtype, s.run.tokens
        token_bytes = kv_token_bytes(model, kv)
        if int(s.run.positions[0]) < self.shared:
            keys = s.run.positions + m
            emit_append(s, model, kv, batch, dtype, k, v, family="kv_shared")
            emit_core(
                s, model, kv, batch, dtype, q, keys, stored=keys, fresh=(), cached=(("kv_shared", token_bytes * keys),)
            )
            return
        emit_append(s, model, kv, batch, dtype, k, v)
        before = s.run.positions - self.shared
        keys = before + m
        own: Read = ("kv", batch * token_bytes * keys)
        pairs = m * before + m * (m + 1) // 2
        if not self.shared:
            emit_core(s, model, kv, batch, dtype, q, keys, stored=keys, fresh=(), cached=(own,))
            return
        rows, heads = batch * m, model.n_heads
        parts = []
        for part in ("shared", "own"):
            out = s.buffer(f"attn_core_{part}", (batch, m, heads * model.head_dim), dtype)
            sums = s.buffer(f"attn_sums_{part}", (batch, m, heads), SUM_DTYPE)
            parts.append((out, sums))
        all_shared = np.full_like(keys, self.shared)
        emit_core(
            s, model, kv, batch, dtype, q, all_shared, stored=all_shared, fresh=(),
            cached=(("kv_shared", token_bytes * self.shared),), pairs=rows * all_shared, together=True, writes=parts[0],
        )  # fmt: skip
        emit_core(
            s, model, kv, batch, dtype, q, keys, stored=keys, fresh=(), cached=(own,), pairs=pairs, writes=parts[1]
        )
        s.op(
            "join_parts", reads=[*parts[0], *parts[1]],
            writes=[s.buffer("attn_core", (batch, m, heads * model.head_dim), dtype)], dtype=dtype, m=rows * heads,
            n=model.head_dim,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """A cache behind the main memory, of which every layer's part comes into one of two buffers ahead of its use."""

    model: Model
    kv: KVSettings
    scenario: Scenario

    def declare(self, builder: TraceBuilder) -> None:
        declare_kv(builder, self.model, self.kv, self.scenario)
        tokens = self.scenario.calls[-1].position
        if tokens:
            builder.declare_slots(
                "kv_near", (self.scenario.batch, tokens, 2, self.model.n_kv_heads, self.model.head_dim), self.kv.dtype,
                Role.ACTIVATION, slots=FETCH_SLOTS,
                size=self.scenario.batch * tokens * kv_token_bytes(self.model, self.kv),
            )  # fmt: skip

    def _stored(self, s: Segment, batch: int, family: str) -> Write:
        return family, batch * kv_token_bytes(self.model, self.kv) * s.run.positions

    def emit_ahead(self, s: Segment, batch: int) -> None:
        if s.run.from_empty:
            return
        s.op(
            "kv_fetch", reads=[self._stored(s, batch, "kv")], writes=[self._stored(s, batch, "kv_near")],
            dtype=self.kv.dtype, m=batch * s.run.positions, n=2 * self.model.n_kv_heads * self.model.head_dim,
        )  # fmt: skip

    def emit(self, s: Segment, batch: int, q: Read, k: Read, v: Read) -> None:
        dtype, stored = self.scenario.dtype, s.run.positions
        emit_append(s, self.model, self.kv, batch, dtype, k, v)
        cached = () if s.run.from_empty else (self._stored(s, batch, "kv_near"),)
        keys = stored + s.run.tokens
        emit_core(s, self.model, self.kv, batch, dtype, q, keys, stored=stored, fresh=(k, v), cached=cached)


def _trace(
    model: Model, settings: MethodSettings, scenario: Scenario, *, cache: Cache | None, shared: int = 0,
    placed_far: tuple[str, ...] = (),
) -> Trace:  # fmt: skip
    decoder = Decoder.of(model, settings.kv, scenario, cache=cache, shared_tokens=shared)
    meta: dict[str, object] = {
        "model": model.name, "method": settings.name, "kv": asdict(settings.kv), "ttt": None,
        "options": asdict(settings.options), "pinned": [],  # type: ignore[call-overload]
    }  # fmt: skip
    if placed_far:
        meta["placed_far"] = list(placed_far)
    return decoder_trace(decoder, scenario, meta=meta)


def paged_trace(model: Model, settings: MethodSettings, scenario: Scenario) -> Trace:
    """Raises :class:`UnsupportedError` where a chip of a context-parallel group would hold no key."""
    options = options_of(settings, PagedOptions)
    cache = Paged(model=model, kv=settings.kv, scenario=scenario, block_tokens=options.block_tokens)
    return _trace(model, settings, scenario, cache=cache)


def paged_state(model: Model, settings: MethodSettings, tokens: int, dtype: str) -> State:
    """Whole blocks, and the table of them."""
    options = options_of(settings, PagedOptions)
    blocks = int(_blocks(tokens, options.block_tokens))
    return State(kv_bytes=kv_bytes(model, settings.kv, blocks * options.block_tokens) + blocks * TABLE_ENTRY_BYTES)


def shared_tokens(options: PrefixOptions, scenario: Scenario) -> int:
    """Tokens that the sequences of ``scenario`` have in common: of a prompt from an empty state, or of the context that
    was there before."""
    first = scenario.calls[0].position
    if first == 0:
        return options.of(scenario.context_tokens)
    taken = first if scenario.taken_tokens is None else scenario.taken_tokens
    return min(options.of(taken), first)


def prefix_trace(model: Model, settings: MethodSettings, scenario: Scenario) -> Trace:
    """Raises :class:`UnsupportedError` for context-parallel chips."""
    _without_cp(scenario, "a shared prefix")
    shared = shared_tokens(options_of(settings, PrefixOptions), scenario)
    cache = SharedPrefix(model=model, kv=settings.kv, scenario=scenario, shared=shared)
    return _trace(model, settings, scenario, cache=cache, shared=shared)


def prefix_state(model: Model, settings: MethodSettings, tokens: int, dtype: str) -> State:
    """What follows the prefix; the prefix itself belongs to all sequences together."""
    shared = options_of(settings, PrefixOptions).of(tokens)
    return State(
        kv_bytes=kv_bytes(model, settings.kv, tokens - shared), shared_bytes=kv_bytes(model, settings.kv, shared)
    )


def offload_trace(model: Model, settings: MethodSettings, scenario: Scenario) -> Trace:
    """Raises :class:`UnsupportedError` for prefetching on context-parallel chips."""
    cache = None
    if options_of(settings, OffloadOptions).prefetch:
        _without_cp(scenario, "fetching keys and values ahead")
        cache = Fetched(model=model, kv=settings.kv, scenario=scenario)
    names = tuple(f"layers.{layer}.kv" for layer in range(model.n_layers))
    return _trace(model, settings, scenario, cache=cache, placed_far=names)


def offload_state(model: Model, settings: MethodSettings, tokens: int, dtype: str) -> State:
    """Keys and values, all of them behind the main memory."""
    held = kv_bytes(model, settings.kv, tokens)
    return State(kv_bytes=held, far_bytes=held)


def _paged(window_tokens: int | None, kv_dtype: str | None, ttt: TTTSettings | None) -> MethodSettings:
    return MethodSettings(name="kv_paged", kv=KVSettings(dtype=kv_dtype or DEFAULT_KV_DTYPE), options=PagedOptions())


def _prefix(window_tokens: int | None, kv_dtype: str | None, ttt: TTTSettings | None) -> MethodSettings:
    return MethodSettings(name="kv_prefix", kv=KVSettings(dtype=kv_dtype or DEFAULT_KV_DTYPE), options=PrefixOptions())


def _offload(window_tokens: int | None, kv_dtype: str | None, ttt: TTTSettings | None) -> MethodSettings:
    return MethodSettings(
        name="kv_offload", kv=KVSettings(dtype=kv_dtype or DEFAULT_KV_DTYPE), options=OffloadOptions()
    )


_EXACT = "Results are those of a plain cache."

KV_PAGED = Method(
    name="kv_paged", title="full attention, paged KV cache", settings=_paged, trace=paged_trace, state=paged_state,
    options=PagedOptions, needs=("reads at addresses that a table gives at run time",), caveat=_EXACT,
)  # fmt: skip
KV_PREFIX = Method(
    name="kv_prefix", title="full attention, shared prefix", settings=_prefix, trace=prefix_trace, state=prefix_state,
    options=PrefixOptions, caveat=f"{_EXACT} Only for sequences that begin with the same tokens.",
)  # fmt: skip
KV_OFFLOAD = Method(
    name="kv_offload", title="full attention, KV cache behind the main memory", settings=_offload, trace=offload_trace,
    state=offload_state, options=OffloadOptions, needs=("a memory behind the main one",),
    caveat=_EXACT,
)  # fmt: skip
