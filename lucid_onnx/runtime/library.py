"""The paths of the native libraries."""

from __future__ import annotations

import ctypes
import functools
import importlib.resources
from typing import Literal, NamedTuple

from lucid_onnx.native import get_library_path as get_library_path
from lucid_onnx.ops.attributes import check_choice

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
#: onnxruntime's CUDA provider in the form of a plugin, for which there are no kernels.
CUDA_PLUGIN = "CudaPluginExecutionProvider"
Provider = Literal["cpu", "cuda"]
#: onnxruntime's execution providers for each ``provider`` of ours, the preferred one first.
PROVIDERS = {"cpu": [CPU], "cuda": [CUDA, CPU]}


def check_provider(provider: str) -> None:
    """Raise ValueError if there is no such provider."""
    check_choice("provider", provider, PROVIDERS)


def get_cmake_dir() -> str:
    """The folder of the CMake package, for ``-D lucid_onnx_DIR=``.

    Raises:
        FileNotFoundError: it is not installed.
    """
    path = importlib.resources.files("lucid_onnx") / "lib" / "cmake" / "lucid_onnx"
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: lucid_onnx was installed without its native library")
    return str(path)


def find_cuda_library() -> str | None:
    """The path of the library with the kernels of CUDA and of the CPU; None if it is not installed.

    It is built with LUCID_CUDA=ON where a CUDA compiler is. A SessionOptions takes one of the two libraries.
    """
    path = importlib.resources.files("lucid_onnx") / "lib" / "liblucid_onnx_ops_cuda.so"
    return str(path) if path.is_file() else None


class CudaToolkit(NamedTuple):
    """What a CUDA library was built with: CUDA's version, such as "13.0", and the first NVIDIA driver that runs it."""

    version: str
    driver: int


@functools.cache
def _cuda_library() -> ctypes.CDLL:
    """The library that `find_cuda_library` names.

    Raises:
        OSError, AttributeError: it does not load, or is of another version.
    """
    native = ctypes.CDLL(find_cuda_library())
    native.lucid_cuda_check_device.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t)
    native.lucid_cuda_check_bounds.argtypes = (ctypes.c_int64, ctypes.c_char_p, ctypes.c_size_t)
    native.lucid_cuda_check_run.argtypes = (ctypes.c_int64, ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t)
    native.lucid_cuda_begin_session.restype = ctypes.c_int64
    return native


def cuda_toolkit() -> CudaToolkit | None:
    """What the CUDA library was built with; None if it is not installed or does not load."""
    if find_cuda_library() is None:
        return None
    try:
        native = _cuda_library()
    except (OSError, AttributeError):
        return None
    number = native.lucid_cuda_toolkit_version()
    return CudaToolkit(f"{number // 1000}.{number % 1000 // 10}", native.lucid_cuda_least_driver())


@functools.cache
def why_no_cuda(device_id: int = 0) -> str | None:
    """Why the CUDA kernels cannot run on a GPU of this machine; None if they can."""
    path = find_cuda_library()
    if path is None:
        return "lucid_onnx was installed without its CUDA kernels: install it where nvcc is, with LUCID_CUDA=ON"
    try:
        native = _cuda_library()
    except (OSError, AttributeError) as error:
        return f"{path}: {error}"
    message = ctypes.create_string_buffer(256)
    return message.value.decode() if native.lucid_cuda_check_device(device_id, message, len(message)) else None


class CudaBounds:
    """The bad offsets and indices that the CUDA kernels of a session recorded. A context creates its session."""

    def __init__(self) -> None:
        self._native = _cuda_library()
        self._session = 0

    def __enter__(self) -> CudaBounds:
        self._session = self._native.lucid_cuda_begin_session()
        return self

    def __exit__(self, *_: object) -> None:
        self._native.lucid_cuda_end_session()

    def of_run(self, *, wait: bool) -> tuple[int, str]:
        """The code and text of an error of the runs on this thread. ``wait``: nobody has waited for the device yet."""
        message = ctypes.create_string_buffer(256)
        return self._native.lucid_cuda_check_run(self._session, wait, message, len(message)), message.value.decode()

    def of_all(self) -> tuple[int, str]:
        """The code and text of an error of all runs and replays so far. Waits for the device."""
        message = ctypes.create_string_buffer(256)
        return self._native.lucid_cuda_check_bounds(self._session, message, len(message)), message.value.decode()
