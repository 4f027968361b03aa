"""Our functions in a model, under whatever names.

Tools that join models give functions other names: onnx.compose writes ``ai.lucid::user_EmbeddingBag``. A function is
recognised by what it computes. Its name alone tells nothing, unless it is exactly that of an operator.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, helper, numpy_helper

from lucid_onnx.graph import node_lists
from lucid_onnx.ops import OPERATOR_OF, OPERATORS, variant
from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.ops.embedding_bag.lowering import BLOCKS, LONGEST_BAG, Ragged
from lucid_onnx.ops.embedding_bag_collection import spec as collection

#: What a node calls: domain, name and overload.
_Key = tuple[str, str, str]
#: Larger constants than this are in none of our functions.
_LARGEST_CONSTANT = 64
#: So many lengths are tried for the longest bag of a padded one.
_MOST_LENGTHS = 4


def restore_names(model: onnx.ModelProto) -> bool:
    """Give our functions, and the nodes that call them, their names back, in place; whether there were any.

    A function is ours if its output is computed as an operator's lowering computes it: names of values, the order of
    nodes and the function's own name do not matter. One that has a name like ours but another body stays.
    """
    ours = renamed(model.functions)
    names = _names(model, ours)
    if not names:
        return False
    for nodes in node_lists(model):
        for node in nodes:
            if (op_type := names.get(_called(node))) is not None:
                node.domain, node.op_type = spec.DOMAIN, op_type
                node.ClearField("overload")
    present = {f.name for f in model.functions if f.domain == spec.DOMAIN}
    for function in [f for f in model.functions if _key(f) in names]:
        name = names[_key(function)]
        if name in present:
            model.functions.remove(function)
            continue
        present.add(name)
        function.domain, function.name = spec.DOMAIN, name
        function.ClearField("overload")
    for imports in (model.opset_import, *(f.opset_import for f in model.functions)):
        if all(i.domain != spec.DOMAIN for i in imports):
            imports.append(helper.make_opsetid(spec.DOMAIN, spec.VERSION))
    return True


def renamed(functions: Iterable[onnx.FunctionProto]) -> dict[_Key, Any]:
    """The functions that are ours and have another name, with their operators."""
    others = [f for f in functions if not (f.domain == spec.DOMAIN and f.name in OPERATOR_OF and not f.overload)]
    found: dict[_Key, Any] = {}
    for _ in range(2):  # a collection calls functions of the bags, which must be known before
        for function in others:
            if _key(function) not in found and (op := _operator(function, found)) is not None:
                found[_key(function)] = op
    return found


def _key(function: onnx.FunctionProto) -> _Key:
    return function.domain, function.name, function.overload


def _called(node: onnx.NodeProto) -> _Key:
    return node.domain, node.op_type, node.overload


def _names(model: onnx.ModelProto, ours: Mapping[_Key, Any]) -> dict[_Key, str]:
    """The names that functions get: collections have one for each combination of their inputs."""
    names = {key: op.name for key, op in ours.items()}
    collections = {key: op for key, op in ours.items() if op.name in collection.VARIANTS}
    if not collections:
        return names
    used: dict[Any, str] = {}
    for node in itertools.chain.from_iterable(node_lists(model)):
        op = collections.get(_called(node))
        if op is not None:
            if _signature(op.name, node) != op.signature:
                names.pop(_called(node), None)  # the node says something else than its function
        elif node.domain == spec.DOMAIN and node.op_type in collection.VARIANTS:
            used.setdefault(_signature(node.op_type, node), node.op_type)
    for key, op in collections.items():
        if key not in names:
            continue
        free = [name for name in collection.VARIANTS if name not in used.values()]
        if op.signature not in used and not free:
            del names[key]
            continue
        names[key] = used.setdefault(op.signature, free[0] if free else "")
    return names


def _signature(name: str, node: onnx.NodeProto) -> Any:
    """The combination of inputs that a node of a collection tells of; None if it does not tell."""
    try:
        return variant(name, {a.name: a.i for a in node.attribute if a.type == AttributeProto.INT}).signature
    except ValueError:
        return None


def _operator(function: onnx.FunctionProto, known: Mapping[_Key, Any]) -> Any:
    """The operator that a function computes, or None."""
    opset = next((i.version for i in function.opset_import if i.domain in ("", "ai.onnx")), 0)
    if not spec.MIN_OPSET <= opset <= spec.MAX_OPSET:
        return None
    candidates = list(_candidates(len(function.input), frozenset(function.attribute), len(function.output)))
    if not candidates:
        return None
    found = _digest(function, known)
    lengths = itertools.islice(_lengths(function), _MOST_LENGTHS)
    ways = itertools.chain((BLOCKS, Ragged("loop")), (Ragged("padded", n) for n in lengths))
    return next((op for way in ways for op in candidates if _expected(op, opset, way) == found), None)


def _candidates(inputs: int, attributes: frozenset[str], outputs: int) -> Iterator[Any]:
    """The operators whose functions have so many inputs and outputs, and these attributes."""
    for operator in OPERATORS.values():
        for op in operator.spec.VARIANTS.values():
            if operator.spec is collection or len(op.outputs) != outputs or len(op.inputs) != inputs:
                continue
            if attributes == frozenset(operator.spec.Attributes.onnx_names(op)):
                yield op
    if outputs != 1 or "num_tables" not in attributes:
        return
    for layout, weighted in itertools.product(collection.LAYOUTS, (False, True)):
        kinds = 1 + (layout != "rows") + weighted
        tables = inputs - kinds if layout == "packed" else inputs // (1 + kinds)
        if tables < 1:
            continue
        op = collection.variant(num_tables=tables, layout=layout, weighted=weighted)
        if op.num_inputs == inputs and attributes == frozenset(collection.Attributes.onnx_names(op)):
            yield op


def _lengths(function: onnx.FunctionProto) -> Iterator[int]:
    """The constants that may be the longest bag of a padded one: a Greater compares lengths with it."""
    constants = {n.output[0]: _constant(n) for n in function.node if n.op_type == "Constant" and n.output}
    for node in function.node:
        limit = constants.get(node.input[1]) if node.op_type == "Greater" and len(node.input) == 2 else None
        if limit is not None and limit.dtype == np.int64 and limit.size == 1 and 1 <= limit.item() <= LONGEST_BAG:
            yield int(limit.item())


@functools.lru_cache(maxsize=256)
def _expected(op: Any, opset: int, way: Ragged) -> bytes:
    """The digest of an operator's function; no digest where it has none in that way."""
    try:
        function = OPERATOR_OF[op.name].lowering.function(op, opset, way)
    except ValueError:
        return b""
    return _digest(function, {})


# ---- What a function computes.

#: The digests of values, by name.
_Digests = dict[str, bytes]


def _digest(function: onnx.FunctionProto, known: Mapping[_Key, Any]) -> bytes:
    """A number for what a function's outputs are computed from: equal for equal computations, whatever the names."""
    values = {name: _hash("input", 0, k) for k, name in enumerate(function.input)}
    _digest_nodes(function.node, values, known, 1)
    return _hash("function", *(values.get(name, b"") for name in function.output))


def _hash(*parts: Any) -> bytes:
    state = hashlib.blake2b(digest_size=20)
    for part in parts:
        data = part if isinstance(part, bytes) else repr(part).encode()
        state.update(len(data).to_bytes(8, "little") + data)
    return state.digest()


def _digest_nodes(nodes: Iterable[onnx.NodeProto], values: _Digests, known: Mapping[_Key, Any], depth: int) -> None:
    """Put down the digests of what nodes compute; ``values`` has those of what they read."""
    for node in nodes:
        inputs = [values.get(name, b"") if name else b"-" for name in node.input]
        op = known.get(_called(node))
        domain, name = (spec.DOMAIN, op.name) if op is not None else (node.domain, node.op_type)
        domain = "" if domain == "ai.onnx" else domain
        constant = _constant(node) if (domain, name) == ("", "Constant") else None
        if (domain, name) == ("", "Identity") and len(inputs) == 1:
            whole = [inputs[0]]
        elif constant is not None:
            whole = [_array(constant)]
        else:
            attributes = sorted(_attribute(a, values, known, depth) for a in node.attribute)
            everything = _hash(domain, name, *attributes, "inputs", *inputs)
            whole = [_hash(everything, k) for k in range(len(node.output))]
        values.update(zip(node.output, whole, strict=False))


def _attribute(a: onnx.AttributeProto, values: _Digests, known: Mapping[_Key, Any], depth: int) -> bytes:
    if a.ref_attr_name:
        return _hash(a.name, "refers to", a.ref_attr_name)
    if a.type == AttributeProto.GRAPH:
        inner = values | {v.name: _hash("input", depth, k) for k, v in enumerate(a.g.input)}
        inner |= {t.name: _tensor(t) for t in a.g.initializer}
        _digest_nodes(a.g.node, inner, known, depth + 1)
        return _hash(a.name, "graph", len(a.g.input), *(inner.get(v.name, b"") for v in a.g.output))
    if a.type == AttributeProto.TENSOR:
        return _hash(a.name, _tensor(a.t))
    return _hash(a.name, helper.get_attribute_value(a))


def _tensor(tensor: onnx.TensorProto) -> bytes:
    """The digest of a constant; none of one that is too large for our functions, or in another file."""
    if tensor.data_location == onnx.TensorProto.EXTERNAL or math.prod(tensor.dims) > _LARGEST_CONSTANT:
        return b""
    return _array(numpy_helper.to_array(tensor))


def _array(array: np.ndarray) -> bytes:
    return _hash("constant", array.dtype.name, array.shape, array.tobytes())


def _constant(node: onnx.NodeProto) -> np.ndarray | None:
    """The numbers of a small Constant node; None where the function's attributes decide them."""
    (attribute,) = node.attribute if len(node.attribute) == 1 else (onnx.AttributeProto(ref_attr_name="none"),)
    if attribute.ref_attr_name:
        return None
    if attribute.name == "value":
        small = math.prod(attribute.t.dims) <= _LARGEST_CONSTANT
        external = attribute.t.data_location == onnx.TensorProto.EXTERNAL
        return numpy_helper.to_array(attribute.t) if small and not external else None
    dtype = {"i": np.int64, "f": np.float32}.get(attribute.name.removeprefix("value_")[:1])
    return None if dtype is None else np.asarray(helper.get_attribute_value(attribute), dtype)
