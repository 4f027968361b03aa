"""Packages that the commands need and that are not always installed."""

from __future__ import annotations

from typing import Any

from .files import EXTRAS, UserError


def rewriting(name: str) -> Any:
    """A function of `lucid_onnx.rewrite`, which needs onnx-ir."""
    try:
        from lucid_onnx import rewrite
    except ImportError as error:
        raise UserError(str(error)) from error
    return getattr(rewrite, name)


def need_onnxruntime() -> Any:
    """The module onnxruntime, with its log turned off."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"onnxruntime is not installed: {EXTRAS}") from error
    onnxruntime.set_default_logger_severity(4)
    return onnxruntime
