"""Put ``ai.lucid`` nodes where a model has bags that somebody wrote out."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx import helper, version_converter
from onnx_ir.external_data import set_base_dir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from lucid_onnx.builder import FORMS, Form, convert
from lucid_onnx.ops.embedding_bag import spec

from . import files, patterns
from .expressions import Expression, Reader, difference, inside, set_attributes
from .merging import Merged, Unmerged, merge
from .segments import segments

#: What an opset before `spec.MIN_OPSET` is raised to.
_RAISED_OPSET = spec.DEFAULT_OPSET
#: What `_Search` may compute anew, as it is written in every opset from 11 on.
_COMPUTED = frozenset(("Cast", "Concat", "CumSum", "Equal", "Expand", "Gather", "Less", "NonZero", "Not", "Reshape"))
_COMPUTED |= {"ScatterElements", "Shape", "Slice", "Sub", "Where"}
_ATEN_DOMAINS = ("org.pytorch.aten", "aten")


@dataclasses.dataclass(frozen=True)
class Fused:
    """A bag that was found: the node that it ended in, how it was written, and what it became.

    ``table_bytes`` is None where the shape of the table is not fixed.
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


@dataclasses.dataclass(frozen=True)
class Unfused:
    """What looks like a bag and was left as it is, and why."""

    where: str
    pattern: str
    reason: str


@dataclasses.dataclass(frozen=True)
class FuseReport:
    """The model, the bags that were put into it, and what looked like one. External data is not loaded.

    ``merged`` and ``unmerged`` are the bags that were to be merged; both are empty if nobody asked.
    """

    model: onnx.ModelProto = dataclasses.field(repr=False)
    fused: tuple[Fused, ...]
    unfused: tuple[Unfused, ...]
    merged: tuple[Merged, ...] = ()
    unmerged: tuple[Unmerged, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """All but the model, for JSON."""
        return {
            "fused": [dataclasses.asdict(f) for f in self.fused],
            "unfused": [dataclasses.asdict(u) for u in self.unfused],
            "merged": [dataclasses.asdict(m) for m in self.merged],
            "unmerged": [dataclasses.asdict(u) for u in self.unmerged],
        }


def fuse(
    model: onnx.ModelProto | str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    form: Form = "portable",
    assume_nonempty: bool = False,
    merge_tables: bool = False,
) -> FuseReport:
    """Find the bags that a model has written out, and put one node in the place of each.

    Found are nn.EmbeddingBag as torch exports it (dynamo or not, optimized or not, and as an ATen node), a Gather
    over indices [B, L] with a reduction over L, a fixed number of bags written out one after another, lookups that
    TensorFlow's segment operators pool, as tf2onnx writes them, and what `lower` makes, of codes too. A graph is
    fused only if it is, node for node and up to what changes no value, what such a bag is written as;
    `lucid_onnx.rewrite.patterns` and `.segments` say where the two differ all the same. Above all, a bag refuses a
    negative index, where ONNX's Gather counts from the end.

    What torch.onnx.export's own optimizer lost before stays lost: by default it drops ``x + 1e-8`` and
    ``x * 1.000009``. `lucid_onnx.torch.export`, and torch with ``optimize=False``, keep them.

    Inputs, outputs and metadata keep their names and order, and tables stay where they are: external data is neither
    loaded nor changed, and is copied only if ``output`` is in another folder. A model whose opset is below 16 is
    raised to 18 where it has a bag. In the body of a model-local function that imports the model's opset a bag is
    found if all calls of it agree in the types that the bag needs to know.

    Args:
        model: a path, or a model; it is not changed.
        output: where to write the result; it appears whole or not at all, and may be the input's path.
        form: the form of all ``ai.lucid`` nodes in the result, as in `lucid_onnx.to_form`. Strict shape inference fails
            where a function of the model has a node in the "native" form, whose type it cannot know.
        assume_nonempty: indices [B, L] under a mean or a maximum have L > 0, though the model does not say so.
        merge_tables: bags of equal attributes whose results a Concat lays beside each other, those that the model had
            before among them, become one ``ai.lucid::EmbeddingBagCollection``; see `lucid_onnx.rewrite.merging`.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: an unknown form, no ONNX model, or one that onnx.checker refuses.
    """
    if form not in FORMS:
        raise ValueError(f"form = {form!r} is not one of 'portable', 'standard', 'native'")
    proto, folder = files.read(model)
    report = _fuse(proto, folder, form, assume_nonempty, merge_tables)
    if output is not None:
        files.write(report.model, output, folder)
    return report


def _fuse(
    proto: onnx.ModelProto, folder: Path | None, form: Form, assume_nonempty: bool, merge_tables: bool
) -> FuseReport:
    model = ir.from_proto(proto)
    if folder is not None:
        set_base_dir(model.graph, folder)
    RemoveUnusedNodesPass()(model)  # exporters leave nodes that nothing uses, and that would keep a Loop alive
    found = _Search(model, _inferred(proto), assume_nonempty=assume_nonempty)
    found.run()
    if found.fused:
        result = _with_opset(ir.to_proto(model))
    elif folder is not None:
        result = proto  # read for this call
    else:
        result = onnx.ModelProto()
        result.CopyFrom(proto)
    lucid = any(i.domain == spec.DOMAIN for i in result.opset_import) or bool(found.fused)
    merged: tuple[Merged, ...] = ()
    unmerged: tuple[Unmerged, ...] = ()
    if lucid and merge_tables:
        convert(result, "native")  # with all attributes written out, and no function of ours
        model = ir.from_proto(result)
        if folder is not None:
            set_base_dir(model.graph, folder)
        merged, unmerged = merge(model)
        if merged:
            result = ir.to_proto(model)
    if lucid:
        convert(result, form)
        if form == "portable":
            result.ir_version = max(result.ir_version, _FUNCTIONS_IR)
        complaint = files.check(result)
        if complaint is not None:
            before = files.check(proto)
            whose = "the model, before any change" if before is not None else "the model with its bags fused"
            raise ValueError(f"{whose}, does not pass onnx.checker: {before or complaint}")
    return FuseReport(result, tuple(reversed(found.fused)), tuple(reversed(found.unfused)), merged, unmerged)


#: The first IR version with model-local functions.
_FUNCTIONS_IR = 8


def _inferred(proto: onnx.ModelProto) -> dict[str, ir.Value]:
    """What shape inference finds for the values of the graph, by name."""
    light = files.without_tables(proto)
    try:
        inferred = onnx.shape_inference.infer_shapes(light)
    except (onnx.shape_inference.InferenceError, RuntimeError):
        inferred = light  # the checker will say what is wrong, if there is something to fuse
    graph = ir.from_proto(inferred).graph
    return {v.name: v for node in graph for v in node.outputs if v.name}


def _with_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with an opset that bags have."""
    opset = _opset({i.domain: i.version for i in model.opset_import})
    if opset >= spec.MIN_OPSET:
        return model
    if model.functions:
        raise ValueError(
            f"the model imports opset {opset} and has functions, which onnx.version_converter drops: a bag needs "
            f"opset {spec.MIN_OPSET}"
        )
    light = files.without_tables(model)
    try:
        converted = version_converter.convert_version(light, _RAISED_OPSET)
    except RuntimeError as error:
        raise ValueError(
            f"the model imports opset {opset}, and onnx.version_converter cannot raise it to {_RAISED_OPSET}: "
            f"{' '.join(str(error).split())}"
        ) from error
    own = {v.name: v for v in model.graph.input}
    del converted.graph.input[:]
    converted.graph.input.extend(model.graph.input)
    converted.graph.initializer.extend(t for t in model.graph.initializer if files.is_table(t))
    assert set(own) == {v.name for v in converted.graph.input}
    converted.ir_version = max(model.ir_version, helper.find_min_ir_version_for(list(converted.opset_import), True))
    return converted


def _opset(imports: Mapping[str, int]) -> int:
    """The version of the standard operators; 0 if they are not imported."""
    return imports.get("", imports.get("ai.onnx", 0))


class _Search:
    """Replaces bags in a model, in place; what it found is listed last first."""

    def __init__(self, model: ir.Model, known: dict[str, ir.Value], *, assume_nonempty: bool) -> None:
        self.fused: list[Fused] = []
        self.unfused: list[Unfused] = []
        self._model = model
        self._reader = Reader(known)
        self._patterns: dict[str, patterns.Pattern] = {
            "torch legacy export": patterns.torch_legacy,
            "torch dynamo export": patterns.torch_dynamo,
            "unrolled bags": patterns.unrolled,
            "tf2onnx segments": segments,
            "standard form": patterns.Standard(_opset(model.graph.opset_imports)),
            "standard form of codes": patterns.QuantizedStandard(_opset(model.graph.opset_imports)),
            "Gather and reduction": patterns.GatherReduce(assume_nonempty=assume_nonempty),
        }
        self._names = _free_names(model)
        self._within: dict[ir.Graph, ir.Graph | None] = {}
        self._told: set[ir.Node] = set()  # parts of what is listed already
        self._inside = ""  # which function is searched

    def run(self) -> None:
        self._reader.read(self._model.graph)
        self._search(self._model.graph, None)
        readers: dict[ir.Graph | ir.Function, Reader] = {self._model.graph: self._reader}
        opset = _opset(self._model.graph.opset_imports)
        for function in _callers_first(self._model):
            arguments = [
                [None if v is None else reader.of[v] for v in node.inputs]
                for caller, reader in readers.items()
                for node in _calls(caller, function)
            ]
            self._reader = readers[function] = _function_reader(function, arguments)
            if arguments and _opset(function.opset_imports) == opset:
                self._inside = f" in function {function.name!r}"
                self._search(function.graph, None)

    def _search(self, graph: ir.Graph, outer: ir.Graph | None) -> None:
        self._within[graph] = outer
        for node in list(reversed(graph)):
            if node.graph is None or not node.outputs:  # gone, with a bag behind it
                continue
            if node.domain in _ATEN_DOMAINS:
                self._aten(node)
            elif node.domain in ("", "ai.onnx"):
                self._try(node)
        for node in reversed(graph):
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.GRAPH:
                    self._search(attribute.as_graph(), graph)

    def _try(self, node: ir.Node) -> None:
        root = self._reader.of[node.outputs[0]]
        if root.value is None or (root.value.producer() is not node and node.op_type not in ("Cast", "CastLike")):
            return  # another name of something that has its turn
        refused: tuple[str, str] | None = None
        for name, pattern in self._patterns.items():
            for bag, written in pattern(root):
                reason = bag.objection() or _parted(root, written) or self._out_of_reach(bag, node)
                if reason is None:
                    self._replace(node, node.outputs[0], bag, name)
                    return
                refused = refused or (name, reason)  # the first guess is the plainest
        if refused is None and (reason := _resembles(root)) is not None:
            refused = ("Loop", reason)
        if refused is not None and node not in self._told:
            self.unfused.append(Unfused(_where(node) + self._inside, *refused))
            inner: Expression | None = root
            while inner is not None:
                if inner.value is not None and (producer := inner.value.producer()) is not None:
                    self._told.add(producer)
                inner = inner.inputs[0] if inner.op in ("Cast", "Div", "ConcatFromSequence") else None

    def _aten(self, node: ir.Node) -> None:
        if _string(node, "operator") not in ("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only"):
            return
        inputs = [None if v is None else self._reader.of[v] for v in node.inputs]
        bag, reason = patterns.aten(node, inputs)
        if bag is not None:
            reason = bag.objection() or self._out_of_reach(bag, node)
        if reason is None and any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
            used = next(v for v in node.outputs[1:] if v.uses() or v.is_graph_output())
            reason = f"its output {used.name!r} is used, and a bag has one output"
        if reason is None and bag is not None:
            self._replace(node, node.outputs[0], bag, "ATen node")
        elif reason is not None:
            self.unfused.append(Unfused(_where(node) + self._inside, "ATen node", reason))

    def _replace(self, node: ir.Node, value: ir.Value, bag: patterns.Bag, pattern: str) -> None:
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        where, name = _where(node) + self._inside, value.name or next(self._names)
        inputs = {i: self._value(e, graph, node) for i, e in bag.inputs.items()}
        a = bag.attributes
        value.name = f"{name}_unfused"
        new = ir.node(bag.op.name, [inputs[i] for i in bag.op.inputs], bag.to_onnx(), domain=spec.DOMAIN)
        nodes = [new]
        if bag.keepdims:
            new.outputs[0].name = next(self._names)
            nodes += self._unsqueezed(new.outputs[0])
        new.name = node.name
        result = nodes[-1].outputs[0]
        result.name, result.type, result.shape, result.doc_string = name, value.type, value.shape, value.doc_string
        result.metadata_props.update(value.metadata_props)
        graph.insert_before(node, nodes)
        value.replace_all_uses_with(result, replace_graph_outputs=True)
        _remove_dead([node])
        self._model.graph.opset_imports.setdefault(spec.DOMAIN, spec.VERSION)
        self.fused.append(
            Fused(
                where,
                pattern,
                bag.op.name,
                a.mode,
                inputs[next(iter(bag.table))].name or "",
                bag.table_shape,
                bag.table_dtype,
                _bytes(bag),
                a.padding_idx,
                a.max_norm,
                a.norm_type,
                a.include_last_offset,
            )
        )

    def _unsqueezed(self, value: ir.Value) -> list[ir.Node]:
        """Nodes that put an axis of one in the place of the bags' rows."""
        if _opset(self._model.graph.opset_imports) < 13:
            return [ir.node("Unsqueeze", [value], {"axes": [1]})]
        axes = ir.node("Constant", [], {"value_ints": [1]})
        axes.outputs[0].name = next(self._names)
        return [axes, ir.node("Unsqueeze", [value, axes.outputs[0]])]

    def _value(self, e: Expression, graph: ir.Graph, before: ir.Node) -> ir.Value:
        """The value of an expression where ``before`` stands; what has none there is computed anew."""
        if e.value is not None and self._is_seen(e.value, graph):
            return e.value
        if e.array is not None:
            node = ir.node("Constant", [], {"value": ir.tensor(e.array)})
        else:
            assert e.op in _COMPUTED  # `_out_of_reach` has looked
            inputs = [None if i is None else self._value(i, graph, before) for i in e.inputs]
            node = ir.node(e.op, inputs, set_attributes(e))
        node.outputs[0].name = next(self._names)
        graph.insert_before(before, node)
        self._reader.of[node.outputs[0]] = e
        if e.value is None:  # a pattern's own, which may read it again
            e.value = node.outputs[0]
        return node.outputs[0]

    def _out_of_reach(self, bag: patterns.Bag, node: ir.Node) -> str | None:
        """Why an input of a bag cannot be had where ``node`` stands, or None."""
        for name, e in bag.inputs.items():
            waiting: list[Expression | None] = [e]
            while waiting:
                inner = waiting.pop()
                if inner is None or inner.array is not None:
                    continue
                if inner.value is not None and self._is_seen(inner.value, node.graph):
                    continue
                if inner.op not in _COMPUTED or (inner.op != "Cast" and inner.value is not None) or inner.output:
                    return f"its {name} are computed inside of a branch, {inner}"
                waiting += inner.inputs
        return None

    def _is_seen(self, value: ir.Value, graph: ir.Graph | ir.Function | None) -> bool:
        owner = value.graph
        while isinstance(graph, ir.Graph) and graph is not owner:
            graph = self._within[graph]
        return graph is not None and graph is owner


def _callers_first(model: ir.Model) -> list[ir.Function]:
    """The functions of others, each behind those that call it."""
    waiting = [f for f in model.functions.values() if f.domain != spec.DOMAIN]
    ordered: list[ir.Function] = []
    while waiting:
        ready = [f for f in waiting if not any(any(_calls(g, f)) for g in waiting if g is not f)]
        if not ready:  # they call each other, which is no model
            return ordered
        ordered += ready
        waiting = [f for f in waiting if f not in ready]
    return ordered


def _calls(graph: ir.Graph | ir.Function, function: ir.Function) -> Iterator[ir.Node]:
    """The nodes that call a function, in a graph and in what is inside of it."""
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


def _parted(root: Expression, written: Expression | str) -> str | None:
    """Why ``root`` is not what a bag would be written as, or None."""
    if isinstance(written, str):
        return written
    parted = difference(root, written)
    return None if parted is None else f"it has {parted[0]} where such a bag has {parted[1]}"


def _resembles(root: Expression) -> str | None:
    """Why a Loop that gathers rows of a table and reduces them is no bag."""
    if root.op != "Loop" or root.output != 0 or root.body is None:
        return None
    for result in root.body.results:
        for e in inside(result, 200):
            if e.op in ("ReduceSum", "ReduceMean", "ReduceMax") and any(
                g.op == "Gather" and g.inputs[0] is not None and g.inputs[0].rank == 2 for g in inside(e, 20)
            ):
                return "a Loop that gathers rows and reduces them, but not in the way of a known exporter"
    return None


def _bytes(bag: patterns.Bag) -> int | None:
    """The bytes of a bag's table; None where its shape is not fixed."""
    total = 0.0
    for part in bag.table.values():
        dims = [d for d in part.dims or () if isinstance(d, int)]
        if part.type is None or part.rank is None or len(dims) != part.rank:
            return None
        total += math.prod(dims) * part.type.itemsize
    return int(total)


def _remove_dead(nodes: list[ir.Node]) -> None:
    """Remove nodes that nothing uses, then what only they used, initializers too."""
    while nodes:
        node = nodes.pop()
        if node.graph is None or any(v.uses() or v.is_graph_output() for v in node.outputs):
            continue
        sources = list(dict.fromkeys(_sources(node)))
        node.graph.remove(node, safe=True)
        _detach(node)
        for value in sources:
            producer = value.producer()
            if producer is not None:
                nodes.append(producer)
            elif value.is_initializer() and not (value.uses() or value.is_graph_input() or value.is_graph_output()):
                assert value.graph is not None
                value.graph.initializers.pop(value.name or "")


def _sources(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, also within its subgraphs."""
    for n in _with_inner(node):
        yield from (v for v in n.inputs if v is not None)


def _with_inner(node: ir.Node) -> Iterator[ir.Node]:
    yield node
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph():
                yield from _with_inner(inner)


def _detach(node: ir.Node) -> None:
    """Take away what a removed node's subgraphs still use of the outside."""
    for inner in _with_inner(node):
        for k in range(len(inner.inputs)):
            inner.replace_input_with(k, None)


def _where(node: ir.Node) -> str:
    name = node.name or next((v.name for v in node.outputs if v.name), "")
    return f"node {name!r} ({node.op_type})"


def _string(node: ir.Node, name: str) -> str | None:
    attribute = node.attributes.get(name)
    return attribute.as_string() if attribute is not None and attribute.type == ir.AttributeType.STRING else None


def _free_names(model: ir.Model) -> Iterator[str]:
    taken = {v.name for node in model.graph.all_nodes() for v in (*node.inputs, *node.outputs) if v is not None}
    taken |= {v.name for v in (*model.graph.inputs, *model.graph.initializers.values())}
    for function in model.functions.values():
        taken |= {v.name for v in function.inputs}
        taken |= {v.name for node in function.all_nodes() for v in node.outputs}
    return (name for k in itertools.count() if (name := f"bag_{k}") not in taken)
