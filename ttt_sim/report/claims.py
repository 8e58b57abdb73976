"""The ledger of claims: a page, and a few lines in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from ttt_sim.claims import VERDICTS, Judged
from ttt_sim.data_files import write_whole
from ttt_sim.report.console import hanging, printer
from ttt_sim.report.markdown import table_row

TITLE = "Claims about test-time training and hardware"
_INTRODUCTION = (
    "Each claim is judged by a rule that is stated beside it, on numbers that the command below it shows again. Costs "
    "are simulated, quality is not: a claim that needs equal quality is judged for its cost alone. Models are "
    "Qwen3-4B unless a row says otherwise, with a window of 1024 tokens and updates every 1024."
)


def sentence(found: Judged) -> str:
    """Verdict and reason as one text."""
    verdict, reason = found.judgement.verdict, found.judgement.reason
    if verdict == "holds when":
        return f"Holds when {reason[:1].lower()}{reason[1:]}"
    start = {"holds": "Holds", "does not hold": "Does not hold", "cannot be simulated": "Cannot be simulated"}[verdict]
    return f"{start}: {reason[:1].lower()}{reason[1:]}"


def ledger(judged: Sequence[Judged], *, command: str, version: str) -> str:
    """The page in Markdown."""
    lines = [f"# {TITLE}", "", _INTRODUCTION, "", table_row("claim", "verdict"), table_row("---", "---")]
    for found in judged:
        anchor = found.claim.name.replace("_", "-")
        lines.append(table_row(f"[{found.claim.said}](#{anchor})", found.judgement.verdict))
    lines.append("")
    for found in judged:
        claim, judgement = found.claim, found.judgement
        lines += [f"## {claim.name.replace('_', ' ')}", "", f"> {claim.said}", "", f"**{sentence(found)}**", ""]
        lines += [f"- Rule: {claim.rule}", f"- Uncertainty: {judgement.uncertainty}"]
        if claim.command != "-":
            lines.append(f"- Again: `{claim.command}`")
        if judgement.rows:
            head, *rows = judgement.rows
            lines += ["", table_row(*head), table_row(*(["---"] + ["---:"] * (len(head) - 1)))]
            lines += [table_row(*row) for row in rows]
        lines.append("")
    lines += ["## Where this comes from", "", f"ttt_sim {version}, `{command}`."]
    return "\n".join(lines).rstrip() + "\n"


def write_claims(judged: Sequence[Judged], out: Path, *, command: str, version: str) -> None:
    """Write the ledger to the file ``out``, whole or not at all.

    Raises:
        ConfigError: it cannot be written.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, ledger(judged, command=command, version=version).encode())


def print_claims(judged: Sequence[Judged], out: Path | None = None, console: Console | None = None) -> None:
    """Print verdicts and reasons."""
    show = printer(console)
    show(Text(TITLE, style="bold"))
    for verdict in VERDICTS:
        count = sum(found.judgement.verdict == verdict for found in judged)
        if count:
            show(Text(f"  {count} {verdict}"))
    for found in judged:
        show(Text())
        show(hanging("", found.claim.said))
        show(hanging("  ", sentence(found)))
    if out is not None:
        show(Text())
        show(Text(f"Ledger: {out}", style="bold"))
