"""LoRA (arXiv 2106.09685): beside a frozen weight W stand two trained factors of rank r, y = x W + (x A) B.

Training: one adapter learns from the whole batch, or every sequence has its own. The gradient stops at the lowest
product that has an adapter. Serving: every request brings its own adapter, the base is shared, so the products with the
factors are one small product per sequence, with gathered weights (Punica, arXiv 2310.18547; S-LoRA, arXiv 2311.03285).

A product that chips of a tensor-parallel group share by outputs has all of A and a part of B on each of them, one that
they share by inputs a part of A and all of B. The sums over chips that follow these products anyway add up the parts;
only the gradient of the whole factor needs a sum of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from ttt_sim.dtypes import tensor_bytes
from ttt_sim.errors import ConfigError
from ttt_sim.model import ONE_CHIP, KVSettings, MethodSettings, Model, Parallel, Scenario, TTTSettings
from ttt_sim.ops import Role, Trace
from ttt_sim.workload.attention import attention_weights, kv_bytes
from ttt_sim.workload.backward import ATTENTION_PRODUCTS, MLP_PRODUCTS
from ttt_sim.workload.builder import Read, Segment, TraceBuilder, Write
from ttt_sim.workload.fine_tuning import (
    TrainingOptions,
    check_context,
    check_training,
    no_context,
    step_tokens,
    steps,
    training_of,
)
from ttt_sim.workload.kv_cache import DEFAULT_KV_DTYPE
from ttt_sim.workload.method import Method, State
from ttt_sim.workload.transformer import Decoder, decoder_trace

Targets = Literal["attention", "mlp", "all"]
_TARGETS: Mapping[Targets, tuple[str, ...]] = {
    "attention": ATTENTION_PRODUCTS,
    "mlp": MLP_PRODUCTS,
    "all": (*ATTENTION_PRODUCTS, *MLP_PRODUCTS),
}
#: Products that read the same rows, and what each writes. Their adapters follow the last of them.
_GROUPS: tuple[Mapping[str, str], ...] = (
    {"q_proj": "q", "k_proj": "k", "v_proj": "v"},
    {"o_proj": "attn_projected"},
    {"gate_proj": "gate", "up_proj": "up"},
    {"down_proj": "mlp_out"},
)
#: Products of which a chip of a tensor-parallel group has a part of the inputs.
_BY_INPUTS = ("o_proj", "down_proj")


def product_shapes(model: Model, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of those products of a layer that ``targets`` name."""
    d, f = model.d_model, model.d_ff
    weights = {**attention_weights(model), "gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}
    return {name: (weights[name][0], weights[name][1]) for name in targets}


def adapter_parameters(model: Model, targets: Sequence[str], rank: int) -> int:
    """Parameters of one adapter: r (inputs + outputs) of every product that it has."""
    return model.n_layers * sum(rank * (n + k) for n, k in product_shapes(model, targets).values())


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """Adapters of the products ``targets`` of every layer; :class:`ttt_sim.workload.transformer.Adapters`.

    ``sequences``: how many there are, each for an equal part of the ``batch``. Factors of the product p are ``p_a`` (r,
    inputs) and ``p_b`` (outputs, r).
    """

    model: Model
    targets: tuple[str, ...]
    rank: int
    batch: int
    sequences: int
    dtype: str
    parallel: Parallel = ONE_CHIP

    def weights(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for name, (n, k) in product_shapes(self.model, self.targets).items():
            found[f"{name}_a"] = (self.sequences, self.rank, k)
            found[f"{name}_b"] = (self.sequences, n, self.rank)
        return found

    def reaches(self, products: Sequence[str]) -> bool:
        return not set(products).isdisjoint(self.targets)

    def declare(self, builder: TraceBuilder) -> None:
        for name, shape in self.weights().items():
            builder.declare(
                f"{name}.weight", shape, self.dtype, Role.FAST_WEIGHT, layers=range(self.model.n_layers),
                initial_version=0, in_place=True,
            )  # fmt: skip

    def emit(self, s: Segment, name: str, sources: Sequence[Read], out: Write, *, n: int, k: int) -> None:
        """L1 and L2 of all products that read the same rows, after the last of them."""
        group = next(group for group in _GROUPS if name in group)
        shapes = product_shapes(self.model, [product for product in group if product in self.targets])
        if name != tuple(group)[-1]:
            return
        m = self._rows(s)
        for product, (_, inputs) in shapes.items():
            s.op(
                "adapter_down", reads=[*sources, self._weight(f"{product}_a", inputs)], writes=[self._low(s, product)],
                dtype=self.dtype, batch=self.sequences, m=m, n=self.rank, k=inputs,
            )  # fmt: skip
        for product, (outputs, _) in shapes.items():
            total: Write = (group[product], self._size(self.batch * s.run.tokens * outputs))
            s.op(
                "adapter_up", reads=[self._low(s, product), self._weight(f"{product}_b", outputs), total],
                writes=[total], dtype=self.dtype, batch=self.sequences, m=m, n=outputs, k=self.rank,
                extra_lanes=self.sequences * m * outputs,
            )  # fmt: skip

    def emit_grad(
        self, s: Segment, name: str, out_grad: Read, source: Read, in_grad: Write | None, *, n: int, k: int
    ) -> None:
        if name not in self.targets:
            return
        m, r, count = self._rows(s), self.rank, self.sequences
        low, low_grad = self._low(s, name), self._low(s, name, "_grad")
        s.op(
            "input_grad", reads=[out_grad, self._weight(f"{name}_b", n)], writes=[low_grad], dtype=self.dtype,
            batch=count, m=m, n=r, k=n,
        )  # fmt: skip
        factors = ((f"{name}_b", out_grad, low, n, r), (f"{name}_a", low_grad, source, r, k))
        for factor, left, right, outputs, inputs in factors:
            grad = s.buffer(f"{factor}_grad", (count, outputs, inputs), self.dtype, Role.GRADIENT)
            s.op(
                "weight_grad", reads=[left, right], writes=[grad], dtype=self.dtype, batch=count, m=outputs, n=inputs,
                k=m,
            )  # fmt: skip
            whole = factor.endswith("_b") == (name in _BY_INPUTS)
            if self.parallel.tp > 1 and whole:
                s.op(
                    "allreduce", reads=[grad], writes=[grad], dtype=self.dtype, m=count * outputs * inputs, n=1,
                    heads=self.parallel.tp,
                )  # fmt: skip
        if in_grad is not None:
            s.op(
                "input_grad", reads=[low_grad, self._weight(f"{name}_a", k), in_grad], writes=[in_grad],
                dtype=self.dtype, batch=count, m=m, n=k, k=r, extra_lanes=count * m * k,
            )  # fmt: skip

    def _rows(self, s: Segment) -> int:
        """Rows of one adapter."""
        return self.batch * s.run.tokens // self.sequences

    def _size(self, elements: int) -> int:
        return tensor_bytes(elements, self.dtype)

    def _weight(self, name: str, width: int) -> Read:
        """A factor of all adapters."""
        return f"{name}.weight", self._size(self.sequences * self.rank * width)

    def _low(self, s: Segment, product: str, suffix: str = "") -> Write:
        """Rows of rank r between the two factors."""
        return s.buffer(f"{product}_low{suffix}", (self.batch, s.run.tokens, self.rank), self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraOptions(TrainingOptions):
    """Adapters of ``rank`` on all products of ``targets``. ``own``: every sequence of a batch trains an adapter of its
    own; else one learns from all."""

    rank: int = 16
    targets: Targets = "all"
    own: bool = False


def trace(model: Model, settings: MethodSettings, scenario: Scenario) -> Trace:
    """A step of training, or calls of sequences that have an adapter each.

    Raises:
        UnsupportedError: training on stages or context-parallel chips, which are refused after it as well.
    """
    options = _options(settings)
    trains = scenario.task == "train"
    adapters = LowRank(
        model=model, targets=_TARGETS[options.targets], rank=options.rank, batch=scenario.batch,
        sequences=scenario.batch if options.own or not trains else 1, dtype=scenario.dtype, parallel=scenario.parallel,
    )  # fmt: skip
    decoder = Decoder.of(model, settings.kv, scenario, adapters=adapters)
    learner = None
    if trains:
        check_training(scenario)
        learner = training_of(decoder, options)
    check_context(scenario)
    meta: dict[str, object] = {
        "model": model.name, "method": settings.name, "kv": asdict(settings.kv), "ttt": None,
        "options": asdict(options), "pinned": [],
    }  # fmt: skip
    if options.own:
        meta["updates"] = "together"
    return decoder_trace(decoder, scenario, learner=learner, meta=meta)


def state(model: Model, settings: MethodSettings, tokens: int, dtype: str) -> State:
    """An adapter, and the cache of what was said since."""
    options = _options(settings)
    parameters = adapter_parameters(model, _TARGETS[options.targets], options.rank)
    return State(kv_bytes=kv_bytes(model, settings.kv, tokens), fast_weight_bytes=tensor_bytes(parameters, dtype))


def _options(settings: MethodSettings) -> LoraOptions:
    if not isinstance(settings.options, LoraOptions):
        raise ConfigError(f"method {settings.name} needs LoraOptions and has {settings.options!r}")
    return settings.options


def _settings(window_tokens: int | None, kv_dtype: str | None, ttt: TTTSettings | None) -> MethodSettings:
    return MethodSettings(name="lora", kv=KVSettings(dtype=kv_dtype or DEFAULT_KV_DTYPE), options=LoraOptions())


def _per_task(window_tokens: int | None, kv_dtype: str | None, ttt: TTTSettings | None) -> MethodSettings:
    options = LoraOptions(rank=128, epochs=2, own=True)
    return MethodSettings(name="lora_ttt", kv=KVSettings(dtype=kv_dtype or DEFAULT_KV_DTYPE), options=options)


_NEEDS = ("a backward pass", "optimiser state in memory", "adapters writable", "products with weights per sequence")
LORA = Method(
    name="lora", title="LoRA", settings=_settings, trace=trace, state=state,
    family="training", phases=("prefill", "ask", "decode", "train"), adapts="train", held_tokens=no_context,
    step_tokens=step_tokens, steps=steps, options=LoraOptions, needs=_NEEDS,
    caveat="Learns less and forgets less than full fine-tuning (arXiv 2405.09673); like it, it recalls facts of a text "
    "less reliably than the text itself does.",
)  # fmt: skip
LORA_TTT = Method(
    name="lora_ttt", title="LoRA per task, at test time", settings=_per_task, trace=trace, state=state,
    family="training", phases=("prefill", "ask", "decode", "train"), adapts="train", held_tokens=no_context,
    step_tokens=step_tokens, steps=steps, options=LoraOptions, needs=_NEEDS,
    caveat="Up to six times the accuracy of fine-tuned models on ARC puzzles, with training examples made from each "
    "task (arXiv 2411.07279); gains depend on the task.",
)  # fmt: skip
