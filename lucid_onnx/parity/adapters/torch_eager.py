"""PyTorch, eager, on the CPU: torch.nn.functional.embedding_bag, its gradient, and the module of quantised bags."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from lucid_onnx.ops.embedding_bag.spec import ATEN_MODES
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
        call = {name: math.inf if value == "inf" else value for name, value in program.call.items()}
        operator = call.pop("operator")
        if operator not in _CALLS:
            raise UnsupportedError(f"the comparison cannot call torch for {operator}")
        later = (call.pop("negative", "refuse"), call.pop("divisor", None))
        if later != ("refuse", None) or call["mode"] not in ATEN_MODES:
            raise UnsupportedError("torch has no mode sqrtn, no divisor of weighted means and skips no negative index")
        if operator == "quantized_embedding_bag" and (call["padding_idx"], call["max_norm"]) != (None, None):
            raise UnsupportedError("torch's quantised bags have no padding_idx and no max_norm")
        return _CALLS[operator], call

    def run(self, loaded: Any, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        function, call = loaded
        return list(map(_array, function({name: _tensor(array) for name, array in inputs.items()}, call)))


def _tensor(array: np.ndarray) -> Any:
    import torch

    array = array.copy()  # max_norm writes into the table
    if array.dtype == _BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _array(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return np.asarray(tensor.view(torch.int16).numpy().view(_BFLOAT16))
    return np.asarray(tensor.numpy())


def _bag(tensors: dict[str, Any], call: Mapping[str, Any]) -> list[Any]:
    import torch

    with torch.no_grad():
        return [torch.nn.functional.embedding_bag(tensors.pop("indices"), tensors.pop("weight"), **tensors, **call)]


def _gradient(tensors: dict[str, Any], call: Mapping[str, Any]) -> list[Any]:
    """The gradients of the table, as rows and values where it is sparse, and of per_sample_weights."""
    import torch

    leaves = [tensors[name].requires_grad_() for name in ("weight", "per_sample_weights") if name in tensors]
    grad_output, indices = tensors.pop("grad_output"), tensors.pop("indices")
    pooled = torch.nn.functional.embedding_bag(indices, tensors.pop("weight"), **tensors, **call)
    table, *others = torch.autograd.grad(pooled, leaves, grad_output)
    return [table._indices()[0], table._values(), *others] if call["sparse"] else [table, *others]


def _quantized(tensors: dict[str, Any], call: Mapping[str, Any]) -> list[Any]:
    """torch's module of quantised bags, whose values are unsigned and have a zero_point in place of a bias."""
    import torch
    from torch.ao.nn.quantized import EmbeddingBag

    from lucid_onnx.ops.quantized_embedding_bag import spec

    kind, dim = spec.CODES_TYPES[call["codes_type"]], call["embedding_dim"]
    codes = spec.unpack(tensors["codes"].numpy(), kind, dim)
    scale = tensors["scale"].float()
    zero = tensors["zero_point"].float() if "zero_point" in tensors else torch.zeros_like(scale)
    if "bias" in tensors:
        zero = -tensors["bias"].float() / scale
    unsigned = torch.from_numpy(codes.astype(np.int16) - kind.lowest)
    exact = (unsigned - (zero[:, None] - kind.lowest)) * scale[:, None]
    dtype = torch.quint4x2 if "4" in call["codes_type"] else torch.quint8
    module = EmbeddingBag(
        *codes.shape,
        mode=call["mode"],
        include_last_offset=call["include_last_offset"],
        dtype=dtype,
        # Exact for the quantized values themselves: they are the nearest.
        _weight=torch.quantize_per_channel(exact, scale, zero - kind.lowest, 0, dtype),
    )
    pooled = module(tensors["indices"], tensors.get("offsets"), tensors.get("per_sample_weights"))
    return [pooled.to(tensors["scale"].dtype)]


#: By operator: a function of tensors by name and of keyword arguments, which returns tensors.
_CALLS = {"embedding_bag": _bag, "embedding_bag_grad": _gradient, "quantized_embedding_bag": _quantized}

RUNTIME = _Torch()
