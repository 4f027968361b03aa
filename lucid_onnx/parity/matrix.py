"""Every job on every runtime: cells, and how a runtime takes bad input."""

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
        budget: seconds for each runtime; what is left after them is "not run".
        at_once: how many runtimes run beside each other.
        every_case: also those that a runtime's entry leaves out.
    """

    runs: int = 20
    seconds: float = 0.1
    budget: float = 240.0
    at_once: int = 2
    every_case: bool = False


#: Told of each finished piece: the runtime, how many pieces it has done, and how many it has.
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
            entry.name: pool.submit(_Visit(entry, limits, progress).all, jobs, tests)
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


class _Visit:
    """One runtime's part of the matrix."""

    def __init__(self, entry: Entry, limits: Limits, progress: Progress) -> None:
        self._entry, self._limits, self._progress = entry, limits, progress
        self._loaded: Any = None  # the program that the worker holds
        self._hangs = 0
        self._begin = 0.0
        self._refused: int | None = None  # the cell that the process which is running refused last
        self._spoils = False  # a refusal leaves the runtime's process useless
        self._not_loaded: tuple[Any, process.RefusalError] | None = None  # the program that was refused last
        self._closed: dict[str, Cell] = {}  # of each form that is refused as a whole, the cell that showed it
        self._no_good: dict[tuple[str, str], str] = {}  # why the good call of probes does not run, by form and name

    def all(self, jobs: Sequence[Job], tests: Sequence[probes.Probe]) -> tuple[Column, list[Cell], list[Outcome]]:
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
            pieces = [(form, job) for form in entry.forms for job in jobs]
            total = sum(job.program(form) is not None for form, job in pieces) + len(entry.forms) * len(tests)
            done, cells, outcomes = 0, [], []
            # Bad input first: it is little, and a runtime's time may be up before the end.
            for form in entry.forms:
                for probe in tests:
                    if probe.good.program(form) is not None:
                        outcomes.append(self._probe(form, probe))
                    done += 1
                    self._progress(entry.name, done, total)
            for form in entry.forms:
                chosen, why = self._chosen(jobs, form)
                for job in _by_program(jobs, form):
                    if job.name not in chosen:
                        cells.append(Cell(job.name, entry.name, form, LEFT_OUT, why=why))
                    elif form in self._closed:
                        cells.append(dataclasses.replace(self._closed[form], job=job.name))
                    else:
                        cells.append(self._cell(form, job))
                        self._look_back(form, job, cells)
                        self._close(form, cells[-1])
                    done += 1
                    self._progress(entry.name, done, total)
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

    def _absent(self, jobs: Sequence[Job], why: str) -> tuple[Column, list[Cell], list[Outcome]]:
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
        """The names of the jobs to run, and a sentence about the others."""
        entry = self._entry
        suite = [job for job in jobs if job.group in ("conformance", "scale") and job.program(form) is not None]
        names = {job.name for job in jobs}
        if entry.few is None or self._limits.every_case:
            return names, ""
        units = list(_programs(suite, form)) if entry.few_programs else [[job] for job in suite]
        if len(units) <= entry.few:
            return names, ""
        kept = [units[k * len(units) // entry.few] for k in range(entry.few)]
        names -= {job.name for job in suite} - {job.name for unit in kept for job in unit}
        what = "programs, each with all of its cases" if entry.few_programs else "cases"
        return names, f"It is given {entry.few} of {len(units)} {what}, evenly spread: {entry.why_few}."

    def _close(self, form: str, cell: Cell) -> None:
        """Ask no more of a form of which one cell ended as all will."""
        known = explain.find(cell)
        if known is not None and known.whole_form:
            self._closed[form] = dataclasses.replace(
                cell, note=f"Not tried, as {cell.job} was {cell.status}: {cell.note}"
            )

    def _out_of_time(self) -> str | None:
        if self._hangs >= _HANGS_ENOUGH:
            return f"given up after {_HANGS_ENOUGH} hangs"
        if time.perf_counter() - self._begin > self._limits.budget:
            return f"its {self._limits.budget:.0f} s were up"
        return None

    def _load(self, form: str, job: Job) -> float | None:
        """Seconds, or None where the worker has that program already."""
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

    def _look_back(self, form: str, job: Job, cells: list[Cell]) -> None:
        """Of a death that may be an earlier refusal's doing, try again in a new process, and tell which it was."""
        status = cells[-1].status
        if status in (CRASHED, HUNG) and self._refused is not None:
            before, self._refused = self._refused, None
            again = self._cell(form, job)
            if again.status not in (CRASHED, HUNG):
                self._spoils = True
                self._hangs -= status == HUNG
                ending = f"After this error the next call {'did not return' if status == HUNG else 'crashed'}."
                cells[before] = dataclasses.replace(cells[before], note=f"{cells[before].note} {ending}")
                cells[-1] = again
                status = again.status
        if status in (CRASHED, HUNG):
            self._refused = None
        elif status == REFUSED and self._loaded is not None:  # by the run, not by the load
            if self._spoils:
                self._worker.stop(kill=True)
                self._loaded = None
            else:
                self._refused = len(cells) - 1

    def _failed(self, form: str, job: Job, error: Exception) -> Cell:
        status = REFUSED
        if isinstance(error, process.RefusalError):
            status = UNSUPPORTED if error.unsupported else REFUSED
        else:
            self._loaded = None
            status = CRASHED if isinstance(error, process.CrashError) else HUNG
            self._hangs += status == HUNG
        cell = Cell(job.name, self._entry.name, form, status, _shortened(str(error)))
        # What a runtime announces is the explanation.
        return dataclasses.replace(cell, why=f"{cell.note}." if status == UNSUPPORTED else explain.why(cell))

    def _probe(self, form: str, probe: probes.Probe) -> Outcome:
        outcome, note = self._judged(form, probe)
        return Outcome(probe.name, self._entry.name, form, outcome, _shortened(note))

    def _judged(self, form: str, probe: probes.Probe) -> tuple[str, str]:
        if self._out_of_time() is not None:
            return "not run", str(self._out_of_time())
        good = form, probe.good.name
        if good in self._no_good:  # nor does it now
            return "not run", self._no_good[good]
        try:
            self._load(form, probe.good)
            if not self._good_call(probe.good):
                self._no_good[good] = "the good call gave wrong numbers"
        except process.RefusalError as error:
            self._no_good[good] = str(error)
        except (process.CrashError, process.HangError) as error:
            self._loaded = None
            self._hangs += isinstance(error, process.HangError)
            self._no_good[good] = str(error)
        if good in self._no_good:
            return "not run", self._no_good[good]
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
        _, outputs = self._worker.run(job.inputs, runs=1, seconds=0, timeout=self._entry.run_timeout)
        return measure.compare(outputs[0], job.expected).kind == "equal"


def _by_program(jobs: Iterable[Job], form: str) -> list[Job]:
    """Those that have the form, with jobs over the same program beside each other: it is loaded once for them."""
    return [job for group in _programs(jobs, form) for job in group]


def _programs(jobs: Iterable[Job], form: str) -> Iterable[list[Job]]:
    """Those that have the form, a list for each program."""
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
