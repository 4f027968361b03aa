"""Find the bags that are written out in a model, and put an ``ai.lucid`` node in the place of each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from lucid_onnx.builder import other_function
from lucid_onnx.ops import OPERATOR_OF
from lucid_onnx.ops.embedding_bag import spec

from . import nodes, patterns
from .expressions import Expression, constant, difference, from_array, subexpressions
from .normal_form import as_opset, make, set_attributes
from .reader import Known, Reader

#: What `Search` may compute anew, as it is written in every opset from 11 on.
_COMPUTED = frozenset(("Cast", "Concat", "CumSum", "Equal", "Expand", "Gather", "Less", "NonZero", "Not", "Reshape"))
_COMPUTED |= {"ScatterElements", "Shape", "Slice", "Sub", "Where", "Squeeze", "Transpose", "Unsqueeze", "Flatten"}
#: What masks and weights are made of, and what stands around a bag.
_COMPUTED |= {"Abs", "Add", "And", "Clip", "ConstantOfShape", "Div", "Erf", "Exp", "Floor", "Greater", "GreaterOrEqual"}
_COMPUTED |= {"LessOrEqual", "Log", "Max", "Min", "Mod", "Mul", "Neg", "Or", "Pow", "Reciprocal", "ReduceMax", "Relu"}
_COMPUTED |= {"ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "Sigmoid", "Sign", "Sqrt", "Tanh", "Tile", "Xor"}
_COMPUTED |= {"Ceil", "IsInf", "IsNaN", "LeakyRelu", "Round", "Softplus"}
#: The first opset whose Shape gives one axis alone; its Reshape keeps zeros on demand.
_SHAPE_OF_AN_AXIS = 15
#: Constants of more elements are initializers.
_FEW = 256
_ATEN_DOMAINS = ("org.pytorch.aten", "aten")
_ATEN_OPERATORS = ("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only")


@dataclasses.dataclass(frozen=True)
class Fused:
    """A bag that was found: the node that it ended in, how it was written, and what it became.

    ``table_bytes`` is None where the shape of the table is not fixed. ``table_from`` is the operator that computes the
    table, None where it is an initializer or an input: a runtime that does not fold it computes the table in every run.
    ``attributes`` has all that a caller gives to the operator, by name; ``changed`` is those that are not the default.
    """

    where: str
    pattern: str
    op: str
    mode: str
    table: str
    table_shape: tuple[int | str | None, ...]
    table_dtype: str
    table_bytes: int | None
    padding_idx: int | None
    max_norm: float | None
    norm_type: float
    include_last_offset: bool
    table_from: str | None = None
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    changed: str = ""


@dataclasses.dataclass(frozen=True)
class Unfused:
    """What looks like a bag and was left as it is, and why."""

    where: str
    pattern: str
    reason: str


class Search:
    """Replaces bags in a model, in place.

    Args:
        known: what shape inference found for the values of the graph, by name.
        assume_nonempty: as of `patterns.GatherReduce`.

    Attributes:
        fused, unfused: what was found, the last node first.
    """

    def __init__(self, model: ir.Model, known: Known, *, assume_nonempty: bool = False) -> None:
        self.fused: list[Fused] = []
        self.unfused: list[Unfused] = []
        self._model = model
        self._opset = nodes.opset(model.graph.opset_imports)
        self._reader = Reader(known)
        self._patterns: dict[str, patterns.Pattern] = {
            "torch legacy export": patterns.torch_legacy,
            "torch dynamo export": patterns.torch_dynamo,
            "unrolled bags": patterns.unrolled,
            "tf2onnx segments": patterns.segments,
            "standard form": patterns.Lowered(self._opset),
            "quantized standard form": patterns.QuantizedLowered(self._opset),
            "Gather and reduction": patterns.GatherReduce(
                assume_nonempty=assume_nonempty, keep_empty=self._opset >= _SHAPE_OF_AN_AXIS
            ),
        }
        self._names = nodes.free_names(model, "bag")
        self._outer: dict[ir.Graph, ir.Graph | None] = {}  # the graph around each graph
        self._reported: set[ir.Node] = set()  # parts of what ``unfused`` lists already
        self._place = ""  # which function is searched, as reports say it

    def run(self) -> None:
        """Search the graph, then the bodies of functions."""
        self._reader.read(self._model.graph)
        self._search(self._model.graph, None)
        readers: dict[ir.Graph | ir.Function, Reader] = {self._model.graph: self._reader}
        for function in _callers_first(self._model):
            arguments = [
                [None if v is None else reader.of[v] for v in node.inputs]
                for caller, reader in readers.items()
                for node in _calls(caller, function)
            ]
            self._reader = readers[function] = _function_reader(function, arguments)
            if arguments and nodes.opset(function.opset_imports) == self._opset:
                self._place = f" in function {function.name!r}"
                self._search(function.graph, None)

    def _search(self, graph: ir.Graph, outer: ir.Graph | None) -> None:
        """The nodes of a graph from the last one on, then those of its subgraphs."""
        self._outer[graph] = outer
        for node in list(reversed(graph)):
            if node.graph is None or not node.outputs:  # removed with a bag behind it
                continue
            if node.domain in _ATEN_DOMAINS:
                self._try_aten(node)
            elif node.domain == spec.DOMAIN and node.op_type not in OPERATOR_OF:
                self._reject(node, "function", other_function(node.op_type))
            elif nodes.is_standard(node):
                self._try_patterns(node)
        self._forget_rows(graph)
        # No RecursiveGraphIterator: subgraphs come behind the nodes around them, which may have been removed.
        for node in reversed(graph):
            for inner in nodes.subgraphs(node):
                self._search(inner, graph)

    def _forget_rows(self, graph: ir.Graph) -> None:
        """Take the shape of rows from their indices, where nothing else of the rows is read any more."""
        for node in list(graph) if self.fused else ():
            rows = node.inputs[0] if nodes.is_standard(node) and node.op_type == "Shape" and node.inputs else None
            if rows is None or rows.is_graph_output() or any(user.op_type != "Shape" for user, _ in rows.uses()):
                continue
            shape, gathered = self._reader.of[node.outputs[0]], self._reader.of[rows]
            sizes = _sizes_of_rows(gathered)
            if sizes is None or gathered.rank is None:
                continue
            if shape.array is not None:
                sizes = from_array(shape.array)
            elif shape.attributes:
                places = range(gathered.rank)[slice(shape.attributes.get("start"), shape.attributes.get("end"))]
                sizes = make("Gather", sizes, list(places))
            name, last = node.outputs[0].name or next(self._names), self._value(sizes, graph, node).producer()
            assert last is not None
            nodes.replace(node, [last], name, f"{name}_unfused")
            _remove_unused([node])

    def _try_patterns(self, node: ir.Node) -> None:
        root = self._reader.of[node.outputs[0]]
        if root.value is None or (root.value.producer() is not node and node.op_type not in ("Cast", "CastLike", "If")):
            return  # another name of a value whose own node is tried; of an If, that is inside of a branch
        rejected: tuple[str, str] | None = None
        for name, pattern in self._patterns.items():
            for guess, written in pattern(root):
                if guess is None:
                    rejected = rejected or (name, str(written))
                    continue
                bag = patterns.over_codes(guess)
                reason = bag.why_invalid() or _mismatch(root, written) or self._why_out_of_reach(bag, node)
                if reason is None:
                    self._replace(node, bag, name)
                    return
                rejected = rejected or (name, reason)  # the first guess is the plainest
        if rejected is None and (reason := _why_unknown_loop(root)) is not None:
            rejected = ("Loop", reason)
        if rejected is not None and node not in self._reported:
            self._reject(node, *rejected)
            self._reported.update(_inner_producers(root), nodes.with_inner(node))

    def _try_aten(self, node: ir.Node) -> None:
        operator = node.attributes.get("operator")
        if operator is None or operator.type != ir.AttributeType.STRING or operator.value not in _ATEN_OPERATORS:
            return
        bag = patterns.aten(node, [None if v is None else self._reader.of[v] for v in node.inputs])
        used = next((v for v in node.outputs[1:] if v.uses() or v.is_graph_output()), None)
        if isinstance(bag, str):
            self._reject(node, "ATen node", bag)
        elif (reason := bag.why_invalid() or self._why_out_of_reach(bag, node)) is not None:
            self._reject(node, "ATen node", reason)
        elif used is not None:
            self._reject(node, "ATen node", f"its output {used.name!r} is used, and a bag has one output")
        else:
            self._replace(node, bag, "ATen node")

    def _reject(self, node: ir.Node, pattern: str, reason: str) -> None:
        self.unfused.append(Unfused(nodes.where(node) + self._place, pattern, reason))

    def _replace(self, node: ir.Node, bag: patterns.Bag, pattern: str) -> None:
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        where, name = nodes.where(node) + self._place, node.outputs[0].name or next(self._names)
        inputs = {i: self._value(e, graph, node) for i, e in bag.inputs.items()}
        new = ir.node(bag.op.name, [inputs[i] for i in bag.op.inputs], bag.to_onnx(), domain=spec.DOMAIN)
        new.name = node.name
        last = new
        if bag.result is not None:
            new.outputs[0].name = next(self._names)
            graph.insert_before(node, new)
            result = self._value(bag.result(_pooled(bag, new.outputs[0])), graph, node).producer()
            assert result is not None
            last = result
        nodes.replace(node, [last], name, f"{name}_unfused")
        _remove_unused([node])
        self._model.graph.opset_imports.setdefault(spec.DOMAIN, spec.VERSION)
        a = bag.attributes
        self.fused.append(
            Fused(
                where=where,
                pattern=pattern,
                op=bag.op.name,
                table=inputs[next(iter(bag.table))].name or "",
                table_shape=bag.table_shape,
                table_dtype=bag.table_dtype,
                table_bytes=_table_bytes(bag),
                mode=a.mode,
                padding_idx=a.padding_idx,
                max_norm=a.max_norm,
                norm_type=a.norm_type,
                include_last_offset=a.include_last_offset,
                table_from=None if (made := inputs[next(iter(bag.table))].producer()) is None else made.op_type,
                attributes=a.keywords,
                changed=a.changed,
            )
        )

    def _value(self, e: Expression, graph: ir.Graph, before: ir.Node) -> ir.Value:
        """The value of an expression where ``before`` stands; computed anew where there is none."""
        if e.value is not None and self._is_visible(e.value, graph):
            return e.value
        if e.array is not None and e.array.size > _FEW and not self._place:  # a table, and not in a function
            tensor = ir.tensor(e.array, name=next(self._names))
            e.value = ir.Value(
                name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self._model.graph.register_initializer(e.value)
            return e.value
        if e.array is not None:
            node = ir.node("Constant", [], {"value": ir.tensor(e.array)})
        else:
            assert e.op in _COMPUTED  # see `_why_out_of_reach`
            operands, attributes = as_opset(e.op, e.inputs, set_attributes(e), self._opset)
            inputs = [None if i is None else self._value(i, graph, before) for i in operands]
            node = ir.node(e.op, inputs, {name: _written(value) for name, value in attributes.items()})
        node.outputs[0].name = next(self._names)
        graph.insert_before(before, node)
        self._reader.of[node.outputs[0]] = e
        if e.value is None:  # a pattern's own, which may read it again
            e.value = node.outputs[0]
        return node.outputs[0]

    def _why_out_of_reach(self, bag: patterns.Bag, node: ir.Node) -> str | None:
        """Why an input of a bag cannot be read or computed where ``node`` stands, or None."""
        needed = dict(bag.inputs)
        pooled = _pooled(bag, None)
        if bag.result is not None:
            needed["numbers around it"] = bag.result(pooled)
        for name, e in needed.items():
            waiting: list[Expression | None] = [e]
            while waiting:
                inner = waiting.pop()
                if inner is None or inner is pooled or inner.array is not None:
                    continue
                if inner.value is not None and self._is_visible(inner.value, node.graph):
                    continue
                if inner.op not in _COMPUTED or (inner.op != "Cast" and inner.value is not None) or inner.output:
                    return f"its {name} are computed inside of a branch, {inner}"
                waiting += inner.inputs
        return None

    def _is_visible(self, value: ir.Value, graph: ir.Graph | ir.Function | None) -> bool:
        """Whether a value is one of a graph or of those around it."""
        owner = value.graph
        while isinstance(graph, ir.Graph) and graph is not owner:
            graph = self._outer[graph]
        return graph is not None and graph is owner


# ---- Functions.


def _callers_first(model: ir.Model) -> list[ir.Function]:
    """The functions of other domains, each behind those that call it."""
    waiting = [f for f in model.functions.values() if f.domain != spec.DOMAIN]
    ordered: list[ir.Function] = []
    while waiting:
        ready = [f for f in waiting if not any(any(_calls(g, f)) for g in waiting if g is not f)]
        if not ready:  # they call each other, which is not valid ONNX
            return ordered
        ordered += ready
        waiting = [f for f in waiting if f not in ready]
    return ordered


def _calls(graph: ir.Graph | ir.Function, function: ir.Function) -> Iterator[ir.Node]:
    """The nodes that call a function, in a graph and its subgraphs."""
    for node in ir.traversal.RecursiveGraphIterator(graph):
        if (node.domain, node.op_type) == (function.domain, function.name):
            yield node


def _function_reader(function: ir.Function, arguments: Sequence[Sequence[Expression | None]]) -> Reader:
    """The expressions of a function's values. Of its inputs is known what all calls agree in."""
    reader = Reader()
    for k, value in enumerate(function.inputs):
        given = [a[k] if k < len(a) else None for a in arguments]
        types = {None if e is None else e.type for e in given}
        ranks = {None if e is None else e.rank for e in given}
        dims: tuple[Any, ...] | None = None
        if len(ranks) == 1 and None not in ranks:
            columns = zip(*(e.dims for e in given if e is not None and e.dims is not None), strict=True)
            # A name is another size in another call.
            dims = tuple(c[0] if isinstance(c[0], int) and len(set(c)) == 1 else None for c in columns)
        dtype = types.pop() if len(types) == 1 else None
        reader.of[value] = Expression("Value", dtype=dtype, shape=dims, value=value)
    reader.read(function)
    return reader


# ---- Expressions.


def _mismatch(root: Expression, written: Expression | str) -> str | None:
    """Why ``root`` is not what a bag would be written as, or None."""
    if isinstance(written, str):
        return written
    found = difference(root, written)
    return None if found is None else f"it has {found[0]} where such a bag has {found[1]}"


def _sizes_of_rows(gathered: Expression) -> Expression | None:
    """The shape of ``Gather(table, indices)``, from both; None for everything else."""
    table, indices = gathered.inputs if gathered.op == "Gather" and len(gathered.inputs) == 2 else (None, None)
    if table is None or indices is None or table.rank != 2 or gathered.attributes["axis"] != 0:
        return None
    width = None if table.dims is None else table.dims[1]
    columns = constant([width]) if isinstance(width, int) else make("Gather", make("Shape", table), [1])
    return make("Concat", make("Shape", indices), columns, axis=0)


def _pooled(bag: patterns.Bag, value: ir.Value | None) -> Expression:
    """A bag's result, [B, D]."""
    return Expression("Value", dtype=bag.weight.type, shape=(None, *bag.table_shape[1:]), value=value)


#: What may stand between a Gather of rows and their reduction in a Loop of a known exporter.
_PASSES = frozenset(("Cast", "Gather", "Identity", "If", "Mul", "Reshape", "Slice", "Squeeze", "Unsqueeze"))


def _why_unknown_loop(root: Expression) -> str | None:
    """Why a Loop that gathers rows of a table and reduces them is no bag; None for another one."""
    if root.op != "Loop" or root.body is None:
        return None
    for result in root.body.results:
        for e in subexpressions(result, 200):
            path = _path_to_rows(e) if e.op.startswith("Reduce") else None
            if path is None:
                continue
            table = path[-1].inputs[0]
            value = None if table is None else table.value
            pools = f"a Loop that pools rows of {table if value is None else repr(value.name)}"
            if e.op not in patterns.REDUCTION_MODES:
                return f"{pools} by {e}, and a bag pools by sum, mean or max"
            changed = next((p for p in path[1:] if p.op not in _PASSES), None)
            if changed is not None:
                return f"{pools}, but {changed} changes them between the Gather and the {e.op}"
            return f"{pools} by {e}, but not in the way of a known exporter"
    return None


def _path_to_rows(reduction: Expression) -> list[Expression] | None:
    """The expressions from a reduction to the nearest Gather of rows [.., D] of a table that it is computed from."""
    before: dict[int, Expression | None] = {id(reduction): None}
    waiting = [reduction]
    for e in waiting:  # grows while it is walked
        table = e.inputs[0] if e.op == "Gather" else None
        if table is not None and table.rank == 2 and e.attributes.get("axis") == 0:
            path: list[Expression] = []
            step: Expression | None = e
            while step is not None:
                path.insert(0, step)
                step = before[id(step)]
            return path
        if len(waiting) > _LONGEST_PATH:
            return None
        for inner in e.inputs:
            if inner is not None and id(inner) not in before:
                before[id(inner)] = e
                waiting.append(inner)
    return None


_LONGEST_PATH = 200


def _inner_producers(root: Expression) -> Iterator[ir.Node]:
    """The nodes of an expression that a pattern may begin at as well."""
    inner: Expression | None = root
    while inner is not None:
        if inner.value is not None and (producer := inner.value.producer()) is not None:
            yield producer
        inner = inner.inputs[0] if inner.op in ("Cast", "Div", "ConcatFromSequence") else None


def _table_bytes(bag: patterns.Bag) -> int | None:
    """The bytes of a bag's table; None where its shape is not fixed."""
    total = 0.0
    for part in bag.table.values():
        dims = [d for d in part.dims or () if isinstance(d, int)]
        if part.type is None or part.rank is None or len(dims) != part.rank:
            return None
        total += math.prod(dims) * part.type.itemsize
    return int(total)


def _written(value: Any) -> Any:
    """An attribute's value as a node takes it. Of a tensor, an expression has the type, the shape and the bytes."""
    if isinstance(value, tuple) and len(value) == 3 and isinstance(value[0], ir.DataType):
        dtype, shape, data = value
        return ir.tensor(np.frombuffer(data, dtype.numpy()).reshape(shape))
    return value


# ---- Removing nodes.


def _remove_unused(waiting: list[ir.Node]) -> None:
    """Remove nodes that nothing uses, then what only they used, initializers too."""
    while waiting:
        node = waiting.pop()
        if node.graph is None or any(v.uses() or v.is_graph_output() for v in node.outputs):
            continue
        sources = list(dict.fromkeys(v for n in nodes.with_inner(node) for v in n.inputs if v is not None))
        node.graph.remove(node, safe=True)
        for inner in nodes.with_inner(node):  # so that its subgraphs use nothing from outside any more
            for k in range(len(inner.inputs)):
                inner.replace_input_with(k, None)
        for value in sources:
            producer = value.producer()
            if producer is not None:
                waiting.append(producer)
            elif value.is_initializer() and not (value.uses() or value.is_graph_input() or value.is_graph_output()):
                assert value.graph is not None
                value.graph.initializers.pop(value.name or "")
