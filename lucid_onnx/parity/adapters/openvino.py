"""OpenVINO on the CPU, with the settings that it has by itself."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from lucid_onnx.parity.runtime import Program

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class _OpenVino:
    def missing(self) -> str | None:
        found = importlib.util.find_spec("openvino")
        return None if found else "openvino is not installed: pip install 'lucid-onnx[parity]'"

    def version(self) -> str:
        import openvino

        return str(openvino.__version__).partition("-")[0]

    def load(self, program: Program) -> Any:
        import openvino

        core = openvino.Core()
        return core.compile_model(core.read_model(program.model), "CPU").create_infer_request()

    def run(self, loaded: Any, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        import openvino

        # OpenVINO shows bfloat16 to NumPy as float16 of the same bits.
        feeds = {}
        for name, array in inputs.items():
            if array.dtype == _BFLOAT16:
                feeds[name] = openvino.Tensor(openvino.Type.bf16, openvino.Shape(array.shape))
                feeds[name].data[...] = array.view(np.float16)
            else:
                feeds[name] = openvino.Tensor(np.ascontiguousarray(array))
        loaded.infer(feeds)
        outputs = []
        for tensor in loaded.output_tensors:
            array = np.array(tensor.data)
            outputs.append(array.view(_BFLOAT16) if tensor.element_type == openvino.Type.bf16 else array)
        return outputs


RUNTIME = _OpenVino()
