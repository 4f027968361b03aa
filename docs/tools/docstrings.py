"""What mkdocstrings asks for while it reads docstrings: theirs are read in an editor first, and have a few things of
reStructuredText that Markdown has not.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).resolve().parent))

from site_text import simple_tables  # a neighbour, found beside this file

_ENTRY = re.compile(r"^    (?P<names>\w+(?:,\s+\w+)+): (?P<text>.*(?:\n {5,}.*)*)", flags=re.MULTILINE)


class PlainMarkdown(griffe.Extension):
    """Tables, ``code`` and literal blocks as Markdown, and an entry for each of the arguments that share one."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = simple_tables(obj.docstring.value).replace("``", "`")
            obj.docstring.value = _ENTRY.sub(_apart, re.sub(r" ?::$", ":", text, flags=re.MULTILINE))


def _apart(entry: re.Match[str]) -> str:
    names = re.split(r",\s+", entry["names"])
    return "\n".join(f"    {name}: {entry['text']}" for name in names)
