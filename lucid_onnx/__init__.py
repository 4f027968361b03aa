"""embedding_bag for ONNX: one file that runs on any ONNX Runtime, and at memory speed where our kernels are.

Importing the package imports nothing of it: everything is looked up when it is first used. Building models needs
onnx alone; what runs them (`embedding_bag`, `InferenceSession`, `register`) imports onnxruntime, and what rewrites
them (`fuse`, `lower`, `quantize`) onnx-ir.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import reference
    from .builder import (
        build_collection_model,
        build_grad_model,
        build_model,
        build_quantized_model,
        make_collection_node,
        make_grad_node,
        make_node,
        model_files,
        save,
        to_form,
    )
    from .native import QuantizedTable, get_library_path
    from .rewrite import FuseReport, QuantizeReport, fuse, lower, quantize
    from .runtime.functional import (
        embedding_bag,
        embedding_bag_collection,
        embedding_bag_grad,
        quantized_embedding_bag,
    )
    from .runtime.session import InferenceSession, register
    from .runtime.training import Trainer, build_training_model
    from .sources import Imported, import_model
    from .sources.encoder import TextEncoder

__version__ = "0.1.0"

__all__ = [
    "FuseReport",
    "Imported",
    "InferenceSession",
    "QuantizeReport",
    "QuantizedTable",
    "TextEncoder",
    "Trainer",
    "build_collection_model",
    "build_grad_model",
    "build_model",
    "build_quantized_model",
    "build_training_model",
    "embedding_bag",
    "embedding_bag_collection",
    "embedding_bag_grad",
    "fuse",
    "get_library_path",
    "import_model",
    "lower",
    "make_collection_node",
    "make_grad_node",
    "make_node",
    "model_files",
    "quantize",
    "quantized_embedding_bag",
    "reference",
    "register",
    "save",
    "to_form",
]

#: The module of each name.
_HOME = {
    "build_collection_model": "builder",
    "build_grad_model": "builder",
    "build_model": "builder",
    "build_quantized_model": "builder",
    "make_collection_node": "builder",
    "make_grad_node": "builder",
    "make_node": "builder",
    "model_files": "builder",
    "save": "builder",
    "to_form": "builder",
    "get_library_path": "native",
    "QuantizedTable": "native",
    "InferenceSession": "runtime.session",
    "register": "runtime.session",
    "Trainer": "runtime.training",
    "build_training_model": "runtime.training",
    "embedding_bag": "runtime.functional",
    "embedding_bag_grad": "runtime.functional",
    "embedding_bag_collection": "runtime.functional",
    "quantized_embedding_bag": "runtime.functional",
    "FuseReport": "rewrite",
    "fuse": "rewrite",
    "lower": "rewrite",
    "QuantizeReport": "rewrite",
    "quantize": "rewrite",
    "Imported": "sources",
    "import_model": "sources",
    "TextEncoder": "sources.encoder",
}


def __getattr__(name: str) -> Any:
    if name == "reference":  # a module itself
        return importlib.import_module(".reference", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
