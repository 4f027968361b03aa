"""The formats that `import_model` knows, and how it tells them apart."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lucid_onnx.ops.attributes import check_choice
from lucid_onnx.ops.embedding_bag import spec

from . import static, vectors
from .fasttext.format import FastText
from .imported import Format, Imported, Layout, Options, Progress, TableDtype

if TYPE_CHECKING:
    from lucid_onnx.builder import Form

#: In the order in which they are tried: the first that recognises a source imports it.
FORMATS: tuple[Format, ...] = (*static.FORMATS, *vectors.FORMATS, FastText())
#: How many names of a folder a message has room for.
_MOST_NAMED = 12
#: What packed files begin with.
_PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}


def import_model(
    source: str | os.PathLike[str],
    *,
    format: str | None = None,
    dtype: TableDtype | None = None,
    layout: Layout | None = None,
    normalize: bool | None = None,
    key: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    vocabulary: str | os.PathLike[str] | None = None,
    form: Form = "portable",
    opset: int = spec.DEFAULT_OPSET,
    index_dtype: str = "int64",
    progress: Progress | None = None,
    sample: Sequence[str] = (),
) -> Imported:
    """A model of another library as an ONNX model, with what turns texts into its ids.

    Args:
        source: its file or folder. See the documentation's page of sources for each format.
        format: the format's name, where the files leave it open; by default it is recognised.
        dtype: what the table is written as, by default as it is: a float dtype, or "int8", "uint8", "int4" or "uint4"
            with a scale per row. The model's output does not change its dtype.
        layout: "padded" takes ``input_ids`` and ``attention_mask`` [B, L], as other runners feed them; "ragged" takes
            ``ids`` [N] and ``offsets`` [B]. A negative id is a position that is not there. By default "padded", and
            "ragged" of fastText's models, which take nothing else.
        normalize: whether vectors are divided by their length; by default as the source says.
        key: the tensor that is the table, in a .safetensors file with several.
        tokenizer: the tokenizer's file, if it is not where the format has it.
        vocabulary: the file of the words, for vectors that come without.
        form, opset: as in `lucid_onnx.build_model`.
        index_dtype: int32 or int64, for ids, mask and offsets.
        progress: called with the bytes that are done and those to do, where this takes long.
        sample: texts on which to measure what a smaller ``dtype`` costs; see `Imported.found`.

    Raises:
        OSError: a file cannot be read.
        ValueError: no format is recognised; the source is broken; or an option does not suit it.
        TypeError: a dtype that no table can have.
    """
    path = Path(source)
    options = Options(
        dtype=dtype,
        layout=layout,
        normalize=normalize,
        key=key,
        tokenizer=None if tokenizer is None else os.fspath(tokenizer),
        vocabulary=None if vocabulary is None else os.fspath(vocabulary),
        form=form,
        opset=opset,
        index_dtype=index_dtype,
        progress=progress,
        sample=sample,
    )
    chosen = _format(path, format)
    with _about(path):
        return chosen.load(path, options)


@contextlib.contextmanager
def _about(path: Path) -> Iterator[None]:
    """A message begins with the source, or with a file that it names first."""
    try:
        yield
    except (ValueError, TypeError) as error:
        named = re.match(r"(.*?): ", str(error))
        if named is not None and Path(named[1]).exists():
            raise
        raise type(error)(f"{path}: {error}") from error


def _format(path: Path, name: str | None) -> Format:
    """The format of a source."""
    if name is not None:
        check_choice("format", name, (f.name for f in FORMATS))
    if not path.exists():
        raise FileNotFoundError(2, "there is no such file or folder", str(path))
    if not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path}: is neither a regular file nor a folder")
    found = next((f for f in FORMATS if (f.recognises(path) if name is None else f.name == name)), None)
    if found is None:
        known = "; ".join(f"{f.name} ({f.files})" for f in FORMATS)
        raise ValueError(f"{path}: {_seen(path)}: the format is not known; known formats are: {known}")
    return found


def _seen(path: Path) -> str:
    """What is there, in a few words."""
    if path.is_file():
        with path.open("rb") as file:
            beginning = file.read(8)
        packed = next((kind for magic, kind in _PACKED.items() if beginning.startswith(magic)), None)
        if packed is not None:
            return f"a file that {packed} has packed, which must be unpacked first"
        return f"a file that begins with {beginning!r}"
    names = sorted(p.name for p in path.iterdir())
    shown = ", ".join(names[:_MOST_NAMED]) + (", ..." if len(names) > _MOST_NAMED else "")
    return f"a folder with {shown}" if names else "an empty folder"
