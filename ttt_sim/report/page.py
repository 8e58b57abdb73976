"""The report's front page in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from ttt_sim.report.data import ReportData, tokens_label
from ttt_sim.report.figures import Rendered
from ttt_sim.report.findings import answers, crossing_rows, limit_rows, quality_note, sensitivity_step, time_rows
from ttt_sim.report.markdown import figure_lines, table_row
from ttt_sim.report.names import method_title

GLOSSARY: tuple[tuple[str, str], ...] = (
    ("state", "bytes that a sequence keeps between calls: KV cache, fast weights, carry"),
    ("fast weights", "weights of the TTT layers that each sequence rewrites for itself at run time"),
    ("chunk", "tokens between two updates of the fast weights"),
    ("carry", "rows of the open chunk, kept until it is complete; tables on state take it at its largest"),
    ("boundary step", "decode step that completes a chunk, and so pays for the update"),
    ("prefill time", "time of the whole prompt; per token, divided by all tokens of the batch"),
    ("decode time", "mean step time over a whole chunk; a step gives every sequence of the batch one token"),
    ("traffic", "bytes that cross the interface of main memory, after fusion and caching"),
    ("kernel", "ops that run as one piece of work; what may merge is a rule of the chip file"),
    ("critical path", "the chain of tasks that decides the total time"),
    ("% faster", "time before divided by time after, minus one"),
    ("does not fit", "weights, state and activations exceed main memory; chips needed counts capacity only"),
    ("K, M", "1,024 and 1,024 x 1,024 tokens; KiB, MiB, GiB are binary, kB, MB, GB decimal"),
    ("USD", "hourly price of the chips times the time, nothing else"),
)


def page(data: ReportData, figures: Sequence[Rendered]) -> str:
    """Headline numbers, tables, figures with captions, glossary and where it all comes from."""
    lines = [f"# {data.model} on {data.machine.title}", ""]
    lines += [f"- {sentence}" for sentence in answers(data)]
    for note in quality_note(data):
        lines += ["", f"> {note}"]
    for phase in data.headlines:
        lines += ["", *_times(data, phase)]
    lines += ["", *_limits(data), "", *_crossings(data), "", "## Figures", ""]
    lines += figure_lines(figures)
    lines += ["## Terms", "", "| term | meaning |", "| --- | --- |"]
    lines += [f"| {term} | {meaning} |" for term, meaning in GLOSSARY]
    lines += ["", *_provenance(data)]
    return "\n".join(lines).rstrip() + "\n"


def _times(data: ReportData, phase: str) -> list[str]:
    what = "time per token of the prompt" if phase == "prefill" else "time per step"
    lines = [f"## {phase.capitalize()}: {what}, tokens per second of the whole batch", ""]
    lines.append(table_row("batch", "context", *(method_title(data, method) for method in data.methods)))
    lines.append(table_row(*["---:"] * (2 + len(data.methods))))
    for at in time_rows(data, phase):
        lines.append(table_row(str(at.batch), tokens_label(at.context_tokens), *at.cells))
    return lines


def _limits(data: ReportData) -> list[str]:
    lines = ["## What limits each method", ""]
    lines.append(table_row("phase", "method", "bound by", "time goes to", f"{sensitivity_step(data)} more buys"))
    lines.append(table_row(*["---"] * 5))
    for limit in limit_rows(data):
        lines.append(table_row(limit.phase, method_title(data, limit.method), limit.bound, limit.kernels, limit.gain))
    return lines


def _crossings(data: ReportData) -> list[str]:
    rows, remarks = crossing_rows(data)
    if not rows:
        return []
    lines = ["## Crossovers: context in tokens from which fast weights need less", ""]
    lines.append(table_row("quantity", "method", "against", "simulated", "closed form", "note"))
    lines.append(table_row("---", "---", "---", "---:", "---", "---:"))
    for crossing in rows:
        lines.append(table_row(*crossing[:5], str(crossing.note) if crossing.note else ""))
    return [*lines, "", *(f"{number}. {remark}" for number, remark in enumerate(remarks, start=1))]


def _provenance(data: ReportData) -> list[str]:
    lines = ["## Where this comes from", "", "| | |", "| --- | --- |"]
    for key, value in data.provenance.items():
        text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        if text not in ("", "{}"):
            lines.append(table_row(key.replace("_", " "), f"`{text}`"))
    return [*lines, *(f"\n{note[0].upper()}{note[1:]}." for note in data.notes)]
