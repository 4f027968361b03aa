"""The public names, their parameters and the command line's options: a change of any of them is meant, and shown here.

`python tests/test_api.py` writes public_api.txt anew; the diff of that file is the change.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PUBLIC = Path(__file__).with_name("public_api.txt")

#: Every documented module, and its names where the module does not list them itself.
MODULES: dict[str, tuple[str, ...] | None] = {
    "lucid_onnx": None,
    "lucid_onnx.lucid": ("from_checkpoint", "from_module"),
    "lucid_onnx.reference": None,
    "lucid_onnx.rewrite": None,
    "lucid_onnx.parity.adapters": ("ENTRIES",),
    "lucid_onnx.parity.matrix": ("Report", "run"),
    "lucid_onnx.parity.runtime": ("Program", "Runtime", "UnsupportedError"),
    "lucid_onnx.parity.suite": ("SuiteCase", "case", "model_case", "names", "suite"),
    "lucid_onnx.parity.work": ("conformance", "operators", "scale"),
    "lucid_onnx.pytest_plugin": ("parity",),
    "lucid_onnx.ops": ("OPERATORS", "OPERATOR_OF"),
    "lucid_onnx.torch": ("MIN_OPSET", "UnfusedWarning", "embedding_bag", "export", "translation_table"),
}


def parameters(function: Any) -> str:
    """A signature without annotations, which may become narrower: names, order, kinds and defaults.

    Parameters that are given by name alone stand in the order of the alphabet: theirs has no meaning.
    """
    found = inspect.signature(function)
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    plain.sort(key=lambda p: (p.kind, p.name if p.kind is inspect.Parameter.KEYWORD_ONLY else ""))
    text = str(found.replace(parameters=plain, return_annotation=inspect.Signature.empty))
    return re.sub(r" at 0x[0-9a-f]+", "", text)  # of a default that is a function


def members(cls: type) -> Iterator[str]:
    """What a class of ours has beside what it inherits from others."""
    names = {name for base in cls.__mro__ if base.__module__.startswith("lucid_onnx") for name in vars(base)}
    written = not dataclasses.is_dataclass(cls) and not getattr(cls, "_is_protocol", False)
    for name in sorted(n for n in names if not n.startswith("_") or (n == "__init__" and written)):
        member = inspect.getattr_static(cls, name)
        if isinstance(member, (staticmethod, classmethod)):
            yield f".{name}{parameters(getattr(cls, name))}"
        elif inspect.isfunction(member):
            yield f".{name}{parameters(member)}"
        else:
            yield f".{name}"


def described(module: str) -> Iterator[str]:
    """The lines of a module."""
    found = importlib.import_module(module)
    for name in sorted(MODULES[module] or found.__all__):
        value = getattr(found, name)
        if inspect.isclass(value):
            yield f"{module}.{name}"
            if dataclasses.is_dataclass(value):
                yield f"{module}.{name}{parameters(value)}"
            yield from (f"{module}.{name}{member}" for member in members(value))
        elif inspect.isfunction(value):
            yield f"{module}.{name}{parameters(value)}"
        else:
            yield f"{module}.{name}"


def command_line() -> Iterator[str]:
    """The commands with their arguments and options."""
    typer = pytest.importorskip("typer")
    from lucid_onnx.cli import app

    root = typer.main.get_command(app._app())
    for name, command in sorted(root.commands.items()):
        for parameter in sorted(command.params, key=lambda p: str(p.name)):
            if parameter.param_type_name == "argument":
                yield f"$ lucid-onnx {name} {str(parameter.name).upper()}"
            else:
                yield f"$ lucid-onnx {name} {' '.join((*parameter.opts, *parameter.secondary_opts))}"


def written(prefix: str) -> list[str]:
    return [line for line in PUBLIC.read_text().splitlines() if line.startswith(prefix)]


@pytest.mark.parametrize("module", [m for m in MODULES if m != "lucid_onnx.torch"])
def test_the_public_names_are_as_written(module: str) -> None:
    found = list(described(module))
    assert found
    inner = tuple(f"{m}." for m in MODULES if m.startswith(f"{module}."))
    assert found == [line for line in written(f"{module}.") if not line.startswith(inner)]


def test_the_names_for_torch_are_as_written() -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    assert list(described("lucid_onnx.torch")) == written("lucid_onnx.torch.")


def test_the_command_line_is_as_written() -> None:
    assert list(command_line()) == written("$ ")


if __name__ == "__main__":
    lines = [line for module in MODULES for line in described(module)] + list(command_line())
    PUBLIC.write_text("\n".join(lines) + "\n")
