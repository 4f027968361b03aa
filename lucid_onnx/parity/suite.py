"""The conformance suite and one's own models, for the author of a runtime: a model, its inputs, and a check.

    for case in suite():
        case.check(my_runtime.run(case.model_bytes, case.inputs))

Under pytest the fixture ``parity`` is such a case; see `lucid_onnx.pytest_plugin`.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from lucid_onnx.ops import OPERATORS

from . import measure, work

#: How many sets of random inputs a model gets.
SETS = 3


class SuiteCase:
    """One thing for a runtime to run.

    Attributes:
        name: of the case, with the model's form.
        form: "standard", "portable", "native" or, for a model without bags, "given".
        inputs: the arrays by input name; bfloat16 is that of ml_dtypes.
    """

    def __init__(self, job: work.Job, form: str) -> None:
        program = job.program(form)
        if program is None:
            raise ValueError(f"{job.name} has no form {form!r}")
        self.name, self.form, self.inputs = f"{job.name} ({form})", form, dict(job.inputs)
        self.model_bytes = program.model
        self._job = job

    @functools.cached_property
    def model(self) -> onnx.ModelProto:
        """The model, parsed."""
        return onnx.load_from_string(self.model_bytes)

    @property
    def expected(self) -> list[np.ndarray]:
        """The reference's outputs, rounded to the outputs' dtypes."""
        return [e.rounded for e in self._job.expected]

    @property
    def dtypes(self) -> set[str]:
        """The names of all dtypes of inputs and outputs, for a runtime that lacks some."""
        arrays = [*self.inputs.values(), *self.expected]
        return {array.dtype.name for array in arrays}

    def check(self, outputs: Any) -> None:
        """Raise AssertionError unless the outputs are right: count, dtypes, shapes, and values within the tolerance.

        Args:
            outputs: arrays in the order of the model's outputs, a mapping in that order, or the only array.
        """
        if isinstance(outputs, Mapping):
            outputs = list(outputs.values())
        if isinstance(outputs, np.ndarray):
            outputs = [outputs]
        arrays = [np.asarray(output) for output in outputs]
        found = measure.compare(arrays, self._job.expected)
        if found.kind != "equal":
            counted = f"; {found.wrong} of {found.size} elements are wrong" if found.wrong else ""
            raise AssertionError(f"{self.name}: {found.where}{counted}")


def names(pattern: str = "*") -> list[str]:
    """The suite's cases whose names match a pattern of `fnmatch`."""
    return [name for name in _cases() if fnmatch.fnmatchcase(name, pattern)]


def suite(pattern: str = "*", form: str = "standard") -> list[SuiteCase]:
    """The suite's cases in one form."""
    return [case(name, form) for name in names(pattern)]


def case(name: str, form: str = "standard") -> SuiteCase:
    """One of the suite's cases.

    Raises:
        KeyError: there is no such case.
    """
    return SuiteCase(work.case_job(_cases()[name], "conformance"), form)


def model_case(path: str, number: int, form: str = "standard") -> SuiteCase:
    """A model over the ``number``-th set of random inputs, 0 to `SETS` - 1; in the form "given" if it has no bags.

    Raises:
        OSError, work.CannotRunError: as `work.model`.
    """
    job = _model_jobs(path)[number]
    return SuiteCase(job, form if job.program(form) is not None else "given")


@functools.cache
def _cases() -> Mapping[str, Any]:
    return {name: case for operator in OPERATORS.values() for name, case in operator.cases.suite().items()}


@functools.lru_cache(maxsize=4)
def _model_jobs(path: str) -> Sequence[work.Job]:
    return work.model(Path(path), {}, sets=SETS)
