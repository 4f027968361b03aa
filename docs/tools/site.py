"""What mkdocs asks for while it builds the site: pages that are written from the installed package.

A page says `<!-- operator: NAME -->` where the specification of an operator goes, from the docstring, the names and the
attributes of ``lucid_onnx.ops.NAME.spec``; `<!-- commands: NAME ... -->` where the help of commands goes; and
`<!-- file: NAME -->` where a file of the repository's root goes.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from site_text import markdown, table  # a neighbour, found beside this file

ROOT = Path(__file__).resolve().parent.parent.parent
_PLACE = re.compile(r"<!-- (operator|commands|file): ([A-Za-z_. ]+) -->\n\n\(The site's build[^\n]*\)\n")


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


# ---- Operators.


def operator(name: str) -> str:
    """The specification of an operator as Markdown."""
    spec = importlib.import_module(f"lucid_onnx.ops.{name}.spec")
    title, _, text = inspect.cleandoc(spec.__doc__ or "").partition("\n")
    assert text, f"lucid_onnx.ops.{name}.spec has no docstring"
    title = title.partition(": ")[2].strip()
    text = re.sub(r"`\.\.(\w+)\.spec`", lambda m: f"[{m[1]}]({m[1]}.md)", markdown(text))
    parts = [title[:1].upper() + title[1:], text, "## Names\n", *_names(spec)]
    attributes = getattr(spec, "ATTRIBUTES", None)
    if attributes:
        parts += ["## Attributes\n", _attributes(attributes)]
    return "\n\n".join(parts) + "\n"


def _names(spec: Any) -> list[str]:
    names = list(spec.VARIANTS.values())
    rows = [
        (f"`{v.name}`", ", ".join(f"`{i}`" for i in v.inputs), ", ".join(f"`{o}`" for o in v.outputs)) for v in names
    ]
    if "num_tables" in {f.name for f in dataclasses.fields(names[0])}:  # the inputs are those of the fewest tables
        return [f"Domain `{spec.DOMAIN}`, version {spec.VERSION}. {', '.join(name for name, *_ in rows)}."]
    return [f"Domain `{spec.DOMAIN}`, version {spec.VERSION}.", table(("name", "inputs", "outputs"), rows)]


def _attributes(attributes: Any) -> str:
    """A table of typed attributes: a mapping by name, or a sequence, of dataclasses or of named tuples."""
    named = isinstance(attributes, Mapping)
    rows = []
    for entry in attributes.items() if named else attributes:
        name, value = entry if named else (None, entry)
        if dataclasses.is_dataclass(value):
            values = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        else:
            values = dict(value._asdict()) if hasattr(value, "_asdict") else {"value": value}
        rows.append({"name": name, **values} if named else values)
    head = list(rows[0])
    return table(head, [[_cell(row[column], column == "name") for column in head] for row in rows])


def _cell(value: Any, code: bool) -> str:
    if value is None:
        return ""
    if isinstance(value, (tuple, list, frozenset)):
        return ", ".join(_cell(v, code) for v in value)
    text = getattr(value, "__name__", None) or str(value)
    return f"`{text}`" if code or not isinstance(value, str) else text


# ---- Commands.


def commands(names: Sequence[str]) -> str:
    """The help of commands, a section each."""
    parts = []
    for name in names:
        program = f"import sys; from lucid_onnx.cli import main; sys.exit(main([{name!r}, '--help']))"
        environment = {**os.environ, "TYPER_USE_RICH": "0", "COLUMNS": "100", "NO_COLOR": "1"}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        parts.append(f"## lucid-onnx {name}\n\n```text\n{done.stdout.strip()}\n```\n")
    return "\n".join(parts)
