"""Runs a page as its reader would: every ``python`` and ``bash`` block as it stands, in order, in one empty folder."""

from __future__ import annotations

import importlib.util
import linecache
import os
import re
import subprocess
import sys
import sysconfig
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
#: Modules that the tests' extra does not bring. A block that uses one is left out where it is not installed, and
#: so is the rest of its section, which builds on it.
OPTIONAL = (
    "torch",
    "onnxscript",
    "onnx_ir",
    "safetensors",
    "tokenizers",
    "wordllama",
    "model2vec",
    "sentence_transformers",
    "torchrec",
    "fbgemm_gpu",
    "fasttext",
)
#: Programs that install or fetch. Their blocks have the language "console", and are not run.
INSTALLERS = ("pip", "git", "cd", "nox", "cmake", "(cd")


class Block(NamedTuple):
    language: str
    code: str
    line: int  #: of the page, where the code begins
    section: int  #: how many headings of two or fewer # come before


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page."""
    language, code, start, section = None, [""], 0, 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = re.match(r"```(\w*)", line)
        if language is None:
            section += bool(re.match(r"##? ", line))
            if fence:
                language, code, start = fence[1], [], number + 1
        elif fence:
            yield Block(language, "\n".join(code) + "\n", start, section)
            language = None
        else:
            code.append(line)
    assert language is None, f"{page.name}: the block at line {start} has no end"


def run(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], list[int]]:
    """The names that the page's Python leaves behind, and the lines of the blocks that were left out."""
    monkeypatch.chdir(folder)
    scripts = sysconfig.get_path("scripts")  # where an activated environment has `lucid-onnx`
    monkeypatch.setenv("PATH", scripts + os.pathsep + os.environ["PATH"])
    script = types.ModuleType(f"page_{page.stem}")  # onnxscript looks a function's globals up in its module
    monkeypatch.setitem(sys.modules, script.__name__, script)
    names: dict[str, Any] = script.__dict__
    left_out: list[int] = []
    skipped: set[int] = set()
    for block in blocks(page):
        if block.language not in ("python", "bash"):
            continue
        if any(_needs(block.code, module) and not importlib.util.find_spec(module) for module in OPTIONAL):
            skipped.add(block.section)
        if block.section in skipped:
            left_out.append(block.line)
        elif block.language == "bash":
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", block.code], cwd=folder, capture_output=True, text=True, timeout=240
            )
            assert done.returncode == 0, f"{page.name}:{block.line}\n{block.code}{done.stdout}{done.stderr}"
        else:
            name = f"{page}:{block.line}"
            linecache.cache[name] = (len(block.code), None, block.code.splitlines(keepends=True), name)
            exec(compile(block.code, name, "exec"), names)
    return names, left_out


def _needs(code: str, module: str) -> bool:
    imported = rf"^\s*(?:import|from) (?:{module}|lucid_onnx\.{module})\b"
    return bool(re.search(rf"{imported}|\b{module}\.\w+\.", code, flags=re.MULTILINE))
