"""What is known about cells that are not equal: one sentence each, checked by hand against the runtime."""

from __future__ import annotations

import dataclasses
import fnmatch
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .matrix import Cell


@dataclasses.dataclass(frozen=True)
class Known:
    """A sentence and the cells that it explains.

    Attributes:
        runtimes, jobs: patterns of `fnmatch`.
        status: of the cell.
        kinds: of its difference; empty for any.
        note: what its note contains.
        forms: empty for any.
    """

    runtimes: str
    jobs: str
    status: str
    sentence: str
    kinds: tuple[str, ...] = ()
    note: str = ""
    forms: tuple[str, ...] = ()


KNOWN: tuple[Known, ...] = ()


def why(cell: Cell) -> str:
    """The sentence that explains a cell; empty if there is none, or nothing to explain."""
    for known in KNOWN:
        if (
            cell.status == known.status
            and fnmatch.fnmatchcase(cell.runtime, known.runtimes)
            and fnmatch.fnmatchcase(cell.job, known.jobs)
            and (not known.forms or cell.form in known.forms)
            and (not known.kinds or (cell.difference is not None and cell.difference.kind in known.kinds))
            and known.note in cell.note
        ):
            return known.sentence
    return ""
