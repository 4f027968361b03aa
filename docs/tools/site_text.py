"""What is written from the package: specifications and the help of commands, as Markdown; and Markdown of the
reStructuredText that docstrings have: tables, literal blocks, code.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

# ---- Operators.


def operator(name: str) -> str:
    """The specification of an operator as Markdown."""
    spec = importlib.import_module(f"lucid_onnx.ops.{name}.spec")
    title, _, text = inspect.cleandoc(spec.__doc__ or "").partition("\n")
    assert text, f"lucid_onnx.ops.{name}.spec has no docstring"
    title = title.partition(": ")[2].strip()
    text = re.sub(r"`\.\.(\w+)\.spec`", lambda m: f"[{m[1].title().replace('_', '')}]({m[1]}.md)", markdown(text))
    parts = [title[:1].upper() + title[1:], text, "## Names\n", *_names(spec)]
    return "\n\n".join(parts) + "\n"


def _names(spec: Any) -> list[str]:
    names = list(spec.VARIANTS.values())
    rows = [
        (f"`{v.name}`", ", ".join(f"`{i}`" for i in v.inputs), ", ".join(f"`{o}`" for o in v.outputs)) for v in names
    ]
    if "num_tables" in {f.name for f in dataclasses.fields(names[0])}:  # the inputs are those of the fewest tables
        return [f"Domain `{spec.DOMAIN}`, version {spec.VERSION}. {', '.join(name for name, *_ in rows)}."]
    return [f"Domain `{spec.DOMAIN}`, version {spec.VERSION}.", table(("name", "inputs", "outputs"), rows)]


# ---- Commands.


def commands(names: Sequence[str]) -> str:
    """The help of commands, a section each."""
    parts = []
    for name in names:
        program = f"import sys; from lucid_onnx.cli import main; sys.exit(main([{name!r}, '--help']))"
        environment = {**os.environ, "TYPER_USE_RICH": "0", "COLUMNS": "100", "NO_COLOR": "1"}
        with tempfile.TemporaryDirectory() as folder:  # where no folder of sources stands in the package's way
            done = subprocess.run(
                [sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True, check=True
            )
        parts.append(f"## lucid-onnx {name}\n\n```console\n{done.stdout.strip()}\n```\n")
    return "\n".join(parts)


# ---- Text.


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def markdown(text: str) -> str:
    """Markdown of the little reStructuredText that docstrings of specifications have: tables, literal blocks, code."""
    out: list[str] = []
    lines = simple_tables(text).split("\n")
    k = 0
    while k < len(lines):
        line = lines[k]
        if line.startswith("    "):
            end = k
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            block = inspect.cleandoc("\n".join(lines[k:end])).rstrip()
            out += ["", "```text", block, "```", ""]
            k = end
        else:
            out.append(re.sub(r" ?::$", ":", line).replace("``", "`"))
            k += 1
    return "\n".join(out).strip()


def simple_tables(text: str) -> str:
    """The text with its simple tables of reStructuredText as tables of Markdown."""
    out: list[str] = []
    lines = text.split("\n")
    k = 0
    while k < len(lines):
        end = k + 1
        if re.fullmatch(r"=+( +=+)+", lines[k]):
            while end < len(lines) and lines[end].strip():
                end += 1
            end = max(i for i in range(k, end) if lines[i].startswith("=")) + 1  # text may follow it at once
            out += ["", _table(lines[k:end]), ""]
        else:
            out.append(lines[k])
        k = end
    return "\n".join(out)


def _table(lines: list[str]) -> str:
    """A simple table of reStructuredText; a line without a first cell goes on with the one before."""
    spans = [(m.start(), m.end()) for m in re.finditer(r"=+", lines[0])]
    spans[-1] = (spans[-1][0], 10**6)
    groups: list[list[list[str]]] = [[]]
    for line in lines[1:]:
        if line.startswith("="):
            groups.append([])
            continue
        cells = [line[start:end].strip().replace("``", "`") for start, end in spans]
        if cells[0] or not groups[-1]:
            groups[-1].append(cells)
        else:
            groups[-1][-1] = [f"{a} {b}".strip() for a, b in zip(groups[-1][-1], cells, strict=True)]
    *heads, body = [group for group in groups if group]
    if heads:
        return table(heads[0][0], body)
    if all(row[1] in ("INT", "FLOAT", "STRING") for row in body):
        head = ["attribute", "type", *(["values"] if len(spans) == 4 else []), "meaning"]
    else:
        head = ["name", "dtype", "shape", ""]
    return table(head[: len(spans)], body)
