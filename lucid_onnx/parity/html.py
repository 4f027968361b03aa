"""The report as one HTML file: no script, style, font or picture from anywhere else."""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Callable, Iterable, Sequence
from html import escape

from . import probes
from .report import (
    ABSENT,
    CRASHED,
    DIFFERS,
    EQUAL,
    FAILURES,
    HUNG,
    LEFT_OUT,
    NOT_RUN,
    REFUSED,
    STATUSES,
    UNSTEADY,
    UNSUPPORTED,
    Cell,
    Column,
    Report,
)

#: A sign and a class per status: colour is never the only difference.
_SIGNS = {
    EQUAL: "=",
    DIFFERS: "≠",
    UNSTEADY: "~",
    REFUSED: "!",
    UNSUPPORTED: "∅",
    CRASHED: "✕",
    HUNG: "…",
    ABSENT: "·",
    LEFT_OUT: "-",
    NOT_RUN: "○",
}
#: What makes a row worth showing.
_LOUD = (*FAILURES, REFUSED)
_GOOD = ("refuses",)
_BAD = ("crash", "hang", "garbage", "refuses, then fails")
_FORM_LETTERS = {
    "call": "call",
    "native": "native",
    "portable": "portable",
    "standard": "standard",
    "given": "as given",
}


def page(report: Report) -> str:
    """The whole document."""
    columns = [(column, form) for column in report.columns for form in _forms(report, column)]
    here = [(column, form) for column, form in columns if column.missing is None]
    data = json.dumps(_data(report), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    body = [
        "<header>",
        "<h1>Same file, same numbers?</h1>",
        f"<p class=lead>{_lead(report)}</p>",
        f"<p class=small>{escape(report.made.replace('T', ' '))}, lucid-onnx {escape(report.lucid_onnx)}, "
        f"{escape(report.machine)}, made in {report.seconds:.0f} s.</p>",
        "</header>",
        _matrix(report, here),
        _explanations(report),
        _unseen(report),
        _bad_input(report, here),
        _plots(report, here),
        _runtimes(report),
    ]
    return (
        "<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n"
        '<meta name=viewport content="width=device-width, initial-scale=1">\n'
        f"<title>lucid-onnx parity, {escape(report.made[:10])}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n<dialog id=detail><form method=dialog><button aria-label=Close>✕</button></form>"
        + "<div id=detail-body></div></dialog>\n"
        # No "<" in it can end the element.
        + f"<script type=application/json id=data>{data.replace('<', chr(92) + 'u003c')}</script>\n"
        + f"<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _forms(report: Report, column: Column) -> list[str]:
    seen = {cell.form for cell in report.cells if cell.runtime == column.runtime}
    return [form for form in column.forms if form in seen]


def _lead(report: Report) -> str:
    counts = collections.Counter(cell.status for cell in report.cells)
    ran = sum(counts[s] for s in (EQUAL, DIFFERS, UNSTEADY))
    here = sum(column.missing is None for column in report.columns)
    different = counts[DIFFERS] + counts[UNSTEADY]
    dead = counts[CRASHED] + counts[HUNG]
    sentences = [
        f"<b>{len(report.rows)}</b> {_plural(len(report.rows), 'case')} on <b>{here}</b> "
        f"{_plural(here, 'runtime')}: of {ran} results <b>{counts[EQUAL]}</b> are equal within the tolerance "
        f"and <b>{different}</b> {'is' if different == 1 else 'are'} not."
    ]
    if dead:
        sentences.append(f"{dead} ended in a crash or a hang.")
    unexplained = len(report.failures)
    if unexplained:
        sentences.append(
            f"<b class=alarm>{unexplained} of these {'has' if unexplained == 1 else 'have'} no explanation.</b>"
        )
    elif different + dead:
        sentences.append("All of these are explained below.")
    return " ".join(sentences)


def _plural(count: int, word: str) -> str:
    return word if count == 1 else word + "s"


# The matrix.


def _matrix(report: Report, columns: Sequence[tuple[Column, str]]) -> str:
    cells = {(c.job, c.runtime, c.form): k for k, c in enumerate(report.cells)}
    rows, plain = [], 0
    group = ""
    # A runtime that refuses all says nothing about a row.
    mute = [(column, form) for column, form in columns if not _any_result(report, column, form)]
    for k, row in enumerate(report.rows):
        found = [cells.get((row.job, column.runtime, form)) for column, form in columns]
        spoken = [i for i, key in zip(found, columns, strict=True) if i is not None and key not in mute]
        statuses = [report.cells[i].status for i in spoken]
        quiet = not any(s in _LOUD for s in statuses)
        plain += quiet
        if row.group != group:
            group = row.group
            rows.append(
                f"<tr class=group><th colspan={len(columns) + 1}><span>{escape(_GROUPS[group])}</span></th></tr>"
            )
        line = "".join(_td(report.cells[i], i) if i is not None else "<td></td>" for i in found)
        rows.append(
            f"<tr{' class=quiet' if quiet else ''}><th scope=row><button data-row={k}>{escape(row.job)}</button></th>"
            f"{line}</tr>"
        )
    totals = "".join(_total(report, column, form) for column, form in columns)
    legend = " ".join(
        f"<span class=key><i class={_css(s)}>{_SIGNS[s]}</i> {s}</span>"
        for s in STATUSES
        if s != ABSENT and any(c.status == s for c in report.cells)
    )
    return f"""<section id=matrix>
<h2>The matrix</h2>
<p class=legend>{legend}</p>
<p class=tools><label><input type=search id=filter placeholder="filter: max_, float16"></label>
<label><input type=checkbox id=all> show the {plain} rows where nothing differs</label>
<span class=small>Click a cell or a row for its numbers.</span></p>
<div class=scroll><table class=matrix>
<thead>{_head(columns)}<tr class=totals><th scope=row>equal, of those that ran</th>{totals}</tr></thead>
<tbody>
{chr(10).join(rows)}
</tbody></table></div>
</section>"""


_GROUPS = {
    "conformance": "The conformance suite",
    "scale": "At scale: threads, long bags, skewed lengths",
    "operators": "Standard operators and functions alone, where runtimes are known to part",
    "model": "The model",
}


def _any_result(report: Report, column: Column, form: str) -> bool:
    mine = [c.status for c in report.cells if (c.runtime, c.form) == (column.runtime, form)]
    return any(s in (EQUAL, *FAILURES) for s in mine)


def _head(columns: Sequence[tuple[Column, str]]) -> str:
    heads = "".join(
        f"<th scope=col><div><span>{escape(column.title)}<em>{_FORM_LETTERS[form]}</em></span></div></th>"
        for column, form in columns
    )
    return f"<tr class=heads><td></td>{heads}</tr>"


def _total(report: Report, column: Column, form: str) -> str:
    mine = [c.status for c in report.cells if (c.runtime, c.form) == (column.runtime, form)]
    equal, ran = (
        mine.count(EQUAL),
        sum(s not in (LEFT_OUT, NOT_RUN, UNSUPPORTED) for s in mine),
    )
    share = "-" if not ran else "all" if equal == ran else f"{100 * equal / ran:.0f}%" if equal else "0"
    if share == "100%":
        share = "99%"
    return f'<td title="{equal} of {ran}">{share}</td>'


def _css(status: str) -> str:
    return status.replace(" ", "-")


def _td(cell: Cell, number: int) -> str:
    alarm = " alarm" if cell.failed else ""
    return f'<td class="{_css(cell.status)}{alarm}" data-cell={number} tabindex=0>{_SIGNS[cell.status]}</td>'


# What is not equal, in sentences.


def _explanations(report: Report) -> str:
    titles = {column.runtime: column.title for column in report.columns}
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in report.cells:
        if cell.status not in (EQUAL, ABSENT):
            # Errors that differ in their numbers alone are one.
            kind = cell.difference.kind if cell.difference is not None else cell.note.split(": ")[0][:80]
            text = cell.why or kind
            groups.setdefault((cell.runtime, cell.status, text), []).append(cell)
    if not groups:
        return ""
    items = []
    for (runtime, status, _), cells in groups.items():
        jobs = sorted({cell.job for cell in cells})
        names = ", ".join(jobs[:4]) + (f" and {len(jobs) - 4} more" if len(jobs) > 4 else "")
        forms = ", ".join(dict.fromkeys(cell.form for cell in cells))
        text = cells[0].why or f"{'not explained' if cells[0].failed else 'it said'}: {cells[0].note}"
        alarm = " class=alarm" if any(cell.failed for cell in cells) else ""
        items.append(
            f"<li><i class={_css(status)}>{_SIGNS[status]}</i><div><b>{escape(titles[runtime])}</b> "
            f"<span class=small>{escape(forms)}: {len(cells)} {_plural(len(cells), 'cell')} {status}</span><br>"
            f"<span{alarm}>{escape(text)}</span><br><span class=small>{escape(names)}</span></div></li>"
        )
    return f"<section><h2>What is not equal, and why</h2><ul class=why>{''.join(items)}</ul></section>"


def _unseen(report: Report) -> str:
    if not report.unseen:
        return ""
    titles = {column.runtime: column.title for column in report.columns}
    groups: dict[tuple[str, str, bool], list[str]] = {}
    for known in report.unseen:
        groups.setdefault((known.sentence, known.witness, known.gone), []).append(titles[known.runtime])
    items = "".join(
        f"<li><i class={_css(EQUAL)}>{_SIGNS[EQUAL]}</i><div><b>{escape('; '.join(names))}</b> "
        f"<span class=small>{'gone' if gone else 'not seen in these runs'}, by {escape(witness)}</span><br>"
        f"{escape(sentence)}</div></li>"
        for (sentence, witness, gone), names in groups.items()
    )
    return (
        "<section><h2>Known differences that did not occur</h2><p>Each of these is true of some release, some runs or "
        f"some CPUs. The case that would show it is equal here.</p><ul class=why>{items}</ul></section>"
    )


# Bad input.


def _bad_input(report: Report, columns: Sequence[tuple[Column, str]]) -> str:
    if not report.outcomes:
        return ""
    found = {(o.probe, o.runtime, o.form): (k, o) for k, o in enumerate(report.outcomes)}
    columns = [
        (column, form)
        for column, form in columns
        if any((o.runtime, o.form) == (column.runtime, form) and o.outcome != "not run" for o in report.outcomes)
    ]
    rows = []
    for probe in probes.all_probes():
        line = ""
        for column, form in columns:
            k, outcome = found.get((probe.name, column.runtime, form), (None, None))
            if outcome is None:
                line += "<td></td>"
                continue
            kind = "good" if outcome.outcome in _GOOD else "bad" if outcome.outcome in _BAD else "other"
            kind = "none" if outcome.outcome == "not run" else kind
            sign = {"good": "✓ ", "bad": "✕ ", "other": "≈ ", "none": ""}[kind]
            line += f'<td class="word {kind}" data-outcome={k} tabindex=0>{sign}{escape(outcome.outcome)}</td>'
        rows.append(f"<tr><th scope=row>{escape(probe.title)}</th>{line}</tr>")
    used = [o.outcome for o in report.outcomes]
    meanings = "".join(
        f"<dt>{escape(word)}</dt><dd>{escape(text)}</dd>" for word, text in probes.OUTCOMES.items() if word in used
    )
    return f"""<section><h2>Bad input</h2>
<p>The specification rejects each of these. Standard operators cannot always do so, and other runtimes need not.</p>
<div class=scroll><table class="matrix words"><thead>{_head(columns)}</thead>
<tbody>{"".join(rows)}</tbody></table></div>
<dl class=small>{meanings}</dl></section>"""


# Plots.


def _plots(report: Report, columns: Sequence[tuple[Column, str]]) -> str:
    labels, errors, times = [], [], []
    for column, form in columns:
        cells = [c for c in report.cells if (c.runtime, c.form) == (column.runtime, form)]
        margins = [
            c.difference.margin for c in cells if c.difference is not None and math.isfinite(c.difference.margin)
        ]
        if not margins:
            continue
        labels.append(f"{column.title}, {form}")
        errors.append([m for m in margins if m > 0])
        big = [c for c in cells if c.seconds and _group(report, c) in ("scale", "model")]
        times.append([1e3 * c.seconds for c in big if c.seconds])
    if not labels:
        return ""
    text = (
        "<section><h2>How large the errors are</h2>"
        "<p>A dot is a result: its largest error, measured in tolerances. A cross, right of the line, is beyond "
        "the tolerance. Exact results have no dot.</p>"
        + _strip(labels, errors, 1.0, lambda v: f"{v:g}", "errors in tolerances, logarithmic")
        + "</section>"
    )
    if any(times):
        shown = [(name, values) for name, values in zip(labels, times, strict=True) if values]
        text += (
            "<section><h2>How long it takes</h2><p>Each large case or model once: the median run in milliseconds, on "
            "a machine that was also doing other work. An order of magnitude, not a benchmark.</p>"
            + _strip(
                [n for n, _ in shown], [v for _, v in shown], None, lambda v: f"{v:g} ms", "milliseconds, logarithmic"
            )
            + "</section>"
        )
    return text


def _group(report: Report, cell: Cell) -> str:
    return next(row.group for row in report.rows if row.job == cell.job)


def _strip(
    labels: Sequence[str],
    values: Sequence[Sequence[float]],
    limit: float | None,
    tick: Callable[[float], str],
    title: str,
) -> str:
    """A line of dots per label over a logarithmic axis.

    Places along the axis are percentages, so that a plot is as wide as there is room, and its dots stay round. A label
    is beside its line, or above it in a narrow window.
    """
    every = [v for line in values for v in line] + ([limit] if limit else [])
    if not every:
        return "<p>No error anywhere: every result is exact.</p>"
    low, high = math.floor(math.log10(min(every))), math.ceil(math.log10(max(every)))
    if limit:  # what is far below it is as good as exact
        low = max(low, math.floor(math.log10(limit)) - 5)
    high = max(high, low + 1)

    def x(value: float) -> str:
        return f"{100 * (max(math.log10(value), low) - low) / (high - low):.2f}%"

    step = max(1, math.ceil((high - low) / 8))
    anchor = round(math.log10(limit)) if limit else low
    powers = [p for p in range(low, high + 1) if (p - anchor) % step == 0]
    rules = "".join(f"<line class=grid x1={x(10.0**p)} x2={x(10.0**p)} y1=0 y2=100% />" for p in powers)
    if limit:
        rules += f"<line class=limit x1={x(limit)} x2={x(limit)} y1=0 y2=100% />"
    parts = []
    for label, line in zip(labels, values, strict=True):
        dots = [_dot(x(value), limit is not None and value > limit) for value in sorted(set(line))]
        about = f"{len(line)} {_plural(len(line), 'result')}, up to {tick(max(line))}" if line else "exact"
        parts.append(
            f'<div class=strip><span>{escape(label)}</span><svg role=img aria-label="{escape(about)}">{rules}'
            + ("".join(dots) or "<text x=6 y=15 class=small>exact</text>")
            + "</svg></div>"
        )
    # Of more than four every other one is hidden in a narrow window.
    hidden = {p for p in powers if len(powers) > 4 and (p - anchor) // step % 2}
    ticks = "".join(
        f"<text x={x(10.0**p)} y=16 text-anchor=middle{' class=odd' if p in hidden else ''}>"
        f"{escape(tick(10.0**p))}</text>"
        for p in powers
    )
    parts.append(f"<div class=strip aria-hidden=true><span></span><svg>{ticks}</svg></div>")
    return f'<figure class=plot aria-label="{escape(title)}">{"".join(parts)}</figure>'


def _dot(x: str, beyond: bool) -> str:
    if not beyond:
        return f"<circle cx={x} cy=50% r=3.2 />"
    # Another shape, not only another colour.
    return f'<svg class=beyond x={x} y=50%><path d="M-4 -4l8 8m0 -8l-8 8" /></svg>'


# Who was there.


def _runtimes(report: Report) -> str:
    rows = []
    for column in report.columns:
        where = (
            escape(column.version or "") if column.missing is None else f"<em>not here: {escape(column.missing)}</em>"
        )
        time = "" if column.missing is not None else f"{column.seconds:.0f} s"
        restarts = f", {column.restarts} restarts" if column.restarts else ""
        rows.append(f"<tr><th scope=row>{escape(column.title)}</th><td>{where}</td><td>{time}{restarts}</td></tr>")
    return (
        "<section><h2>Runtimes</h2><div class=scroll><table class=plain>"
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _data(report: Report) -> dict[str, object]:
    """What the page's script shows of a cell."""

    def numbers(cell: Cell) -> list[object]:
        d = cell.difference
        if d is None:
            return []
        return [d.kind, d.same_bits, _text(d.max_abs), _text(d.max_rel), d.max_ulp, _text(d.margin), d.wrong, d.size]

    order = {column.runtime: k for k, column in enumerate(report.columns)}
    jobs = {row.job: k for k, row in enumerate(report.rows)}
    return {
        "columns": [[c.title, c.version or c.missing] for c in report.columns],
        "rows": [[row.job, row.about] for row in report.rows],
        "statuses": {s: [_SIGNS[s], text] for s, text in STATUSES.items()},
        "cells": [
            [
                jobs[c.job],
                order[c.runtime],
                c.form,
                c.status,
                c.note,
                c.why,
                c.runs,
                c.differing,
                None if c.seconds is None else _text(1e3 * c.seconds),
                numbers(c),
            ]
            for c in report.cells
        ],
        "outcomes": [[order[o.runtime], o.form, o.outcome, o.note] for o in report.outcomes],
        "meanings": probes.OUTCOMES,
    }


def _text(value: float) -> str:
    return f"{value:.3g}"


def _lines(texts: Iterable[str]) -> str:
    return "".join(line.strip() for text in texts for line in text.splitlines())


# Colours of Okabe and Ito, which people who confuse red and green tell apart.
_STYLE = """
:root{--ink:#1b1f24;--paper:#fff;--faint:#6a737d;--line:#e3e6ea;--tint:#f5f7f9;
--equal:#d9ecf7;--equal-ink:#00537f;--differs:#d55e00;--unsteady:#cc79a7;--dead:#1b1f24;--dead-ink:#fff;
--refused:#f0e6b8;--refused-ink:#5c4a00;--dot:#0072b2}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ec;--paper:#14171a;--faint:#98a2ad;--line:#2b3138;--tint:#1c2126;
--equal:#123243;--equal-ink:#8fd0f5;--dead:#e6e9ec;--dead-ink:#14171a;--refused:#4a4013;--refused-ink:#f3e6a4;
--dot:#56b4e9}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1240px;padding:28px 20px 80px;font:16px/1.55 system-ui,-apple-system,"Segoe UI",
"DejaVu Sans",sans-serif;color:var(--ink);background:var(--paper)}
h1{font-size:clamp(26px,5vw,40px);line-height:1.15;margin:0 0 10px;letter-spacing:-.02em}
h2{font-size:22px;margin:44px 0 8px;letter-spacing:-.01em}
.lead{font-size:clamp(16px,2.3vw,19px);max-width:62ch;margin:0 0 8px}
.small{font-size:13px;color:var(--faint)}
.alarm{color:var(--differs)}td.alarm{outline:2px solid var(--differs);outline-offset:-2px}
.legend{display:flex;flex-wrap:wrap;gap:6px 16px;margin:8px 0}
.key{font-size:14px;white-space:nowrap}
i{display:inline-block;width:22px;height:22px;line-height:22px;text-align:center;font-style:normal;border-radius:4px;
font-weight:600;font-size:14px;flex:none}
.tools{display:flex;flex-wrap:wrap;gap:8px 18px;align-items:center;font-size:14px;margin:10px 0}
input[type=search]{font:inherit;padding:6px 10px;border:1px solid var(--line);border-radius:6px;background:var(--tint);
color:inherit;width:min(260px,100%)}
.scroll{overflow:auto;max-height:80vh;border:1px solid var(--line);border-radius:8px}
.plot{margin:0;padding:8px 36px 4px 12px;border:1px solid var(--line);border-radius:8px}
.strip{display:grid;grid-template-columns:minmax(0,18rem) minmax(0,1fr);gap:0 14px}
.strip>span{font-size:13px;line-height:22px;text-align:right;overflow-wrap:anywhere}
.strip>svg{display:block;width:100%;height:22px;overflow:visible}
table{border-collapse:separate;border-spacing:0;font-size:13px}
.matrix thead{position:sticky;top:0;z-index:3;background:var(--paper)}
.matrix th[scope=row]{position:sticky;left:0;z-index:2;background:var(--paper);text-align:left;font-weight:400;
white-space:nowrap;padding:0 10px 0 8px;max-width:46vw;overflow:hidden;text-overflow:ellipsis}
.heads td{position:sticky;left:0;background:var(--paper);z-index:4}
.heads th{height:214px;vertical-align:bottom;padding:0;font-weight:400;min-width:34px}
.heads div{width:34px;height:208px;display:flex;align-items:flex-end;justify-content:center}
.heads span{writing-mode:vertical-rl;transform:rotate(180deg);white-space:nowrap;line-height:1.2}
.heads em{display:block;color:var(--faint);font-style:normal;font-size:11px}
.words .heads th{min-width:84px;height:auto;padding:6px}.words .heads div{width:84px;height:auto;display:block}
.words .heads span{writing-mode:horizontal-tb;transform:none;white-space:normal;overflow-wrap:anywhere;display:block;
text-align:left}
.words td.word{font-size:12px;padding:3px 6px;white-space:normal;min-width:84px;text-align:left}
.totals td{font-size:11px;text-align:center;color:var(--faint);border-bottom:1px solid var(--line);padding:2px}
.totals th{color:var(--faint);font-size:12px;border-bottom:1px solid var(--line)}
.matrix tbody td{height:24px;text-align:center;border:1px solid var(--paper);cursor:pointer;font-weight:600;
border-radius:5px}
.matrix tbody tr:hover th,.matrix tbody tr:hover td{border-color:var(--faint)}
.matrix button{all:unset;cursor:pointer}.matrix button:hover,.matrix button:focus-visible{text-decoration:underline}
td:focus-visible{outline:2px solid var(--dot)}
.group th{text-align:left;padding:12px 8px 4px;font-weight:600}.group span{position:sticky;left:8px}
.matrix:not(.everything) tr.quiet{display:none}tr.hidden{display:none!important}
.equal,.good{background:var(--equal);color:var(--equal-ink)}
.differs,.bad{background:var(--differs);color:#fff}
.unsteady{background:repeating-linear-gradient(45deg,var(--unsteady) 0 5px,#a6527f 5px 10px);color:#fff}
.refused,.other{background:var(--refused);color:var(--refused-ink)}
.unsupported,.left-out,.not-run,.absent,.none{background:var(--tint);color:var(--faint)}
.crashed,.hung{background:var(--dead);color:var(--dead-ink)}
.why{list-style:none;padding:0;margin:0;columns:2 420px;column-gap:28px}
.why li{display:flex;gap:10px;break-inside:avoid;padding:8px 0;border-top:1px solid var(--line);overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 14px;margin:10px 0}dt{font-weight:600}dd{margin:0}
.plain th,.plain td{text-align:left;padding:5px 12px;border-bottom:1px solid var(--line);font-weight:400;
vertical-align:top}
.plain th{font-weight:600}.plain td:last-child{white-space:nowrap}.plain em{color:var(--faint);font-style:normal}
svg text{font-size:12.5px;fill:var(--ink)}svg .grid{stroke:var(--line)}svg .limit{stroke:var(--differs);stroke-width:2}
svg circle{fill:var(--dot);fill-opacity:.55}svg .beyond{overflow:visible}
svg .beyond path{stroke:var(--differs);stroke-width:2.4;fill:none}svg text.small{fill:var(--faint)}
dialog{border:1px solid var(--line);border-radius:12px;padding:18px 22px 24px;max-width:min(760px,94vw);width:100%;
color:var(--ink);background:var(--paper);max-height:88vh;overflow:auto;overflow-wrap:anywhere}
dialog::backdrop{background:rgba(0,0,0,.45)}dialog form{float:right}
dialog form button{font:inherit;border:0;background:var(--tint);color:inherit;border-radius:6px;padding:4px 10px;
cursor:pointer}
dialog p>button,dialog table button{font:inherit;font-size:14px;color:inherit;background:var(--tint);
border:1px solid var(--line);border-radius:6px;padding:3px 10px;cursor:pointer}
dialog h3{margin:0 0 6px;font-size:19px}dialog table{width:100%}dialog td{padding:4px 8px 4px 0;vertical-align:top;
border-top:1px solid var(--line)}
@media(max-width:600px){body{padding:18px 12px 60px}.matrix th[scope=row]{max-width:40vw}
.words th[scope=row]{white-space:normal}.plot{padding:8px 32px 4px}.strip{grid-template-columns:minmax(0,1fr)}
.strip>span{text-align:left;line-height:18px;margin-top:4px}svg .odd{display:none}}
@media print{.scroll{max-height:none}.tools{display:none}}
"""

_SCRIPT = r"""
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const detail = document.getElementById("detail"), body = document.getElementById("detail-body");
const make = (tag, text, className) => {
  const e = document.createElement(tag);
  if (text !== undefined) e.textContent = text;
  if (className) e.className = className;
  return e;
};
const sign = status => make("i", data.statuses[status][0], status.replace(" ", "-"));
const facts = pairs => {
  const table = make("table");
  for (const [name, value] of pairs) {
    if (value === null || value === undefined || value === "") continue;
    const row = table.insertRow();
    row.append(make("td", name, "small"), make("td", value));
  }
  return table;
};
function numbers(cell) {
  const [, , , , , , runs, differing, ms, n] = cell;
  const pairs = [];
  if (n.length) {
    const [kind, same, abs, rel, ulp, margin, wrong, size] = n;
    pairs.push(["same bits as the reference", same ? "yes" : "no"], ["largest error", abs], ["relative", rel],
      ["in units in the last place", ulp], ["in tolerances", margin],
      ["elements that are off", wrong ? `${wrong} of ${size}` : `none of ${size}`]);
    if (kind !== "equal" && kind !== "value") pairs.push(["what is off", kind]);
  }
  const bits = differing ? `${differing} of them with other bits` : "all with the same bits";
  if (runs) pairs.push(["runs", `${runs}, ${bits}`]);
  pairs.push(["median run", ms === null ? null : `${ms} ms`]);
  return pairs;
}
function showCell(k) {
  const cell = data.cells[k], [row, column, form, status, note, why] = cell;
  const head = make("h3", data.rows[row][0]);
  const line = make("p");
  line.append(sign(status), ` ${data.columns[column][0]}, ${form}: ${status}, that is: ${data.statuses[status][1]}.`);
  body.replaceChildren(head, make("p", data.rows[row][1], "small"), line);
  if (why) body.append(make("p", why));
  body.append(facts([["it said", note], ...numbers(cell), ["version", data.columns[column][1]]]));
  const other = make("button", "this row on every runtime");
  other.onclick = () => showRow(row);
  const last = make("p");
  last.append(other);
  body.append(last);
  detail.open || detail.showModal();
}
function showRow(k) {
  body.replaceChildren(make("h3", data.rows[k][0]), make("p", data.rows[k][1], "small"));
  const table = make("table");
  data.cells.forEach((cell, i) => {
    if (cell[0] !== k || cell[3] === "absent") return;
    const row = table.insertRow(), n = cell[9];
    const first = make("td"), name = make("button", `${data.columns[cell[1]][0]}, ${cell[2]}`);
    name.onclick = () => showCell(i);
    first.append(sign(cell[3]), " ", name);
    row.append(first, make("td", n.length ? `error ${n[2]}, ${n[5]} tolerances` : cell[4], "small"),
      make("td", cell[8] === null ? "" : `${cell[8]} ms`, "small"));
  });
  body.append(table);
  detail.open || detail.showModal();
}
function showOutcome(k) {
  const [column, form, outcome, note] = data.outcomes[k];
  body.replaceChildren(make("h3", `${data.columns[column][0]}, ${form}`),
    make("p", `${outcome}: ${data.meanings[outcome]}.`),
    facts([["it said", note], ["version", data.columns[column][1]]]));
  detail.showModal();
}
document.addEventListener("click", event => {
  const at = event.target.closest("[data-cell],[data-row],[data-outcome]");
  if (at?.dataset.cell) showCell(+at.dataset.cell);
  else if (at?.dataset.row) showRow(+at.dataset.row);
  else if (at?.dataset.outcome) showOutcome(+at.dataset.outcome);
  else if (event.target === detail) detail.close();
});
document.addEventListener("keydown", event => {
  if ((event.key === "Enter" || event.key === " ") && event.target.matches("td[tabindex]")) {
    event.preventDefault();
    event.target.click();
  }
});
const table = document.querySelector(".matrix");
const filter = document.getElementById("filter"), all = document.getElementById("all");
const quiet = table.querySelectorAll("tbody tr.quiet").length, rows = table.querySelectorAll("tbody tr:not(.group)");
if (quiet === rows.length) all.checked = true;
function refresh() {
  table.classList.toggle("everything", all.checked || filter.value !== "");
  const wanted = filter.value.toLowerCase();
  for (const row of rows) row.classList.toggle("hidden", !row.textContent.toLowerCase().includes(wanted));
}
all.onchange = filter.oninput = refresh;
refresh();
"""
