"""Runs every job on every runtime: cells, and the outcomes of bad input."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import datetime
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lucid_onnx import __version__

from . import explain, measure, probes, process
from .adapters import Entry, NotHereError
from .report import (
    ABSENT,
    CRASHED,
    DIFFERS,
    EQUAL,
    HUNG,
    LEFT_OUT,
    NOT_RUN,
    REFUSED,
    UNSTEADY,
    UNSUPPORTED,
    Cell,
    Column,
    Outcome,
    Report,
    Row,
)
from .work import Job

_HANGS_ENOUGH = 3


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much is run.

    Attributes:
        runs: of each cell, as far as ``seconds`` for it last, but at least two.
        budget: seconds for each runtime; after them the rest is "not run".
        at_once: how many runtimes run at the same time.
        every_case: also the cases beyond the sample of a runtime's entry.
    """

    runs: int = 20
    seconds: float = 0.1
    budget: float = 240.0
    at_once: int = 2
    every_case: bool = False


#: Called after each piece of work: the runtime, how many pieces are done, and how many there are.
Progress = Callable[[str, int, int], None]


def run(
    entries: Sequence[Entry],
    jobs: Sequence[Job],
    *,
    bad_input: bool = True,
    limits: Limits | None = None,
    progress: Progress = lambda runtime, done, total: None,
) -> Report:
    """Run every job in every form on every runtime, each runtime in a process of its own."""
    limits = limits or Limits()
    begin = time.perf_counter()
    tests = probes.all_probes() if bad_input else []
    with concurrent.futures.ThreadPoolExecutor(limits.at_once) as pool:
        waiting = {
            entry.name: pool.submit(_RuntimeRun(entry, limits, progress).results, jobs, tests)
            for entry in sorted(entries, key=lambda e: not e.slow)
        }
        found = [waiting[entry.name].result() for entry in entries]
    cells = tuple(cell for _, cells, _ in found for cell in cells)
    return Report(
        made=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        lucid_onnx=__version__,
        machine=f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.system()}, Python {platform.python_version()}",
        seconds=time.perf_counter() - begin,
        columns=tuple(column for column, _, _ in found),
        rows=tuple(Row(job.name, job.group, job.about) for job in jobs),
        cells=cells,
        outcomes=tuple(outcome for _, _, outcomes in found for outcome in outcomes),
        unseen=tuple(explain.unseen(cells)),
    )


class _RuntimeRun:
    """One runtime's part of the matrix."""

    def __init__(self, entry: Entry, limits: Limits, progress: Progress) -> None:
        self._entry, self._limits, self._progress = entry, limits, progress
        self._loaded: Any = None  # the program that the worker holds
        self._hangs = 0
        self._begin = 0.0
        self._done, self._total = 0, 0  # pieces, for the progress
        self._refused: int | None = None  # index of the cell that the running process refused last
        self._refusal_spoils = False  # after a refusal the process is of no use
        self._not_loaded: tuple[Any, process.RefusalError] | None = None  # the program that was refused last
        # By form and name: why the good call of a probe does not run.
        self._good_failures: dict[tuple[str, str], str] = {}

    def results(self, jobs: Sequence[Job], tests: Sequence[probes.Probe]) -> tuple[Column, list[Cell], list[Outcome]]:
        """Its column, cells and outcomes."""
        entry = self._entry
        self._begin = time.perf_counter()
        try:
            command = entry.command()
        except NotHereError as error:
            return self._absent(jobs, str(error))
        with process.Worker(command) as self._worker:
            try:
                hello = self._worker.hello(entry.load_timeout)
            except (process.CrashError, process.HangError, process.RefusalError) as error:
                return self._absent(jobs, f"it does not start: {error}")
            if hello["missing"]:
                return self._absent(jobs, str(hello["missing"]))
            runnable = sum(job.program(form) is not None for form in entry.forms for job in jobs)
            self._total = runnable + len(entry.forms) * len(tests)
            # Bad input first: it is little, and the runtime's time may be up before the end.
            outcomes = self._outcomes(tests)
            cells: list[Cell] = []
            for form in entry.forms:
                self._run_form(form, jobs, cells)
            restarts = self._worker.starts - 1
        column = Column(
            entry.name,
            entry.title,
            entry.forms,
            str(hello["version"]),
            None,
            time.perf_counter() - self._begin,
            restarts,
        )
        return column, cells, outcomes

    def _advance(self) -> None:
        """Report one more piece as done."""
        self._done += 1
        self._progress(self._entry.name, self._done, self._total)

    def _absent(self, jobs: Sequence[Job], why: str) -> tuple[Column, list[Cell], list[Outcome]]:
        """The results of a runtime that is not available."""
        entry = self._entry
        self._progress(entry.name, 1, 1)
        cells = [
            Cell(job.name, entry.name, form, ABSENT, why)
            for form in entry.forms
            for job in jobs
            if job.program(form) is not None
        ]
        return Column(entry.name, entry.title, entry.forms, None, why), cells, []

    def _chosen(self, jobs: Sequence[Job], form: str) -> tuple[set[str], str]:
        """The names of the jobs to run, and a sentence that says why not all."""
        entry = self._entry
        suite = [job for job in jobs if job.group in ("conformance", "scale") and job.program(form) is not None]
        names = {job.name for job in jobs}
        if entry.sample_size is None or self._limits.every_case:
            return names, ""
        units = list(_programs(suite, form)) if entry.sample_programs else [[job] for job in suite]
        if len(units) <= entry.sample_size:
            return names, ""
        kept = [units[k * len(units) // entry.sample_size] for k in range(entry.sample_size)]
        names -= {job.name for job in suite} - {job.name for unit in kept for job in unit}
        what = "programs, each with all of its cases" if entry.sample_programs else "cases"
        return names, f"It runs {entry.sample_size} of {len(units)} {what}, evenly spread: {entry.sample_reason}."

    def _out_of_time(self) -> str | None:
        """Why nothing more is run; None if there is time."""
        if self._hangs >= _HANGS_ENOUGH:
            return f"given up after {_HANGS_ENOUGH} hangs"
        if time.perf_counter() - self._begin > self._limits.budget:
            return f"its budget of {self._limits.budget:.0f} s is used up"
        return None

    def _load(self, form: str, job: Job) -> float | None:
        """The seconds it took; None if the worker has that program already."""
        program = job.program(form)
        assert program is not None
        if program == self._loaded:
            return None
        if self._not_loaded is not None and program == self._not_loaded[0]:
            raise self._not_loaded[1]
        self._loaded = None
        call = None if program.call is None else dict(program.call)
        try:
            seconds = self._worker.load(form, program.model, call, self._entry.load_timeout)
        except process.RefusalError as error:
            self._not_loaded = program, error
            raise
        self._loaded = program
        return seconds

    def _run_form(self, form: str, jobs: Sequence[Job], cells: list[Cell]) -> None:
        """Add the cells of one form."""
        chosen, why = self._chosen(jobs, form)
        refused: Cell | None = None  # the cell that showed that the whole form is refused
        for job in _by_program(jobs, form):
            if job.name not in chosen:
                cells.append(Cell(job.name, self._entry.name, form, LEFT_OUT, why=why))
            elif refused is not None:
                cells.append(dataclasses.replace(refused, job=job.name))
            else:
                cells.append(self._cell(form, job))
                self._retry_after_refusal(form, job, cells)
                refused = _whole_form(cells[-1])
            self._advance()

    def _cell(self, form: str, job: Job) -> Cell:
        name = self._entry.name
        late = self._out_of_time()
        if late is not None:
            return Cell(job.name, name, form, NOT_RUN, late, why=f"Not run: {late}.")
        load_seconds = None
        try:
            load_seconds = self._load(form, job)
            header, outputs = self._worker.run(
                job.inputs,
                runs=max(self._limits.runs, job.runs),
                seconds=max(self._limits.seconds, job.seconds),
                timeout=self._entry.run_timeout,
            )
        except (process.RefusalError, process.CrashError, process.HangError) as error:
            return self._failed(form, job, error)
        found = [measure.compare(result, job.expected) for result in outputs]
        worst = max(found, key=lambda d: (d.kind != "equal", d.margin))
        status = EQUAL if worst.kind == "equal" else DIFFERS
        note = worst.where
        if header["differing"]:
            status = UNSTEADY
            note = f"{header['differing']} of {header['runs']} runs had other bits than the first. {note}".strip()
        cell = Cell(
            job.name,
            name,
            form,
            status,
            note,
            worst,
            header["runs"],
            header["differing"],
            header["seconds"],
            load_seconds,
        )
        return dataclasses.replace(cell, why=explain.why(cell))

    def _retry_after_refusal(self, form: str, job: Job, cells: list[Cell]) -> None:
        """After a crash or hang that an earlier refusal may have caused, try again in a new process.

        If the second try succeeds, the refused cell says that the refusal broke the process.
        """
        status = cells[-1].status
        if status in (CRASHED, HUNG) and self._refused is not None:
            before, self._refused = self._refused, None
            again = self._cell(form, job)
            if again.status not in (CRASHED, HUNG):
                self._refusal_spoils = True
                self._hangs -= status == HUNG
                ending = f"After this error the next call {'did not return' if status == HUNG else 'crashed'}."
                cells[before] = dataclasses.replace(cells[before], note=f"{cells[before].note} {ending}")
                cells[-1] = again
                status = again.status
        if status in (CRASHED, HUNG):
            self._refused = None
        elif status == REFUSED and self._loaded is not None:  # by the run, not by the load
            if self._refusal_spoils:
                self._worker.stop(kill=True)
                self._loaded = None
            else:
                self._refused = len(cells) - 1

    def _failed(self, form: str, job: Job, error: Exception) -> Cell:
        """The cell of a job that ended with an error."""
        status = REFUSED
        if isinstance(error, process.RefusalError):
            status = UNSUPPORTED if error.unsupported else REFUSED
        else:
            self._loaded = None
            status = CRASHED if isinstance(error, process.CrashError) else HUNG
            self._hangs += status == HUNG
        cell = Cell(job.name, self._entry.name, form, status, _shortened(str(error)))
        # For an announced limit, its message is the explanation.
        return dataclasses.replace(cell, why=f"{cell.note}." if status == UNSUPPORTED else explain.why(cell))

    def _outcomes(self, tests: Sequence[probes.Probe]) -> list[Outcome]:
        """The outcomes of bad input, in every form that the probe has."""
        outcomes = []
        for form in self._entry.forms:
            for probe in tests:
                if probe.good.program(form) is not None:
                    outcome, note = self._outcome(form, probe)
                    outcomes.append(Outcome(probe.name, self._entry.name, form, outcome, _shortened(note)))
                self._advance()
        return outcomes

    def _outcome(self, form: str, probe: probes.Probe) -> tuple[str, str]:
        """One of `probes.OUTCOMES`, and a note."""
        if self._out_of_time() is not None:
            return "not run", str(self._out_of_time())
        good = form, probe.good.name
        if good in self._good_failures:  # it would fail again
            return "not run", self._good_failures[good]
        try:
            self._load(form, probe.good)
            if not self._good_call(probe.good):
                self._good_failures[good] = "the good call gave wrong numbers"
        except process.RefusalError as error:
            self._good_failures[good] = str(error)
        except (process.CrashError, process.HangError) as error:
            self._loaded = None
            self._hangs += isinstance(error, process.HangError)
            self._good_failures[good] = str(error)
        if good in self._good_failures:
            return "not run", self._good_failures[good]
        timeout = self._entry.run_timeout
        try:
            _, outputs = self._worker.run(probe.inputs, runs=1, seconds=0, timeout=timeout)
        except process.RefusalError as refusal:
            try:
                usable = self._good_call(probe.good)
            except (process.RefusalError, process.CrashError, process.HangError):
                self._loaded = None
                usable = False
            return ("refuses" if usable else "refuses, then fails"), str(refusal)
        except process.CrashError as error:
            self._loaded = None
            return "crash", str(error)
        except process.HangError as error:
            self._loaded = None
            self._hangs += 1
            return "hang", str(error)
        if not outputs[0]:
            return "garbage", "no output"
        return probes.read(probe, outputs[0][0]), ""

    def _good_call(self, job: Job) -> bool:
        """Whether a job runs and is equal."""
        _, outputs = self._worker.run(job.inputs, runs=1, seconds=0, timeout=self._entry.run_timeout)
        return measure.compare(outputs[0], job.expected).kind == "equal"


def _whole_form(cell: Cell) -> Cell | None:
    """What to report for the other jobs of a form if ``cell`` shows that all of them end alike; else None."""
    known = explain.find(cell)
    if known is None or not known.whole_form:
        return None
    return dataclasses.replace(cell, note=f"Not tried, as {cell.job} was {cell.status}: {cell.note}")


def _by_program(jobs: Iterable[Job], form: str) -> list[Job]:
    """The jobs that have the form, those of one program in a row, so that it is loaded once."""
    return [job for group in _programs(jobs, form) for job in group]


def _programs(jobs: Iterable[Job], form: str) -> Iterable[list[Job]]:
    """The jobs that have the form, a list for each program."""
    groups: dict[Any, list[Job]] = {}
    for job in jobs:
        program = job.program(form)
        if program is not None:
            key = (program.model, None if program.call is None else tuple(sorted(map(repr, program.call.items()))))
            groups.setdefault(key, []).append(job)
    return groups.values()


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 400 else text[:400] + " ..."
