"""Bags into models that were made without them, and out again: `fuse` and `lower`. Needs onnx-ir."""

from __future__ import annotations

try:
    import onnx_ir
except ImportError as error:  # pragma: no cover  # the extras bring it
    raise ImportError(
        "lucid_onnx rewrites models with onnx-ir, which is not installed: pip install 'lucid-onnx[rewrite]'"
    ) from error

from .fusion import Fused, FuseReport, Unfused, fuse
from .lowering import lower

del onnx_ir

__all__ = ["FuseReport", "Fused", "Unfused", "fuse", "lower"]
