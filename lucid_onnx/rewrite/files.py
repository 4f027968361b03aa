"""Models are read without their tables, checked, and written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import google.protobuf.message
import onnx
from onnx import TensorProto

from lucid_onnx.builder import Replacing, save, without_initializers
from lucid_onnx.graph import node_lists, subgraphs

#: Initializers larger than this take no part in checks and conversions, which copy a model several times.
_LARGEST_CARRIED = 2**16
_CHUNK = 2**24


def read(model: onnx.ModelProto | str | os.PathLike[str]) -> tuple[onnx.ModelProto, Path | None]:
    """A model, and the folder that its external data lies in (None: not known). No external data is loaded.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not an ONNX model, or has what a rewrite would lose.
    """
    if isinstance(model, onnx.ModelProto):
        proto, name, folder = model, "the model", None
    else:
        path = Path(model)
        name, folder = str(path), path.parent
        try:
            proto = onnx.load_model(path, format="protobuf", load_external_data=False)
        except google.protobuf.message.DecodeError as error:
            raise ValueError(f"{name}: not an ONNX model: {error}") from error
    if not proto.HasField("graph") or not proto.opset_import:
        raise ValueError(f"{name}: not an ONNX model: it has no graph or no opset")
    for what, held in (
        ("training_info", proto.training_info),
        ("a sparse initializer", proto.graph.sparse_initializer),
    ):
        if len(held):
            raise ValueError(f"{name}: has {what}, which a rewrite would lose")
    return proto, folder


def without_tables(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which large and external initializers are inputs, behind the model's own."""
    light = without_initializers(model)
    declared = {v.name for v in model.graph.input}
    for tensor in model.graph.initializer:
        if not is_table(tensor):
            light.graph.initializer.append(tensor)
        elif tensor.name not in declared:
            value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            light.graph.input.append(value)
    return light


def is_table(tensor: onnx.TensorProto) -> bool:
    """Whether `without_tables` leaves an initializer out."""
    return tensor.data_location == TensorProto.EXTERNAL or tensor.ByteSize() > _LARGEST_CARRIED


def check(model: onnx.ModelProto) -> str | None:
    """What onnx.checker reports for a model, with strict shape inference; None if it is valid."""
    try:
        onnx.checker.check_model(without_tables(model), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return " ".join(str(error).split())
    return None


def write(model: onnx.ModelProto, output: str | os.PathLike[str], folder: Path | None) -> None:
    """Write a model beside its external data; into another folder with a copy of the data, named after the model.

    All files appear or none.

    Args:
        folder: where the external data lies.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: the external data cannot be found, or would be overwritten.
    """
    output = Path(output)
    if output.is_dir():
        raise IsADirectoryError(f"{output} is a folder")
    external = [t for t in tensors(model) if t.data_location == TensorProto.EXTERNAL]
    if not external:
        save(model, output)
        return
    if folder is None:
        raise ValueError(
            f"initializer {external[0].name!r} is external data that was not loaded: give the path of the model"
        )
    sources = {name: source(folder, name, external) for name in dict.fromkeys(location(t) for t in external)}
    for name, path in sources.items():
        if output.exists() and output.samefile(path):
            raise ValueError(f"{output} is the external data {name!r} of the model")
    with Replacing(output) as files:
        if not output.parent.samefile(folder):
            model = _moved(model, sources, output, files)
        files.open(output.name).write(model.SerializeToString())


def _moved(model: onnx.ModelProto, sources: dict[str, Path], output: Path, files: Replacing) -> onnx.ModelProto:
    """Copy the external data beside ``output``; gives the model that refers to the copies."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for k, (name, source) in enumerate(sources.items()):
        target = f"{output.name}.data" if k == 0 else f"{output.name}.{k}.data"
        if (output.parent / target).exists() and (output.parent / target).samefile(source):
            raise ValueError(f"{output.parent / target} is the external data of the model, and would be replaced")
        with source.open("rb") as stream:
            shutil.copyfileobj(stream, files.open(target), _CHUNK)
        for tensor in tensors(copy):
            if tensor.data_location == TensorProto.EXTERNAL and location(tensor) == name:
                for entry in tensor.external_data:
                    if entry.key == "location":
                        entry.value = f"\0{target}"  # no other file's name, should one be called like a copy
    for tensor in tensors(copy):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = entry.value.removeprefix("\0")
    return copy


def location(tensor: onnx.TensorProto) -> str:
    """The name of the file that external data is in, which must be in the model's folder."""
    found = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
    path = PurePosixPath(found.replace("\\", "/"))
    if not found or path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
        raise ValueError(f"initializer {tensor.name!r} has its data at {found!r}, outside of the model's folder")
    return found


def source(folder: Path, name: str, external: Sequence[onnx.TensorProto]) -> Path:
    """The file of that `location`, which one of the tensors has its data in."""
    path = folder / name
    if not path.is_file():
        owner = next(t.name for t in external if location(t) == name)
        raise FileNotFoundError(2, f"initializer {owner!r} has its data there, and there is no such file", str(path))
    return path


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
