"""Packages that the commands need and that are not always installed."""

from __future__ import annotations

import importlib
from typing import Any

from lucid_onnx.runtime.installation import load_onnxruntime

from .files import UserError


def rewriting(name: str, module: str = "") -> Any:
    """A function of `lucid_onnx.rewrite`, or of a module of it; they need onnx-ir."""
    try:
        rewrite = importlib.import_module(f"lucid_onnx.rewrite{module}")
    except ImportError as error:
        if str(error.name).partition(".")[0] == "lucid_onnx":  # a defect
            raise
        ours = isinstance(error.__cause__, ModuleNotFoundError)  # it says what to install
        raise UserError(str(error) if ours else f"lucid_onnx.rewrite does not load: {error}") from error
    return getattr(rewrite, name)


def need_onnxruntime() -> Any:
    """The module onnxruntime, with its log turned off."""
    try:
        onnxruntime = load_onnxruntime()
    except ImportError as error:
        raise UserError(str(error)) from error
    onnxruntime.set_default_logger_severity(4)
    return onnxruntime
