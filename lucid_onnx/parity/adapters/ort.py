"""ONNX Runtime from Python: with our library and without it, on the CPU and on CUDA."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lucid_onnx.parity.runtime import Program


@dataclasses.dataclass(frozen=True)
class _Ort:
    """``native``: with the library registered."""

    native: bool
    provider: str = "CPUExecutionProvider"

    def missing(self) -> str | None:
        from lucid_onnx.runtime.installation import load_onnxruntime

        try:
            onnxruntime = load_onnxruntime()
        except ImportError as error:
            return str(error)
        if self.provider not in onnxruntime.get_available_providers():
            return f"onnxruntime {onnxruntime.__version__} has no {self.provider}"
        if self.native:
            from lucid_onnx.native import get_library_path

            try:
                get_library_path()
            except FileNotFoundError as error:
                return str(error)
        return None

    def version(self) -> str:
        import onnxruntime

        if not self.native:
            return str(onnxruntime.__version__)
        from lucid_onnx.runtime.info import library as installed

        library = installed()
        assert library is not None
        return f"{onnxruntime.__version__}, library {library.version} ({library.active})"

    def load(self, program: Program) -> Any:
        import onnxruntime

        from lucid_onnx.runtime.session import InferenceSession

        onnxruntime.set_default_logger_severity(4)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = InferenceSession(
            program.model, native=self.native, providers=[self.provider], session_options=options
        )
        if self.provider not in session.get_providers():
            raise RuntimeError(f"{self.provider} did not start")
        run_options = onnxruntime.RunOptions()
        run_options.log_severity_level = 4
        return session, run_options

    def run(self, loaded: Any, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        session, options = loaded
        return [np.asarray(output) for output in session.run(None, inputs, options)]


NATIVE = _Ort(native=True)
STANDARD = _Ort(native=False)
CUDA_NATIVE = _Ort(native=True, provider="CUDAExecutionProvider")
CUDA = _Ort(native=False, provider="CUDAExecutionProvider")
