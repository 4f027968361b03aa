"""Models are read without their tables, checked, and written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx

from lucid_onnx.builder import (
    LARGEST_MESSAGE,
    TEXT_ENTRY,
    ExternalData,
    Replacing,
    byte_count,
    check_structure,
    data_of,
    is_external,
    load,
    location,
    remember_data,
    renamed,
    restore_names,
    save_beside,
    tensors,
    text_file,
    without_initializers,
)
from lucid_onnx.graph import subgraphs, where

#: Initializers larger than this take no part in checks and conversions, which copy a model several times.
_LARGEST_CARRIED = 2**16
_CHUNK = 2**24
#: Of what onnx.checker says, which has a line for every node that depends on a wrong one.
_LONGEST_COMPLAINT = 2000


def read(model: onnx.ModelProto | str | os.PathLike[str]) -> tuple[onnx.ModelProto, ExternalData | None]:
    """A model, and where its external data lies (None: not known, and the model is the caller's own).

    Small constants in external data become part of the model, since what they are may decide something. No table is
    loaded.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not an ONNX model, has what a rewrite would lose, or has its data outside of its folder.
    """
    if isinstance(model, onnx.ModelProto):
        proto, name, data = model, "the model", data_of(model)
        check_structure(proto, name)
        if data is not None or renamed(model.functions):
            proto = onnx.ModelProto()
            proto.CopyFrom(model)
            restore_names(proto)
    else:
        name, data = os.fspath(model), ExternalData(model)
        proto = load(model)
        data.read_small(proto)
    for what, held in (
        ("training_info", proto.training_info),
        ("a sparse initializer", proto.graph.sparse_initializer),
        ("a device configuration in an IR version before 11", proto.configuration if proto.ir_version < 11 else ()),
    ):
        if len(held):
            raise ValueError(f"{name}: has {what}, which a rewrite would lose")
    return proto, data


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
    return is_external(tensor) or tensor.ByteSize() > _LARGEST_CARRIED


def check(model: onnx.ModelProto) -> str | None:
    """What onnx.checker reports for a model, with strict shape inference; None if it is valid."""
    try:
        onnx.checker.check_model(without_tables(model), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        text = " ".join(str(error).split())
        return text if len(text) <= _LONGEST_COMPLAINT else f"{text[:_LONGEST_COMPLAINT]}..."
    return None


def unknown_name(model: onnx.ModelProto) -> str | None:
    """What reads a value that nothing gives, in whatever order; None if nothing does."""
    found = _unknown_in_graph(model.graph, ())
    for function in model.functions:
        given = {*function.input, *_given(function.node)}
        found = found or _unknown_in_nodes(function.node, (given,)) or _unknown_outputs(function.output, given)
    return found


def _unknown_in_graph(graph: onnx.GraphProto, outer: tuple[set[str], ...]) -> str | None:
    given = {value.name for value in (*graph.input, *graph.initializer)} | _given(graph.node)
    given.update(sparse.values.name for sparse in graph.sparse_initializer)
    outputs = [value.name for value in graph.output if not any(value.name in names for names in outer)]
    return _unknown_in_nodes(graph.node, (*outer, given)) or _unknown_outputs(outputs, given)


def _unknown_in_nodes(nodes: Iterable[onnx.NodeProto], scopes: tuple[set[str], ...]) -> str | None:
    for node in nodes:
        for name in node.input:
            if name and not any(name in names for names in scopes):
                return f"{where(node)} reads {name!r}, which nothing gives"
        for graph in subgraphs(node):
            if (found := _unknown_in_graph(graph, scopes)) is not None:
                return found
    return None


def _unknown_outputs(outputs: Iterable[str], given: set[str]) -> str | None:
    return next((f"nothing gives the output {name!r}" for name in outputs if name not in given), None)


def _given(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    return {name for node in nodes for name in node.output if name}


def need_data(model: onnx.ModelProto, data: ExternalData | None) -> None:
    """Raise ValueError if a model has external data and nobody said where it is."""
    external = next((t for t in tensors(model) if is_external(t)), None)
    if external is not None and data is None:
        raise ValueError(
            f"initializer {external.name!r} is external data that was not loaded: give the path of the model"
        )


def check_not_data(output: Path, model: onnx.ModelProto, data: ExternalData) -> None:
    """Raise ValueError if ``output`` is in the place of the model's external data; find all of that."""
    for tensor in by_location(model).values():
        source = data.source(tensor)
        if output.exists() and output.samefile(source):
            raise ValueError(f"{output} is the external data of the model, and would be replaced")


def by_location(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """The locations of a model's external data, each with the first tensor that is there."""
    found: dict[str, onnx.TensorProto] = {}
    for tensor in tensors(model):
        if is_external(tensor):
            found.setdefault(location(tensor), tensor)
    return found


def finish(
    model: onnx.ModelProto,
    data: ExternalData | None,
    output: str | os.PathLike[str] | None,
    *,
    single_file: bool,
) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """Write a result where it is wanted; the result, and the files that it needs.

    Args:
        data: where the model's external data is.
        output: the file to write; None writes nothing.
        single_file: put all external data into the model first.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: as `write` and `check_single_file`; or single_file without an output.
    """
    if single_file:
        check_single_file(model, data, output)
        model = _packed(model, data)
    remember_data(model, data)
    if output is not None:
        return model, write(model, output, data)
    return model, () if data is None else tuple(os.fspath(data.folder / name) for name in by_location(model))


def check_single_file(
    model: onnx.ModelProto,
    data: ExternalData | None,
    output: str | os.PathLike[str] | None,
    *,
    initializer_bytes: int | None = None,
) -> None:
    """Raise ValueError if a model cannot be one file with all of its tables, before any of them is read.

    Args:
        initializer_bytes: what the initializers of the main graph will have at least; by default what they have.
    """
    if output is None:
        raise ValueError("single_file = True needs an output")
    need_data(model, data)
    if data is not None:
        check_not_data(Path(output), model, data)
    light = without_initializers(model)
    inner = (tensor for tensor in tensors(light) if is_external(tensor))
    if initializer_bytes is None:
        initializer_bytes = sum(map(byte_count, model.graph.initializer))
    size = light.ByteSize() + initializer_bytes + sum(map(byte_count, inner))
    if size > LARGEST_MESSAGE:
        raise ValueError(
            f"single_file = True, but the model and its tables have {size} bytes, and one file holds less than 2 GiB "
            "(protobuf's limit)"
        )


def _packed(model: onnx.ModelProto, data: ExternalData | None) -> onnx.ModelProto:
    """A copy of the model with its external data in it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in tensors(copy):
        if is_external(tensor) and data is not None:
            data.read(tensor)
    return copy


def write(model: onnx.ModelProto, output: str | os.PathLike[str], data: ExternalData | None) -> tuple[str, ...]:
    """Write a model that refers to its external data where it is; if it is not found from there, to a copy of it.

    Whoever reads ``output`` finds the old model with its data or the new one, as after `save`.

    Args:
        data: where the model's external data is.

    Returns:
        The files that the result needs: ``output``, and those of external data.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: the external data is not known or not in the model's folder, or would be overwritten.
    """
    output = Path(output)
    if output.is_dir():
        raise IsADirectoryError(f"{output} is a folder")
    need_data(model, data)
    model, others, text = with_text(model, data, output)
    if data is None or not (external := by_location(model)):
        return *save_beside(model, output, others)[:1], *text
    check_not_data(output, model, data)
    with Replacing(output) as files:
        copies: dict[str, str] = {}
        for name, tensor in external.items():
            if not data.is_beside(tensor, output):
                copies[name], target = files.open_data()
                with data.source(tensor).open("rb") as stream:
                    shutil.copyfileobj(stream, target, _CHUNK)
        for name, content in others.items():
            files.open(name).write(content)
        files.open_model().write(_moved(model, copies).SerializeToString())
    return os.fspath(output), *(os.fspath(output.with_name(copies.get(name, name))) for name in external), *text


def with_text(
    model: onnx.ModelProto, data: ExternalData | None, output: Path
) -> tuple[onnx.ModelProto, dict[str, bytes], tuple[str, ...]]:
    """What goes with a model whose texts another file encodes.

    In another folder that file is written again, beside ``output`` and under its name; it is left where it is beside
    the model that was read, and where it is not what that model names.

    Returns:
        The model, which names the file; what is to be written beside it, by name; and the paths of what it needs.
    """
    name = text_file(model)
    if name is None or data is None:
        return model, {}, ()
    if os.path.realpath(output.parent) == os.path.realpath(data.folder):
        beside = output.with_name(name)
        return model, {}, (os.fspath(beside),) if beside.is_file() else ()
    content = data.text(name)
    settings = json.loads(next(p.value for p in model.metadata_props if p.key == TEXT_ENTRY))
    if content is None or hashlib.sha256(content).hexdigest() != settings.get("sha256"):
        return model, {}, ()
    mine = f"{output.name}.{name.removeprefix(data.name + '.')}"
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for entry in copy.metadata_props:
        if entry.key == TEXT_ENTRY:
            entry.value = json.dumps({**settings, "file": mine}, ensure_ascii=False)
    return copy, {mine: content}, (os.fspath(output.with_name(mine)),)


def _moved(model: onnx.ModelProto, copies: Mapping[str, str]) -> onnx.ModelProto:
    """The model with other locations of its external data."""
    if not copies:
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in tensors(copy):
        for entry in tensor.external_data:
            if entry.key == "location" and is_external(tensor):
                entry.value = copies.get(entry.value, entry.value)
    return copy
