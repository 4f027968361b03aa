"""From PyTorch: `export` a module with its bags as ``ai.lucid`` nodes, and `embedding_bag` for tensors.

Needs torch, onnxscript and onnx-ir: ``pip install 'lucid-onnx[torch]'``.
"""

from __future__ import annotations

from lucid_onnx.runtime.installation import missing_package

try:
    from .autograd import embedding_bag
    from .export import MIN_OPSET, UnfusedWarning, export, translation_table
    from .tables import from_module
except ModuleNotFoundError as error:
    package = missing_package(error, ("torch", "onnxscript", "onnx_ir"))
    if package is None:
        raise
    raise ImportError(
        f"lucid_onnx.torch needs {package}, which is not installed: pip install 'lucid-onnx[torch]'"
    ) from error

__all__ = ["MIN_OPSET", "UnfusedWarning", "embedding_bag", "export", "from_module", "translation_table"]
