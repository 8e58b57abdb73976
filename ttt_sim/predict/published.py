"""Published figures of chips as cases: one file with their citations, read strictly (docs/validation.md).

Every case names a chip file, a workload, and the figure that somebody published for it; :mod:`ttt_sim.predict.serving`
predicts it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttt_sim.config.chip_file import read_chip_file, split_variant
from ttt_sim.config.fields import CERTAINTIES, Choice, Field, Reader, Text, TextTable, WholeNumber
from ttt_sim.config.groups import Group, Items
from ttt_sim.config.yaml_reader import Problems, YamlMapping, YamlScalar, read_yaml
from ttt_sim.dtypes import DTYPES
from ttt_sim.errors import ConfigError
from ttt_sim.predict.harness import HARNESSES
from ttt_sim.predict.models import BLOCK_HALF_BITS, MODELS, Formats
from ttt_sim.predict.rows import Row, parse_rows

FILE = Path(__file__).with_name("published.yaml")
SATURATED = "saturated"
#: Share of the memory that a saturated server keeps for activations and work space, unless a case states another.
RESERVED = 0.1

#: Metric: its unit for people, and what it is.
METRICS: dict[str, tuple[str, str]] = {
    "tokens_per_s": ("tok/s", "tokens of the answers of all sequences, prefill included"),
    "tokens_per_s_user": ("tok/s per user", "tokens of one sequence while it decodes"),
    "step_ms": ("ms", "a decode step"),
    "total_s": ("s", "prompt and answer of one batch"),
    "ttft_ms": ("ms", "time to the first token"),
    "prefill_tokens_per_s": ("tok/s in", "tokens of prompts"),
    "power_w": ("W", "all chips together in a decode step"),
    "op_us": ("us", "one op"),
    "op_tops": ("Top/s", "rate of products in a row"),
    "op_tops_per_w": ("Top/s/W", "operations of products in a row for their energy, idle power included"),
}
OP_METRICS = ("op_us", "op_tops", "op_tops_per_w")
#: What a case is used for.
USES: dict[str, str] = {
    "count": "counts in the medians",
    "fit": "a constant of the chip file was fitted to it",
    "micro": "a figure of a kernel or of the whole chip, not of inference",
    "speculative": "with speculative decoding: compared with the plain prediction",
    "aside": "shown and not counted, for the reason stated",
}
_NUMBER = r"[0-9]+(\.[0-9]+)?"
_NUMBER_HELP = "a number such as 36 or 0.75"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One published figure. ``prompt``, ``answer`` in tokens; ``batch`` 0 where a saturated server fills the memory.

    ``tp`` of the ``chips`` share each layer, ``stages`` groups follow one another; ``value_to`` is the upper end of a
    range; ``against`` and ``against_weights``: the figure is the metric over that of this other chip.
    ``call_tokens``: most prompt tokens of a call, 0 for any; ``most_sequences``: most that the software serves at once,
    0 for any; ``row``: the op of an ``op_`` metric.
    """

    name: str
    chip: str
    metric: str
    value: float
    value_to: float
    use: str
    source: str
    certainty: str
    line: int
    formats: Formats
    model: str = ""
    chips: int = 1
    tp: int = 1
    batch: int = 1
    prompt: int = 1
    answer: int = 0
    call_tokens: int = 0
    most_sequences: int = 0
    reserved: float = RESERVED
    speculation: str = ""
    against: str = ""
    against_weights: str = "bf16"
    row: Row | None = None
    harness: str = "bare_kernel"
    note: str = ""
    reason: str = ""

    @property
    def stages(self) -> int:
        return self.chips // self.tp

    @property
    def file(self) -> str:
        """The chip file without its variant."""
        return str(split_variant(self.chip)[0])


def _format(doc: str, *, stored: bool = False) -> Choice:
    return Choice(doc=doc, options=(*DTYPES, *BLOCK_HALF_BITS) if stored else DTYPES)


_FIELDS: dict[str, Field] = {
    "name": Text(doc="Unique.", required=True, pattern=r"[a-z0-9_-]+", pattern_help="small letters, digits, - and _"),
    "chip": Text(doc="Chip file, with :VARIANT for another version.", required=True),
    "metric": Choice(doc="What was published.", options=tuple(METRICS), required=True),
    "value": Text(doc="The figure, in the unit of metric.", required=True, pattern=_NUMBER, pattern_help=_NUMBER_HELP),
    "value_to": Text(doc="Upper end, where a range was published.", pattern=_NUMBER, pattern_help=_NUMBER_HELP),
    "use": Choice(doc="What the case is used for.", options=tuple(USES), default="count"),
    "source": Text(doc="A key of sources.", required=True),
    "certainty": Choice(doc="How sure the figure and its workload are.", options=CERTAINTIES, required=True),
    "model": Choice(doc="A model of ttt_sim/predict/models.py.", options=tuple(MODELS)),
    "chips": WholeNumber(doc="Chips together.", default=1),
    "tp": WholeNumber(doc="Chips that share each layer; the others follow one another. All by default."),
    "weights": _format("Format of stored weights.", stored=True),
    "product": _format("Format that the matrix units multiply, that of the weights by default."),
    "activations": _format("Format of activations and of the head."),
    "kv": _format("Format of keys and values, that of activations by default."),
    "batch": Text(
        doc="Sequences, or saturated.", default="1", pattern=rf"[1-9][0-9]{{0,5}}|{SATURATED}",
        pattern_help=f"a whole number or {SATURATED}",
    ),
    "prompt": WholeNumber(doc="Tokens of a prompt; of a step: tokens held before the answer.", default=1),
    "answer": Text(doc="Tokens of an answer.", default="0", pattern=r"[0-9]{1,7}", pattern_help="a whole number"),
    "call_tokens": WholeNumber(doc="Most prompt tokens of a call.", default=0),
    "most_sequences": WholeNumber(doc="Most sequences that the software serves at once.", default=0),
    "reserved": Text(
        doc="Share of the memory that a server keeps back.", pattern=r"0?\.[0-9]+", pattern_help="a share such as 0.1"
    ),
    "speculation": Text(doc="Tokens accepted in a step, or unknown.", default="", pattern=r"unknown|[0-9]+(\.[0-9]+)?",
                        pattern_help="unknown or a number"),
    "against": Text(doc="The figure is a ratio over this chip.", default=""),
    "against_weights": _format("Format of weights on the other chip, bf16 by default.", stored=True),
    "shape": Text(doc="An op and its sizes, such as: gemm m=64 n=4096 k=4096.", default=""),
    "harness": Choice(doc="How an op was timed.", options=tuple(HARNESSES), default="bare_kernel"),
    "note": Text(doc="What is assumed, in own words.", default=""),
    "reason": Text(doc="Why it is not counted, or why the prediction is far off.", default=""),
}  # fmt: skip
SCHEMA = Group(
    doc="Published figures.",
    fields={
        "cases": Items(doc="Figures.", required=True, item=Group(doc="A figure.", fields=_FIELDS)),
        "no_figure": TextTable(doc="Chips without a usable figure, and what there is.", default={}),
        "sources": TextTable(doc="Citations by key.", required=True),
    },
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """``cases`` in the order of the file; ``no_figure``: by chip, why it has none."""

    cases: tuple[Case, ...]
    no_figure: dict[str, str]


def read_cases(path: Path = FILE, content: bytes | None = None) -> Published:
    """Read a file of cases; ``content`` is taken for what it holds.

    Raises:
        ConfigError: everything that is wrong, each with file, line and key.
    """
    tree, _ = read_yaml(path, path.name, content)
    sources = tree.entries.get("sources")
    known: dict[str, str] = {}
    if isinstance(sources, YamlMapping):
        known = {key: node.text for key, node in sources.entries.items() if isinstance(node, YamlScalar)}
    reader = Reader(problems=Problems(), sources=known)
    values = SCHEMA.read(tree, "", reader)
    cases = [_case(item, reader) for item in (values or {}).get("cases") or ()]
    no_figure: dict[str, str] = (values or {}).get("no_figure") or {}
    for chip in no_figure:
        if any(case is not None and case.file == chip and case.use != "aside" for case in cases):
            reader.problems.add(reader.places["no_figure"], f"no_figure.{chip}", "has figures among the cases")
    reader.problems.raise_if_any()
    return Published(cases=tuple(case for case in cases if case is not None), no_figure=no_figure)


def _case(item: dict[str, Any], reader: Reader) -> Case | None:
    """A case from its fields, None with a problem noted where they do not fit together."""
    name = item.get("name")
    if name is None:
        return None
    at = f"cases.{name}"
    before = len(reader.problems.found)

    def refuse(key: str, text: str) -> None:
        reader.refuse(f"{at}.{key}", text)

    if any(item[key] is None for key, field in _FIELDS.items() if field.required):
        return None
    if item["source"] not in reader.sources:
        refuse("source", f"{item['source']!r} is not defined under sources")
    for key in ("chip", "against"):
        if item[key]:
            _check_chip(item[key], lambda text, key=key: refuse(key, text))
    chips = item["chips"] or 1
    tp = item["tp"] or chips
    if chips % tp:
        refuse("tp", f"{chips} chips are not a multiple of {tp}")
    batch = 0 if item["batch"] == SATURATED else int(item["batch"] or 1)
    answer, value = int(item["answer"] or 0), float(item["value"])
    value_to = float(item["value_to"] or item["value"])
    if value <= 0:
        refuse("value", f"{item['value']}: must be greater than 0")
    if value_to < value:
        refuse("value_to", f"{item['value_to']} is less than the value {item['value']}")
    metric, row = item["metric"], None
    if metric in OP_METRICS:
        row = _op_row(item, tp, refuse)
    else:
        for key in ("model", "weights"):
            if item[key] is None:
                refuse(key, f"is missing, a case of {metric} needs it")
        if item["shape"]:
            refuse("shape", f"a case of {metric} has a model, not an op")
        if answer == 0 and metric in ("tokens_per_s", "total_s"):
            refuse("answer", f"is missing, a case of {metric} needs it")
        if batch == 0 and (metric != "tokens_per_s" or chips != tp):
            refuse("batch", "a saturated server is known for tokens_per_s without pipeline stages")
    if (item["use"] == "speculative") != bool(item["speculation"]):
        refuse("speculation", f"does not go with the use {item['use']}")
    if item["use"] in ("aside", "speculative") and not item["reason"]:
        refuse("reason", f"is missing, a case of use {item['use']} states one")
    if len(reader.problems.found) > before:
        return None
    formats = Formats.of(item["weights"] if item["weights"] in DTYPES else "bf16")
    act = item["activations"] or formats.act
    formats = Formats(
        product=item["product"] or (item["weights"] if item["weights"] in DTYPES else act),
        weights=item["weights"] or "bf16", act=act, kv=item["kv"] or act,
    )  # fmt: skip
    return Case(
        name=name, chip=item["chip"], metric=metric, value=value, value_to=value_to, use=item["use"],
        source=reader.sources[item["source"]], certainty=item["certainty"], line=reader.places[at].line,
        model=item["model"] or "", chips=chips, tp=tp, formats=formats, batch=batch, prompt=item["prompt"],
        answer=answer, call_tokens=item["call_tokens"], most_sequences=item["most_sequences"],
        reserved=float(item["reserved"] or RESERVED), speculation=item["speculation"], against=item["against"],
        against_weights=item["against_weights"] or "bf16", row=row, harness=item["harness"], note=item["note"],
        reason=item["reason"],
    )  # fmt: skip


def _check_chip(text: str, refuse: Any) -> None:
    file, variant = split_variant(text)
    try:
        variants = read_chip_file(file).variants
    except ConfigError as error:
        refuse(str(error).splitlines()[0])
        return
    if variant is not None and variant not in variants:
        refuse(f"{file} has no variant {variant!r}; variants: {', '.join(variants) or 'none'}")


def _op_row(item: dict[str, Any], tp: int, refuse: Any) -> Row | None:
    op, *sizes = item["shape"].split() or [""]
    pairs = [re.fullmatch(r"([a-z_]+)=([0-9]+)", text) for text in sizes]
    if not op or not all(pairs):
        refuse("shape", f"{item['shape']!r}: must be an op and its sizes, such as gemm m=64 n=4096 k=4096")
        return None
    given = {match[1]: match[2] for match in pairs if match}
    given = {"tp": str(tp), "device": "x", "dtype": item["weights"] or "bf16", "op": op} | given
    found = parse_rows(f"{','.join(given)}\n{','.join(given.values())}\n", "shape")
    for problem in found.problems:
        refuse("shape", problem.partition(": ")[2])
    row = found.rows[0] if found.rows else None
    if row is not None and item["metric"] != "op_us" and (row.op != "gemm" or row.n != row.k):
        refuse("shape", f"a case of {item['metric']} is a gemm with n equal to k, so that one can follow another")
    return row
