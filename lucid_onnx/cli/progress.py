"""Progress bars on a terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn


def writing_bar() -> contextlib.AbstractContextManager[Callable[[int, int], None] | None]:
    """`bytes_bar` of what is written."""
    return bytes_bar("writing")


@contextlib.contextmanager
def bytes_bar(doing: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on the terminal: a function of the bytes that are done and those to do. None without a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn(doing), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("")
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def runtime_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each runtime on the terminal: a function of its name, the pieces done and the pieces in all."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda runtime, done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f} of {task.total:.0f}"))
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def progress(runtime: str, done: int, total: int) -> None:
            if runtime not in tasks:
                tasks[runtime] = bars.add_task(runtime, total=total)
            bars.update(tasks[runtime], completed=done, total=total)

        yield progress
