"""What is installed here, and which bags a model has: the facts behind ``lucid-onnx info``, as plain data."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import math
import os
import platform
from collections.abc import Iterable, Iterator, Mapping

import google.protobuf.message
import numpy as np
import onnx
from onnx import TensorProto, helper

from lucid_onnx.graph import subgraphs, where
from lucid_onnx.ops import OPERATOR_OF
from lucid_onnx.ops.embedding_bag import spec

from .library import get_library_path

FORCE_ISA = "LUCID_FORCE_ISA"


@dataclasses.dataclass(frozen=True)
class Isa:
    """An instruction set that the library was compiled for; ``supported``: this machine has it."""

    name: str
    supported: bool


@dataclasses.dataclass(frozen=True)
class Library:
    """The native library: ``isas`` with the best one last, ``active`` the one that runs."""

    path: str
    version: str
    isas: tuple[Isa, ...]
    active: str
    forced: bool


@dataclasses.dataclass(frozen=True)
class Installation:
    """Versions, the native library (None: not installed) and onnxruntime's providers, the preferred one first."""

    lucid_onnx: str
    python: str
    numpy: str
    onnx: str
    onnxruntime: str | None
    providers: tuple[str, ...]
    library: Library | None


@dataclasses.dataclass(frozen=True)
class Value:
    """An input, an output or a table. A dimension is a number, a name or None; a shape of None is unknown."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None


@dataclasses.dataclass(frozen=True)
class Node:
    """One bag of a model; a collection is one for each of its tables.

    ``table_bytes`` is None for a table that the model does not hold itself. ``table_external``: it is held in a file of
    its own, as external data. ``numbers_bytes``: of a quantised table's scales, and zero_points or biases, where the
    model holds all of them; else None.
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


@dataclasses.dataclass(frozen=True)
class Model:
    """A model file; ``form`` is "portable", "native", "mixed", or "standard" where no bag is left to be seen."""

    path: str
    file_bytes: int
    opset: int
    form: str
    nodes: tuple[Node, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


@dataclasses.dataclass(frozen=True)
class TablePlace:
    """What starting a session would do with a constant table.

    ``plan`` is "stays", "in place" (huge pages are put under it), "copied" (to huge pages, unless another session of
    the process has copied it), "joined" (codes are copied, each row with its scale behind it, for every node that pools
    them) or "refused" (there is no memory for the copy).
    """

    name: str
    bytes: int
    external: bool
    plan: str
    copied_bytes: int
    huge_pages: int


@dataclasses.dataclass(frozen=True)
class TableMemory:
    """The tables of a model under one choice of table memory; ``free_bytes`` is None where the system does not say."""

    choice: str
    free_bytes: int | None
    tables: tuple[TablePlace, ...]


_PLANS = ("stays", "in place", "copied", "refused")
_HUGE_PAGE = 2 << 20
#: kLargeTable and kMostJoinedBytes of the library.
_LARGE_TABLE, _MOST_JOINED_BYTES = 8 << 20, 1024


def installation() -> Installation:
    """What is installed here.

    Raises:
        OSError, ValueError: see `library`.
    """
    try:
        import onnxruntime
    except ImportError:
        onnxruntime = None
    return Installation(
        lucid_onnx=version(),
        python=platform.python_version(),
        numpy=np.__version__,
        onnx=onnx.__version__,
        onnxruntime=None if onnxruntime is None else onnxruntime.__version__,
        providers=() if onnxruntime is None else tuple(onnxruntime.get_available_providers()),
        library=library(),
    )


def version() -> str:
    """The version of lucid-onnx."""
    from lucid_onnx import __version__

    return __version__


def _native() -> tuple[str, ctypes.CDLL] | None:
    """The native library, and where it is; None if this installation has none."""
    try:
        path = get_library_path()
    except FileNotFoundError:
        return None
    return path, ctypes.CDLL(path)


def library() -> Library | None:
    """The native library, asked through its C interface; None if this installation has none.

    Raises:
        OSError: it is there and cannot be loaded, or is not lucid-onnx's.
        ValueError: LUCID_FORCE_ISA names an instruction set that does not run here.
    """
    found_at = _native()
    if found_at is None:
        return None
    path, native = found_at
    try:
        for name in ("lucid_onnx_version", "lucid_isa_name", "lucid_isa_active"):
            getattr(native, name).restype = ctypes.c_char_p
        isas = tuple(
            Isa(native.lucid_isa_name(i).decode(), bool(native.lucid_isa_supported(i)))
            for i in range(native.lucid_isa_count())
        )
        active = native.lucid_isa_active()
        library_version = native.lucid_onnx_version().decode()
    except AttributeError as error:
        raise OSError(f"{path}: not the library of this lucid-onnx: {error}") from error
    forced = os.environ.get(FORCE_ISA, "")
    if active is None:
        able = ", ".join(isa.name for isa in isas if isa.supported)
        raise ValueError(f"{FORCE_ISA} = {forced!r} is no instruction set that runs here; those that do: {able}")
    return Library(path, library_version, isas, active.decode(), bool(forced))


def table_memory(found: Model, choice: str = "auto") -> TableMemory | None:
    """Where the tables of a model would lie, as the native library decides it; None without the library.

    Memory is counted for each table by itself, as if the others were not there.

    Raises:
        OSError: as `library`.
        ValueError: there is no such choice.
    """
    found_at = _native()
    if found_at is None:
        return None
    path, native = found_at
    try:
        native.lucid_free_memory.restype = ctypes.c_int64
        native.lucid_table_plan.argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    except AttributeError as error:
        raise OSError(f"{path}: not the library of this lucid-onnx: {error}") from error
    if native.lucid_table_plan(choice.encode(), 0, 0, 0) < 0:
        raise ValueError(f"table memory {choice!r} is not one of 'auto', 'inplace', 'hugepage_copy', 'mmap'")
    free = native.lucid_free_memory()
    held = {n.table.name: n for n in found.nodes if n.table_bytes is not None}
    places = []
    for name, node in held.items():
        size = node.table_bytes or 0
        joined = _joined_bytes(node)
        if joined and choice in ("auto", "hugepage_copy"):
            large = joined >= _LARGE_TABLE
            if not large or _PLANS[native.lucid_table_plan(b"auto", True, joined, free)] == "copied":
                pages = -(-joined // _HUGE_PAGE) if large else 0
                copied = pages * _HUGE_PAGE if large else joined
                places.append(TablePlace(name, size, node.table_external, "joined", copied, pages))
                continue
        plan = _PLANS[native.lucid_table_plan(choice.encode(), node.table_external, size, free)]
        # A copy is made of whole pages; in place, those count that lie wholly within the table.
        pages = {"copied": -(-size // _HUGE_PAGE), "in place": size // _HUGE_PAGE}.get(plan, 0)
        copied = pages * _HUGE_PAGE if plan == "copied" else 0
        places.append(TablePlace(name, size, node.table_external, plan, copied, pages))
    return TableMemory(choice, None if free < 0 else free, tuple(places))


def _joined_bytes(node: Node) -> int:
    """What a table of codes takes with every row's numbers behind it; 0 for one that is not joined with them."""
    rows = node.table.shape[0] if node.table.shape else 0
    if node.table_bytes is None or node.numbers_bytes is None or not isinstance(rows, int) or rows == 0:
        return 0
    row_bytes = node.table_bytes // rows
    return node.table_bytes + node.numbers_bytes if 0 < row_bytes <= _MOST_JOINED_BYTES else 0


def model(path: str) -> Model:
    """The bags, inputs and outputs of a model file. External data is not read.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no ONNX model, or one of its ``ai.lucid`` nodes is not as the operator's contract says.
    """
    try:
        proto = onnx.load_model(path, format="protobuf", load_external_data=False)
    except google.protobuf.message.DecodeError as error:
        raise ValueError(f"{path}: not an ONNX model: {error}") from error
    if not proto.HasField("graph") or not proto.opset_import:
        raise ValueError(f"{path}: not an ONNX model: it has no graph or no opset")
    try:
        nodes = tuple(_bags(proto))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    forms = {node.form for node in nodes}
    return Model(
        path=path,
        file_bytes=os.path.getsize(path),
        opset=opset(proto),
        form="standard" if not forms else forms.pop() if len(forms) == 1 else "mixed",
        nodes=nodes,
        inputs=inputs(proto),
        outputs=outputs(proto),
    )


def inputs(proto: onnx.ModelProto) -> tuple[Value, ...]:
    """What a model must be given."""
    held = {tensor.name for tensor in proto.graph.initializer}
    return tuple(_value(value) for value in proto.graph.input if value.name not in held)


def outputs(proto: onnx.ModelProto) -> tuple[Value, ...]:
    """What a model gives."""
    return tuple(_value(value) for value in proto.graph.output)


def opset(proto: onnx.ModelProto) -> int:
    """The version of the standard operators; 0 if a model imports none."""
    return next((int(i.version) for i in proto.opset_import if i.domain in ("", "ai.onnx")), 0)


#: By name: what is known of a value that may be a table, its bytes where the model holds it, and whether in a file.
_Known = Mapping[str, tuple[Value, "int | None", bool]]


def _bags(proto: onnx.ModelProto) -> Iterator[Node]:
    bodies = {f.name for f in proto.functions if f.domain == spec.DOMAIN}
    found = itertools.chain(
        _nodes(proto.graph, {}),
        *(_within(f.node, {}) for f in proto.functions if f.domain != spec.DOMAIN),
    )
    for node, known in found:
        if node.domain != spec.DOMAIN:
            continue
        at = where(node)
        if node.op_type not in OPERATOR_OF:
            raise ValueError(f"{at}: {spec.DOMAIN}::{node.op_type} is not one of {', '.join(OPERATOR_OF)}")
        meaning = OPERATOR_OF[node.op_type].spec
        op = meaning.VARIANTS[node.op_type]
        if len(node.input) <= op.inputs.index(op.table):
            raise ValueError(f"{at}: {node.op_type} has no input {op.table}")
        try:
            given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            attributes = meaning.Attributes.from_onnx(given)
            op = op.of(given)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{at}: {error}") from error
        name = node.name or (node.output[0] if node.output else "")
        named = dict(zip(op.inputs, node.input, strict=False))
        for bag in op.bags:
            if bag.table not in named:
                continue
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
            )


def _nodes(graph: onnx.GraphProto, outer: _Known) -> Iterator[tuple[onnx.NodeProto, _Known]]:
    """Every node of a graph and its subgraphs, with what is known where it stands."""
    known = dict(outer)
    for value in (*graph.value_info, *graph.input):
        known[value.name] = (_value(value), None, False)
    for tensor in graph.initializer:
        shape = tuple(int(d) for d in tensor.dims)
        dtype = _dtype(tensor.data_type)
        itemsize = 0 if dtype is None else dtype.itemsize
        external = tensor.data_location == TensorProto.EXTERNAL
        known[tensor.name] = (Value(tensor.name, _dtype_name(dtype), shape), math.prod(shape) * itemsize, external)
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
