"""The three forms of a model: portable, standard and native."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args

import onnx
from onnx import TensorProto, helper

from lucid_onnx.graph import free_prefixes, node_lists_of, reads, where
from lucid_onnx.ops import OPERATOR_OF, variant
from lucid_onnx.ops.attributes import check_choice
from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.ops.embedding_bag.lowering import BLOCKS, Ragged
from lucid_onnx.ops.emit import Fact, needed
from lucid_onnx.ops.variants import Known

from .axes import separate
from .functions import restore_names
from .origins import data_of, remember_data

Form = Literal["portable", "standard", "native"]


FORMS: tuple[str, ...] = get_args(Form)


def check_form(form: Any) -> None:
    """Raise ValueError if there is no such form."""
    check_choice("form", form, FORMS)


def to_form(model: onnx.ModelProto, form: Form) -> onnx.ModelProto:
    """A copy of ``model`` with every ``ai.lucid`` node in the given form, whatever form it is in now.

    Nodes may be in the graph, in subgraphs (If, Loop, Scan) and in model-local functions, in any number. An
    attribute that a node lacks is written with its default; ``mode`` may also be a string, as onnxscript writes
    it. "portable" adds one function per operator name, "native" takes them away, and "standard" puts standard
    nodes in place of each node and leaves no trace of the domain.

    Functions of ours that a tool has renamed are recognised by what they compute. An axis name that the indices of a
    ragged bag share with another input is replaced, since a runtime would plan memory for equal sizes.

    Raises:
        ValueError: an unknown form, an opset that is not supported, a node that breaks the operator's contract, or in
            the "standard" form a function in the domain that computes something else than an operator.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    convert(copy, form)
    remember_data(copy, data_of(model))
    return copy


def convert(model: onnx.ModelProto, form: str, ragged: Ragged = BLOCKS) -> None:
    """`to_form` in place; standard operators pool bags in the given way.

    Raises:
        ValueError: as `to_form`, and if flat bags are to be padded to no length.
    """
    check_form(form)
    opset = _opset(model)
    restore_names(model)
    for function in [f for f in model.functions if f.domain == spec.DOMAIN and f.name in OPERATOR_OF]:
        model.functions.remove(function)
    others = {f.name for f in model.functions if f.domain == spec.DOMAIN}
    separate(model)
    known = _facts(model)
    # A function's names are its own: what the graph knows of the same ones says nothing of them.
    lists = [(nodes, known) for nodes in node_lists_of(model.graph.node)]
    lists += [(nodes, {}) for function in model.functions for nodes in node_lists_of(function.node)]
    used: dict[str, Any] = {}
    if form == "standard":
        if others:
            raise ValueError(f"{other_function(min(others))}, so that it has no standard form")
        _expand(lists, _names_read(model), opset, free_prefixes(model), ragged)
    else:
        used = _complete(lists, others)
    for imports in (model.opset_import, *(f.opset_import for f in model.functions)):
        _set_import(imports, set(used) | others)
    if form == "portable":
        _add_functions(model, used, opset, ragged)


def other_function(name: str) -> str:
    """How a message tells of a function in our domain that is none of our operators."""
    return (
        f"{spec.DOMAIN}::{name} is a function that computes something else than the operators of this release of "
        "lucid-onnx"
    )


#: Lists of nodes, each with what is known of the values that its nodes may read.
_Lists = Iterable[tuple[Any, "dict[str, Fact]"]]


def _names_read(model: onnx.ModelProto) -> set[str]:
    """The names of values that a node or an output of the model reads."""
    read = {output.name for output in model.graph.output}
    for node in itertools.chain(model.graph.node, *(function.node for function in model.functions)):
        read.update(reads(node))
    return read.union(*(function.output for function in model.functions))


def _expand(lists: _Lists, read: set[str], opset: int, prefixes: Iterator[str], ragged: Ragged) -> None:
    """Put standard nodes in the place of each ``ai.lucid`` node."""
    for nodes, known in lists:
        expanded: list[onnx.NodeProto] = []
        for node in nodes:
            if node.domain != spec.DOMAIN:
                expanded.append(_copy(node))
                continue
            op, attributes = _normalise(node, known)
            write = OPERATOR_OF[op.name].lowering.nodes
            with _named(where(node)):
                written = write(
                    op, tuple(node.input), tuple(node.output), attributes, opset, next(prefixes), ragged, known
                )
            # Of a gradient, not every output may be.
            expanded += needed(written, read.intersection(node.output) or node.output)
        del nodes[:]
        nodes.extend(expanded)


def _complete(lists: _Lists, others: set[str]) -> dict[str, Any]:
    """Write all attributes on each ``ai.lucid`` node, and its name in this model; the operators, by that name.

    Nodes that call ``others`` of the domain stay.
    """
    used: dict[str, Any] = {}
    names_taken: dict[Any, str] = {}
    for nodes, known in lists:
        for node in nodes:
            if node.domain == spec.DOMAIN and node.op_type not in others:
                op = _normalise(node, known)[0].in_model(names_taken)
                node.op_type = op.name
                used[op.name] = op
    return used


def _add_functions(model: onnx.ModelProto, used: dict[str, Any], opset: int, ragged: Ragged) -> None:
    """Add a function for each operator of ``used``, and for those that they call."""
    for op in list(used.values()):
        used |= {called.name: called for called in op.calls}
    # What a function calls comes before it: onnx.reference reads them in order.
    for name in sorted(used, key=lambda n: (bool(used[n].calls), n)):
        with _named(name):
            model.functions.append(OPERATOR_OF[name].lowering.function(used[name], opset, ragged))


def _opset(model: onnx.ModelProto) -> int:
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            spec.check_opset(entry.version, f"the model imports opset {entry.version}, which")
            return int(entry.version)
    raise ValueError("the model imports no standard opset")


def _set_import(imports: Any, used: set[str]) -> None:
    """Import our domain once where a node of it is used, else not at all."""
    for entry in [i for i in imports if i.domain == spec.DOMAIN]:
        imports.remove(entry)
    if used:
        imports.append(helper.make_opsetid(spec.DOMAIN, spec.VERSION))


def _facts(model: onnx.ModelProto) -> dict[str, Fact]:
    """What is known of the values of the graph: element types, and the dimensions that are fixed."""
    known: dict[str, Fact] = {}
    for value in itertools.chain(model.graph.value_info, model.graph.input):
        tensor = value.type.tensor_type
        dims = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
        known[value.name] = Fact(tensor.elem_type, dims if tensor.HasField("shape") else None)
    for held in model.graph.initializer:
        known[held.name] = Fact(held.data_type, tuple(held.dims))
    return known


def _normalise(node: onnx.NodeProto, facts: dict[str, Fact]) -> tuple[Any, dict[str, int | float]]:
    """Check a node against the contract and write all of its attributes on it; returns them, and its operator name."""
    at = where(node)
    if node.op_type not in OPERATOR_OF:
        known = ", ".join(OPERATOR_OF)
        if any(node.op_type.endswith(name) for name in OPERATOR_OF):
            raise ValueError(
                f"{at}: {spec.DOMAIN}::{node.op_type} is not one of {known}; a tool has renamed it, and its function, "
                "which would tell what it is, is not in the model"
            )
        raise ValueError(f"{at}: {spec.DOMAIN}::{node.op_type} is not one of {known}")
    meaning = OPERATOR_OF[node.op_type].spec
    integers = {a.name: a.i for a in node.attribute if a.type == onnx.AttributeProto.INT and not a.ref_attr_name}
    with _named(at):
        op = variant(node.op_type, integers)
        op.check_node_inputs(node.input)
    if len(op.outputs) == 1 and len(node.output) != 1:
        raise ValueError(f"{at}: {op.name} has one output, not {len(node.output)}")
    if len(node.output) != len(op.outputs) or not all(node.output):
        raise ValueError(f"{at}: {op.name} gives {', '.join(op.outputs)}; it was given {list(node.output)}")
    given: dict[str, Any] = {}
    for attribute in node.attribute:
        if attribute.name not in meaning.Attributes.onnx_names(op):
            raise ValueError(f"{at}: {op.name} has no attribute {attribute.name!r}")
        if attribute.ref_attr_name:
            raise ValueError(f"{at}: {attribute.name} refers to an attribute of the function around it")
        with _named(at):
            given[attribute.name] = meaning.Attributes.read(attribute)
    named = dict(zip(op.inputs, node.input, strict=True))
    found = [facts.get(named[bag.table], Fact()) for bag in op.bags]
    element_type = found[0].type
    double = given.get("stash_type") == TensorProto.DOUBLE if not element_type else element_type == TensorProto.DOUBLE
    try:
        attributes = meaning.Attributes.from_onnx(given)
        op.check_node(attributes, [_known_table(fact) for fact in found])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{at}: {error}") from error
    complete = attributes.to_onnx(op, double=double)
    del node.attribute[:]
    node.attribute.extend(helper.make_attribute(name, value) for name, value in complete.items())
    return op, complete


def _known_table(fact: Fact) -> Known:
    rows = fact.dims[0] if fact.dims is not None and len(fact.dims) == 2 else None
    return Known(TensorProto.DataType.Name(fact.type) if fact.type else None, rows)


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    """A ValueError within says where."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy
