"""EmbeddingBagCollection as T EmbeddingBag nodes and a Concat, or as what those are in standard ONNX."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx
from onnx import helper

from ..embedding_bag import lowering
from ..embedding_bag import spec as embedding_bag
from ..emit import Emitter, Facts
from . import spec

#: Writes the bags of one table into an Emitter: which table, the names of its inputs, and of the result.
_Bag = Callable[[int, Sequence[str], str], None]


def function(op: spec.Variant, opset: int, choice: Any = None) -> onnx.FunctionProto:
    """The operator as a model-local function for one combination of inputs, generic in its attributes and dtypes.

    Its nodes are EmbeddingBag's, whose function the model must have too (`Variant.calls`), in the way of ``choice``.
    """
    e = Emitter(opset)

    def bag(t: int, inputs: Sequence[str], output: str) -> None:
        node = helper.make_node(op.bag.name, inputs, [output], domain=spec.DOMAIN)
        for attribute in embedding_bag.Attributes.table():
            if not attribute.applies(op.bag):
                continue
            if attribute.name == "include_last_offset" and op.layout == "packed":
                node.attribute.append(helper.make_attribute(attribute.name, 1))
                continue
            for name in attribute.onnx_names:
                kind: Any = attribute.kind.type
                node.attribute.append(onnx.AttributeProto(name=name, ref_attr_name=name, type=kind))
        e.nodes.append(node)

    expand(e, op, op.inputs, bag, *op.outputs)
    body = e.function(spec.DOMAIN, op.name, op.inputs, op.outputs, spec.Attributes.onnx_names(op))
    body.opset_import.append(helper.make_opsetid(spec.DOMAIN, spec.VERSION))
    return body


def nodes(
    op: spec.Variant,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    attributes: dict[str, int | float],
    opset: int,
    prefix: str,
    choice: Any = None,
    facts: Facts | None = None,
) -> list[onnx.NodeProto]:
    """The operator as standard nodes for one node's attributes (see `spec.Attributes.to_onnx`)."""
    e = Emitter(opset, prefix, attributes)
    own = {name: attributes[name] for name in embedding_bag.Attributes.onnx_names(op.bag)}

    def bag(t: int, inputs: Sequence[str], output: str) -> None:
        e.nodes += lowering.nodes(op.bag, tuple(inputs), (output,), own, opset, f"{prefix}{t}_", choice, facts)

    expand(e, op, inputs, bag, *outputs)
    return e.nodes


def expand(e: Emitter, op: spec.Variant, inputs: Sequence[str], bag: _Bag, output: str) -> None:
    """Write the operator's nodes into ``e``, its bags by ``bag``."""
    named = dict(zip(op.inputs, inputs, strict=True))
    packed = _Packed(e, op, named) if op.layout == "packed" else None
    if packed is None and op.num_tables > 1:
        first = f"{counted(op)}_0"
        named[first] = checked(e, op, named)
    pooled = []
    for t in range(op.num_tables):
        if packed is not None:
            given = packed.inputs(t)
        else:
            given = {stem: named[f"{stem}_{t}"] for stem in op.bag.inputs if stem != "weight"}
        pooled.append(e.name())
        bag(t, [named[f"weight_{t}"] if i == "weight" else given[i] for i in op.bag.inputs], pooled[-1])
    e.node("Concat", pooled, {"axis": 1}, output)


def counted(op: spec.Variant) -> str:
    """Which input of a table tells how many bags it has."""
    return "indices" if op.bag.two_d else "offsets"


def checked(e: Emitter, op: spec.Variant, named: Mapping[str, str]) -> str:
    """What counts the first table's bags, through nodes that are an error if another table has more bags or fewer.

    Concat would not do: ONNX Runtime's leaves out an input without elements, whatever its other dimension is, so that
    no bags or no columns beside some bags are an output with columns that nobody wrote.
    """
    first, *others = dict.fromkeys(named[f"{counted(op)}_{t}"] for t in range(op.num_tables))
    if not others:  # all tables have the same bags
        return first
    e.part("tables_have_as_many_bags")
    count = e.Shape(first, start=0, end=1)
    wrong = e.Not(e.Equal(e.Concat(*(e.Shape(other, start=0, end=1) for other in others), axis=0), count))
    shape = [e.Add(count, lowering.refusal(e, wrong))]
    if op.bag.two_d:
        shape.append(e.Shape(first, start=1))
    found = e.Reshape(first, e.Concat(*shape, axis=0), allowzero=1)
    e.part("")
    return str(found)


class _Packed:
    """Packed indices cut into those of each table.

    A table's first offset is the one before's last, so that offsets that decrease or pass the end do so in some table,
    whose bags reject them. Of the first table nothing is subtracted: its bags reject a first offset other than 0.
    """

    def __init__(self, e: Emitter, op: spec.Variant, named: dict[str, str]) -> None:
        self._e, self._op, self._named = e, op, named
        self._offsets = e.Cast(named["offsets"], to=onnx.TensorProto.INT64)
        count = e.Sub(e.Shape(self._offsets), 1)  # [1]
        # A rest is an error as in `..embedding_bag.lowering`: by reading past the end.
        rest = e.Gather([0], e.Cast(e.Greater(e.Mod(count, op.num_tables), 0), to=onnx.TensorProto.INT64))
        self._bags = e.Add(e.Div(count, op.num_tables), rest)  # [1]: B

    def inputs(self, t: int) -> dict[str, str]:
        """The indices, offsets and weights of a table, by the names that its bag has for them."""
        e = self._e
        first = e.Mul(self._bags, [t])
        bounds = e.Slice(self._offsets, first, e.Add(e.Add(first, self._bags), 1))  # [B + 1]
        begin = e.int64([0]) if t == 0 else e.Slice(bounds, [0], [1])
        end = e.Slice(bounds, [-1], [2**31 - 1])
        found = {"offsets": bounds if t == 0 else e.Sub(bounds, begin)}
        for name in ("indices", *(("per_sample_weights",) if self._op.weighted else ())):
            found[name] = e.Slice(self._named[name], begin, end)
        return found
