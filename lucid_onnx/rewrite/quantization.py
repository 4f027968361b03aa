"""Give the bags of a model smaller tables: codes of 8 or 4 bits with a scale per row, or 16-bit floats."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lucid_onnx.builder import CODES_TYPES, FORMS, TABLE_TYPES, Form, Replacing, convert, without_initializers
from lucid_onnx.ops import OPERATOR_OF, quantized_embedding_bag, variant
from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.ops.embedding_bag_collection import spec as collection
from lucid_onnx.ops.quantized_embedding_bag.table import extremes, quantize_rows

from . import files

#: What a table can be turned into: codes, and floats of 16 bits.
DTYPES = (*quantized_embedding_bag.spec.CODES_TYPES, "float16", "bfloat16")
_HALVES = {"float16": np.dtype(np.float16), "bfloat16": spec.BFLOAT16}
#: Elements that are worked on at a time: a handful of float64 arrays of this size stays in the caches of a core, which
#: is worth a factor of four.
_ELEMENTS_AT_ONCE = 2**16
#: External data begins on a page, and is not worth a page below this.
_ALIGNMENT = 4096
_CHUNK = 2**24
#: Codes times scale are added up in float32. Beyond half its range a row's span could leave it.
_LARGEST = float(np.finfo(np.float32).max) / 2


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A table that was made smaller, and what that costs.

    The error of a row is the Euclidean length of what it lost, relative to its own; 0 for a row of zeros.

    Attributes:
        table, shape: the initializer's name, and [V, D].
        bags: the nodes that pool its rows.
        dtype_before, dtype: what its elements were and are.
        bytes_before, bytes_after: of the table, with its scales and biases.
        largest_row_error, worst_row: the largest error, and whose it is; 0 and None where nothing was lost.
        mean_row_error: over all rows.
        largest_difference: the furthest that an element is off.
    """

    table: str
    shape: tuple[int, int]
    bags: tuple[str, ...]
    dtype_before: str
    dtype: str
    bytes_before: int
    bytes_after: int
    largest_row_error: float
    worst_row: int | None
    mean_row_error: float
    largest_difference: float


@dataclasses.dataclass(frozen=True)
class Unquantized:
    """A table that was left as it is, the bags that pool it, and why."""

    table: str
    bags: tuple[str, ...]
    reason: str


@dataclasses.dataclass(frozen=True)
class QuantizeReport:
    """The model, the tables that became smaller, and those that did not. Of external data no more is loaded."""

    model: onnx.ModelProto = dataclasses.field(repr=False)
    quantized: tuple[Quantized, ...]
    unquantized: tuple[Unquantized, ...]

    def as_dict(self) -> dict[str, Any]:
        """All but the model, for JSON."""
        return {
            "quantized": [dataclasses.asdict(q) for q in self.quantized],
            "unquantized": [dataclasses.asdict(u) for u in self.unquantized],
        }


def quantize(
    model: onnx.ModelProto | str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    dtype: str = "int8",
    min_bytes: int = 0,
    form: Form | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> QuantizeReport:
    """Make the constant tables of a model's ``ai.lucid::EmbeddingBag`` nodes smaller.

    With a ``dtype`` of codes the nodes become ``QuantizedEmbeddingBag``, and tables as `QuantizedTable.quantize` makes
    them: "int8" and "int4" symmetric with a scale per row, "uint8" and "uint4" with a scale and a bias per row. They
    are pooled in float32. With "float16" and "bfloat16" the nodes stay and their tables are rounded; per_sample_weights
    and the pooled rows then go through that type, too. Casts keep every other value of the graph in the type it has.

    A table is quantised once, however many bags pool it. It is left as it is, with the reason in the report, if
    something else reads it, if it is no initializer of the main graph or one that a caller may override, if it holds
    what the new type cannot, or if nothing would be won. Inputs, outputs, metadata and all other nodes stay.

    External tables are read and written in parts, so that they may be larger than memory; ``output`` then has all of
    its external data in ``<output>.data``. Both files appear whole or not at all.

    Args:
        model: a path, or a model; it is not changed. Bags in standard form are no nodes: `fuse` them first.
        output: where to write the result; it may be the input's path if the model has no external data.
        dtype: "int8", "uint8", "int4", "uint4", "float16" or "bfloat16".
        min_bytes: tables with fewer bytes are left.
        form: of all ``ai.lucid`` nodes in the result, as in `lucid_onnx.to_form`; None keeps "portable" or "native".
        progress: called with the bytes of tables read and to read.

    Raises:
        OSError: a file cannot be read or written.
        TypeError: ``min_bytes`` is not an integer.
        ValueError: an unknown ``dtype`` or ``form``, a negative ``min_bytes``, no ONNX model, one without
            ``ai.lucid`` nodes, one that onnx.checker refuses, or ``output`` in the place of what has to be read.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype = {dtype!r} is not one of {', '.join(DTYPES)}")
    if form is not None and form not in FORMS:
        raise ValueError(f"form = {form!r} is not one of 'portable', 'standard', 'native'")
    if isinstance(min_bytes, bool) or not isinstance(min_bytes, int):
        raise TypeError(f"min_bytes = {min_bytes!r} must be an integer")
    if min_bytes < 0:
        raise ValueError(f"min_bytes = {min_bytes} must be >= 0")
    proto, folder = files.read(model)
    external = [t for t in files.tensors(proto) if t.data_location == TensorProto.EXTERNAL]
    if external and folder is None:
        raise ValueError(
            f"initializer {external[0].name!r} is external data that was not loaded: give the path of the model"
        )
    work = _Work(proto, folder, dtype, min_bytes, form, progress)
    if output is None or not external:
        report = work.run(None)
        if output is not None:
            files.write(report.model, output, folder)
        return report
    output = Path(output)
    if output.is_dir():
        raise IsADirectoryError(f"{output} is a folder")
    assert folder is not None
    data = output.with_name(output.name + ".data")
    for source in {files.source(folder, files.location(t), external) for t in external}:
        for target in (output, data):
            if target.exists() and target.samefile(source):
                raise ValueError(f"{target} is the external data of the model, and would be replaced")
    with Replacing(output) as replacing:
        store = _Store(replacing.open(data.name), data.name)
        report = work.run(store)
        store.finish()
        replacing.open(output.name).write(report.model.SerializeToString())
    return report


# ---- Where tables come from, and where they go.


class _Rows(NamedTuple):
    """The rows [V, D] of a table, to be read in parts."""

    shape: tuple[int, int]
    dtype: np.dtype
    read: Callable[[int, int], np.ndarray]  #: rows from, to

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _Store:
    """A file of external data that grows; what was written last can be taken back."""

    def __init__(self, file: BinaryIO, location: str) -> None:
        self.file, self.location = file, location
        self.end = 0

    def room(self, nbytes: int) -> int:
        """Where ``nbytes`` more may go."""
        offset = -(-self.end // _ALIGNMENT) * _ALIGNMENT
        self.end = offset + nbytes
        return offset

    def finish(self) -> None:
        """Cut off what was taken back."""
        self.file.truncate(self.end)

    def refer(self, tensor: onnx.TensorProto, offset: int, nbytes: int) -> None:
        """Say in a tensor that its data is here."""
        tensor.data_location = TensorProto.EXTERNAL
        del tensor.external_data[:]
        for key, value in (("location", self.location), ("offset", offset), ("length", nbytes)):
            tensor.external_data.add(key=key, value=str(value))


class _Column:
    """A new initializer of a row of numbers (or one number) per row of the table, written in parts.

    Args:
        store: where its data goes; None keeps it in memory, and so does next to no data.
    """

    def __init__(self, name: str, dtype: np.dtype, dims: tuple[int, ...], store: _Store | None) -> None:
        self._tensor = TensorProto(name=name, data_type={**TABLE_TYPES, **CODES_TYPES}[dtype], dims=dims)
        self.nbytes = math.prod(dims) * dtype.itemsize
        self._row_bytes = math.prod(dims[1:]) * dtype.itemsize
        self._store = store if self.nbytes >= _ALIGNMENT else None
        self._offset = 0 if self._store is None else self._store.room(self.nbytes)
        self._array = np.empty(dims if self._store is None else 0, dtype)

    def write(self, begin: int, values: np.ndarray) -> None:
        """The values of rows from ``begin`` on."""
        if self._store is None:
            self._array[begin : begin + len(values)] = values
        else:
            self._store.file.seek(self._offset + begin * self._row_bytes)
            self._store.file.write(np.ascontiguousarray(values).view(np.uint8).data)

    def tensor(self) -> onnx.TensorProto:
        """The initializer."""
        if self._store is None:
            self._tensor.raw_data = self._array.tobytes()
        else:
            self._store.refer(self._tensor, self._offset, self.nbytes)
        return self._tensor


@contextlib.contextmanager
def _opened(tensor: onnx.TensorProto, folder: Path | None) -> Iterator[_Rows]:
    """The rows of an initializer [V, D] of floats."""
    rows, columns = tensor.dims
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    if tensor.data_location != TensorProto.EXTERNAL:
        array = numpy_helper.to_array(tensor)
        yield _Rows((rows, columns), array.dtype, lambda begin, end: array[begin:end])
        return
    assert folder is not None
    width, nbytes = columns * dtype.itemsize, rows * columns * dtype.itemsize
    path, offset, length = _region(tensor, folder)
    if length != nbytes:
        raise ValueError(f"initializer {tensor.name!r} has {length} bytes in {path}, and its shape takes {nbytes}")
    with path.open("rb") as file:

        def read(begin: int, end: int) -> np.ndarray:
            file.seek(offset + begin * width)
            data = file.read((end - begin) * width)
            if len(data) != (end - begin) * width:
                raise OSError(5, f"the file ends before the data of initializer {tensor.name!r}", str(path))
            return np.frombuffer(data, dtype).reshape(end - begin, columns)

        yield _Rows((rows, columns), dtype, read)


def _region(tensor: onnx.TensorProto, folder: Path) -> tuple[Path, int, int]:
    """The file, the offset and the length of external data."""
    path = files.source(folder, files.location(tensor), [tensor])
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
    return path, offset, length


def _carried(tensor: onnx.TensorProto, folder: Path, store: _Store) -> None:
    """Copy the external data of a tensor that stays what it is."""
    path, offset, length = _region(tensor, folder)
    target = store.room(length)
    store.file.seek(target)
    with path.open("rb") as file:
        file.seek(offset)
        for begin in range(0, length, _CHUNK):
            store.file.write(file.read(min(_CHUNK, length - begin)))
    store.refer(tensor, target, length)


# ---- The rows.


class _Kept(Exception):  # noqa: N818  # no error: a table stays as it is, and this says why
    pass


#: Squares above this have as many digits as others.
_SMALLEST_SQUARE = 1e-280


def _squares(rows: np.ndarray) -> np.ndarray:
    return np.einsum("rd,rd->r", rows, rows)


def _careful_error(rows: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """The error of each row, with no square out of range. What is not finite lost nothing, in ``lost`` too."""
    finite = np.isfinite(rows)
    lost[~finite] = 0
    whole = np.where(finite, rows, 0)
    size = np.abs(whole).max(axis=1, initial=0, keepdims=True)
    size[size == 0] = 1
    length = np.sqrt(_squares(whole / size))
    return np.sqrt(_squares(lost / size)) / np.where(length > 0, length, 1)  # type: ignore[no-any-return]


class _Lost:
    """What rows lost, added up part by part."""

    def __init__(self) -> None:
        self.largest, self.worst, self.difference = 0.0, None, 0.0
        self._sum, self._count = 0.0, 0

    worst: int | None

    def add(self, begin: int, rows: np.ndarray, kept: np.ndarray) -> None:
        """Both float64 [n, D]; ``kept`` is used up."""
        with np.errstate(invalid="ignore", over="ignore"):
            lost = np.subtract(rows, kept, out=kept)
            squares, lost_squares = _squares(rows), _squares(lost)
            # Infinity and NaN, and what is no number any more when it is squared.
            odd = np.flatnonzero(~((squares > _SMALLEST_SQUARE) & (squares + lost_squares < np.inf)))
            error = np.sqrt(lost_squares / squares)
        if len(odd):
            zeros = ~rows[odd].any(axis=1)  # which lost nothing, and are many in some tables
            error[odd[zeros]] = 0
            odd = odd[~zeros]
        if len(odd):
            error[odd] = _careful_error(rows[odd], part := lost[odd])
            lost[odd] = part
        self._sum += float(error.sum())
        self._count += len(error)
        self.difference = max(self.difference, float(lost.max(initial=0)), -float(lost.min(initial=0)))
        if len(error) and error.max() > self.largest:
            self.largest, self.worst = float(error.max()), begin + int(error.argmax())

    @property
    def mean(self) -> float:
        return self._sum / self._count if self._count else 0.0


def _parts(rows: _Rows) -> Iterator[tuple[int, np.ndarray]]:
    """The rows in parts, with where each begins."""
    num_rows, dim = rows.shape
    step = max(1, _ELEMENTS_AT_ONCE // max(dim, 1))
    for begin in range(0, num_rows, step):
        yield begin, rows.read(begin, min(begin + step, num_rows))


def _first(mask: np.ndarray, begin: int) -> str:
    """The place of the first true element, as it is written."""
    r, d = (int(k) for k in np.argwhere(mask)[0])
    return f"[{begin + r}, {d}]"


def _as_codes(rows: _Rows, kind: str, columns: Mapping[str, _Column], tick: Callable[[int], None]) -> _Lost:
    lost, codes_type = _Lost(), quantized_embedding_bag.spec.CODES_TYPES[kind]
    for begin, part in _parts(rows):
        # The extremes of a row are those of its floats, and found sooner there; NumPy has no fast ones of 16 bits.
        low, high = extremes(part if part.dtype.itemsize > 2 else part.astype(np.float32))
        wide = part.astype(np.float64)
        largest = np.maximum(np.abs(low), np.abs(high)).max(initial=0)
        if not largest <= _LARGEST:
            for wrong, why in (
                (~np.isfinite(wide), "which has no code"),
                (np.abs(wide) > _LARGEST, "which is beyond what codes times a float32 scale can be"),
            ):
                if wrong.any():
                    raise _Kept(f"its element {_first(wrong, begin)} is {wide[wrong][0]}, {why}")
        found = quantize_rows(wide, low, high, codes_type)
        for name, array in (("codes", found.codes), ("scale", found.scale), ("bias", found.bias)):
            if array is not None:
                columns[name].write(begin, array)
        lost.add(begin, wide, found.meant)
        tick(part.nbytes)
    return lost


def _as_halves(rows: _Rows, dtype: np.dtype, column: _Column, tick: Callable[[int], None]) -> _Lost:
    lost = _Lost()
    for begin, part in _parts(rows):
        with np.errstate(over="ignore"):
            rounded = part.astype(dtype)
        wide, kept = part.astype(np.float64), rounded.astype(np.float64)
        beyond = np.isinf(kept) & np.isfinite(wide)
        if beyond.any():
            raise _Kept(f"its element {_first(beyond, begin)} is {wide[beyond][0]}, which is beyond {dtype}")
        column.write(begin, rounded)
        lost.add(begin, wide, kept)
        tick(part.nbytes)
    return lost


# ---- The graph.


class _Bag(NamedTuple):
    """A node, and its table: the initializer's name, or why it is none."""

    node: onnx.NodeProto
    table: str
    objection: str | None


class _Work:
    """One model on its way. The tables of the original are only read."""

    def __init__(
        self,
        proto: onnx.ModelProto,
        folder: Path | None,
        dtype: str,
        min_bytes: int,
        form: Form | None,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._folder, self._dtype, self._min_bytes, self._progress = folder, dtype, min_bytes, progress
        self._proto = proto
        self._initializers = {t.name: t for t in proto.graph.initializer}
        self._form = form or ("portable" if any(f.domain == spec.DOMAIN for f in proto.functions) else "native")
        self._light = without_initializers(proto)
        for tensor in proto.graph.initializer:  # types and shapes are all that `convert` looks at
            self._light.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        convert(self._light, "native")
        self._bags: list[_Bag] = []
        self._others: dict[str, str] = {}  # who else reads an initializer
        self._survey()
        self._taken = _names(self._light)
        if not self._bags:
            raise ValueError(f"the model has no {spec.DOMAIN} nodes: `fuse` finds bags that are written out")

    def run(self, store: _Store | None) -> QuantizeReport:
        """Quantise what can be, into ``store`` what was external, into memory what was not."""
        tables: dict[str, list[_Bag]] = {}
        for bag in self._bags:
            tables.setdefault(bag.table, []).append(bag)
        quantized: list[Quantized] = []
        unquantized: list[Unquantized] = []
        made: dict[str, dict[str, onnx.TensorProto]] = {}
        reasons = {name: self._objection(name, bags) for name, bags in tables.items()}
        sizes = {n: _nbytes(self._initializers[n]) for n, reason in reasons.items() if reason is None}
        done = 0

        def tick(count: int) -> None:
            nonlocal done
            done += count
            if self._progress is not None:
                self._progress(done, sum(sizes.values()))

        for name, bags in tables.items():
            where = tuple(_where(bag.node) for bag in bags)
            before, start = done, 0 if store is None else store.end
            try:
                if (reason := reasons[name]) is not None:
                    raise _Kept(reason)
                found, made[name] = self._table(name, where, store, tick)
                quantized.append(found)
            except _Kept as kept:
                if store is not None:
                    store.end = start
                if name in sizes:
                    tick(before + sizes[name] - done)
                unquantized.append(Unquantized(name, where, str(kept)))
        self._rewrite(made)
        return QuantizeReport(self._result(made, store), tuple(quantized), tuple(unquantized))

    # Finding.

    def _survey(self) -> None:
        """Find the bags and where their tables come from, and who else reads an initializer."""
        graph = self._light.graph
        scope = {t.name: "" for t in graph.initializer}
        scope.update((v.name, "it is an input of the model") for v in graph.input)
        for value in graph.output:
            if value.name in self._initializers:
                self._others[value.name] = "it is an output of the model"
        self._survey_nodes(graph.node, scope)
        for function in self._light.functions:
            self._survey_nodes(function.node, dict.fromkeys(function.input, "it is an argument of a function"))

    def _survey_nodes(self, nodes: Sequence[onnx.NodeProto], outer: Mapping[str, str]) -> None:
        """``outer``: for every name that is known here, why it is no constant table; "" for those that are."""
        scope = dict(outer)
        for node in nodes:
            meaning = OPERATOR_OF[node.op_type].spec if node.domain == spec.DOMAIN else None
            is_bag = meaning is spec
            for k, name in enumerate(node.input):
                if is_bag and k == 0:
                    objection = scope.get(name, "it is not known where it comes from")
                    self._bags.append(_Bag(node, name, objection or None))
                elif scope.get(name) == "":
                    self._others.setdefault(name, f"{_where(node)} ({node.op_type}) reads it as well")
            if node.domain == spec.DOMAIN and node.op_type in collection.VARIANTS:
                op = variant(node.op_type, {a.name: helper.get_attribute_value(a) for a in node.attribute})
                objection = "a collection pools it, which has no tables of codes: quantize before tables are merged"
                self._bags += [_Bag(node, name, objection) for name in node.input[: op.num_tables]]
            elif meaning is quantized_embedding_bag.spec:
                kind = quantized_embedding_bag.spec.Attributes.from_onnx(
                    {a.name: helper.get_attribute_value(a) for a in node.attribute}
                ).codes_type
                self._bags.append(_Bag(node, node.input[0], f"it has codes already, {kind}"))
            for inner in _subgraphs(node):
                within = {**scope, **{v.name: "it is an input of a subgraph" for v in inner.input}}
                within.update((t.name, "it is an initializer of a subgraph") for t in inner.initializer)
                self._survey_nodes(inner.node, within)
            made = "a Constant node" if node.op_type == "Constant" else f"{_where(node)} ({node.op_type})"
            scope.update(dict.fromkeys(node.output, f"it is made by {made}, and is no initializer"))

    def _objection(self, name: str, bags: Sequence[_Bag]) -> str | None:
        """Why a table has to stay as it is, as far as can be said without reading it."""
        if (objection := next((b.objection for b in bags if b.objection is not None), None)) is not None:
            return objection
        if name in self._others:
            return self._others[name]
        tensor = self._initializers[name]
        dtype = _dtype(tensor)
        if dtype not in TABLE_TYPES:
            return f"it is {TensorProto.DataType.Name(tensor.data_type).lower()}, and no table of floats"
        if len(tensor.dims) != 2:
            return f"it has shape {list(tensor.dims)}, expected [V, D]"
        if str(dtype) == self._dtype:
            return f"it is {dtype} already"
        size, after = _nbytes(tensor), self._bytes_after(*tensor.dims)
        if size < self._min_bytes:
            return f"it has {size} bytes, less than min_bytes = {self._min_bytes}"
        if after >= size:
            return f"it would not be smaller: {after} bytes for {size}"
        return None

    def _bytes_after(self, num_rows: int, dim: int) -> int:
        if self._dtype in _HALVES:
            return num_rows * dim * 2
        kind = quantized_embedding_bag.spec.CODES_TYPES[self._dtype]
        return num_rows * (kind.stored_columns(dim) + (4 if kind.lowest < 0 else 8))

    # Changing.

    def _table(
        self, name: str, where: tuple[str, ...], store: _Store | None, tick: Callable[[int], None]
    ) -> tuple[Quantized, dict[str, onnx.TensorProto]]:
        """A table in its new type, by the operator's input names."""
        tensor = self._initializers[name]
        with _opened(tensor, self._folder) as rows:
            num_rows, dim = rows.shape
            target = store if tensor.data_location == TensorProto.EXTERNAL else None
            if self._dtype in _HALVES:
                dtype = _HALVES[self._dtype]
                columns = {"weight": _Column(self._free(f"{name}_{self._dtype}"), dtype, rows.shape, target)}
                lost = _as_halves(rows, dtype, columns["weight"], tick)
            else:
                kind = quantized_embedding_bag.spec.CODES_TYPES[self._dtype]
                shape = (num_rows, kind.stored_columns(dim))
                columns = {"codes": _Column(self._free(f"{name}_codes"), kind.stored, shape, target)}
                for number in ("scale", "bias")[: 1 if kind.lowest < 0 else 2]:
                    free = self._free(f"{name}_{number}")
                    columns[number] = _Column(free, np.dtype(np.float32), (num_rows,), target)
                lost = _as_codes(rows, self._dtype, columns, tick)
        found = Quantized(
            table=name,
            shape=rows.shape,
            bags=where,
            dtype_before=str(rows.dtype),
            dtype=self._dtype,
            bytes_before=rows.nbytes,
            bytes_after=sum(c.nbytes for c in columns.values()),
            largest_row_error=lost.largest,
            worst_row=lost.worst,
            mean_row_error=lost.mean,
            largest_difference=lost.difference,
        )
        return found, {key: column.tensor() for key, column in columns.items()}

    def _rewrite(self, made: Mapping[str, Mapping[str, onnx.TensorProto]]) -> None:
        """Let the nodes read the new tables."""
        changed = {id(bag.node): bag for bag in self._bags if bag.table in made}

        def within(nodes: Any) -> None:
            result: list[onnx.NodeProto] = []
            for node in nodes:
                for inner in _subgraphs(node):
                    within(inner.node)
                bag = changed.get(id(node))
                result += [node] if bag is None else self._nodes(bag, made[bag.table])
            if len(result) != len(nodes) or any(id(n) in changed for n in nodes):
                copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in result]
                del nodes[:]
                nodes.extend(copies)

        within(self._light.graph.node)

    def _nodes(self, bag: _Bag, table: Mapping[str, onnx.TensorProto]) -> list[onnx.NodeProto]:
        """A bag over its new table, with casts around it where the type of its rows was another one."""
        node, source = bag.node, self._initializers[bag.table]
        op = spec.VARIANTS[node.op_type]
        inputs = {**dict(zip(op.inputs, node.input, strict=True)), **{key: t.name for key, t in table.items()}}
        attributes = spec.Attributes.from_onnx({a.name: helper.get_attribute_value(a) for a in node.attribute})
        if "codes" in table:
            rows_type = int(TensorProto.FLOAT)
            meaning = quantized_embedding_bag.spec
            new_op: Any = meaning.variant(
                second="bias" if "bias" in table else None, two_d=op.two_d, weighted=op.weighted
            )
            fields = {f.name: getattr(attributes, f.name) for f in dataclasses.fields(attributes)}
            attributes = meaning.Attributes(**fields, codes_type=self._dtype, embedding_dim=source.dims[1])
        else:
            rows_type, new_op = table["weight"].data_type, op
        before, after = [], []
        output = node.output[0]
        if rows_type != source.data_type:
            if op.weighted:
                weights = self._free(f"{output}_weights")
                before.append(helper.make_node("Cast", [inputs["per_sample_weights"]], [weights], to=rows_type))
                inputs["per_sample_weights"] = weights
            output = self._free(f"{output}_pooled")
            after.append(helper.make_node("Cast", [output], [node.output[0]], to=source.data_type))
        new = helper.make_node(
            new_op.name,
            [inputs[i] for i in new_op.inputs],
            [output],
            name=node.name,
            doc_string=node.doc_string or None,
            domain=spec.DOMAIN,
            **attributes.to_onnx(new_op, double=False),  # type: ignore[arg-type]
        )
        new.metadata_props.extend(node.metadata_props)
        return [*before, new, *after]

    def _free(self, name: str) -> str:
        """A name that nothing has, as this one if it is free."""
        found, k = name, 0
        while found in self._taken:
            found, k = f"{name}_{k}", k + 1
        self._taken.add(found)
        return found

    def _result(self, made: Mapping[str, Mapping[str, onnx.TensorProto]], store: _Store | None) -> onnx.ModelProto:
        """The model whole, and checked."""
        model = self._light
        for value in [v for v in model.graph.value_info if v.name in made]:
            model.graph.value_info.remove(value)
        stubs = {t.name: t for t in model.graph.initializer}
        for name, tensors in made.items():
            model.graph.initializer.remove(stubs[name])
            for tensor in tensors.values():
                model.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        convert(model, self._form)
        if self._form == "portable":
            model.ir_version = max(model.ir_version, 8)  # the first one with functions
        del model.graph.initializer[:]
        for tensor in self._proto.graph.initializer:
            for kept in made.get(tensor.name, {"": tensor}).values():
                _copy_into(model.graph.initializer.add(), kept)
        complaint = files.check(model)
        if complaint is not None:
            before = files.check(self._proto)
            whose = "the model, before any change" if before is not None else "the model with its tables quantised"
            raise ValueError(f"{whose}, does not pass onnx.checker: {before or complaint}")
        if store is not None:
            new = {t.name for tensors in made.values() for t in tensors.values()}
            for tensor in files.tensors(model):
                if tensor.data_location == TensorProto.EXTERNAL and tensor.name not in new:
                    assert self._folder is not None
                    _carried(tensor, self._folder, store)
        return model


def _copy_into(target: onnx.TensorProto, source: onnx.TensorProto) -> None:
    """As CopyFrom, which fails for 2 GiB and more of data."""
    for field, value in source.ListFields():
        if field.name == "raw_data":
            target.raw_data = value
        elif isinstance(value, (int, str, bytes)):
            setattr(target, field.name, value)
        elif hasattr(value, "CopyFrom"):
            getattr(target, field.name).CopyFrom(value)
        else:
            getattr(target, field.name).extend(value)


def _dtype(tensor: onnx.TensorProto) -> np.dtype | None:
    return next((dtype for dtype, kind in TABLE_TYPES.items() if kind == tensor.data_type), None)


def _nbytes(tensor: onnx.TensorProto) -> int:
    dtype = _dtype(tensor)
    return math.prod(tensor.dims) * (0 if dtype is None else dtype.itemsize)


def _where(node: onnx.NodeProto) -> str:
    return f"node {node.name or ', '.join(node.output)!r}"


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        yield from (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs)


def _names(model: onnx.ModelProto) -> set[str]:
    """Every name of a value in the graph and in what is inside of it."""
    names: set[str] = set()

    def within(graph: onnx.GraphProto) -> None:
        names.update(v.name for v in (*graph.input, *graph.output, *graph.value_info))
        names.update(t.name for t in graph.initializer)
        for node in graph.node:
            names.update((*node.input, *node.output))
            for inner in _subgraphs(node):
                within(inner)

    within(model.graph)
    return names
