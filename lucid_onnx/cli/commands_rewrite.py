"""The commands that write one model from another: fuse, lower, quantize."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lucid_onnx.builder import FORMS, model_files
from lucid_onnx.ops.embedding_bag.lowering import RAGGED

from . import files as cli_files
from . import show as cli_show
from .extras import rewriting
from .options import SMALLER_DTYPES, AnyForm, SingleFile, choice, integer
from .progress import writing_bar


def fuse(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The .onnx file.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The model to write; a file of that name is replaced.")
    ],
    form: AnyForm = "portable",
    assume_nonempty: Annotated[
        bool,
        typer.Option("--assume-nonempty", help="Indices [B, L] under a mean or maximum never come with L = 0."),
    ] = False,
    merge_tables: Annotated[
        bool,
        typer.Option("--merge-tables", help="Merge bags of equal attributes that are concatenated by a Concat."),
    ] = False,
    single_file: SingleFile = False,
    report: Annotated[
        Path | None, typer.Option("--report", help="Write what was fused, and what was not and why, as JSON.")
    ] = None,
) -> None:
    """Replace each bag that is written out in standard operators by one node.

    Finds nn.EmbeddingBag as torch exports it, with dynamo and without, ATen nodes, a Gather with a reduction, and the
    standard form. External data stays where it is, or is copied beside OUTPUT if that is in another folder. If nothing
    is fused, OUTPUT is the same model as MODEL, and the exit code is 0.

    Example: `lucid-onnx fuse ranker.onnx -o fast.onnx`
    """
    rewrite = rewriting("fuse")
    cli_files.check_file(model)
    cli_files.check_output(output)
    cli_files.check_report(report, output)
    with cli_files.model_errors(model), cli_files.rewriting_files(model, output):
        found = rewrite(
            model,
            output,
            form=form,
            assume_nonempty=assume_nonempty,
            merge_tables=merge_tables,
            single_file=single_file,
        )
    if report is not None:
        cli_files.write_report(report, found)
    console = cli_show.new_console()
    cli_show.show_written(console, found.files, source=model)
    if report is not None:
        cli_show.say(console, f"wrote {report}")
    if not (found.fused or found.merged):
        cli_show.say(console, f"nothing was fused: {output} is the same model as {model}")
    cli_show.show_fused(console, found, "fused")


def lower(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The .onnx file.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The model to write; a file of that name is replaced.")
    ],
    form: AnyForm = "standard",
    ragged: Annotated[
        str,
        choice(
            RAGGED,
            "pieces (what suits most), blocks (as releases before wrote), loop (small, slow) or padded (one matrix).",
        ),
    ] = "pieces",
    longest_bag: Annotated[
        int | None,
        typer.Option(parser=integer, metavar="INTEGER", help="The length of the longest bag, for --ragged padded."),
    ] = None,
    single_file: SingleFile = False,
) -> None:
    """Lower the bags of a model to standard operators, or to another form.

    External data stays where it is, or is copied beside OUTPUT if that is in another folder.

    Example: `lucid-onnx lower fast.onnx -o anywhere.onnx`
    """
    rewrite = rewriting("lower")
    cli_files.check_file(model)
    cli_files.check_output(output)
    with cli_files.model_errors(model), cli_files.rewriting_files(model, output):
        rewrite(model, output, form=form, ragged=ragged, longest_bag=longest_bag, single_file=single_file)
    console = cli_show.new_console()
    cli_show.show_written(console, model_files(output), f", {form} form", source=model)


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The .onnx file.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The model to write; a file of that name is replaced.")
    ],
    dtype: Annotated[
        str, choice(SMALLER_DTYPES, "int8 or int4 (symmetric), uint8 or uint4 (with a bias), float16 or bfloat16.")
    ] = "int8",
    min_bytes: Annotated[
        int, typer.Option(parser=integer, metavar="INTEGER", help="Skip tables with fewer bytes.")
    ] = 0,
    form: Annotated[str | None, choice(FORMS, "portable, standard or native; by default the model's own.")] = None,
    single_file: SingleFile = False,
    report: Annotated[Path | None, typer.Option("--report", help="Write the result for each table as JSON.")] = None,
) -> None:
    """Make the tables of a model's bags smaller: 8 or 4 bit values with a scale per row, or 16-bit floats.

    The error of a row is the norm of its difference, relative to its own norm. Run `lucid-onnx fuse` first if the bags
    are written out in standard operators. External tables are written to OUTPUT.data part by part.

    Example: `lucid-onnx quantize fast.onnx -o small.onnx --dtype uint4`
    """
    rewrite = rewriting("quantize")
    cli_files.check_file(model)
    cli_files.check_output(output)
    cli_files.check_report(report, output)
    with cli_files.model_errors(model), cli_files.rewriting_files(model, output), writing_bar() as progress:
        found = rewrite(
            model, output, dtype=dtype, min_bytes=min_bytes, form=form, single_file=single_file, progress=progress
        )
    if report is not None:
        cli_files.write_report(report, found)
    console = cli_show.new_console()
    cli_show.show_written(console, found.files)
    if report is not None:
        cli_show.say(console, f"wrote {report}")
    cli_show.show_quantized(console, found)
