"""tinygrad's ONNX runner, on the device that it chooses."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from lucid_onnx.parity.runtime import Program


class _Tinygrad:
    def missing(self) -> str | None:
        found = importlib.util.find_spec("tinygrad")
        return None if found else "tinygrad is not installed: pip install 'lucid-onnx[parity]'"

    def version(self) -> str:
        from tinygrad import Device

        return f"{importlib.metadata.version('tinygrad')} on {Device.DEFAULT}"

    def load(self, program: Program) -> Any:
        return program.model, {}

    def run(self, loaded: Any, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        from tinygrad.nn.onnx import OnnxRunner

        # A runner keeps the sizes of its first inputs for every dimension that the model only names.
        model, runners = loaded
        shapes = tuple(array.shape for array in inputs.values())
        if shapes not in runners:
            with tempfile.TemporaryDirectory(prefix="lucid-onnx-parity") as folder:
                path = os.path.join(folder, "model.onnx")
                with open(path, "wb") as file:
                    file.write(model)
                runners[shapes] = OnnxRunner(path)
        return [output.numpy() for output in runners[shapes](dict(inputs)).values()]


RUNTIME = _Tinygrad()
