"""Where the native library is."""

from __future__ import annotations

import importlib.resources
import sys

_NAME = {"win32": "lucid_onnx_ops.dll", "darwin": "liblucid_onnx_ops.dylib"}.get(sys.platform, "liblucid_onnx_ops.so")


def find_cuda_library() -> str | None:
    """The path of the library that has the CUDA kernels too, or None where this installation has none."""
    path = importlib.resources.files("lucid_onnx") / "lib" / "liblucid_onnx_ops_cuda.so"
    return str(path) if path.is_file() else None


def get_library_path() -> str:
    """The path of the native library, for ``RegisterCustomOpsLibrary`` of any language's ONNX Runtime.

    Raises:
        FileNotFoundError: this installation has no native library.
    """
    # importlib.resources and not __file__: in an editable install the library is not beside the sources.
    path = importlib.resources.files("lucid_onnx") / "lib" / _NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path}: lucid_onnx was installed without its native library")
    return str(path)
