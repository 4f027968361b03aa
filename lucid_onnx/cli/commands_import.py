"""The command that makes a model of another library's files: import."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.ops.quantized_embedding_bag.spec import CODES_TYPES
from lucid_onnx.sources import Imported, formats, import_model
from lucid_onnx.sources.imported import DTYPES, LAYOUTS

from . import files as cli_files
from . import show as cli_show
from .files import UserError
from .options import AnyForm, Opset, TableBeside, choice
from .progress import bytes_bar, writing_bar

#: How many texts the loss of a smaller table is measured on.
_SAMPLE = 1000


def import_(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="The file or folder of another library.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The model to write; a file of that name is replaced.")
    ],
    *,
    format: Annotated[
        str | None,
        choice([f.name for f in formats.FORMATS], "The format, where the files leave it open."),
    ] = None,
    dtype: Annotated[
        str | None,
        choice(DTYPES, "Write the table as a float dtype, or as 8 or 4 bit values with a scale per row."),
    ] = None,
    layout: Annotated[
        str | None,
        choice(LAYOUTS, "padded (input_ids and attention_mask [B, L]) or ragged (ids and offsets), fastText's alone."),
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option("--normalize/--no-normalize", help="Divide vectors by their length; by default as SOURCE says."),
    ] = None,
    key: Annotated[str | None, typer.Option("--key", metavar="NAME", help="The tensor that is the table.")] = None,
    tokenizer_file: Annotated[
        str | None, typer.Option("--tokenizer-file", metavar="FILE", help="The tokenizer.json, if not beside SOURCE.")
    ] = None,
    vocabulary: Annotated[
        str | None,
        typer.Option("--vocabulary", metavar="FILE", help="The words of vectors that come without, by line."),
    ] = None,
    form: AnyForm = "portable",
    opset: Opset = spec.DEFAULT_OPSET,
    index_dtype: Annotated[str, choice(("int32", "int64"), "int32 or int64, of ids, mask and offsets.")] = "int64",
    external_data: TableBeside = None,
) -> None:
    """Make a model of another library's files: a static text model, vectors of words, or fastText's labels.

    Knows the folders of model2vec and of sentence-transformers' StaticEmbedding, wordllama's weights, fastText's .bin
    and .ftz, GloVe and word2vec, and any .safetensors file with a table and a tokenizer. What encodes texts is written
    beside the model, so that `lucid-onnx run OUTPUT --text "..."` works. With a smaller --dtype, the loss is measured
    on Python's documentation.

    Example: `lucid-onnx import potion-base-8M -o potion.onnx`
    """
    cli_files.check_output(output)
    if output.exists() and Path(source).exists() and output.samefile(source):
        raise UserError(f"--output {output}: is the source itself")
    with (
        cli_files.user_errors(TypeError, ValueError, ImportError),
        cli_files.reading_any(source),
        bytes_bar("reading") as bar,
    ):
        found = import_model(
            source,
            format=format,
            dtype=dtype,  # type: ignore[arg-type]  # import_model checks these
            layout=layout,  # type: ignore[arg-type]
            normalize=normalize,
            key=key,
            tokenizer=tokenizer_file,
            vocabulary=vocabulary,
            form=form,  # type: ignore[arg-type]
            opset=opset,
            index_dtype=index_dtype,
            progress=bar,
            sample=_documentation() if dtype in (*CODES_TYPES, "float16", "bfloat16") else (),
        )
    with cli_files.user_errors(ValueError), cli_files.writing(output), writing_bar() as progress:
        files = found.save(output, external_data=external_data, progress=progress)
    _show(found, files)


def _documentation() -> Sequence[str]:
    """Paragraphs of Python's documentation, spread over all of it; none where it is not installed."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return ()
    found = [part for text in topics.values() for part in text.split("\n\n") if part.strip()]
    return found[:: max(1, len(found) // _SAMPLE)][:_SAMPLE]


def _show(found: Imported, files: Sequence[str]) -> None:
    console = cli_show.new_console()
    table = cli_show.new_table("found", "")
    for heading, words in found.found.items():
        table.add_row(heading, Text(words))
    console.print(table)
    beside = [name for name in files if found.text is not None and name.endswith(f".{found.text.suffix}")]
    cli_show.show_written(console, [name for name in files if name not in beside])
    for name in beside:
        cli_show.say(console, f"wrote {name}, which encodes texts: keep it beside the model")
