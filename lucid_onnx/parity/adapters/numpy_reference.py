"""The NumPy reference, in a worker like every other runtime."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from lucid_onnx import __version__
from lucid_onnx.ops.embedding_bag import reference
from lucid_onnx.ops.embedding_bag_grad import reference as gradient
from lucid_onnx.ops.quantized_embedding_bag import reference as quantized
from lucid_onnx.ops.quantized_embedding_bag import spec as quantized_spec
from lucid_onnx.parity.runtime import Program, UnsupportedError


class _NumPy:
    def missing(self) -> str | None:
        return None

    def version(self) -> str:
        return f"{__version__}, NumPy {np.__version__}"

    def load(self, program: Program) -> Any:
        if program.call is None:
            raise UnsupportedError("it takes calls, not models")
        if program.call["operator"] not in ("embedding_bag", "embedding_bag_grad", "quantized_embedding_bag"):
            raise UnsupportedError(f"the comparison cannot call the reference of {program.call['operator']}")
        return dict(program.call)

    def run(self, loaded: Any, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        call, arrays = dict(loaded), cast("dict[str, Any]", dict(inputs))
        operator = call.pop("operator")
        if operator == "embedding_bag":
            return [reference.embedding_bag(arrays.pop("indices"), **arrays, **_finite(call))]
        if operator == "embedding_bag_grad":
            grad_output, indices = arrays.pop("grad_output"), arrays.pop("indices")
            return list(gradient.embedding_bag_grad(grad_output, indices, **arrays, **_finite(call)))
        kind = quantized_spec.CODES_TYPES[call.pop("codes_type")]
        codes = quantized_spec.unpack(arrays.pop("codes"), kind, call.pop("embedding_dim"))
        return [
            quantized.quantized_embedding_bag(
                arrays.pop("indices"), codes.astype(kind.dtype), **arrays, **_finite(call)
            )
        ]


def _finite(call: dict[str, Any]) -> dict[str, Any]:
    """The call with an infinite ``norm_type``, which JSON carries as a string."""
    return {name: math.inf if value == "inf" else value for name, value in call.items()}


RUNTIME = _NumPy()
