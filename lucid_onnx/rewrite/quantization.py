"""Give the bags of a model smaller tables: 8-bit or 4-bit quantized values with a scale per row, or 16-bit floats.

Works on protobufs throughout, without onnx_ir. `convert` and onnx.checker take nothing else, and a table goes straight
from its file or its TensorProto to that of the new one, with no other copy in memory.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import onnx
from onnx import TensorProto, helper

from lucid_onnx.builder import (
    TABLE_TYPES,
    ExternalData,
    Form,
    Replacing,
    byte_count,
    check_form,
    convert,
    is_external,
    remember_data,
    tensors,
    without_initializers,
)
from lucid_onnx.graph import node_lists_of, subgraphs, where
from lucid_onnx.ops import OPERATOR_OF, quantized_embedding_bag, variant
from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.ops.embedding_bag_collection import spec as collection

from . import files, tables

#: What a table can be turned into: quantized values, and floats of 16 bits.
SmallerDtype = Literal["int8", "uint8", "int4", "uint4", "float16", "bfloat16"]
DTYPES: tuple[str, ...] = get_args(SmallerDtype)


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
    """A table that was skipped, the bags that pool it, and why."""

    table: str
    bags: tuple[str, ...]
    reason: str


@dataclasses.dataclass(frozen=True)
class QuantizeReport:
    """The model, the tables that became smaller, and those that did not.

    External data is not loaded; `InferenceSession` and this package's other functions find it where it is. ``files``
    are all that the result needs, the model first if it was written; copy or remove them together.
    """

    model: onnx.ModelProto = dataclasses.field(repr=False)
    quantized: tuple[Quantized, ...]
    unquantized: tuple[Unquantized, ...]
    files: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """All but the model, for JSON."""
        return {
            "quantized": [dataclasses.asdict(q) for q in self.quantized],
            "unquantized": [dataclasses.asdict(u) for u in self.unquantized],
            "files": list(self.files),
        }


def quantize(
    model: onnx.ModelProto | str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    dtype: SmallerDtype = "int8",
    min_bytes: int = 0,
    form: Form | None = None,
    single_file: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> QuantizeReport:
    """Make the constant tables of a model's ``ai.lucid::EmbeddingBag`` nodes smaller.

    With an integer ``dtype`` the nodes become ``QuantizedEmbeddingBag``, and tables as `QuantizedTable.quantize` makes
    them: "int8" and "int4" symmetric with a scale per row, "uint8" and "uint4" with a scale and a bias per row. They
    are pooled in float32. With "float16" and "bfloat16" the nodes stay and their tables are rounded; per_sample_weights
    and the pooled rows then go through that type, too. Casts keep every other value of the graph in the type it has.

    A table is quantized once, however many bags pool it. It is skipped, with the reason in the report, if something
    else reads it, if it is not an initializer of the main graph or one that a caller may override, if it holds what the
    new type cannot, or if it would not become smaller. Inputs, outputs, metadata and all other nodes stay.

    External tables are read and written in parts, so that they may be larger than memory; ``output`` then has all of
    its external data in ``<output>.data``. The two are written as `save` writes them.

    Args:
        model: a path, or a model; it is not changed. Bags in standard form are not nodes: `fuse` them first.
        output: where to write the result; it may be the input's path if the model has no external data.
        dtype: "int8", "uint8", "int4", "uint4", "float16" or "bfloat16".
        min_bytes: tables with fewer bytes are left.
        form: of all ``ai.lucid`` nodes in the result, as in `lucid_onnx.to_form`; None keeps "portable" or "native".
        single_file: put all external data into ``output``, and into the report's model.
        progress: called with the bytes of tables read and to read.

    Raises:
        OSError: a file cannot be read or written.
        TypeError: ``min_bytes`` is not an integer.
        ValueError: an unknown ``dtype`` or ``form``, a negative ``min_bytes``, not an ONNX model, one without
            ``ai.lucid`` nodes, one that onnx.checker rejects, ``output`` in the place of what has to be read, or a
            single file over 2 GiB.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype = {dtype!r} is not one of {', '.join(DTYPES)}")
    if form is not None:
        check_form(form)
    if isinstance(min_bytes, bool) or not isinstance(min_bytes, int):
        raise TypeError(f"min_bytes = {min_bytes!r} must be an integer")
    if min_bytes < 0:
        raise ValueError(f"min_bytes = {min_bytes} must be >= 0")
    proto, data = files.read(model)
    files.need_data(proto, data)
    external = files.by_location(proto)
    work = _Quantization(proto, data, dtype, min_bytes, form, progress)
    if output is not None and data is not None:
        files.check_not_data(Path(output), proto, data)
    if single_file:
        files.check_single_file(proto, data, output, initializer_bytes=work.least_bytes())
    if output is None or data is None or not external or single_file:
        report = work.run(None)
        result, needed = files.finish(report.model, data, output, single_file=single_file)
        return dataclasses.replace(report, model=result, files=needed)
    return _write(work, Path(output), proto, data)


def _write(work: _Quantization, output: Path, proto: onnx.ModelProto, data: ExternalData) -> QuantizeReport:
    """Write the model and its external data as it is made."""
    if output.is_dir():
        raise IsADirectoryError(f"{output} is a folder")
    beside = output.with_name(output.name + ".data")
    for tensor in files.by_location(proto).values():
        if beside.exists() and beside.samefile(data.source(tensor)):
            raise ValueError(f"{beside} is the external data of the model, and would be removed")
    with Replacing(output) as replacing:
        location, file = replacing.open_data()
        store = tables.Store(file, location)
        report = work.run(store)
        store.finish()
        model, others, text = files.with_text(report.model, data, output)
        for name, content in others.items():
            replacing.open(name).write(content)
        replacing.open_model().write(model.SerializeToString())
    remember_data(model, ExternalData(output))
    needed = (output, *(output.with_name(name) for name in files.by_location(model)))
    return dataclasses.replace(report, model=model, files=(*map(os.fspath, needed), *text))


# ---- Finding the bags.


class _Bag(NamedTuple):
    """A node, and the name of its table; or why that cannot be quantized."""

    node: onnx.NodeProto
    table: str
    reason: str | None


class _Survey:
    """Finds the bags of a model, and what else reads its initializers.

    Attributes:
        bags: in the order of the graph.
        readers: for an initializer that something else than a bag uses, who that is.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.bags: list[_Bag] = []
        self.readers: dict[str, str] = {}
        scope = {t.name: "" for t in model.graph.initializer}
        for value in model.graph.output:
            if value.name in scope:
                self.readers[value.name] = "it is an output of the model"
        scope.update((v.name, "it is an input of the model") for v in model.graph.input)
        self._visit(model.graph.node, scope)
        for function in model.functions:
            self._visit(function.node, dict.fromkeys(function.input, "it is an argument of a function"))

    def _visit(self, nodes: Sequence[onnx.NodeProto], outer: Mapping[str, str]) -> None:
        """Nodes in their order, and those of a subgraph with the names that it sees from outside.

        Args:
            outer: for every name that is known here, why it is not a constant table; "" for those that are.
        """
        scope = dict(outer)
        for node in nodes:
            meaning = OPERATOR_OF[node.op_type].spec if node.domain == spec.DOMAIN else None
            self._read(node, scope, is_bag=meaning is spec)
            if node.domain == spec.DOMAIN and node.op_type in collection.VARIANTS:
                op = variant(node.op_type, _attributes(node))
                reason = "a collection pools it, and those do not support quantized tables: quantize before merging"
                self.bags += [_Bag(node, name, reason) for name in node.input[: op.num_tables]]
            elif meaning is quantized_embedding_bag.spec:
                kind = quantized_embedding_bag.spec.Attributes.from_onnx(_attributes(node)).codes_type
                self.bags.append(_Bag(node, node.input[0], f"it is quantized already, {kind}"))
            for inner in subgraphs(node):
                within = {**scope, **{v.name: "it is an input of a subgraph" for v in inner.input}}
                within.update((t.name, "it is an initializer of a subgraph") for t in inner.initializer)
                self._visit(inner.node, within)
            made = "a Constant node" if node.op_type == "Constant" else f"{where(node)} ({node.op_type})"
            scope.update(dict.fromkeys(node.output, f"it is made by {made}, and is not an initializer"))

    def _read(self, node: onnx.NodeProto, scope: Mapping[str, str], *, is_bag: bool) -> None:
        for k, name in enumerate(node.input):
            if is_bag and k == 0:
                reason = scope.get(name, "it is not known where it comes from")
                self.bags.append(_Bag(node, name, reason or None))
            elif scope.get(name) == "":
                self.readers.setdefault(name, f"{where(node)} ({node.op_type}) reads it as well")


# ---- Changing the model.

#: The initializers that a table became, by the names of the operator's inputs.
_NewTable = Mapping[str, onnx.TensorProto]


class _Quantization:
    """One model, with its tables left out, and the original, whose tables are only read."""

    def __init__(
        self,
        proto: onnx.ModelProto,
        data: ExternalData | None,
        dtype: str,
        min_bytes: int,
        form: Form | None,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._data, self._dtype, self._min_bytes, self._progress = data, dtype, min_bytes, progress
        self._proto = proto
        self._initializers = {t.name: t for t in proto.graph.initializer}
        self._form = form or ("portable" if any(f.domain == spec.DOMAIN for f in proto.functions) else "native")
        self._light = without_initializers(proto)
        for tensor in proto.graph.initializer:  # types and shapes are all that `convert` looks at
            self._light.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        convert(self._light, "native")
        survey = _Survey(self._light)
        self._bags, self._readers = survey.bags, survey.readers
        self._taken = _names(self._light)
        if not self._bags:
            raise ValueError(f"the model has no {spec.DOMAIN} nodes: `fuse` finds bags that are written out")

    def _candidates(self) -> tuple[dict[str, list[_Bag]], dict[str, str | None]]:
        """By table: its bags, and why it has to stay as it is, as far as can be said without reading it."""
        bags_of: dict[str, list[_Bag]] = {}
        for bag in self._bags:
            bags_of.setdefault(bag.table, []).append(bag)
        return bags_of, {name: self._why_skipped(name, bags) for name, bags in bags_of.items()}

    def least_bytes(self) -> int:
        """What the initializers will have, if all tables hold what the new type can."""
        _, reasons = self._candidates()
        smaller = {name for name, reason in reasons.items() if reason is None}
        return sum(
            self._bytes_after(*tensor.dims) if name in smaller else byte_count(tensor)
            for name, tensor in self._initializers.items()
        )

    def run(self, store: tables.Store | None) -> QuantizeReport:
        """Quantize what can be, into ``store`` what was external, into memory what was not."""
        bags_of, reasons = self._candidates()
        tick = _Progress(self._progress, sum(_nbytes(self._initializers[n]) for n, r in reasons.items() if r is None))
        quantized: list[Quantized] = []
        unquantized: list[Unquantized] = []
        made: dict[str, _NewTable] = {}
        for name, bags in bags_of.items():
            names = tuple(where(bag.node) for bag in bags)
            reason = reasons[name]
            if reason is None:
                done, end = tick.done, 0 if store is None else store.end
                try:
                    found, made[name] = self._table(name, names, store, tick)
                    quantized.append(found)
                except tables.Unfit as unfit:
                    reason = str(unfit)
                    if store is not None:
                        store.end = end
                    tick(done + _nbytes(self._initializers[name]) - tick.done)
            if reason is not None:
                unquantized.append(Unquantized(name, names, reason))
        self._rewrite(made)
        return QuantizeReport(self._result(made, store), tuple(quantized), tuple(unquantized))

    def _why_skipped(self, name: str, bags: Sequence[_Bag]) -> str | None:
        """Why a table has to stay as it is, as far as can be said without reading it; None if it need not."""
        if (reason := next((b.reason for b in bags if b.reason is not None), None)) is not None:
            return reason
        if name in self._readers:
            return self._readers[name]
        tensor = self._initializers[name]
        dtype = _dtype(tensor)
        if dtype not in TABLE_TYPES:
            return f"it is {TensorProto.DataType.Name(tensor.data_type).lower()}, not a table of floats"
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
        if self._dtype in tables.HALVES:
            return num_rows * dim * 2
        kind = quantized_embedding_bag.spec.CODES_TYPES[self._dtype]
        return num_rows * (kind.stored_columns(dim) + (4 if kind.lowest < 0 else 8))

    def _table(
        self, name: str, bags: tuple[str, ...], store: tables.Store | None, tick: Callable[[int], None]
    ) -> tuple[Quantized, _NewTable]:
        """A table in its new type.

        Raises:
            tables.Unfit: it holds what the new type cannot.
        """
        tensor = self._initializers[name]
        target = store if is_external(tensor) else None
        with tables.opened(tensor, self._data) as rows:
            columns = self._columns(name, rows.shape, target)
            errors = tables.write_smaller(tables.Smaller(rows, self._dtype, tick), columns)
        found = Quantized(
            table=name,
            shape=rows.shape,
            bags=bags,
            dtype_before=str(rows.dtype),
            dtype=self._dtype,
            bytes_before=rows.nbytes,
            bytes_after=sum(c.nbytes for c in columns.values()),
            largest_row_error=errors.largest,
            worst_row=errors.worst,
            mean_row_error=errors.mean,
            largest_difference=errors.difference,
        )
        return found, {key: column.tensor() for key, column in columns.items()}

    def _columns(self, name: str, shape: tuple[int, int], target: tables.Store | None) -> dict[str, tables.Column]:
        """The initializers that a table becomes, to be written, by the names of the operator's inputs."""
        if self._dtype in tables.HALVES:
            free = self._free(f"{name}_{self._dtype}")
            return {"weight": tables.Column(free, tables.HALVES[self._dtype], shape, target)}
        num_rows, dim = shape
        kind = quantized_embedding_bag.spec.CODES_TYPES[self._dtype]
        stored = (num_rows, kind.stored_columns(dim))
        columns = {"codes": tables.Column(self._free(f"{name}_codes"), kind.stored, stored, target)}
        for number in ("scale", "bias")[: 1 if kind.lowest < 0 else 2]:
            free = self._free(f"{name}_{number}")
            columns[number] = tables.Column(free, np.dtype(np.float32), (num_rows,), target)
        return columns

    def _rewrite(self, made: Mapping[str, _NewTable]) -> None:
        """Let the nodes read the new tables."""
        changed = {id(bag.node): bag for bag in self._bags if bag.table in made}
        for nodes in node_lists_of(self._light.graph.node):
            if not any(id(node) in changed for node in nodes):
                continue
            written: list[onnx.NodeProto] = []
            for node in nodes:
                bag = changed.get(id(node))
                written += [node] if bag is None else self._nodes(bag, made[bag.table])
            copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in written]
            del nodes[:]
            nodes.extend(copies)

    def _nodes(self, bag: _Bag, table: _NewTable) -> list[onnx.NodeProto]:
        """A bag over its new table, with casts around it where the type of its rows was another one."""
        node, source = bag.node, self._initializers[bag.table]
        op = spec.VARIANTS[node.op_type]
        new_op, attributes = self._operator(node, table, source.dims[1])
        rows_type = int(TensorProto.FLOAT) if "codes" in table else table["weight"].data_type
        inputs = {**dict(zip(op.inputs, node.input, strict=True)), **{key: t.name for key, t in table.items()}}
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
            **attributes,  # type: ignore[arg-type]
        )
        new.metadata_props.extend(node.metadata_props)
        return [*before, new, *after]

    def _operator(self, node: onnx.NodeProto, table: _NewTable, dim: int) -> tuple[Any, dict[str, int | float]]:
        """The operator's name with its inputs, and the node's attributes, over a new table of ``dim`` columns."""
        op = spec.VARIANTS[node.op_type]
        attributes = spec.Attributes.from_onnx(_attributes(node))
        if "codes" not in table:
            return op, attributes.to_onnx(op, double=False)
        meaning = quantized_embedding_bag.spec
        second = "bias" if "bias" in table else None
        new_op = meaning.variant(second=second, two_d=op.two_d, weighted=op.weighted)
        fields = {f.name: getattr(attributes, f.name) for f in dataclasses.fields(attributes)}
        return new_op, meaning.Attributes(**fields, codes_type=self._dtype, embedding_dim=dim).to_onnx(new_op)

    def _free(self, name: str) -> str:
        """A name that nothing has, as this one if it is free."""
        found, k = name, 0
        while found in self._taken:
            found, k = f"{name}_{k}", k + 1
        self._taken.add(found)
        return found

    def _result(self, made: Mapping[str, _NewTable], store: tables.Store | None) -> onnx.ModelProto:
        """The model whole, and checked."""
        model = self._light
        self._replace_stubs(model, made)
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
            whose = "the model, before any change" if before is not None else "the model with its tables quantized"
            raise ValueError(f"{whose}, does not pass onnx.checker: {before or complaint}")
        if store is not None:
            new = {t.name for table in made.values() for t in table.values()}
            for tensor in tensors(model):
                if is_external(tensor) and tensor.name not in new:
                    assert self._data is not None
                    tables.copy_external(tensor, self._data, store)
        return model

    def _replace_stubs(self, model: onnx.ModelProto, made: Mapping[str, _NewTable]) -> None:
        """Put types and shapes of the new tables in the place of those of the old ones."""
        for value in [v for v in model.graph.value_info if v.name in made]:
            model.graph.value_info.remove(value)
        stubs = {t.name: t for t in model.graph.initializer}
        for name, table in made.items():
            model.graph.initializer.remove(stubs[name])
            for tensor in table.values():
                model.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)


class _Progress:
    """Counts the bytes of tables that are done, and reports them."""

    def __init__(self, report: Callable[[int, int], None] | None, total: int) -> None:
        self.done = 0
        self._report, self._total = report, total

    def __call__(self, count: int) -> None:
        self.done += count
        if self._report is not None:
            self._report(self.done, self._total)


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


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _dtype(tensor: onnx.TensorProto) -> np.dtype | None:
    return next((dtype for dtype, kind in TABLE_TYPES.items() if kind == tensor.data_type), None)


def _nbytes(tensor: onnx.TensorProto) -> int:
    dtype = _dtype(tensor)
    return math.prod(tensor.dims) * (0 if dtype is None else dtype.itemsize)


def _names(model: onnx.ModelProto) -> set[str]:
    """Every name of a value in the graph and its subgraphs."""
    lists = list(node_lists_of(model.graph.node))
    graphs = [model.graph, *(g for nodes in lists for node in nodes for g in subgraphs(node))]
    names = {name for nodes in lists for node in nodes for name in (*node.input, *node.output)}
    names.update(v.name for g in graphs for v in (*g.input, *g.output, *g.value_info, *g.initializer))
    return names
