"""Which bags, inputs and outputs a model file has, as plain data."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import mmap
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from lucid_onnx.builder import byte_count, data_files, is_external, load
from lucid_onnx.graph import subgraphs, where
from lucid_onnx.ops import OPERATOR_OF
from lucid_onnx.ops.embedding_bag import spec


@dataclasses.dataclass(frozen=True)
class Value:
    """An input, an output or a table. A dimension is a number, a name or None; a shape of None is unknown."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None


@dataclasses.dataclass(frozen=True)
class Node:
    """One bag of a model; a collection is one for each of its tables.

    ``table_bytes`` is None for a table that is not an initializer. ``table_external``: the table is external data.
    ``numbers_bytes``: of a quantized table's scales, and zero_points or biases; None if any is not an initializer.
    ``attributes``: all that a caller gives to the operator, by name; ``changed``: those that are not the default.
    """

    name: str
    op: str
    form: str
    mode: str
    table: Value
    table_bytes: int | None
    table_external: bool
    padding_idx: int | None
    max_norm: float | None
    norm_type: float
    include_last_offset: bool
    numbers_bytes: int | None = None
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    changed: str = ""


@dataclasses.dataclass(frozen=True)
class DataFile:
    """A file of a model's external data.

    Attributes:
        file_bytes: None if it is not there.
        cached_bytes: how much of it is in memory, in the page cache; None where the system does not say. Linux says so
            to those who may write the file, and tells others that all of it is.
    """

    path: str
    file_bytes: int | None
    cached_bytes: int | None


@dataclasses.dataclass(frozen=True)
class Model:
    """A model file; ``form`` is "portable", "native", "mixed", or "standard" if it has no bag nodes.

    ``external_data`` are the other files that it needs.
    """

    path: str
    file_bytes: int
    external_data: tuple[DataFile, ...]
    opset: int
    form: str
    nodes: tuple[Node, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


def model(path: str) -> Model:
    """The bags, inputs and outputs of a model file. External data is not read.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not an ONNX model, or one of its ``ai.lucid`` nodes violates the operator's contract.
    """
    proto = load(path)
    try:
        nodes = tuple(_bags(proto))
        external = data_files(proto, path)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    forms = {node.form for node in nodes}
    return Model(
        path=path,
        file_bytes=os.path.getsize(path),
        external_data=tuple(DataFile(name, _size(name), _cached(name)) for name in external),
        opset=opset(proto),
        form="standard" if not forms else forms.pop() if len(forms) == 1 else "mixed",
        nodes=nodes,
        inputs=inputs(proto),
        outputs=outputs(proto),
    )


def _size(path: str) -> int | None:
    return os.path.getsize(path) if os.path.isfile(path) else None


def _cached(path: str) -> int | None:
    """The bytes of a file's pages that are in the page cache (mincore(2)); None where the system does not say."""
    size = _size(path)
    if sys.platform != "linux" or not size:
        return None
    ask = ctypes.CDLL(None).mincore
    ask.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    page, part = mmap.PAGESIZE, 2**30
    mapped = np.memmap(path, np.uint8, "r")
    found = 0
    for begin in range(0, size, part):
        length = min(part, size - begin)
        pages = np.empty(-(-length // page), np.uint8)
        if ask(mapped.ctypes.data + begin, length, pages.ctypes.data) != 0:
            return None
        inside = (pages & 1) != 0
        found += page * int(inside.sum())
        if inside[-1]:
            found -= page * len(pages) - length
    return found


def inputs(proto: onnx.ModelProto) -> tuple[Value, ...]:
    """The inputs of a model."""
    held = {tensor.name for tensor in proto.graph.initializer}
    return tuple(_value(value) for value in proto.graph.input if value.name not in held)


def outputs(proto: onnx.ModelProto) -> tuple[Value, ...]:
    """The outputs of a model."""
    return tuple(_value(value) for value in proto.graph.output)


def opset(proto: onnx.ModelProto) -> int:
    """The version of the standard operators; 0 if a model imports none."""
    return next((int(i.version) for i in proto.opset_import if i.domain in ("", "ai.onnx")), 0)


#: By name: a value that may be a table, its bytes if it is an initializer, and whether it is external data.
_Known = Mapping[str, tuple[Value, "int | None", bool]]


def _bags(proto: onnx.ModelProto) -> Iterator[Node]:
    bodies = {f.name for f in proto.functions if f.domain == spec.DOMAIN}
    found = itertools.chain(
        _nodes(proto.graph, {}),
        *(_within(f.node, {}) for f in proto.functions if f.domain != spec.DOMAIN),
    )
    for node, known in found:
        if node.domain != spec.DOMAIN or node.op_type in bodies.difference(OPERATOR_OF):
            continue
        at = where(node)
        if node.op_type not in OPERATOR_OF:
            raise ValueError(f"{at}: {spec.DOMAIN}::{node.op_type} is not one of {', '.join(OPERATOR_OF)}")
        meaning = OPERATOR_OF[node.op_type].spec
        try:
            given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            attributes = meaning.Attributes.from_onnx(given)
            op = meaning.VARIANTS[node.op_type].of(given)
            op.check_node_inputs(node.input)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{at}: {error}") from error
        name = node.name or (node.output[0] if node.output else "")
        named = dict(zip(op.inputs, node.input, strict=True))
        for bag in op.bags:
            place = named[bag.table]
            table, size, external = known.get(place, (Value(place, "?", None), None, False))
            dtype, shape = attributes.as_table(table.dtype, table.shape)
            table = dataclasses.replace(table, dtype=dtype, shape=shape)
            sizes = [known[named[n]][1] if named.get(n) in known else None for n in bag.row_numbers]
            numbers = None if None in sizes or not sizes else sum(size for size in sizes if size is not None)
            yield Node(
                name=f"{name}, {bag.label}" if bag.label else name,
                op=node.op_type,
                form="portable" if node.op_type in bodies else "native",
                mode=attributes.mode,
                table=table,
                table_bytes=size,
                table_external=external,
                padding_idx=attributes.padding_idx,
                max_norm=attributes.max_norm,
                norm_type=attributes.norm_type,
                include_last_offset=attributes.include_last_offset,
                numbers_bytes=numbers,
                attributes=attributes.keywords,
                changed=attributes.changed,
            )


def _nodes(graph: onnx.GraphProto, outer: _Known) -> Iterator[tuple[onnx.NodeProto, _Known]]:
    """Every node of a graph and its subgraphs, with the values known there."""
    known = dict(outer)
    for value in (*graph.value_info, *graph.input):
        known[value.name] = (_value(value), None, False)
    for tensor in graph.initializer:
        shape = tuple(int(d) for d in tensor.dims)
        value = Value(tensor.name, _dtype_name(_dtype(tensor.data_type)), shape)
        known[tensor.name] = (value, byte_count(tensor), is_external(tensor))
    yield from _within(graph.node, known)


def _within(nodes: Iterable[onnx.NodeProto], known: _Known) -> Iterator[tuple[onnx.NodeProto, _Known]]:
    for node in nodes:
        yield node, known
        for graph in subgraphs(node):
            yield from _nodes(graph, known)


def _value(value: onnx.ValueInfoProto) -> Value:
    if not value.type.HasField("tensor_type"):
        return Value(value.name, str(value.type.WhichOneof("value") or "?").removesuffix("_type"), None)
    tensor = value.type.tensor_type
    shape = None
    if tensor.HasField("shape"):
        shape = tuple(int(d.dim_value) if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim)
    return Value(value.name, _dtype_name(_dtype(tensor.elem_type)), shape)


def _dtype(element_type: int) -> np.dtype | None:
    if element_type == TensorProto.UNDEFINED or element_type not in TensorProto.DataType.values():
        return None
    return helper.tensor_dtype_to_np_dtype(element_type)


def _dtype_name(dtype: np.dtype | None) -> str:
    return "?" if dtype is None else "string" if dtype == np.object_ else dtype.name
