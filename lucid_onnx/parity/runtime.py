"""The interface of a runtime: a version, and programs that it loads and runs.

An adapter is one file under ``adapters/`` that knows this module and the runtime's own package, and nothing else of
the comparison. It is loaded in a process of its own (see `lucid_onnx.parity.worker`), so it may crash.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

#: The forms of a program: the arguments of a call, or a model in one of its forms. "given" is a user's model as it is
#: in its file.
FORMS = ("call", "native", "portable", "standard", "given")


class UnsupportedError(Exception):
    """The runtime does not claim to support this. It is not a failure."""


@dataclasses.dataclass(frozen=True)
class Program:
    """What a runtime loads.

    Attributes:
        form: one of `FORMS`.
        model: a serialised model; empty for the form "call".
        call: ``{"operator": "embedding_bag", ...}`` and its keyword arguments without the arrays, for "call".
    """

    form: str
    model: bytes = b""
    call: Mapping[str, Any] | None = None


class Runtime(Protocol):
    """One way to run a program."""

    def missing(self) -> str | None:
        """Why this runtime cannot be used here; None if it can."""
        ...

    def version(self) -> str:
        """Its version, and whatever else its results depend on; only called if nothing is missing."""
        ...

    def load(self, program: Program) -> Any:
        """Make a program ready to run.

        Raises:
            UnsupportedError: the runtime does not claim to support such a program.
            Exception: anything else is reported as an error of the runtime.
        """
        ...

    def run(self, loaded: Any, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Run what `load` returned. Raises as `load`. The outputs are read before the next call."""
        ...
