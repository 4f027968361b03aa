"""The door for models that come from files: read without their tables, checked once, with their data where it may be.

A file may be broken, or made by somebody who means harm. What comes through here can be walked without surprises: every
number that says how much there is fits what is there, and external data lies where ONNX Runtime would read it.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import google.protobuf.message
import onnx
from onnx import AttributeProto, TensorProto, helper

from lucid_onnx.graph import node_lists, subgraphs, where

from .functions import restore_names

#: The entry of a model's metadata that says what encodes its texts, as JSON.
TEXT_ENTRY = "lucid.text"
#: No tensor has more dimensions: NumPy's own limit.
_MOST_DIMS = 64
#: External data up to this many bytes is read with the model: of floats, and of all else, which shapes and indices are.
_SMALL_FLOATS, _SMALL = 2**12, 2**16
#: Tensors may share data; together, small ones take no more memory than this beyond the size of their files.
_SHARED = 2**24
#: Bits of an element, of the types that are packed.
_PACKED: dict[int, int] = {
    TensorProto.DataType.Value(name): bits
    for name, bits in {"UINT4": 4, "INT4": 4, "FLOAT4E2M1": 4, "UINT2": 2, "INT2": 2}.items()
    if hasattr(TensorProto, name)
}
#: The types of ONNX 1.19, and what is packed as they are: how newer types are laid out is not known here.
_KNOWN = {number for name, number in TensorProto.DataType.items() if not name.startswith("FLOAT6")}
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_MESSAGES: dict[int, str] = {
    AttributeProto.TENSOR: "t",
    AttributeProto.GRAPH: "g",
    AttributeProto.SPARSE_TENSOR: "sparse_tensor",
    AttributeProto.TYPE_PROTO: "tp",
}


def load(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """A model, without its external data, in which our functions have their own names (see `restore_names`).

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not an ONNX model, or one that `check_structure` rejects.
    """
    name = os.fspath(path)
    try:
        model = onnx.load_model(name, format="protobuf", load_external_data=False)
    except google.protobuf.message.DecodeError as error:
        raise ValueError(f"{name}: not an ONNX model: {error}") from error
    check_structure(model, name)
    restore_names(model)
    return model


def functions(model: str | os.PathLike[str] | bytes) -> list[onnx.FunctionProto]:
    """The functions of a model's file or bytes, of which no more is read: none where it is not an ONNX model.

    Raises:
        OSError: the file cannot be read.
    """
    found = []
    with (
        io.BytesIO(model) if isinstance(model, bytes) else open(model, "rb") as file,
        contextlib.suppress(EOFError, google.protobuf.message.DecodeError),
    ):
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        while file.tell() < size:
            field, kind = divmod(_varint(file), 8)
            if kind == _DELIMITED:
                length = _varint(file)
                if field == onnx.ModelProto.FUNCTIONS_FIELD_NUMBER and length <= size:
                    found.append(onnx.FunctionProto.FromString(file.read(length)))
                else:
                    file.seek(length, os.SEEK_CUR)
            elif kind == _VARINT:
                _varint(file)
            else:
                file.seek({1: 8, 5: 4}.get(kind, size), os.SEEK_CUR)
    return found


#: Kinds of fields in protobuf's encoding.
_VARINT, _DELIMITED = 0, 2


def _varint(file: BinaryIO) -> int:
    """A number in protobuf's encoding, of 7 bits in each byte."""
    number = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise EOFError
        number |= (byte[0] & 127) << shift
        if byte[0] < 128:
            break
    return number


def check_structure(model: onnx.ModelProto, name: str) -> None:
    """Raise ValueError for what no reader of a model can make sense of, whatever the operators mean.

    That is: no graph or opset; text that is not UTF-8; a tensor or attribute of an unknown type; a negative
    dimension, or too many; data that is not as long as the dimensions say; an attribute without its value.

    Args:
        name: of the model, as the message begins.
    """
    if not model.HasField("graph") or not model.opset_import:
        raise ValueError(f"{name}: not an ONNX model: it has no graph or no opset")
    try:
        _check_text(model)
        _check_graph(model.graph)
        for nodes in node_lists(model):
            for node in nodes:
                _check_node(node)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _check_text(message: Any) -> None:
    """Names and other text must be UTF-8: protobuf gives bytes where it is not."""
    for field, value in message.ListFields():
        if field.type == field.TYPE_STRING:
            for text in [value] if isinstance(value, (str, bytes)) else value:
                if isinstance(text, bytes):
                    raise ValueError(f"{field.full_name} is {text[:40]!r}, which is not UTF-8")
        elif field.type == field.TYPE_MESSAGE:
            for inner in [value] if hasattr(value, "ListFields") else value:
                _check_text(inner)


def _check_graph(graph: onnx.GraphProto) -> None:
    for value in itertools.chain(graph.input, graph.output, graph.value_info):
        _check_type(value.type, f"value {value.name!r}")
    for tensor in graph.initializer:
        _check_tensor(tensor, f"initializer {tensor.name!r}")


def _check_node(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        at = f"{where(node)}: attribute {attribute.name!r}"
        if attribute.type == AttributeProto.UNDEFINED:
            raise ValueError(f"{at} has no type")
        field = _MESSAGES.get(attribute.type)
        if field is not None and not attribute.HasField(field) and not attribute.ref_attr_name:
            raise ValueError(f"{at} has no value")
        for tensor in itertools.chain([attribute.t] if attribute.HasField("t") else [], attribute.tensors):
            _check_tensor(tensor, at)
        if attribute.HasField("tp"):
            _check_type(attribute.tp, at)
    for graph in subgraphs(node):
        _check_graph(graph)


def _check_type(type_: onnx.TypeProto, at: str) -> None:
    kind = type_.WhichOneof("value")
    while kind in ("sequence_type", "optional_type"):
        type_ = getattr(type_, kind).elem_type
        kind = type_.WhichOneof("value")
    if kind not in ("tensor_type", "sparse_tensor_type"):
        return
    tensor = getattr(type_, kind)
    if tensor.elem_type not in TensorProto.DataType.values():
        raise ValueError(f"{at} has element type {tensor.elem_type}, which is unknown")
    _check_dims([d.dim_value for d in tensor.shape.dim], at)


def _check_dims(dims: Iterable[int], at: str) -> int:
    """The number of elements."""
    dims = list(dims)
    if len(dims) > _MOST_DIMS:
        raise ValueError(f"{at} has {len(dims)} dimensions, more than {_MOST_DIMS}")
    if any(d < 0 for d in dims):
        raise ValueError(f"{at} has shape {dims}, with a negative dimension")
    return math.prod(dims)


def _check_tensor(tensor: onnx.TensorProto, at: str) -> None:
    count = _check_dims(tensor.dims, at)
    if tensor.data_type not in TensorProto.DataType.values() or tensor.data_type == TensorProto.UNDEFINED:
        raise ValueError(f"{at} has element type {tensor.data_type}, which is unknown")
    if count >= 2**63:
        raise ValueError(f"{at} has shape {list(tensor.dims)}, with {count} elements")
    if tensor.data_location == TensorProto.EXTERNAL:
        if tensor.data_type == TensorProto.STRING:
            raise ValueError(f"{at} has strings as external data")
        return
    if tensor.data_type not in _KNOWN:
        return
    if tensor.HasField("raw_data"):
        found, expected, unit = len(tensor.raw_data), byte_count(tensor), "bytes of data"
        if tensor.data_type == TensorProto.STRING:
            raise ValueError(f"{at} has strings as raw data")
    else:
        field = helper.tensor_dtype_to_field(tensor.data_type)
        found, expected, unit = len(getattr(tensor, field)), _field_length(tensor, count), f"entries of {field}"
    if found != expected:
        raise ValueError(f"{at} has {found} {unit}, and its shape {list(tensor.dims)} takes {expected}")


def _field_length(tensor: onnx.TensorProto, count: int) -> int:
    """The entries of a tensor's typed field."""
    if tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128):
        return 2 * count
    if tensor.data_type in _PACKED:
        per_entry = 8 // _PACKED[tensor.data_type]
        return -(-count // per_entry)
    return count


def byte_count(tensor: onnx.TensorProto) -> int:
    """The bytes of a tensor's raw data; 0 for strings."""
    count = math.prod(tensor.dims)
    if tensor.data_type == TensorProto.STRING:
        return 0
    if tensor.data_type in _PACKED:
        return -(-count * _PACKED[tensor.data_type] // 8)
    return count * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a model: of its graphs and of its nodes' attributes."""
    yield from model.graph.initializer
    for nodes in node_lists(model):
        for node in nodes:
            for graph in subgraphs(node):
                yield from graph.initializer
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors


def model_files(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """The files that a model needs: its own, those of its external data, and the one that encodes its texts, if it was
    imported with one. Copy, move or remove them together.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not an ONNX model, or has its data outside of its folder.
    """
    model = load(path)
    text = text_file(model)
    beside = [] if text is None else [os.fspath(Path(path).parent / text)]
    return os.fspath(path), *data_files(model, path), *(name for name in beside if os.path.isfile(name))


def text_file(model: onnx.ModelProto) -> str | None:
    """The name of the file beside a model that encodes its texts; None if its metadata names none.

    `lucid_onnx.sources` writes it. Its content is checked where it is read.
    """
    entry = next((p.value for p in model.metadata_props if p.key == TEXT_ENTRY), "")
    with contextlib.suppress(ValueError, RecursionError):  # not JSON
        match json.loads(entry):
            case {"file": str(name)} if is_plain_name(name):
                return name
    return None


def is_plain_name(name: str) -> bool:
    """Whether it is the name of a file in a folder, on every system, and leads nowhere else."""
    return re.fullmatch(r"[^/\\:\0]+", name) is not None and name not in (".", "..")


def data_files(model: onnx.ModelProto, path: str | os.PathLike[str]) -> tuple[str, ...]:
    """The files of external data of a model that is at ``path``.

    Raises:
        ValueError: it has its data outside of its folder.
    """
    locations = dict.fromkeys(location(tensor) for tensor in tensors(model) if is_external(tensor))
    return tuple(os.fspath(Path(path).parent / name) for name in locations)


def is_external(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor's data is in another file."""
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def location(tensor: onnx.TensorProto) -> str:
    """The name of the file that external data is in, relative to the model's folder.

    Raises:
        ValueError: it names no file below the folder.
    """
    found = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
    path = PurePosixPath(found.replace("\\", "/"))
    if not found or "\0" in found or path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
        raise ValueError(f"initializer {tensor.name!r} has its data at {found!r}, outside of the model's folder")
    return found


class ExternalData:
    """The external data of a model, which lies below the folder of the model: by the real paths, as for ONNX Runtime.

    A link may lead from the folder to another place in it. Where the model itself is a link, as in the caches of
    download tools, its data may also lie in the folder that the model really is in. Any other link, and what is not
    a regular file, is rejected: it could be a secret, or never end.

    Args:
        model: the path of the model.
    """

    def __init__(self, model: str | os.PathLike[str]) -> None:
        self._model = os.fspath(model)
        self._folder = Path(model).parent
        self._roots = [Path(os.path.realpath(self._folder)), Path(os.path.realpath(model)).parent]

    @property
    def folder(self) -> Path:
        """The folder that the locations of the data are relative to."""
        return self._folder

    @property
    def name(self) -> str:
        """The name of the model's file."""
        return Path(self._model).name

    def anchored(self) -> ExternalData:
        """The same by its absolute path: the current folder may be another one later."""
        return ExternalData(os.path.abspath(self._model))

    def source(self, tensor: onnx.TensorProto) -> Path:
        """The real path of the file that a tensor has its data in.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is outside of the model's folder, or is not a regular file.
        """
        name = location(tensor)
        path = self._folder / name
        real = Path(os.path.realpath(path))
        if not any(real.is_relative_to(root) for root in self._roots):
            raise ValueError(
                f"initializer {tensor.name!r} has its data at {name!r}, which is really {real}, outside of the model's "
                f"folder, {self._roots[1]}"
            )
        try:
            mode = real.stat().st_mode
        except FileNotFoundError as error:
            raise FileNotFoundError(
                2, f"initializer {tensor.name!r} has its data there, and there is no such file", str(path)
            ) from error
        if not stat.S_ISREG(mode):
            raise ValueError(f"initializer {tensor.name!r} has its data at {path}, which is not a regular file")
        return real

    def text(self, name: str) -> bytes | None:
        """The content of the file that encodes the model's texts; None if it is not there, or not in the folder."""
        real = Path(os.path.realpath(self._folder / name))
        if not any(real.is_relative_to(root) for root in self._roots) or not real.is_file():
            return None
        return real.read_bytes()

    def region(self, tensor: onnx.TensorProto) -> tuple[Path, int, int]:
        """The file, the offset and the length of a tensor's data.

        Raises:
            FileNotFoundError, ValueError: as `source`; or the file or the shape is not as long.
        """
        path = self.source(tensor)
        size = path.stat().st_size
        given = {entry.key: entry.value for entry in tensor.external_data}
        try:
            offset = int(given.get("offset") or 0)
            length = int(given["length"]) if given.get("length") else size - offset
        except ValueError as error:
            raise ValueError(f"initializer {tensor.name!r}: its external data is described by {given}") from error
        if not (offset >= 0 and length >= 0 and offset + length <= size):
            raise ValueError(
                f"initializer {tensor.name!r} has its data at {offset} to {offset + length} of {path}, "
                f"which has {size} bytes"
            )
        if length != byte_count(tensor):
            raise ValueError(
                f"initializer {tensor.name!r} has {length} bytes in {path}, and its shape takes {byte_count(tensor)}"
            )
        return path, offset, length

    def read_small(self, model: onnx.ModelProto) -> None:
        """Put small tensors into the model, in place: numbers of which a shape, an axis or an index may depend.

        They stay outside where their file is missing, so that a model can be looked at without its tables.

        Raises:
            OSError: a file cannot be read.
            ValueError: as `region`.
        """
        external = [t for t in tensors(model) if is_external(t)]
        sizes: dict[Path, int] = {}
        used = 0
        for tensor in external:
            nbytes = byte_count(tensor)
            if nbytes > (_SMALL_FLOATS if tensor.data_type in _FLOATS else _SMALL):
                continue
            try:
                path, _, length = self.region(tensor)
            except FileNotFoundError:
                continue
            sizes.setdefault(path, path.stat().st_size)
            used += length
            if used > _SHARED + sum(sizes.values()):
                return
            self.read(tensor)

    def read(self, tensor: onnx.TensorProto) -> None:
        """Put a tensor's data into it.

        Raises:
            OSError: the file cannot be read.
            ValueError: as `region`.
        """
        path, offset, length = self.region(tensor)
        with path.open("rb") as file:
            file.seek(offset)
            tensor.raw_data = file.read(length)
        del tensor.external_data[:]
        tensor.ClearField("data_location")

    def is_beside(self, tensor: onnx.TensorProto, output: Path) -> bool:
        """Whether a model at ``output``, which is a file of its own, finds the data at the same location."""
        folder = Path(os.path.realpath(output.parent))
        real = Path(os.path.realpath(folder / location(tensor)))
        return real == self.source(tensor) and real.is_relative_to(folder)
