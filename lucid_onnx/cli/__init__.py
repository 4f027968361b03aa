"""The command ``lucid-onnx``."""

from __future__ import annotations

from .app import EXIT_BROKEN_PIPE, EXIT_DIFFERS, EXIT_ERROR, EXIT_INTERRUPTED, main

__all__ = ["EXIT_BROKEN_PIPE", "EXIT_DIFFERS", "EXIT_ERROR", "EXIT_INTERRUPTED", "main"]
