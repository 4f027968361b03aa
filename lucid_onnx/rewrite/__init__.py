"""Rewrites of models: `fuse` puts bags into them, `lower` writes bags out, `quantize` makes their tables smaller.

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
