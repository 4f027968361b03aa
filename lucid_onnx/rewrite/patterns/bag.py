"""A bag that was guessed from a graph: its inputs as expressions, and its attributes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir as ir

from lucid_onnx.ops import quantized_embedding_bag
from lucid_onnx.ops.attributes import either
from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.rewrite.expressions import Dim, Expression

#: The types of a table's elements, and NumPy's (or ml_dtypes') names of them.
FLOATS = {ir.DataType.from_numpy(dtype): dtype.name for dtype in spec.TABLE_DTYPES}
#: The types of indices and offsets.
INTEGERS = tuple(map(ir.DataType.from_numpy, spec.INDEX_DTYPES))
#: The types of a quantized table's scale, and of its bias or zero_point.
SCALES = tuple(map(ir.DataType.from_numpy, quantized_embedding_bag.spec.SCALE_DTYPES))


@dataclasses.dataclass(frozen=True, eq=False)
class Bag:
    """A bag over expressions; without ``offsets`` the indices are [B, L]."""

    weight: Expression
    indices: Expression
    offsets: Expression | None
    per_sample_weights: Expression | None
    attributes: spec.Attributes
    #: What the graph computes from the bag's result [B, D]; None if it is the graph's.
    result: Callable[[Expression], Expression] | None = None

    @property
    def op(self) -> Any:
        """The operator's name and inputs."""
        return spec.variant(two_d=self.offsets is None, weighted=self.per_sample_weights is not None)

    @property
    def table_dtype(self) -> str:
        """NumPy's (or ml_dtypes') name of the type of the table's elements."""
        return FLOATS[self.weight.type or ir.DataType.FLOAT]

    @property
    def table_shape(self) -> tuple[Dim, ...]:
        """As far as it is known."""
        return self.weight.dims or ()

    @property
    def table(self) -> dict[str, Expression]:
        """The inputs that make the table, by name; the first one is what is reported."""
        return {"weight": self.weight}

    @property
    def inputs(self) -> dict[str, Expression]:
        """By the operator's names, in order."""
        given = {
            **self.table,
            "indices": self.indices,
            "offsets": self.offsets,
            "per_sample_weights": self.per_sample_weights,
        }
        return {name: found for name in self.op.inputs if (found := given[name]) is not None}

    def with_attributes(self, **attributes: Any) -> Bag:
        """The same bag with other attributes, by name."""
        return dataclasses.replace(self, attributes=dataclasses.replace(self.attributes, **attributes))

    def to_onnx(self) -> dict[str, int | float]:
        """The node's attributes."""
        return self.attributes.to_onnx(self.op, double=self.weight.type == ir.DataType.DOUBLE)

    def why_invalid(self) -> str | None:
        """Why the operator does not take these inputs, or None."""
        table = self.weight
        if table.type not in FLOATS:
            return f"the table has type {_type_name(table)}, expected {either(FLOATS.values())}"
        if table.rank != 2:
            return f"the table has {_rank_name(table)}, expected two"
        for name, value in (("indices", self.indices), ("offsets", self.offsets)):
            if value is not None and value.type not in INTEGERS:
                return f"{name} have type {_type_name(value)}, expected int32 or int64"
        if self.indices.rank != (2 if self.offsets is None else 1):
            return f"the indices have {_rank_name(self.indices)}, expected {'two' if self.offsets is None else 'one'}"
        if self.offsets is not None and self.offsets.rank != 1:
            return f"the offsets have {_rank_name(self.offsets)}, expected one"
        weights = self.per_sample_weights
        if weights is not None and weights.type != table.type:
            return f"per_sample_weights have type {_type_name(weights)}, the table has {_type_name(table)}"
        if weights is not None and weights.rank != self.indices.rank:
            return f"per_sample_weights have {_rank_name(weights)}, expected as many as the indices"
        refuses = self.attributes.negative == "refuse"
        if refuses and self.indices.array is not None and (self.indices.array < 0).any():
            return f"the indices are constant, and {int(self.indices.array.min())} is among them"
        rows = table.dims[0] if table.dims is not None and isinstance(table.dims[0], int) else None
        try:
            self.attributes.check(weighted=weights is not None, num_rows=rows)
        except ValueError as error:
            return str(error)
        return None


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedBag(Bag):
    """A bag over a quantized table: ``weight`` is the scale, whose type its rows have."""

    codes: Expression = dataclasses.field(kw_only=True)
    second: tuple[str, Expression] | None = None  #: "zero_point" or "bias", and it

    @property
    def op(self) -> Any:
        return quantized_embedding_bag.spec.variant(
            second=None if self.second is None else self.second[0],
            two_d=self.offsets is None,
            weighted=self.per_sample_weights is not None,
        )

    @property
    def table_dtype(self) -> str:
        return self.meaning.codes_type

    @property
    def table_shape(self) -> tuple[Dim, ...]:
        return (*(self.codes.dims or (None,))[:1], self.meaning.embedding_dim)

    @property
    def table(self) -> dict[str, Expression]:
        return {"codes": self.codes, "scale": self.weight, **({} if self.second is None else dict([self.second]))}

    @property
    def meaning(self) -> quantized_embedding_bag.spec.Attributes:
        """The attributes, which are those of a bag over a quantized table."""
        assert isinstance(self.attributes, quantized_embedding_bag.spec.Attributes)
        return self.attributes

    def why_invalid(self) -> str | None:
        stored = ir.DataType.from_numpy(self.meaning.codes.stored)
        if self.codes.type != stored or self.codes.rank != 2:
            return f"the quantized values have type {_type_name(self.codes)} and {_rank_name(self.codes)}"
        for name, numbers in self.table.items():
            if name != "codes" and (numbers.type not in SCALES or numbers.type != self.weight.type):
                return f"{name} has type {_type_name(numbers)}, expected float32 or float16 as scale"
            if name != "codes" and numbers.rank != 1:
                return f"{name} has {_rank_name(numbers)}, expected one"
        # The rest is as for rows of the scale's type.
        like = Expression("Value", dtype=self.weight.type, shape=(self.table_shape[0], self.meaning.embedding_dim))
        return Bag(like, self.indices, self.offsets, self.per_sample_weights, self.attributes).why_invalid()

    def to_onnx(self) -> dict[str, int | float]:
        return self.meaning.to_onnx(self.op)


def _type_name(e: Expression) -> str:
    return "unknown" if e.type is None else e.type.name.lower()


def _rank_name(e: Expression) -> str:
    return "an unknown number of dimensions" if e.rank is None else f"{e.rank} dimensions"


#: What a graph may be, and how that would be written; or, in words, why it is not a bag after all.
Guess = tuple[Bag, "Expression | str"]
#: Why a graph that looks like a bag is none, where no bag is to be named.
Obstructed = tuple[None, str]
Pattern = Callable[[Expression], Iterator["Guess | Obstructed"]]
