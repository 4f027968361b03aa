"""What a comparison of runtimes found: statuses, cells, outcomes of bad input, and the whole report."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from . import measure

EQUAL, DIFFERS, UNSTEADY, REFUSED, UNSUPPORTED, CRASHED, HUNG, ABSENT, LEFT_OUT, NOT_RUN = (
    "equal",
    "differs",
    "unsteady",
    "refused",
    "unsupported",
    "crashed",
    "hung",
    "absent",
    "left out",
    "not run",
)
#: What each status means, in the order of a report.
STATUSES = {
    EQUAL: "within the tolerance, and the same bits in every run",
    DIFFERS: "outside of the tolerance, or of another dtype or shape",
    UNSTEADY: "runs over the same input gave different bits",
    REFUSED: "the runtime raised an error",
    UNSUPPORTED: "the runtime does not claim to support this",
    CRASHED: "the process of the runtime died",
    HUNG: "the process of the runtime did not answer in time",
    ABSENT: "the runtime is not available",
    LEFT_OUT: "not in the sample that this runtime runs by default (--cases '*' runs all)",
    NOT_RUN: "the runtime's time budget was used up",
}
#: What counts as a failure, unless it is a known difference.
FAILURES = (DIFFERS, UNSTEADY, CRASHED, HUNG)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One job in one form on one runtime.

    Attributes:
        note: the error, or the first element that is wrong.
        difference: from the expected outputs; of the worst run where runs differ. None if there are no outputs.
        runs, differing: how often it ran, and how many runs had other bits than the first.
        seconds, load_seconds: of the median run, and of loading, inside the worker.
        why: the known reason why a cell is not equal; empty if it is unexplained.
    """

    job: str
    runtime: str
    form: str
    status: str
    note: str = ""
    difference: measure.Difference | None = None
    runs: int = 0
    differing: int = 0
    seconds: float | None = None
    load_seconds: float | None = None
    why: str = ""

    @property
    def failed(self) -> bool:
        """Whether the cell is an unexplained failure."""
        return self.status in FAILURES and not self.why


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a runtime handled one bad call; see `probes.OUTCOMES`."""

    probe: str
    runtime: str
    form: str
    outcome: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Column:
    """A runtime: its version, or why it is not available."""

    runtime: str
    title: str
    forms: tuple[str, ...]
    version: str | None
    missing: str | None
    seconds: float = 0.0
    restarts: int = 0


@dataclasses.dataclass(frozen=True)
class Row:
    """A job, without its arrays."""

    job: str
    group: str
    about: str


@dataclasses.dataclass(frozen=True)
class Unseen:
    """A known difference that did not occur in its witness; ``gone``: the runtime has it no more."""

    runtime: str
    sentence: str
    witness: str
    gone: bool


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything that was found; ``unseen`` are the known differences that did not occur."""

    made: str
    lucid_onnx: str
    machine: str
    seconds: float
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    cells: tuple[Cell, ...]
    outcomes: tuple[Outcome, ...]
    unseen: tuple[Unseen, ...] = ()

    @property
    def failures(self) -> list[Cell]:
        """The unexplained failures."""
        return [cell for cell in self.cells if cell.failed]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; infinities and NaN as strings."""
        return _plain(dataclasses.asdict(self))  # type: ignore[no-any-return]


def _plain(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(value) for value in data]
    if isinstance(data, np.generic):
        data = data.item()
    return str(data) if isinstance(data, float) and not math.isfinite(data) else data
