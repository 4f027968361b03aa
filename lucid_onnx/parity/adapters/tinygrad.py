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
        from tinygrad.nn.onnx import OnnxRunner

        with tempfile.TemporaryDirectory(prefix="lucid-onnx-parity") as folder:
            path = os.path.join(folder, "model.onnx")
            with open(path, "wb") as file:
                file.write(program.model)
            return OnnxRunner(path)

    def run(self, loaded: Any, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return [output.numpy() for output in loaded(dict(inputs)).values()]


RUNTIME = _Tinygrad()
