"""Parsers of the commands' options."""

from __future__ import annotations

import typer


def real(text: str) -> float:
    """A parser of floats with a plain message."""
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a number") from error


def integer(text: str) -> int:
    """A parser of integers with a plain message."""
    try:
        return int(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not an integer") from error
