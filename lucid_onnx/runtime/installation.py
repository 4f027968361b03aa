"""What is installed: versions, the native library and its instruction sets, as plain data."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.metadata
import os
import platform
import sys
from collections.abc import Collection
from typing import Any

import numpy as np
import onnx

from .library import CUDA, CudaToolkit, cuda_toolkit, find_cuda_library, get_library_path, why_no_cuda

FORCE_ISA = "LUCID_FORCE_ISA"
#: The distributions that bring the module onnxruntime. They overwrite each other's files.
_DISTRIBUTIONS = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
    "onnxruntime-rocm",
    "onnxruntime-training",
)
_INSTALL_ONNXRUNTIME = "pip install 'lucid-onnx[cpu]' (or 'lucid-onnx[gpu]')"


@dataclasses.dataclass(frozen=True)
class Isa:
    """An instruction set that the library was compiled for; ``supported``: this machine has it."""

    name: str
    supported: bool


@dataclasses.dataclass(frozen=True)
class Library:
    """The native library: ``isas`` with the best one last, ``active`` the one that runs."""

    path: str
    version: str
    isas: tuple[Isa, ...]
    active: str
    forced: bool


@dataclasses.dataclass(frozen=True)
class CudaLibrary:
    """The library with the CUDA kernels, and what it was built with (None: it does not load).

    ``problem`` says why the kernels do not run on this machine; None if they do.
    """

    path: str
    problem: str | None
    toolkit: CudaToolkit | None


@dataclasses.dataclass(frozen=True)
class Installation:
    """Versions, the native library (None: not installed), and onnxruntime's providers with the preferred one first.

    ``onnxruntime`` is None if it cannot be imported. ``onnxruntime_problem`` says why, or what is wrong with it all the
    same: that two of its distributions are installed.
    """

    lucid_onnx: str
    python: str
    numpy: str
    onnx: str
    onnxruntime: str | None
    onnxruntime_problem: str | None
    providers: tuple[str, ...]
    library: Library | None
    cuda_library: CudaLibrary | None


def installation() -> Installation:
    """What is installed.

    Raises:
        OSError, ValueError: see `library`.
    """
    onnxruntime = None
    try:
        onnxruntime = load_onnxruntime()
        problem = distributions_problem()
    except ImportError as error:
        problem = str(error)
    return Installation(
        lucid_onnx=version(),
        python=platform.python_version(),
        numpy=np.__version__,
        onnx=onnx.__version__,
        onnxruntime=None if onnxruntime is None else onnxruntime.__version__,
        onnxruntime_problem=problem,
        providers=() if onnxruntime is None else tuple(onnxruntime.get_available_providers()),
        library=library(),
        cuda_library=_cuda_library(None if onnxruntime is None else onnxruntime.get_available_providers()),
    )


def _cuda_library(providers: Collection[str] | None) -> CudaLibrary | None:
    path = find_cuda_library()
    if path is None:
        return None
    problem = why_no_cuda()
    if problem is None and CUDA not in (providers or ()):
        problem = f"onnxruntime has no {CUDA}: {install_gpu()}"
    return CudaLibrary(path, problem, cuda_toolkit())


def load_onnxruntime() -> Any:
    """The module onnxruntime.

    Raises:
        ImportError: it is not installed, or does not load. The message says which, and why.
        KeyboardInterrupt: during the import, which extension modules report as an ImportError.
    """
    try:
        import onnxruntime
    except ImportError as error:
        if _is_interrupt(error):
            raise KeyboardInterrupt from error
        if isinstance(error, ModuleNotFoundError) and error.name == "onnxruntime":
            raise ImportError(f"onnxruntime is not installed: {_INSTALL_ONNXRUNTIME}", name="onnxruntime") from error
        reasons = (str(error) or type(error).__name__, distributions_problem())
        message = "; ".join(reason for reason in reasons if reason)
        raise ImportError(f"onnxruntime is installed but does not load: {message}", name="onnxruntime") from error
    if not hasattr(onnxruntime, "InferenceSession"):  # what is left where one of two distributions was uninstalled
        names = " ".join(_distributions()) or "onnxruntime"
        raise ImportError(
            f"onnxruntime is installed but some of its files are missing: pip uninstall -y {names}, then "
            f"{_INSTALL_ONNXRUNTIME}",
            name="onnxruntime",
        )
    return onnxruntime


def missing_package(error: ImportError, packages: Collection[str]) -> str | None:
    """Which of ``packages`` is not installed, if that is what an import failed for; None if it failed otherwise.

    A package that is there and lacks a part of itself is broken, and not missing.
    """
    package = str(error.name).partition(".")[0]
    absent = error.name == package or sys.modules.get(package, "") is None
    return package if isinstance(error, ModuleNotFoundError) and package in packages and absent else None


def distributions_problem() -> str | None:
    """That several distributions of onnxruntime are installed, and how to mend it; None if there is at most one."""
    found = _distributions()
    if len(found) < 2:
        return None
    names = " and ".join(f"{name} {number}" for name, number in found.items())
    return (
        f"{names} are installed together and overwrite each other's files: "
        f"pip uninstall -y {' '.join(found)}, then {_INSTALL_ONNXRUNTIME}"
    )


def install_gpu() -> str:
    """The commands that put onnxruntime-gpu in the place of what is installed."""
    others = [name for name in _distributions() if name != "onnxruntime-gpu"]
    first = f"pip uninstall -y {' '.join(others)}, then " if others else ""
    return f"{first}pip install 'lucid-onnx[gpu]'"


def _distributions() -> dict[str, str]:
    """The versions of the distributions of onnxruntime that are installed, by name."""
    found = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether an error comes from Ctrl-C."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def version() -> str:
    """The version of lucid-onnx."""
    from lucid_onnx import __version__

    return __version__


def native_library() -> tuple[str, ctypes.CDLL] | None:
    """The path of the native library, and the library; None if it is not installed."""
    try:
        path = get_library_path()
    except FileNotFoundError:
        return None
    return path, ctypes.CDLL(path)


def library() -> Library | None:
    """The native library as its C interface describes it; None if it is not installed.

    Raises:
        OSError: it cannot be loaded, or is of another version.
        ValueError: LUCID_FORCE_ISA names an instruction set that this machine lacks.
    """
    found_at = native_library()
    if found_at is None:
        return None
    path, native = found_at
    try:
        for name in ("lucid_onnx_version", "lucid_isa_name", "lucid_isa_active"):
            getattr(native, name).restype = ctypes.c_char_p
        isas = tuple(
            Isa(native.lucid_isa_name(i).decode(), bool(native.lucid_isa_supported(i)))
            for i in range(native.lucid_isa_count())
        )
        active = native.lucid_isa_active()
        library_version = native.lucid_onnx_version().decode()
    except AttributeError as error:
        raise OSError(f"{path}: library version mismatch: {error}") from error
    forced = os.environ.get(FORCE_ISA, "")
    if active is None:
        able = ", ".join(isa.name for isa in isas if isa.supported)
        raise ValueError(f"{FORCE_ISA} = {forced!r} is not an instruction set of this machine; available: {able}")
    return Library(path, library_version, isas, active.decode(), bool(forced))
