"""Retrieval: passages become vectors of an index, a question searches it, the passages that it finds are the context.

*index*: an encoder runs over the passages of a context, and the index takes up their vectors. *ask*: the encoder runs
over the question, the index is searched, and the model reads the passages that were found, and the question, from an
empty state. *decode* goes on from there; *prefill* is a prompt of the model itself. Three kinds of index: all vectors
(flat), inverted lists of product-quantised codes (ivf_pq), a graph of neighbours that a search walks along. Operation
list R1 to R8 of docs/methods.md. Texts of passages stay with the host, like the ids of their tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import isqrt
from typing import Literal

import numpy as np

from ttt_sim.dtypes import tensor_bytes
from ttt_sim.errors import ConfigError, UnsupportedError
from ttt_sim.model import KVSettings, MethodSettings, Model, Scenario, TTTSettings
from ttt_sim.ops import Role, Trace
from ttt_sim.units import ceil_div
from ttt_sim.workload.attention import kv_bytes
from ttt_sim.workload.builder import Read, Run, Segment, TraceBuilder, Write
from ttt_sim.workload.kv_cache import DEFAULT_KV_DTYPE
from ttt_sim.workload.method import Method, State, options_of
from ttt_sim.workload.transformer import Decoder, check_dtype, decoder_trace

#: Values of a byte: centroids of each part of a product quantiser.
CODE_VALUES = 256
LINK_BYTES = 4
#: What a search keeps of a candidate: its number and its score.
FOUND_BYTES = 8
SCORE_DTYPE = "fp32"
#: Inverted lists by default: this many times the root of the number of vectors.
LISTS_PER_ROOT = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalOptions:
    """``passages`` of a corpus that all sequences search, None for an index of each sequence's own context;
    ``dimension`` of vectors; ``top_k`` passages of ``passage_tokens`` are read.

    ``lists`` (None: four times the root of the vectors), ``probes`` of them per search, ``code_bytes`` of a vector:
    ivf_pq. ``degree`` links of a node, ``hops`` of a search one after another, ``construction`` nodes that are visited
    to insert one: graph. ``encoder_``: a transformer over whole passages that sees all of their tokens.
    """

    index: Literal["flat", "ivf_pq", "graph"] = "flat"
    passages: int | None = None
    dimension: int = 1024
    passage_tokens: int = 512
    top_k: int = 8
    lists: int | None = None
    probes: int = 16
    code_bytes: int = 64
    degree: int = 32
    hops: int = 100
    construction: int = 200
    encoder_layers: int = 12
    encoder_width: int = 768
    encoder_ff: int = 3072
    encoder_heads: int = 12
    encoder_vocab: int = 30522

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ConfigError(f"option {name} is {value}, expected at least 1")
        if self.dimension % self.code_bytes:
            raise ConfigError(
                f"option code_bytes is {self.code_bytes}, which does not divide dimension {self.dimension}"
            )
        if self.encoder_width % self.encoder_heads:
            raise ConfigError(
                f"option encoder_heads is {self.encoder_heads}, which does not divide encoder_width "
                f"{self.encoder_width}"
            )

    @property
    def own(self) -> bool:
        """Every sequence searches its own context."""
        return self.passages is None

    def vectors(self, tokens: int, batch: int = 1) -> int:
        """Vectors of an index: of a context of ``tokens``, or of the corpus that those of ``batch`` are part of."""
        taken = max(ceil_div(tokens, self.passage_tokens), 1)
        return taken if self.passages is None else max(self.passages, batch * taken)

    def lists_of(self, vectors: int) -> int:
        """Inverted lists of an index of ``vectors``."""
        return min(vectors, LISTS_PER_ROOT * isqrt(vectors) if self.lists is None else self.lists)

    def held(self, tokens: int) -> int:
        """Tokens of the passages that are found in a context of ``tokens``."""
        return min(tokens, self.top_k * self.passage_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """Makes a vector of every sequence of tokens: post-norm layers, mean over tokens, projection to ``dimension``."""

    options: RetrievalOptions
    dtype: str

    def size(self, *shape: int) -> int:
        elements = 1
        for length in shape:
            elements *= length
        return tensor_bytes(elements, self.dtype)

    def declare(self, builder: TraceBuilder) -> None:
        o = self.options
        d, f = o.encoder_width, o.encoder_ff
        weights = {"embedding": (o.encoder_vocab, d), "projection": (o.dimension, d)}
        if o.dimension == d:
            del weights["projection"]
        layer = {
            "q_proj": (d, d), "k_proj": (d, d), "v_proj": (d, d), "o_proj": (d, d), "up_proj": (f, d),
            "down_proj": (d, f), "norms": (4, d),
        }  # fmt: skip
        for i in range(o.encoder_layers):
            weights |= {f"{i}.{name}": shape for name, shape in layer.items()}
        for name, shape in weights.items():
            builder.declare(f"encoder.{name}.weight", shape, self.dtype, Role.WEIGHT, layers=None, initial_version=0)

    def emit(self, s: Segment, sequences: int, tokens: int) -> Write:
        """Vectors of ``sequences`` of ``tokens`` each. Token ids are too small to count."""
        o = self.options
        d, rows = o.encoder_width, sequences * tokens
        stream = s.buffer("encoder.embedded", (rows, d), self.dtype)
        looked_up: Read = ("encoder.embedding.weight", self.size(min(rows, o.encoder_vocab), d))
        s.op(
            "embedding", reads=[looked_up], writes=[stream], dtype=self.dtype,
            m=rows, n=d,
        )  # fmt: skip
        for layer in range(o.encoder_layers):
            stream = self._layer(s, layer, stream, sequences, tokens)
        pooled = s.buffer("encoder.pooled", (sequences, d), self.dtype)
        s.op("embed_pool", reads=[stream], writes=[pooled], dtype=self.dtype, m=rows, n=d)
        if o.dimension == d:
            return pooled
        vectors = s.buffer("encoder.vectors", (sequences, o.dimension), self.dtype)
        self._product(s, "embed_proj", "projection", pooled, vectors, rows=sequences, n=o.dimension, k=d)
        return vectors

    def _product(
        self, s: Segment, kind: str, weight: str, source: Read, out: Write, *, rows: int, n: int, k: int
    ) -> None:
        weights: Read = (f"encoder.{weight}.weight", self.size(n, k))
        s.op(kind, reads=[source, weights], writes=[out], dtype=self.dtype, m=rows, n=n, k=k)

    def _layer(self, s: Segment, layer: int, stream: Read, sequences: int, tokens: int) -> Write:
        o = self.options
        d, f, rows = o.encoder_width, o.encoder_ff, sequences * tokens

        def buffer(name: str, width: int) -> Write:
            return s.buffer(f"encoder.{name}", (rows, width), self.dtype)

        def product(name: str, source: Read, out: Write, n: int, k: int) -> None:
            self._product(s, name, f"{layer}.{name}", source, out, rows=rows, n=n, k=k)

        def normed(name: str, kind: str, before: Read, added: Read) -> Write:
            total, out = buffer(f"{name}_sum", d), buffer(f"{name}_normed", d)
            s.op(kind, reads=[before, added], writes=[total], dtype=self.dtype, m=rows, n=d)
            weights: Read = (f"encoder.{layer}.norms.weight", self.size(2, d))  # a scale and a shift
            s.op("layernorm", reads=[total, weights], writes=[out], dtype=self.dtype, m=rows, n=d)
            return out

        q, k, v = (buffer(name, d) for name in ("q", "k", "v"))
        for out in (q, k, v):
            product(f"{out[0][-1]}_proj", stream, out, d, d)
        core, projected = buffer("attn_core", d), buffer("attn_projected", d)
        s.op(
            "attention", reads=[q, k, v], writes=[core], dtype=self.dtype, batch=sequences, m=tokens, n=tokens,
            k=d // o.encoder_heads, heads=o.encoder_heads, kv_heads=o.encoder_heads, pairs=tokens * tokens,
        )  # fmt: skip
        product("o_proj", core, projected, d, d)
        middle = normed("attn", "attn_residual", stream, projected)
        up, hidden, down = buffer("up", f), buffer("hidden", f), buffer("down", d)
        product("up_proj", middle, up, f, d)
        s.op("gelu", reads=[up], writes=[hidden], dtype=self.dtype, m=rows, n=f)
        product("down_proj", hidden, down, d, f)
        return normed("mlp", "mlp_residual", middle, down)


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """What is searched: ``vectors`` of one index, of which every chip of a group of ``ranks`` holds a part; ``copies``
    indexes, one per sequence, or one for all."""

    options: RetrievalOptions
    dtype: str
    vectors: int
    copies: int
    ranks: int

    @property
    def part(self) -> int:
        """Vectors of one index on one chip."""
        return ceil_div(self.vectors, self.ranks)

    def _row(self, vectors: int) -> int:
        return tensor_bytes(vectors * self.options.dimension, self.dtype)

    def declare(self, builder: TraceBuilder) -> None:
        o, lists = self.options, self.options.lists_of(self.vectors)
        tensors = {
            "vectors": ((self.copies, self.part, o.dimension), self.dtype),
            "links": ((self.copies, self.part, o.degree * LINK_BYTES), "int8"),
            "codes": ((self.copies, self.part, o.code_bytes), "int8"),
            "centroids": ((lists, o.dimension), self.dtype),
            "codebooks": ((CODE_VALUES, o.dimension), self.dtype),
        }
        kept = {"flat": ("vectors",), "ivf_pq": ("codes", "centroids", "codebooks"), "graph": ("vectors", "links")}
        for name in kept[o.index]:
            shape, dtype = tensors[name]
            builder.declare(f"index.{name}", shape, dtype, Role.INDEX, layers=None, initial_version=0)

    # --- taking up vectors --------------------------------------------------------------------------------------------

    def emit_add(self, s: Segment, vectors: Read, rows: int) -> None:
        """Take up ``rows`` vectors."""
        o = self.options
        if o.index == "ivf_pq":
            self._nearest_lists(s, vectors, rows, 1)
            distances = self._tables(s, vectors, rows)
            codes = s.buffer("index.new_codes", (rows, o.code_bytes), "int8")
            s.op("top_k", reads=[distances], writes=[codes], dtype=self.dtype, m=rows * o.code_bytes, n=CODE_VALUES)
            self._write(s, codes, [("index.codes", rows * o.code_bytes)], rows, o.code_bytes)
            return
        out: list[Write] = [("index.vectors", self._row(rows))]
        if o.index == "graph":
            self._walk(s, vectors, rows, min(o.construction, self.part))
            out.append(("index.links", rows * o.degree * LINK_BYTES))
        self._write(s, vectors, out, rows, o.dimension)

    def _write(self, s: Segment, source: Read, out: Sequence[Write], rows: int, width: int) -> None:
        """R1. Reads of the index cost nothing, they put writes in order."""
        order: list[Read] = [(name, 0) for name, _ in out]
        s.op("index_write", reads=[source, *order], writes=out, dtype=self.dtype, m=rows, n=width)

    # --- searching ----------------------------------------------------------------------------------------------------

    def emit_search(self, s: Segment, queries: Read, batch: int) -> Write:
        """The best passages of each of ``batch`` queries."""
        o = self.options
        if o.index == "flat":
            scores, n = self._scan_all(s, queries, batch), self.part
        elif o.index == "graph":
            n = min(o.hops * o.degree, self.part)
            scores = self._walk(s, queries, batch, n)
        else:
            lists = o.lists_of(self.vectors)
            n = ceil_div(self.part * min(o.probes, lists), lists)
            chosen = self._nearest_lists(s, queries, batch, min(o.probes, lists))
            tables = self._tables(s, queries, batch)
            scores = s.buffer("index.scores", (batch, n), SCORE_DTYPE)
            codes: Read = ("index.codes", min(batch * n, self.copies * self.part) * o.code_bytes)
            s.op(
                "pq_scan", reads=[tables, chosen, codes], writes=[scores], dtype=self.dtype, m=batch * n, n=o.code_bytes
            )
        found = self._best(s, "found", scores, batch, n, min(o.top_k, n))
        if self.ranks == 1:
            return found
        kept = min(o.top_k, n)
        gathered = s.buffer("index.gathered", (batch, self.ranks * kept * FOUND_BYTES), "int8")
        s.op(
            "allgather", reads=[found], writes=[gathered], dtype="int8", m=batch * kept * FOUND_BYTES, n=1,
            heads=self.ranks,
        )  # fmt: skip
        return self._best(s, "all_found", gathered, batch, self.ranks * kept, kept)

    def _best(self, s: Segment, name: str, scores: Read, rows: int, n: int, kept: int) -> Write:
        """R6."""
        out = s.buffer(f"index.{name}", (rows, kept * FOUND_BYTES), "int8")
        s.op("top_k", reads=[scores], writes=[out], dtype=self.dtype, m=rows, n=n)
        return out

    def _scan_all(self, s: Segment, queries: Read, batch: int) -> Write:
        """R2 of all vectors."""
        scores = s.buffer("index.scores", (batch, self.part), SCORE_DTYPE)
        sequences, rows = (1, batch) if self.copies == 1 else (batch, 1)
        s.op(
            "index_scan", reads=[queries, ("index.vectors", self._row(self.copies * self.part))], writes=[scores],
            dtype=self.dtype, batch=sequences, m=rows, n=self.part, k=self.options.dimension,
        )  # fmt: skip
        return scores

    def _nearest_lists(self, s: Segment, vectors: Read, rows: int, kept: int) -> Write:
        """R2 of the centroids of all lists, R6."""
        lists = self.options.lists_of(self.vectors)
        scores = s.buffer("index.list_scores", (rows, lists), SCORE_DTYPE)
        s.op(
            "index_scan", reads=[vectors, ("index.centroids", self._row(lists))], writes=[scores], dtype=self.dtype,
            m=rows, n=lists, k=self.options.dimension,
        )  # fmt: skip
        return self._best(s, "lists", scores, rows, lists, kept)

    def _tables(self, s: Segment, vectors: Read, rows: int) -> Write:
        """R3."""
        o = self.options
        tables = s.buffer("index.tables", (rows, o.code_bytes, CODE_VALUES), self.dtype)
        s.op(
            "pq_table", reads=[vectors, ("index.codebooks", self._row(CODE_VALUES))], writes=[tables], dtype=self.dtype,
            batch=o.code_bytes, m=rows, n=CODE_VALUES, k=o.dimension // o.code_bytes,
        )  # fmt: skip
        return tables

    def _walk(self, s: Segment, vectors: Read, rows: int, visited: int) -> Write:
        """R5: ``rows`` walks side by side, each along ``visited`` nodes, of ``degree`` after every hop."""
        o = self.options
        hops = ceil_div(visited, o.degree)
        scores = s.buffer("index.scores", (rows, visited), SCORE_DTYPE)
        touched = min(rows * visited, self.copies * self.part)
        links = min(rows * hops, self.copies * self.part) * o.degree * LINK_BYTES
        s.op(
            "graph_search", reads=[vectors, ("index.vectors", self._row(touched)), ("index.links", links)],
            writes=[scores], dtype=self.dtype, batch=rows, m=1, n=visited, k=o.dimension, heads=hops,
        )  # fmt: skip
        return scores


def index_of(options: RetrievalOptions, scenario: Scenario) -> Index:
    """The index that ``scenario`` searches or adds to."""
    tokens = scenario.calls[0].position if scenario.taken_tokens is None else scenario.taken_tokens
    if scenario.task == "index":
        tokens = scenario.context_tokens
    return Index(
        options=options, dtype=scenario.dtype, vectors=options.vectors(tokens, scenario.batch),
        copies=scenario.batch if options.own else 1, ranks=scenario.parallel.tp,
    )  # fmt: skip


def index_bytes(options: RetrievalOptions, vectors: int, dtype: str) -> tuple[int, int]:
    """Bytes of an index of ``vectors``: (those that grow with them, those of the quantisers)."""
    row = tensor_bytes(options.dimension, dtype)
    if options.index == "flat":
        return vectors * row, 0
    if options.index == "graph":
        return vectors * (row + options.degree * LINK_BYTES), 0
    return vectors * options.code_bytes, (options.lists_of(vectors) + CODE_VALUES) * row


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrieval:
    """Encoder and index beside a model; a question of ``question`` tokens searches before the first call, 0: none."""

    encoder: Encoder
    index: Index
    batch: int
    question: int

    def declare(self, builder: TraceBuilder) -> None:
        """Declare encoder and index, which are there in all phases."""
        self.encoder.declare(builder)
        self.index.declare(builder)

    def emit(self, s: Segment) -> Sequence[Read]:
        """The search. Returns what the passages are chosen by."""
        if not self.question:
            return ()
        return (self.index.emit_search(s, self.encoder.emit(s, self.batch, self.question), self.batch),)


def trace(model: Model, settings: MethodSettings, scenario: Scenario) -> Trace:
    """Raises :class:`UnsupportedError` for context-parallel chips."""
    if scenario.parallel.cp > 1:
        raise UnsupportedError(
            "a question reads the few passages that a search found, so there is no long context for context-parallel "
            "chips to share; a tensor-parallel group shares the index"
        )
    options = options_of(settings, RetrievalOptions)
    meta: dict[str, object] = {
        "model": model.name, "method": settings.name, "kv": asdict(settings.kv), "ttt": None,
        "options": asdict(options), "pinned": [],
    }  # fmt: skip
    encoder, index = Encoder(options=options, dtype=scenario.dtype), index_of(options, scenario)
    if scenario.task == "index":
        return _index_trace(encoder, index, scenario, meta)
    question = 0
    if scenario.task == "ask":
        call = scenario.calls[0]
        question = call.tokens
        prompt = Scenario.prefill(
            call.position + question, batch=scenario.batch, dtype=scenario.dtype, parallel=scenario.parallel
        )
        scenario = replace(scenario, calls=prompt.calls)
    ahead = Retrieval(encoder=encoder, index=index, batch=scenario.batch, question=question)
    return decoder_trace(Decoder.of(model, settings.kv, scenario), scenario, ahead=ahead, meta=meta)


def _index_trace(encoder: Encoder, index: Index, scenario: Scenario, meta: dict[str, object]) -> Trace:
    """Whole passages in every call, as many as it has tokens for; chips of a group share them."""
    check_dtype(scenario.dtype)
    passage = encoder.options.passage_tokens
    together = max(scenario.calls[0].tokens // passage, 1)
    whole, rest = divmod(scenario.context_tokens, passage)
    calls, left = divmod(whole, together)
    builder = TraceBuilder(1)
    encoder.declare(builder)
    index.declare(builder)
    step, position, listed = 0, 0, []
    for n_calls, passages, tokens in (
        (calls, together, passage),
        (min(left, 1), left, passage),
        (min(rest, 1), 1, rest),
    ):
        if not n_calls:
            continue
        positions = position + passages * tokens * np.arange(n_calls, dtype=np.int64)
        run = Run(first_step=step, positions=positions, tokens=passages * tokens, logits=False)
        segment = Segment(builder, run, ())
        sequences = ceil_div(scenario.batch * passages, index.ranks)
        index.emit_add(segment, encoder.emit(segment, sequences, tokens), sequences)
        builder.add_run(run, [(segment, -1)])
        listed += [[int(p), passages * tokens, False] for p in positions]
        step, position = step + n_calls, position + n_calls * passages * tokens
    return builder.build({**meta, "batch": scenario.batch, "dtype": scenario.dtype, "calls": listed})


def state(model: Model, settings: MethodSettings, tokens: int, dtype: str) -> State:
    """Keys and values of the passages that were found, and the index, if it is of the sequence alone."""
    options = options_of(settings, RetrievalOptions)
    grows, fixed = index_bytes(options, options.vectors(tokens), dtype)
    return State(
        kv_bytes=kv_bytes(model, settings.kv, options.held(tokens)), index_bytes=grows if options.own else 0,
        shared_bytes=fixed if options.own else grows + fixed,
    )  # fmt: skip


def held_tokens(settings: MethodSettings, tokens: int) -> int:
    """Those of the passages that are found."""
    return options_of(settings, RetrievalOptions).held(tokens)


def _settings(window_tokens: int | None, kv_dtype: str | None, ttt: TTTSettings | None) -> MethodSettings:
    return MethodSettings(name="rag", kv=KVSettings(dtype=kv_dtype or DEFAULT_KV_DTYPE), options=RetrievalOptions())


RAG = Method(
    name="rag", title="retrieval of passages", settings=_settings, trace=trace, state=state, family="retrieval",
    phases=("prefill", "ask", "decode", "index"), adapts="index", held_tokens=held_tokens, options=RetrievalOptions,
    needs=("an encoder of passages", "an index to search"),
    caveat="The model sees only passages that the search finds; how often these are the right ones is not simulated.",
)  # fmt: skip
