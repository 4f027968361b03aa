"""Random inputs for a model: indices in range, valid offsets, bags of very different lengths."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper

from lucid_onnx.ops import OPERATOR_OF, variant
from lucid_onnx.ops.embedding_bag import spec

#: Nodes that keep the values of their first input, as far as indices and offsets are concerned.
_PASSING = {"Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"}
_NUM_BAGS, _BAG_LENGTH, _NUM_INDICES, _OTHER = 9, 5, 40, 4
_ROWS = 50


class NoInputsError(ValueError):
    """An input that cannot be generated; the message names it."""


@dataclasses.dataclass
class _Role:
    """What a bag asks of an input of the graph."""

    kind: str  # "indices", "offsets", "table", "gradient"
    rows: int | None = None  # of the table, for indices
    padding: int | None = None
    skips: bool = False  # an index below 0 is allowed, and skipped
    last: bool = False  # include_last_offset, for offsets and a gradient
    partner: str = ""  # the indices, for offsets; the input that has the number of bags, for a gradient
    two_d: bool = False
    tables: int = 1  # that share packed offsets


def random_inputs(model: onnx.ModelProto, given: Mapping[str, np.ndarray], seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays for every input of the graph: those of ``given``, and random ones for the rest.

    An input that ``ai.lucid`` nodes read is valid for them. Other integers are in range of the table that a Gather
    looks them up in, or 0 and 1. Other floats are normally distributed.

    Raises:
        NoInputsError: an input of unknown rank or of another dtype, or offsets whose indices are computed.
    """
    random = np.random.RandomState(seed)
    initializers = {t.name: t for t in model.graph.initializer}
    values = {v.name: v for v in model.graph.input if v.name not in initializers}
    roles = _roles(model.graph, initializers, values)
    sizes: dict[str, int] = {}
    for name, array in given.items():
        if name not in values:
            raise NoInputsError(f"input {name}: the model has no such input; it has: {', '.join(values) or 'none'}")
        for dim, size in zip(values[name].type.tensor_type.shape.dim, array.shape, strict=False):
            if dim.dim_param:
                sizes[dim.dim_param] = size
    result = dict(given)
    # Tables come first, as indices need their rows; offsets need the indices; a gradient is as long as offsets.
    order = {"table": 0, "indices": 1, "other": 2, "offsets": 3, "gradient": 4}
    for name in sorted(values, key=lambda n: order[roles[n].kind if n in roles else "other"]):
        if name not in result:
            result[name] = _array(values[name], roles.get(name), sizes, result, random)
    return {name: result[name] for name in values}


def _roles(
    graph: onnx.GraphProto, initializers: Mapping[str, onnx.TensorProto], inputs: Iterable[str]
) -> dict[str, _Role]:
    """What bags and Gathers ask of the graph's inputs, by input name."""
    found = _Roles(graph, initializers, inputs)
    for node in graph.node:
        if node.domain == spec.DOMAIN and node.op_type in OPERATOR_OF:
            found.add_bags(node)
        elif node.op_type == "Gather" and node.domain == "" and node.input[0] in initializers:
            found.add_gather(node)
    return found.roles


class _Roles:
    """Collects the roles of a graph's inputs, node by node."""

    def __init__(
        self, graph: onnx.GraphProto, initializers: Mapping[str, onnx.TensorProto], inputs: Iterable[str]
    ) -> None:
        self.roles: dict[str, _Role] = {}
        self._initializers = initializers
        self._inputs = set(inputs)
        self._producers = {output: node for node in graph.node for output in node.output}

    def add_bags(self, node: onnx.NodeProto) -> None:
        """A node of an operator of ours."""
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        op = variant(node.op_type, attributes)
        padding = attributes.get("padding_idx", spec.NO_PADDING)
        last = bool(attributes.get("include_last_offset", 0))
        named = dict(zip(op.inputs, node.input, strict=True))
        for bag in op.bags:
            weight, indices = self._origin(named[bag.table]), self._origin(named[bag.indices])
            offsets = None if bag.offsets is None else self._origin(named[bag.offsets])
            held = self._initializers.get(named[bag.table])
            rows = held.dims[0] if held is not None else None
            if weight is not None:
                self.roles[weight] = _Role("table")
            if indices is not None:
                known = None if padding == spec.NO_PADDING else padding
                role = _Role("indices", rows, known, skips=bool(attributes.get("negative", 0)), two_d=op.two_d)
                self.roles[indices] = _narrower(self.roles.get(indices), role)
            if offsets is not None:
                tables = sum(other.offsets == bag.offsets for other in op.bags)
                self.roles[offsets] = _Role("offsets", last=last, partner=indices or "", tables=tables)
        if "grad_output" in named:
            gradient = self._origin(named["grad_output"])
            bags = self._origin(named["indices" if op.two_d else "offsets"])
            if gradient is not None:
                self.roles[gradient] = _Role("gradient", last=last and not op.two_d, partner=bags or "")

    def add_gather(self, node: onnx.NodeProto) -> None:
        """A Gather from an initializer."""
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        name = self._origin(node.input[1])
        if name is not None:
            rows = self._initializers[node.input[0]].dims[axis]
            self.roles[name] = _narrower(self.roles.get(name), _Role("indices", rows))

    def _origin(self, name: str) -> str | None:
        """The graph's input that a value is made from."""
        while name not in self._inputs:
            node = self._producers.get(name)
            if node is None or node.op_type not in _PASSING:
                return None
            name = node.input[0]
        return name


def _narrower(old: _Role | None, new: _Role) -> _Role:
    """Indices into several tables stay within the smallest."""
    if old is None or old.kind != "indices":
        return new
    known = [r.rows for r in (old, new) if r.rows is not None]
    return dataclasses.replace(new, rows=min(known, default=None), padding=None, skips=old.skips and new.skips)


def _array(
    value: onnx.ValueInfoProto,
    role: _Role | None,
    sizes: dict[str, int],
    made: Mapping[str, np.ndarray],
    random: np.random.RandomState,
) -> np.ndarray:
    """An array for one input; ``made`` has those before it."""
    dtype = _dtype(value)
    shape = _shape(value, role, sizes, made)
    if role is not None and role.kind == "offsets":
        return _offsets(value.name, role, shape, dtype, made, random)
    if role is not None and role.kind == "indices":
        rows = role.rows if role.rows is not None else _rows_of_input(made)
        indices = random.randint(0, max(rows, 1), shape).astype(dtype)
        if role.padding is not None and indices.size:
            indices[random.random_sample(shape) < 0.2] = role.padding % max(rows, 1)
        if role.skips and indices.size:
            indices[random.random_sample(shape) < 0.2] = -1
        return indices
    if dtype.kind == "b":
        return random.random_sample(shape) < 0.5
    if dtype.kind in "iu":
        return random.randint(0, 2, shape).astype(dtype)
    return np.asarray(random.standard_normal(shape)).astype(dtype)


def _dtype(value: onnx.ValueInfoProto) -> np.dtype:
    name, tensor = value.name, value.type.tensor_type
    if not value.type.HasField("tensor_type") or not tensor.HasField("shape"):
        raise NoInputsError(f"input {name} has an unknown rank: give it with --input {name}=FILE.npy")
    try:
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    except KeyError:
        dtype = np.dtype(object)
    if dtype.kind not in "fiub" and dtype != spec.BFLOAT16:
        kind = TensorProto.DataType.Name(tensor.elem_type)
        raise NoInputsError(f"input {name} is of {kind}, which cannot be generated: give it with --input")
    return dtype


def _shape(
    value: onnx.ValueInfoProto, role: _Role | None, sizes: dict[str, int], made: Mapping[str, np.ndarray]
) -> list[int]:
    """The shape of an input; ``sizes`` are those of symbolic dimensions, to which new ones are added."""
    dims = value.type.tensor_type.shape.dim
    shape = []
    for axis, dim in enumerate(dims):
        if dim.HasField("dim_value"):
            shape.append(dim.dim_value)
        elif role is not None and role.kind == "gradient" and axis == 0 and role.partner in made:
            shape.append(len(made[role.partner]) - int(role.last))
        else:
            shape.append(sizes.setdefault(dim.dim_param or f"{value.name}.{axis}", _size(role, axis, len(dims))))
    return shape


def _size(role: _Role | None, axis: int, rank: int) -> int:
    """The size of a dimension that the model leaves open."""
    kind = role.kind if role is not None else "other"
    if kind == "indices":
        return (_NUM_BAGS if axis == 0 else _BAG_LENGTH) if rank > 1 else _NUM_INDICES
    if kind == "table":
        return _ROWS if axis == 0 else 8
    if axis > 0:
        return _OTHER
    return _NUM_BAGS if role is None or role.tables == 1 else role.tables * _NUM_BAGS + 1


def _rows_of_input(made: Mapping[str, np.ndarray]) -> int:
    """The number of rows of the smallest table among the inputs; `_ROWS` if there is none."""
    return min((len(a) for a in made.values() if a.ndim == 2), default=_ROWS)


def _offsets(
    name: str,
    role: _Role,
    shape: list[int],
    dtype: np.dtype,
    made: Mapping[str, np.ndarray],
    random: np.random.RandomState,
) -> np.ndarray:
    """Bags whose lengths follow Zipf's law, some of them empty."""
    if role.partner not in made:
        raise NoInputsError(
            f"input {name} has the offsets of indices that the model computes: give it with --input {name}=FILE.npy"
        )
    count = made[role.partner].size
    bags = shape[0] - int(role.last)
    if bags <= 0:
        return np.zeros(shape, dtype)
    shares = 1 / np.arange(1, bags + 1) ** 1.5
    lengths = random.multinomial(count, random.permutation(shares / shares.sum()))
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    return np.asarray(bounds if role.last else bounds[:-1], dtype)
