"""What ``validate`` prints and writes about published figures: a line for each case, a summary for each chip."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from ttt_sim.config import chip_names, load_chip
from ttt_sim.predict.models import Formats
from ttt_sim.predict.published import METRICS, Case, Published
from ttt_sim.predict.serving import FAR, Outcome, median_of_chips, summary_of
from ttt_sim.predict.tolerances import FIGURE_LIMITS, TARGETS, FigureLimit
from ttt_sim.report.markdown import table_row

#: Kinds of chip files that stand for no machine.
MADE_UP = ("example", "hypothetical")
NO_FIGURE = "no published figure"
ABOVE_BOUND = "above the physical bound without speculation"
COLUMNS = (
    "case", "chip", "use", "model", "workload", "metric", "unit", "published", "published_to", "predicted", "ratio",
    "error_percent", "bound", "above_bound", "batch", "certainty", "source", "note", "reason",
)  # fmt: skip


def real_chips() -> list[str]:
    """Chip files that stand for machines, by name."""
    return [name for name in chip_names() if load_chip(name).kind not in MADE_UP]


def formats_text(formats: Formats) -> str:
    """``fp8``, or weights, products, activations, and keys and values where they differ from what weights imply."""
    usual = Formats.of(formats.product)
    text = formats.weights
    if formats.weights != formats.product:
        text += f" x {formats.product}"
    if formats.act != usual.act:
        text += f", {formats.act} activations"
    if formats.kv != formats.act:
        text += f", {formats.kv} KV"
    return text


def workload_text(case: Case) -> str:
    """The workload of a case in a few words."""
    if case.row is not None:
        sizes = ("m", "n", "k", "batch", "seq_q", "seq_kv", "n_heads", "n_kv_heads", "head_dim")
        shape = " ".join(f"{name}={getattr(case.row, name)}" for name in sizes if getattr(case.row, name))
        chips = f", {case.chips} chips" if case.chips > 1 else ""
        return f"{case.row.op} {case.row.dtype} {shape}{chips}"
    parts = [f"{case.model} {formats_text(case.formats)}"]
    if case.chips > 1:
        stages = f" in {case.stages} stages" if case.stages > 1 else ""
        parts.append(f"{case.chips} chips{stages}")
    parts.append("saturated" if case.batch == 0 else f"batch {case.batch}")
    parts.append(f"{case.prompt} + {case.answer}" if case.answer else f"{case.prompt} tokens")
    if case.against:
        parts.append(f"over {case.against} {case.against_weights}")
    return ", ".join(parts)


def figure(value: float) -> str:
    """Four digits, without exponents up to a million."""
    return f"{value:.0f}" if 1000 <= value < 1e6 else f"{value:.4g}"


def unit_of(case: Case) -> str:
    """Unit of a figure for people."""
    return "times" if case.against else METRICS[case.metric][0]


def _published(case: Case) -> str:
    return figure(case.value) if case.value_to == case.value else f"{figure(case.value)} to {figure(case.value_to)}"


def case_line(outcome: Outcome) -> str:
    """One case: workload, prediction, figure, ratio, and what must be known to read it."""
    case = outcome.case
    unit = unit_of(case)
    name = {"ttft_ms": "first token ", "step_ms": "step ", "total_s": "in all "}.get(case.metric, "")
    text = f"  {workload_text(case)}: "
    if outcome.predicted is None or outcome.ratio is None:
        return f"{text}published {name}{_published(case)} {unit}, not predicted: {outcome.problem}"
    text += f"{name}predicted {figure(outcome.predicted)}, published {_published(case)} {unit}, "
    text += f"ratio {outcome.ratio:.2f}"
    marks = [] if case.use == "count" else [case.use]
    if outcome.beats_bound and outcome.bound is not None:
        marks.append(f"{ABOVE_BOUND}: {figure(outcome.bound)}")
    elif case.use == "speculative" and outcome.bound is not None:
        marks.append(f"bound without speculation {figure(outcome.bound)}")
    if case.speculation and case.speculation != "unknown":
        marks.append(f"{case.speculation} tokens a step")
    return text + (f" ({'; '.join(marks)})" if marks else "")


def published_lines(published: Published, outcomes: Sequence[Outcome], chips: Sequence[str]) -> Iterator[str]:
    """Everything that is printed: chip by chip, what is far off and why, medians against the targets."""
    for name in chips:
        mine = [outcome for outcome in outcomes if outcome.case.file == name]
        yield f"{load_chip(name).title} ({name})"
        if not mine or name in published.no_figure:
            reason = published.no_figure.get(name, "")
            yield f"  {NO_FIGURE}{f' that can be used: {reason}' if reason else ''}"
        yield from (case_line(outcome) for outcome in mine)
        summary = summary_of(mine)
        if summary is not None:
            yield (
                f"  {summary.n} counted: median error {summary.median:.1f} %, mean {summary.mean:.1f} %, "
                f"{summary.n_far} off by more than {FAR:g} times"
            )
        for source in dict.fromkeys(outcome.case.source for outcome in mine):
            yield f"    from {source}"
        yield ""
    far = [outcome for outcome in outcomes if outcome.far and outcome.case.use not in ("speculative", "aside")]
    if far:
        yield f"Off by more than {FAR:g} times:"
        for outcome in far:
            yield f"  {outcome.case.name}, ratio {outcome.ratio:.2f}: {outcome.case.reason or 'no reason stated'}"
        yield ""
    yield from _medians(outcomes)


def gpus() -> frozenset[str]:
    """Chip files of GPUs."""
    return frozenset(name for name in chip_names() if load_chip(name).kind == "gpu")


def _medians(outcomes: Sequence[Outcome]) -> Iterator[str]:
    of_gpus = gpus()
    yield "Published figures of chips without speculation, none of them fitted:"
    for title, members, target in (
        ("all chips", outcomes, TARGETS["all"]),
        ("GPUs", [outcome for outcome in outcomes if outcome.case.file in of_gpus], TARGETS["gpu"]),
    ):
        summary, by_chip = summary_of(members), median_of_chips(members)
        if summary is None or by_chip is None:
            yield f"  {title}: none"
            continue
        met = "met" if summary.median <= target else "MISSED"
        n_chips = len({outcome.case.file for outcome in members if outcome.case.use == "count"})
        yield (
            f"  {title}: median error {summary.median:.1f} % over {summary.n} figures of {n_chips} chips, target "
            f"{target:g} % {met}; median of the chips' medians {by_chip:.1f} %"
        )


def judged(outcomes: Sequence[Outcome], limits: Sequence[FigureLimit] = FIGURE_LIMITS) -> list[tuple[str, bool]]:
    """A line for each tolerance and whether it is kept; a case that cannot be predicted breaks it."""
    found = []
    for limit in limits:
        mine = [outcome for outcome in outcomes if outcome.case.file in limit.chips]
        summary = summary_of(mine)
        failed = [outcome.case.name for outcome in mine if outcome.predicted is None]
        if summary is None:
            found.append((f"  {limit.title}: no figures", not failed))
            continue
        kept = summary.mean <= limit.limit and not failed
        text = f"  {limit.title}: {summary.mean:.1f} of {limit.limit:g} ({summary.n} figures) "
        found.append((text + ("ok" if kept else "EXCEEDED" if not failed else f"not predicted: {failed[0]}"), kept))
    return found


def published_frame(outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """The table behind the lines, a row for each case."""
    rows = [
        (
            o.case.name, o.case.chip, o.case.use, o.case.model or (o.case.row.op if o.case.row else ""),
            workload_text(o.case), o.case.metric, unit_of(o.case), o.case.value, o.case.value_to, o.predicted, o.ratio,
            o.error, o.bound, int(o.beats_bound), o.batch or o.case.batch, o.case.certainty, o.case.source, o.case.note,
            o.case.reason,
        )
        for o in outcomes
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=pd.Index(COLUMNS))


_PAGE = """\
# Published figures of chips

Every case of `ttt_sim/predict/published.yaml` with its prediction; `ttt_sim validate --out DIR` writes this page as
`published.md`. Rules, and what is not met: [validation.md](validation.md#published-figures). *Use*: `count` stands in
the medians, `fit` had a constant of the chip file fitted to it, `micro` is no figure of inference, `speculative` is
compared with the plain prediction, `aside` is shown only.
"""
#: Columns of the page.
PAGE_COLUMNS = ("Case", "Workload", "Published", "Predicted", "Ratio", "Use", "Certainty", "Source")


def published_page(published: Published, outcomes: Sequence[Outcome], chips: Sequence[str]) -> str:
    """The page of all cases in Markdown: a table for each chip, reasons and notes, sources by number."""
    sources = list(dict.fromkeys(outcome.case.source for outcome in outcomes))
    head = ("Chip", "Counted", "Median error", "Mean error", "Off by more than 2 times")
    lines = [_PAGE, table_row(*head), table_row(*["---"] * len(head))]
    for name in chips:
        summary = summary_of(outcome for outcome in outcomes if outcome.case.file == name)
        if summary is not None:
            errors = (f"{summary.median:.0f} %", f"{summary.mean:.0f} %", str(summary.n_far))
            lines.append(table_row(load_chip(name).title, str(summary.n), *errors))
    lines.append("")
    for name in chips:
        mine = [outcome for outcome in outcomes if outcome.case.file == name]
        lines += [f"## {load_chip(name).title}", ""]
        if not mine or name in published.no_figure:
            reason = published.no_figure.get(name, "")
            lines += [f"{NO_FIGURE.capitalize()}{f' that can be used: {reason}' if reason else ''}.", ""]
        if not mine:
            continue
        lines += [table_row(*PAGE_COLUMNS), table_row(*["---"] * len(PAGE_COLUMNS))]
        for o in mine:
            value = f"{_published(o.case)} {unit_of(o.case)}"
            predicted, ratio = ("", "") if o.predicted is None else (figure(o.predicted), f"{o.ratio:.2f}")
            mark = f", {ABOVE_BOUND}" if o.beats_bound else ""
            cells = (
                f"`{o.case.name}`", workload_text(o.case), value, predicted, ratio, f"{o.case.use}{mark}",
                o.case.certainty, f"[{sources.index(o.case.source) + 1}]",
            )  # fmt: skip
            lines.append(table_row(*cells))
        remarks = [(o.case, text) for o in mine for text in (o.case.note, o.case.reason) if text]
        lines += ["", *(f"* `{case.name}`: {text}." for case, text in remarks), *([""] if remarks else [])]
    lines += ["## Sources", "", *(f"{number}. {source}" for number, source in enumerate(sources, start=1)), ""]
    return "\n".join(lines)
