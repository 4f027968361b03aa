"""Bags into models that were made without them, and out again: `fuse`, `lower`; smaller tables: `quantize`.

Needs onnx-ir.
"""

from __future__ import annotations

try:
    from .fusion import Fused, FuseReport, Unfused, fuse
except ModuleNotFoundError as error:
    if error.name != "onnx_ir":
        raise
    raise ImportError(
        "lucid_onnx rewrites models with onnx-ir, which is not installed: pip install 'lucid-onnx[rewrite]'"
    ) from error
from . import picture
from .lowering import lower
from .merging import Merged, Unmerged
from .quantization import Quantized, QuantizeReport, Unquantized, quantize

__all__ = [
    "FuseReport",
    "Fused",
    "Merged",
    "QuantizeReport",
    "Quantized",
    "Unfused",
    "Unmerged",
    "Unquantized",
    "fuse",
    "lower",
    "picture",
    "quantize",
]
