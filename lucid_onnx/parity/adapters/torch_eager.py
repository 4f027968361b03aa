"""torch.nn.functional.embedding_bag, eager, on the CPU."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from lucid_onnx.parity.runtime import Program, UnsupportedError

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class _Torch:
    def missing(self) -> str | None:
        return None if importlib.util.find_spec("torch") else "torch is not installed: pip install 'lucid-onnx[torch]'"

    def version(self) -> str:
        import torch

        return str(torch.__version__)

    def load(self, program: Program) -> Any:
        if program.call is None:
            raise UnsupportedError("it takes calls, not models")
        if program.call["operator"] == "embedding_bag_grad":
            raise UnsupportedError(
                "torch divides by the frequency of another row (pytorch#190063), and has no sparse max"
            )
        if program.call["operator"] == "quantized_embedding_bag":
            raise UnsupportedError("torch's bags over codes have their numbers in another layout")
        if program.call["operator"] != "embedding_bag":
            raise UnsupportedError(f"nothing here calls torch for {program.call['operator']}")
        return {name: math.inf if value == "inf" else value for name, value in program.call.items()}

    def run(self, loaded: Any, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        import torch

        def tensor(name: str) -> Any:
            if name not in inputs:
                return None
            array = inputs[name].copy()  # max_norm writes into the table
            if array.dtype == _BFLOAT16:
                return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
            return torch.from_numpy(array)

        keywords = {name: value for name, value in loaded.items() if name != "operator"}
        with torch.no_grad():
            got = torch.nn.functional.embedding_bag(
                tensor("indices"),
                tensor("weight"),
                tensor("offsets"),
                per_sample_weights=tensor("per_sample_weights"),
                **keywords,
            )
        if got.dtype == torch.bfloat16:
            return [got.view(torch.int16).numpy().view(_BFLOAT16)]
        return [got.numpy()]


RUNTIME = _Torch()
