"""The commands that look into a model: info, inspect."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import onnx
import typer

from lucid_onnx.builder import Replacing
from lucid_onnx.runtime import info as facts

from . import files as cli_files
from . import show as cli_show
from .extras import rewriting
from .files import UserError
from .options import choice


def info(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="An .onnx file to show as well.")] = None,
    table_memory: Annotated[
        str,
        choice(
            ("auto", "inplace", "hugepage_copy", "mmap"),
            "The table_memory to assume: auto, inplace, hugepage_copy or mmap.",
        ),
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show versions, instruction sets and providers, the bags of a model, and where a session would keep its tables.

    Example: `lucid-onnx info users.onnx --json`
    """
    with cli_files.user_errors(OSError, ValueError):
        installed = facts.installation()
    found = None
    if model is not None:
        cli_files.check_file(model)
        with cli_files.user_errors(ValueError), cli_files.reading(model):
            found = facts.model(model)
    with cli_files.user_errors(OSError, ValueError):
        places = None if found is None else facts.table_memory(found, table_memory)
    if as_json:
        data = dataclasses.asdict(installed)
        if found is not None:
            data["model"] = dataclasses.asdict(found)
            data["table_memory"] = None if places is None else dataclasses.asdict(places)
        print(json.dumps(cli_files.finite(data), indent=2, allow_nan=False))
        return
    console = cli_show.new_console()
    cli_show.show_installation(console, installed)
    if found is not None:
        cli_show.show_model(console, found)
    if places is not None and places.tables:
        cli_show.show_table_memory(console, places)


def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The .onnx file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    svg: Annotated[
        Path | None, typer.Option("--svg", help="Draw the model around its bags, and the bags before and after.")
    ] = None,
) -> None:
    """Show the bags of a model, what `fuse` would fuse, and why it would not fuse the rest.

    Example: `lucid-onnx inspect ranker.onnx --svg ranker.svg`
    """
    fuse = rewriting("fuse")
    cli_files.check_file(model)
    if svg is not None:
        cli_files.check_output(svg, "--svg")
        if svg.exists() and svg.samefile(model):
            raise UserError(f"--svg {svg}: is the model itself")
    with cli_files.user_errors(ValueError), cli_files.reading(model):
        found = facts.model(model)
    with cli_files.model_errors(model), cli_files.reading(model):
        report = fuse(model)
    if svg is not None:
        drawn = rewriting("picture").draw(onnx.load(model, load_external_data=False), report, Path(model).name)
        with cli_files.writing(svg), Replacing(svg) as files:
            files.open(svg.name).write(drawn.encode())
    if as_json:
        print(
            json.dumps(cli_files.finite({**dataclasses.asdict(found), **report.as_dict()}), indent=2, allow_nan=False)
        )
        return
    console = cli_show.new_console()
    cli_show.show_model(console, found)
    cli_show.show_fused(console, report, "would fuse")
    if report.fused:
        cli_show.say(console, f"lucid-onnx fuse {model} -o OUTPUT.onnx writes the model with these fused")
    if svg is not None:
        cli_show.say(console, f"wrote {svg}")
