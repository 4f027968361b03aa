"""What mkdocs asks for while it builds the site: pages that are written from the installed package.

A page says `<!-- operator: NAME -->` where the specification of an operator goes, from the docstring, the names and the
attributes of ``lucid_onnx.ops.NAME.spec``; `<!-- commands: NAME ... -->` where the help of commands goes; and
`<!-- file: NAME -->` where a file of the repository's root goes.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority

sys.path.insert(0, str(Path(__file__).resolve().parent))

from site_text import commands, operator  # a neighbour, found beside this file

ROOT = Path(__file__).resolve().parent.parent.parent
_PLACE = re.compile(r"<!-- (operator|commands|file): ([A-Za-z_. ]+) -->\n\n\(The site's build[^\n]*\)\n")


@event_priority(100)  # before mkdocstrings makes its handlers
def on_config(config: Any) -> Any:
    """Let mkdocstrings read the package that is installed, which has lucid_onnx.ops; the sources' folder has not."""
    found = importlib.util.find_spec("lucid_onnx")
    if found is None or importlib.util.find_spec("lucid_onnx.ops") is None:
        raise ModuleNotFoundError("lucid_onnx is not installed: pip install '.[cpu,docs]', and run `mkdocs`")
    assert found.submodule_search_locations
    handler = config.plugins["mkdocstrings"].config.handlers.setdefault("python", {})
    handler["paths"] = [str(Path(found.submodule_search_locations[0]).parent)]
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in what a page leaves to the build."""

    def fill(place: re.Match[str]) -> str:
        if place[1] == "file":
            return (ROOT / place[2]).read_text(encoding="utf-8")
        return operator(place[2]) if place[1] == "operator" else commands(place[2].split())

    return _PLACE.sub(fill, markdown)
