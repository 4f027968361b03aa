"""Markdown of the reStructuredText that docstrings have: tables, literal blocks, code."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence


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
        return table(["attribute", "type", "meaning"], body)
    return table(["name", "dtype", "shape"][: len(spans)], body)
