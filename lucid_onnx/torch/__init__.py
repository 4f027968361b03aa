"""From PyTorch: `export` a module with its bags as ``ai.lucid`` nodes, and `embedding_bag` for tensors.

Needs torch, onnxscript and onnx-ir: ``pip install 'lucid-onnx[torch]'``.
"""

from __future__ import annotations

import sys

try:
    from .autograd import embedding_bag
    from .export import MIN_OPSET, export, translation_table
except ModuleNotFoundError as error:
    package = str(error.name).partition(".")[0]
    absent = error.name == package or sys.modules.get(package, "") is None  # and not a part of it
    if package not in ("torch", "onnxscript", "onnx_ir") or not absent:
        raise
    raise ImportError(
        f"lucid_onnx.torch needs {package}, which is not installed: pip install 'lucid-onnx[torch]'"
    ) from error

__all__ = ["MIN_OPSET", "embedding_bag", "export", "translation_table"]
