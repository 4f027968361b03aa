"""One thing for every runtime to run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from .measure import Expected
from .runtime import Program


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """One thing to run on every runtime.

    Attributes:
        name, group: the group is "conformance", "scale", "operators" or "model".
        about: one line for people.
        inputs: in the order of the model's inputs.
        expected: of each output.
        program: the program of a form, or None where this job has none of that form.
        runs, seconds: at least so many runs, within at least so many seconds, where the comparison's own limits are
            lower.
    """

    name: str
    group: str
    about: str
    inputs: Mapping[str, np.ndarray]
    expected: Sequence[Expected]
    program: Callable[[str], Program | None]
    runs: int = 0
    seconds: float = 0.0
