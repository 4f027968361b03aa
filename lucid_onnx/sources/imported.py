"""What an import gives, and what a format is."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol, get_args

import numpy as np
import onnx
from onnx import helper

from lucid_onnx.builder import INDEX_TYPES, Form, as_dtype, check_form, fill_tables, onnx_type, save_beside, streamed
from lucid_onnx.ops.attributes import check_choice
from lucid_onnx.ops.embedding_bag import spec

from . import text as texts

#: What the model takes: ``input_ids`` and ``attention_mask`` [B, L], or ``ids`` and ``offsets``.
Layout = Literal["padded", "ragged"]
LAYOUTS: tuple[str, ...] = get_args(Layout)
#: What tables can be written as.
TableDtype = Literal["float32", "float16", "bfloat16", "float64", "int8", "uint8", "int4", "uint4"]
DTYPES: tuple[str, ...] = get_args(TableDtype)
#: Called with the bytes that are done and those that there are.
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Options:
    """How to import; `import_model` tells what each means."""

    dtype: str | None = None
    layout: str | None = None
    normalize: bool | None = None
    key: str | None = None
    tokenizer: str | None = None
    vocabulary: str | None = None
    form: Form = "portable"
    opset: int = spec.DEFAULT_OPSET
    index_dtype: str = "int64"
    progress: Progress | None = None
    sample: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.dtype is not None:
            check_choice("dtype", self.dtype, DTYPES)
        if self.layout is not None:
            check_choice("layout", self.layout, LAYOUTS)
        check_form(self.form)
        spec.check_opset(self.opset)
        onnx_type("index_dtype", as_dtype("index_dtype", self.index_dtype), INDEX_TYPES)

    def check_only(self, format: str, *names: str) -> None:
        """Raise ValueError for an option about the source's files that a format does not have; it has ``names``."""
        for name in ("key", "tokenizer", "vocabulary"):
            if name not in names and getattr(self, name) is not None:
                raise ValueError(f"{name} = {getattr(self, name)!r} is given, and the format {format} has no {name}")


class Format(Protocol):
    """A format of models or tables."""

    #: Its name, by which `import_model` can be told of it.
    name: str
    #: The files that it is, in a line.
    files: str

    def recognises(self, path: Path) -> bool:
        """Whether a file or folder, which exists, looks like it. Reads little."""

    def load(self, path: Path, options: Options) -> Imported:
        """Import it.

        Raises:
            OSError: a file cannot be read.
            ValueError, TypeError: it is not what it looks like, or an option does not suit it.
        """


@dataclasses.dataclass(frozen=True)
class Imported:
    """A model that was made from another format.

    Attributes:
        model: the model. Those of its initializers that are in ``tables`` have no data in it.
        tables: initializers by name, which may be mapped files larger than memory.
        found: what was found in the source, for display: a few words under each heading, in order.
        text: what turns texts into the model's ids; None if the source has nothing of the kind.
    """

    model: onnx.ModelProto = dataclasses.field(repr=False)
    tables: Mapping[str, np.ndarray] = dataclasses.field(repr=False)
    found: Mapping[str, str]
    text: texts.Text | None = dataclasses.field(default=None, repr=False)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        external_data: bool | None = None,
        progress: Progress | None = None,
    ) -> tuple[str, ...]:
        """Write the model, and beside it the file that encodes its texts: all of them or none.

        Args:
            path, external_data, progress: as in `lucid_onnx.save`.

        Returns:
            The files that were written, the model first.

        Raises:
            ValueError, OSError: as `lucid_onnx.save`.
        """
        model, others = onnx.ModelProto(), {}
        model.CopyFrom(self.model)
        if self.text is not None:
            name, content = f"{Path(path).name}.{self.text.suffix}", self.text.content()
            others[name] = content
            model.metadata_props.add(key=texts.ENTRY, value=texts.entry(self.text, name, content))
        return save_beside(
            model,
            path,
            others,
            external_data=external_data,
            progress=progress,
            tables={name: streamed(table) for name, table in self.tables.items()},
        )

    def whole(self) -> onnx.ModelProto:
        """The model with the data of its tables, for `lucid_onnx.InferenceSession`; without what encodes texts."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        fill_tables(model, {name: _bytes(table) for name, table in self.tables.items()})
        return model


def _bytes(table: np.ndarray) -> memoryview:
    return table.reshape(-1).view(np.uint8).data


def add_table(model: onnx.ModelProto, name: str, table: np.ndarray) -> None:
    """An initializer without its data, which `Imported.tables` has."""
    model.graph.initializer.add(
        name=name, data_type=helper.np_dtype_to_tensor_dtype(table.dtype), dims=list(table.shape)
    )


def add_metadata(model: onnx.ModelProto, found: Mapping[str, str]) -> None:
    """What was found, as the metadata of a model: ``lucid.format``, ``lucid.licence`` and so on."""
    for heading, words in found.items():
        model.metadata_props.add(key=f"lucid.{heading.replace(' ', '_')}", value=words)
