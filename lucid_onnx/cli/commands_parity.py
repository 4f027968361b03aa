"""The command that compares runtimes: parity."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from lucid_onnx.builder import Replacing

from . import files as cli_files
from . import show as cli_show
from .files import EXIT_DIFFERS, UserError
from .options import integer, real
from .progress import runtime_bars

if TYPE_CHECKING:
    from lucid_onnx.parity.job import Job
    from lucid_onnx.parity.report import Report

_SHOWN_FAILURES = 20


def parity(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="An .onnx file; without one, the conformance suite.")
    ] = None,
    runtimes: Annotated[str, typer.Option(metavar="NAME,NAME", help="The runtimes; --list shows their names.")] = "all",
    cases: Annotated[
        str | None,
        typer.Option(
            metavar="PATTERN",
            help="The suite's cases whose names match, such as 'max_*'. Without it, slow runtimes run a sample.",
        ),
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input", "-i", metavar="NAME=FILE.npy", help="An input of MODEL; the others are random. Repeatable."
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            parser=real,
            metavar="NUMBER",
            help="The largest error of MODEL's outputs, as a part of their largest magnitude; by default 2e-5.",
        ),
    ] = None,
    bad_input: Annotated[bool, typer.Option("--bad-input/--no-bad-input", help="Also try bad input.")] = True,
    strict: Annotated[bool, typer.Option("--strict", help="Also fail on known differences.")] = False,
    runs: Annotated[
        int,
        typer.Option(
            parser=integer, metavar="INTEGER", help="How often each case runs; all runs must give the same bits."
        ),
    ] = 20,
    budget: Annotated[
        float,
        typer.Option(parser=real, metavar="SECONDS", help="The time for each runtime; cases beyond it are not run."),
    ] = 240.0,
    at_once: Annotated[
        int,
        typer.Option("--at-once", parser=integer, metavar="INTEGER", help="How many runtimes run at the same time."),
    ] = 2,
    html: Annotated[Path | None, typer.Option("--html", help="Write the report as one HTML file.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the whole report as JSON.")] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", help="Write the report as a small Markdown table.")
    ] = None,
    names: Annotated[
        bool, typer.Option("--list", help="List the runtimes, and which are available, and exit.")
    ] = False,
) -> int:
    """Compare runtimes: where their results are equal, where they differ and by how much.

    Runs MODEL in all of its forms, or the conformance suite with larger cases and some standard operators and
    functions, on every available runtime, each in its own process. Crashes and hangs are reported. The exit code is 1
    after an unexplained failure: a result beyond the tolerance, runs with different bits, a crash or a hang. `--strict`
    also fails on known differences.

    Example: `lucid-onnx parity ranker.onnx --runtimes onnxruntime,web-webgpu --html report.html`
    """
    from lucid_onnx.parity import matrix

    chosen = _chosen_runtimes(runtimes)
    if names:
        return _show_runtimes(chosen)
    for option, path in (("--html", html), ("--json", as_json), ("--markdown", markdown)):
        if path is not None:
            cli_files.check_output(path, option)
    for option, value in (("--runs", runs), ("--budget", budget), ("--at-once", at_once)):
        if not value >= 1:
            raise UserError(f"{option} {value}: must be at least 1")
    jobs = _suite_jobs(cases, inputs, tolerance) if model is None else _model_jobs(model, cases, inputs, tolerance)
    limits = matrix.Limits(runs=runs, budget=budget, at_once=at_once, every_case=cases is not None)
    with runtime_bars() as progress:
        report = matrix.run(chosen, jobs, bad_input=bad_input, limits=limits, progress=progress)
    written = _write_reports(report, html=html, as_json=as_json, markdown=markdown)
    console = cli_show.new_console()
    failures = _show_report(console, report, strict)
    for path in written:
        cli_show.say(console, f"wrote {path} ({cli_show.bytes_text(path.stat().st_size)})")
    return EXIT_DIFFERS if failures else 0


def _suite_jobs(cases: str | None, inputs: list[str] | None, tolerance: float | None) -> list[Job]:
    from lucid_onnx.parity import work

    if inputs or tolerance is not None:
        raise UserError("--input and --tolerance need a MODEL")
    pattern = "*" if cases is None else cases
    jobs = [*work.conformance(pattern), *work.scale(pattern), *work.operators(pattern)]
    if not jobs:
        raise UserError(f"--cases {cases}: no case matches")
    return jobs


def _model_jobs(model: str, cases: str | None, inputs: list[str] | None, tolerance: float | None) -> list[Job]:
    from lucid_onnx.parity import work

    if cases is not None:
        raise UserError(f"--cases {cases}: needs the conformance suite, but MODEL {model} is given")
    cli_files.check_file(model)
    given = {name: cli_files.read_npy(path) for name, path in cli_files.named_files(inputs or []).items()}
    limit = work.MODEL_TOLERANCE if tolerance is None else tolerance
    with cli_files.user_errors(work.CannotRunError), cli_files.reading(model):
        return work.model(Path(model), given, tolerance=limit)


def _write_reports(report: Report, *, html: Path | None, as_json: Path | None, markdown: Path | None) -> list[Path]:
    """Write the report to the files that are given; returns their paths."""
    from lucid_onnx.parity import html as as_html
    from lucid_onnx.parity import markdown as as_markdown

    texts: dict[Path | None, Callable[[], str]] = {
        html: lambda: as_html.page(report),
        as_json: lambda: json.dumps(report.as_dict(), indent=1, allow_nan=False),
        markdown: lambda: as_markdown.page(report),
    }
    paths = [path for path in texts if path is not None]
    for path in paths:
        with cli_files.writing(path), Replacing(path) as files:
            files.open(path.name).write(texts[path]().encode())
    return paths


def _chosen_runtimes(text: str) -> list[Any]:
    from lucid_onnx.parity.adapters import ENTRIES

    if text == "all":
        return list(ENTRIES.values())
    chosen = []
    for name in dict.fromkeys(part.strip() for part in text.split(",")):
        if name not in ENTRIES:
            raise UserError(f"--runtimes {name}: is not one of {', '.join(ENTRIES)}")
        chosen.append(ENTRIES[name])
    return chosen


def _show_runtimes(chosen: Sequence[Any]) -> int:
    from lucid_onnx.parity import matrix

    table = cli_show.new_table("name", "runtime", "available")
    for column in matrix.run(chosen, [], bad_input=False).columns:
        table.add_row(column.runtime, column.title, Text(column.version or f"no: {column.missing}"))
    cli_show.new_console().print(table)
    return 0


def _show_report(console: Console, report: Report, strict: bool) -> int:
    """Print the table and the failures; returns the number of failures."""
    from lucid_onnx.parity.report import ABSENT, FAILURES, STATUSES

    statuses = [s for s in STATUSES if any(c.status == s for c in report.cells) and s != ABSENT]
    table = cli_show.new_table("runtime", "form", *statuses, "largest error")
    for column in report.columns:
        if column.missing is not None:
            continue
        for form in column.forms:
            cells = [c for c in report.cells if (c.runtime, c.form) == (column.runtime, form)]
            if not cells:
                continue
            margins = [c.difference.margin for c in cells if c.difference is not None]
            worst = f"{max(margins):.3g} tolerances" if margins else "-"
            counts = [str(sum(c.status == s for c in cells) or "-") for s in statuses]
            table.add_row(column.runtime, form, *counts, worst)
    console.print(table)
    for column in report.columns:
        if column.missing is not None:
            cli_show.say(console, f"not available: {column.runtime}: {column.missing}")
    known = [c for c in report.cells if c.status in FAILURES and c.why]
    failures = report.failures + (known if strict else [])
    if known and not strict:
        cli_show.say(console, f"{len(known)} known differences; the reports and --strict show them")
    if report.unseen:
        cli_show.say(console, f"{len(report.unseen)} known differences did not occur; the reports show them")
    for cell in failures[:_SHOWN_FAILURES]:
        cli_show.say(console, f"{cell.runtime}, {cell.form}, {cell.job}: {cell.status}: {cell.note}")
    if len(failures) > _SHOWN_FAILURES:
        cli_show.say(console, f"and {len(failures) - _SHOWN_FAILURES} more")
    return len(failures)
