"""The paths of the native libraries."""

from __future__ import annotations

import ctypes
import functools
import importlib.resources
import sys
from typing import Literal

from lucid_onnx.ops.attributes import check_choice

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
Provider = Literal["cpu", "cuda"]
#: onnxruntime's execution providers for each ``provider`` of ours, the preferred one first.
PROVIDERS = {"cpu": [CPU], "cuda": [CUDA, CPU]}
_NAME = {"win32": "lucid_onnx_ops.dll", "darwin": "liblucid_onnx_ops.dylib"}.get(sys.platform, "liblucid_onnx_ops.so")


def check_provider(provider: str) -> None:
    """Raise ValueError if there is no such provider."""
    check_choice("provider", provider, PROVIDERS)


def get_library_path() -> str:
    """The path of the native library, for ``RegisterCustomOpsLibrary`` of any language's ONNX Runtime.

    Raises:
        FileNotFoundError: the native library is not installed.
    """
    # importlib.resources and not __file__: in an editable install the library is not beside the sources.
    path = importlib.resources.files("lucid_onnx") / "lib" / _NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path}: lucid_onnx was installed without its native library")
    return str(path)


def find_cuda_library() -> str | None:
    """The path of the library with the kernels of CUDA and of the CPU; None if it is not installed.

    It is built if a CUDA compiler is found. A SessionOptions takes one of the two libraries.
    """
    path = importlib.resources.files("lucid_onnx") / "lib" / "liblucid_onnx_ops_cuda.so"
    return str(path) if path.is_file() else None


@functools.cache
def why_no_cuda() -> str | None:
    """Why the CUDA kernels cannot run on this machine; None if they can."""
    path = find_cuda_library()
    if path is None:
        return "lucid_onnx was installed without its CUDA kernels: install it where nvcc is, with LUCID_CUDA=ON"
    try:
        count_devices = ctypes.CDLL(path).lucid_cuda_device_count
    except (OSError, AttributeError) as error:
        return f"{path}: {error}"
    message = ctypes.create_string_buffer(256)
    if count_devices(message, ctypes.c_size_t(len(message))) > 0:
        return None
    return message.value.decode() or "the CUDA driver lists no device"
