"""Fine-tuning: all weights of the model are trained on a context, and then serve it without the context.

A step is forward, loss over all rows, backward, optimiser, on whole sequences. With Adam in mixed precision a weight
costs 16 bytes: 2 of its own, 2 of its gradient, 4 each of a master copy and two moments. Afterwards the context is in
the weights, of which every user has a copy; a question is answered like by the model itself, without any context.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from ttt_sim.dtypes import tensor_bytes
from ttt_sim.errors import ConfigError, UnsupportedError
from ttt_sim.model import KVSettings, MethodSettings, Model, Scenario, TTTSettings
from ttt_sim.ops import Trace
from ttt_sim.units import ceil_div
from ttt_sim.workload.attention import kv_bytes
from ttt_sim.workload.backward import ATTENTION_PRODUCTS, MLP_PRODUCTS, Optimiser, Steps, TrainedMlp, Training
from ttt_sim.workload.kv_cache import DEFAULT_KV_DTYPE
from ttt_sim.workload.method import Method, State
from ttt_sim.workload.transformer import Decoder, decoder_trace


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOptions:
    """How a step of training is made. ``loss_tile_rows``: rows of logits that exist at a time, None for all;
    ``recompute``, ``master`` and ``clip`` as of :mod:`ttt_sim.workload.backward`."""

    optimiser: Optimiser = "adam"
    recompute: bool = True
    master: bool = True
    clip: bool = True
    loss_tile_rows: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is int and value < 1:
                raise ConfigError(f"option {field.name} is {value}, expected at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOptions(StepOptions):
    """How a context is trained on: ``epochs`` times, in sequences of ``sequence_tokens``."""

    epochs: int = 1
    sequence_tokens: int = 4096


def check_training(scenario: Scenario) -> None:
    """Raise :class:`UnsupportedError` where the backward pass has no rule for the chips of ``scenario``."""
    if scenario.parallel.pp > 1:
        raise UnsupportedError("training is modelled on one chip or a tensor-parallel group, without stages")
    if scenario.parallel.cp > 1:
        raise UnsupportedError(
            "training on context-parallel chips would pass gradients of keys and values back around the ring, for "
            "which there is no rule here; a tensor-parallel group trains"
        )


def check_context(scenario: Scenario) -> None:
    """Raise :class:`UnsupportedError` where context-parallel chips would share a context that is in the weights."""
    taken = scenario.taken_tokens
    if scenario.parallel.cp > 1 and taken is not None and scenario.calls[0].position < taken:
        raise UnsupportedError(
            "the context is in the weights, so too few keys are left for context-parallel chips to share; a "
            "tensor-parallel group is of use"
        )


def all_weights(model: Model) -> frozenset[str]:
    """Names of all weights but norms'."""
    head = () if model.tied_embeddings else ("lm_head",)
    return frozenset((*ATTENTION_PRODUCTS, *MLP_PRODUCTS, "embedding", *head))


def training_of(decoder: Decoder, options: StepOptions, *, other: TrainedMlp | None = None) -> Training:
    """The step of training that ``options`` describe; ``other``: the MLP of some layers."""
    steps = Steps(
        optimiser=options.optimiser, master=options.master, clip=options.clip, dtype=decoder.dtype,
        grad_dtype=decoder.dtype,
    )  # fmt: skip
    return Training(
        decoder=decoder, steps=steps, recompute=options.recompute, loss_tile_rows=options.loss_tile_rows, other=other
    )


def trace(model: Model, settings: MethodSettings, scenario: Scenario) -> Trace:
    """A step of training, or the calls of the trained model.

    Raises:
        UnsupportedError: training on stages or context-parallel chips, which are refused after it as well.
    """
    decoder = Decoder.of(model, settings.kv, scenario)
    learner = None
    options = training_options(settings)
    if scenario.task == "train":
        check_training(scenario)
        decoder = Decoder.of(model, settings.kv, scenario, trained=all_weights(model))
        learner = training_of(decoder, options)
    check_context(scenario)
    meta: dict[str, object] = {
        "model": model.name, "method": settings.name, "kv": asdict(settings.kv), "ttt": None,
        "options": asdict(options), "pinned": [],
    }  # fmt: skip
    return decoder_trace(decoder, scenario, learner=learner, meta=meta)


def state(model: Model, settings: MethodSettings, tokens: int, dtype: str) -> State:
    """A model of its own, and the cache of what was said since."""
    return State(kv_bytes=kv_bytes(model, settings.kv, tokens), fast_weight_bytes=tensor_bytes(model.parameters, dtype))


def training_options(settings: MethodSettings) -> TrainingOptions:
    """The options of ``settings``, which must be those of training."""
    if not isinstance(settings.options, TrainingOptions):
        raise ConfigError(f"method {settings.name} needs TrainingOptions and has {settings.options!r}")
    return settings.options


def _settings(window_tokens: int | None, kv_dtype: str | None, ttt: TTTSettings | None) -> MethodSettings:
    return MethodSettings(
        name="fine_tuning", kv=KVSettings(dtype=kv_dtype or DEFAULT_KV_DTYPE), options=TrainingOptions()
    )


def no_context(settings: MethodSettings, tokens: int) -> int:
    """Nothing of the context stands before a question."""
    return 0


def step_tokens(settings: MethodSettings, tokens: int) -> int:
    """Tokens of one step: a context is cut into sequences, one of which a step trains on."""
    return min(tokens, training_options(settings).sequence_tokens)


def steps(settings: MethodSettings, tokens: int) -> int:
    """Steps that take a context of ``tokens`` in."""
    return training_options(settings).epochs * ceil_div(tokens, step_tokens(settings, tokens))


FINE_TUNING = Method(
    name="fine_tuning", title="full fine-tuning", settings=_settings, trace=trace, state=state,
    family="training", phases=("prefill", "ask", "decode", "train"), adapts="train", held_tokens=no_context,
    step_tokens=step_tokens, steps=steps, batched=False, options=TrainingOptions,
    needs=("a backward pass", "optimiser state in memory", "all weights writable"),
    caveat="Facts taken up by training on a text are recalled less reliably than from the text (general knowledge).",
)  # fmt: skip
