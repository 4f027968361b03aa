"""onnx.reference.ReferenceEvaluator, ONNX's own runtime in NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx.reference

from lucid_onnx.parity.runtime import Program


class _Reference:
    def missing(self) -> str | None:
        return None

    def version(self) -> str:
        return f"{onnx.__version__}, NumPy {np.__version__}"

    def load(self, program: Program) -> Any:
        return onnx.reference.ReferenceEvaluator(onnx.load_from_string(program.model))

    def run(self, loaded: Any, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        with np.errstate(all="ignore"):  # the cases hold infinities
            return [np.asarray(output) for output in loaded.run(None, dict(inputs))]


RUNTIME = _Reference()
