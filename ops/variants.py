"""What the tools ask of an operator name: its inputs and outputs, their dimensions, and which tables it pools.

Each spec's ``Variant`` is one operator name, and answers these questions; no tool needs to know which operator it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

#: What an input or output is. "rows" are values of the operator's dtype that are no table, such as pooled bags.
Role = Literal["table", "quantized", "row_number", "indices", "offsets", "weights", "bags", "rows", "row_indices"]
#: The roles of a table's parts, which a model may hold as initializers.
TABLE_ROLES = ("table", "quantized", "row_number")
Dims = tuple["int | str", ...]
#: A message names no more inputs than this.
_MOST_NAMED = 64


class Value(NamedTuple):
    """An input or output: what it is, and its dimensions, numbers or names.

    ``dtype`` is None where the model decides: indices and offsets have dtypes of their own, all else that of the
    operator's rows (see `BaseVariant.typed_by`).
    """

    role: Role
    dims: Dims
    dtype: np.dtype | None = None


class Bag(NamedTuple):
    """A table that an operator pools, and the inputs that belong to it; a collection has one for each table."""

    table: str
    indices: str
    offsets: str | None
    row_numbers: tuple[str, ...] = ()  #: of a quantized table: scale, and zero_point or bias
    label: str = ""  #: how a message tells it from the others of the node


class Known(NamedTuple):
    """What a model says of a table: the name of its ONNX type, and its number of rows."""

    type: str | None
    num_rows: int | None


class BaseVariant:
    """The base of every operator's Variant, with the answers of an operator that has one table and one output."""

    name: str
    two_d: bool
    weighted: bool
    outputs: tuple[str, ...] = ("output",)
    table = "weight"  #: the input that is the table, or its first part
    typed_by = "weight"  #: the input whose dtype the operator's rows have
    graph = "embedding_bag"  #: the name of the graph of a model of one such node

    @property
    def inputs(self) -> tuple[str, ...]:
        """The inputs, in order."""
        raise NotImplementedError

    @property
    def num_inputs(self) -> int:
        """The number of inputs, without making their names: attributes of a node may ask for 2**62 of them."""
        return len(self.inputs)

    def check_node_inputs(self, given: Sequence[str]) -> None:
        """Raise ValueError if a node has not the inputs of this operator, one name for each."""
        if len(given) == self.num_inputs and all(given):
            return
        takes = ", ".join(self.inputs) if self.num_inputs <= _MOST_NAMED else f"{self.num_inputs} inputs"
        names = list(given) if len(given) <= _MOST_NAMED else f"{len(given)}"
        raise ValueError(f"{self.name} takes {takes}; it was given {names}")

    @property
    def bags(self) -> tuple[Bag, ...]:
        """The tables that it pools, with their inputs."""
        numbers = tuple(name for name in self.inputs if name in ("scale", "zero_point", "bias"))
        return (Bag(self.table, "indices", None if self.two_d else "offsets", numbers),)

    def values(self, attributes: Any, shapes: Mapping[str, Sequence[int]]) -> dict[str, Value]:
        """Its inputs and outputs, and perhaps more, by name.

        Args:
            attributes: the operator's Attributes.
            shapes: of the tables, as far as they are known.
        """
        raise NotImplementedError

    def of(self, attributes: Mapping[str, Any]) -> Any:
        """This name with the inputs that a node's attributes tell of.

        Raises:
            ValueError: the attributes do not tell.
        """
        return self

    def in_model(self, used: dict[Any, str]) -> Any:
        """This operator under the name that it has in a model; ``used``, of the model, notes names that are taken."""
        return self

    @property
    def calls(self) -> tuple[BaseVariant, ...]:
        """The operators whose functions its own function calls."""
        return ()

    def check_node(self, attributes: Any, tables: Sequence[Known]) -> None:
        """Raise TypeError or ValueError if a node is wrong; ``tables``: what is known of those of `bags`."""
        attributes.check(weighted=self.weighted, num_rows=tables[0].num_rows)


def bag_values(*, two_d: bool, include_last_offset: bool, number: str = "") -> dict[str, Value]:
    """Indices, offsets and per_sample_weights of bags. ``number`` is appended to the names of dimensions."""
    positions: Dims = ("num_bags", f"bag_length{number}") if two_d else (f"num_indices{number}",)
    return {
        "indices": Value("indices", positions),
        "offsets": Value("offsets", ("num_offsets" if include_last_offset else "num_bags",)),
        "per_sample_weights": Value("weights", positions),
    }
