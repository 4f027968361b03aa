"""The report as a small Markdown table for a repository: what is equal where, and why the rest is not."""

from __future__ import annotations

from . import probes
from .report import (
    ABSENT,
    CRASHED,
    DIFFERS,
    EQUAL,
    HUNG,
    LEFT_OUT,
    NOT_RUN,
    REFUSED,
    STATUSES,
    UNSTEADY,
    UNSUPPORTED,
    Cell,
    Report,
)

_COUNTED = (
    EQUAL,
    DIFFERS,
    UNSTEADY,
    REFUSED,
    UNSUPPORTED,
    CRASHED,
    HUNG,
    LEFT_OUT,
    NOT_RUN,
)


def page(report: Report) -> str:
    """A Markdown document."""
    lines = [
        "# Where the numbers are the same",
        "",
        f"`lucid-onnx parity` over {len(report.rows)} cases, {report.made[:10]}, lucid-onnx {report.lucid_onnx}, "
        f"{report.machine}, {report.seconds:.0f} s.",
        "",
        *(f"*{status}*: {meaning}.  " for status, meaning in STATUSES.items() if _any(report, status)),
        "",
        "| runtime | version | form | " + " | ".join(_COUNTED) + " | largest error of an equal case |",
        "|---|---|---|" + "---:|" * (len(_COUNTED) + 1),
    ]
    for column in report.columns:
        if column.missing is not None:
            lines.append(f"| {column.title} | not available: {_cell(column.missing)} | |" + " |" * (len(_COUNTED) + 1))
            continue
        for form in column.forms:
            cells = [c for c in report.cells if (c.runtime, c.form) == (column.runtime, form)]
            if not cells:
                continue
            counts = [sum(c.status == status for c in cells) or "" for status in _COUNTED]
            good = [c.difference.margin for c in cells if c.status == EQUAL and c.difference is not None]
            worst = f"{max(good):.2g} tolerances" if good else ""
            values = " | ".join(map(str, counts))
            lines.append(f"| {column.title} | {_cell(column.version or '')} | {form} | {values} | {worst} |")
    lines += ["", "## What is not equal, and why", "", "| runtime | form | status | cells | such as | why |"]
    lines.append("|---|---|---|---:|---|---|")
    titles = {column.runtime: column.title for column in report.columns}
    for (runtime, form, status, why), found in _grouped(report).items():
        lines.append(f"| {titles[runtime]} | {form} | {status} | {len(found)} | `{found[0].job}` | {_cell(why)} |")
    if report.unseen:
        lines += ["", "## Known differences that did not occur", ""]
        lines += ["*gone*: its witness is equal.  ", "*not seen*: it occurs in some runs or on some CPUs only.  ", ""]
        lines += ["| runtime | | witness | what |", "|---|---|---|---|"]
        for known in report.unseen:
            word = "gone" if known.gone else "not seen"
            lines.append(f"| {titles[known.runtime]} | {word} | `{known.witness}` | {_cell(known.sentence)} |")
    if report.outcomes:
        lines += ["", "## Bad input", "", *_bad_input(report)]
    return "\n".join(lines) + "\n"


def _any(report: Report, status: str) -> bool:
    return any(cell.status == status for cell in report.cells)


def _grouped(report: Report) -> dict[tuple[str, str, str, str], list[Cell]]:
    groups: dict[tuple[str, str, str, str], list[Cell]] = {}
    for cell in report.cells:
        if cell.status not in (EQUAL, ABSENT):
            why = cell.why or f"**unexplained**: {cell.note[:160]}"
            groups.setdefault((cell.runtime, cell.form, cell.status, why), []).append(cell)
    return groups


def _bad_input(report: Report) -> list[str]:
    """A line per kind of bad input: the runtimes by their outcome."""
    titles = {column.runtime: column.title for column in report.columns}
    lines = [f"*{word}*: {text}.  " for word, text in probes.OUTCOMES.items() if _outcome(report, word)]
    lines += ["", "| | refuses | otherwise |", "|---|---|---|"]
    for probe in probes.all_probes():
        refuse, other = [], []
        for outcome in report.outcomes:
            if outcome.probe != probe.name or outcome.outcome == "not run":
                continue
            who = f"{titles[outcome.runtime]} ({outcome.form})"
            if outcome.outcome == "refuses":
                refuse.append(who)
            else:
                other.append(f"{who}: {outcome.outcome}")
        lines.append(f"| {probe.title} | {'; '.join(refuse)} | {'; '.join(other)} |")
    return lines


def _outcome(report: Report, word: str) -> bool:
    return word != "not run" and any(outcome.outcome == word for outcome in report.outcomes)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
