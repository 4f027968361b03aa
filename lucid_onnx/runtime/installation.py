"""What is installed: versions, the native library and its instruction sets, as plain data."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import platform

import numpy as np
import onnx

from .library import get_library_path

FORCE_ISA = "LUCID_FORCE_ISA"


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
class Installation:
    """Versions, the native library (None: not installed), and onnxruntime's providers with the preferred one first."""

    lucid_onnx: str
    python: str
    numpy: str
    onnx: str
    onnxruntime: str | None
    providers: tuple[str, ...]
    library: Library | None


def installation() -> Installation:
    """What is installed.

    Raises:
        OSError, ValueError: see `library`.
    """
    try:
        import onnxruntime
    except ImportError:
        onnxruntime = None
    return Installation(
        lucid_onnx=version(),
        python=platform.python_version(),
        numpy=np.__version__,
        onnx=onnx.__version__,
        onnxruntime=None if onnxruntime is None else onnxruntime.__version__,
        providers=() if onnxruntime is None else tuple(onnxruntime.get_available_providers()),
        library=library(),
    )


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
