"""embedding_bag for ONNX: one file that runs on any ONNX Runtime, and at memory speed where our kernels are.

Building models needs onnx alone; what runs them (`embedding_bag`, `InferenceSession`, `register`) imports
onnxruntime when first used, and what rewrites them (`fuse`, `lower`, `quantize`) onnx-ir.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import reference
from .builder import build_model, build_quantized_model, make_node, save, to_form
from .library import get_library_path
from .ops.quantized_embedding_bag.table import QuantizedTable

if TYPE_CHECKING:
    from .functional import embedding_bag, quantized_embedding_bag
    from .rewrite import FuseReport, QuantizeReport, fuse, lower, quantize
    from .session import InferenceSession, register

__version__ = "0.1.0"

__all__ = [
    "FuseReport",
    "InferenceSession",
    "QuantizeReport",
    "QuantizedTable",
    "build_model",
    "build_quantized_model",
    "embedding_bag",
    "fuse",
    "get_library_path",
    "lower",
    "make_node",
    "quantize",
    "quantized_embedding_bag",
    "reference",
    "register",
    "save",
    "to_form",
]

_RUNS = {
    "InferenceSession": "session",
    "register": "session",
    "embedding_bag": "functional",
    "quantized_embedding_bag": "functional",
    "FuseReport": "rewrite",
    "fuse": "rewrite",
    "lower": "rewrite",
    "QuantizeReport": "rewrite",
    "quantize": "rewrite",
}


def __getattr__(name: str) -> Any:
    if name not in _RUNS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_RUNS[name]}", __name__), name)
