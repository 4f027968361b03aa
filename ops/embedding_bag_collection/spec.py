"""EmbeddingBagCollection: the bags of T tables, concatenated in one output.

    output[:, D_0 + ... + D_(t-1) : D_0 + ... + D_t] = EmbeddingBag(weight_t, indices_t, offsets_t, ...)

with the equation, attributes and errors of `..embedding_bag.spec`, and the very bits that T nodes and a Concat over
axis 1 would have. V and D may differ from table to table; all tables and per_sample_weights are of one dtype, and all
tables have B bags. ``indices`` and ``offsets`` are of int32 or int64, each by itself. The attributes are those of every
table; a negative ``padding_idx`` counts from the end of each.

The inputs are T tables, and then what one of three layouts has:

====== ========= ======================================================================================
layout attribute inputs behind weight_0 [V_0, D_0], ..., weight_(T-1) [V_(T-1), D_(T-1)]
====== ========= ======================================================================================
ragged 0         indices_t [N_t] of each table, then offsets_t [B] (or [B + 1]) of each
packed 1         indices [N] and offsets [T * B + 1] of all: bag i of table t is
                 ``offsets[t * B + i] <= k < offsets[t * B + i + 1]``; include_last_offset is 1
rows   2         indices_t [B, L_t] of each table
====== ========= ======================================================================================

and per_sample_weights last, shaped like indices, where there are any: of each table, or of all in the packed layout.
(Packed is how FBGEMM's table-batched embeddings have them.)

The attributes beyond EmbeddingBag's:

========== ==== ========================== ====================================
attribute  type values                     meaning
========== ==== ========================== ====================================
num_tables INT  >= 1                       T
layout     INT  0 ragged, 1 packed, 2 rows which inputs there are, as above
weighted   INT  0 or 1                     whether there are per_sample_weights
========== ==== ========================== ====================================

A function of a model cannot take a number of inputs that varies, and a model cannot have two functions of one name. So
there are several names (`VARIANTS`) for the same operator: ``EmbeddingBagCollection``, ``EmbeddingBagCollection_1`` and
so on, of which a model has one for every combination of num_tables, layout and weighted in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from ..attributes import Attribute, Choice, Flag, Integer, check_choice, decided
from ..embedding_bag import spec as embedding_bag
from ..variants import Bag, BaseVariant, Known, Value, bag_values

DOMAIN, VERSION = embedding_bag.DOMAIN, embedding_bag.VERSION
LAYOUTS = ("ragged", "packed", "rows")
#: How many combinations of num_tables, layout and weighted a model may have.
MOST_SIGNATURES = 8
_NAME = "EmbeddingBagCollection"
_LAYOUT = Choice({layout: number for number, layout in enumerate(LAYOUTS)})


@dataclasses.dataclass(frozen=True)
class Variant(BaseVariant):
    """One operator name with one combination of inputs."""

    name: str
    num_tables: int = 1
    layout: str = "ragged"
    weighted: bool = False
    table = typed_by = "weight_0"
    graph = "embedding_bag_collection"

    def __post_init__(self) -> None:
        if self.num_tables < 1:
            raise ValueError(f"num_tables = {self.num_tables} must be >= 1")
        check_choice("layout", self.layout, LAYOUTS)

    @property
    def inputs(self) -> tuple[str, ...]:
        names = [("weight", True), ("indices", False)]
        names += [] if self.layout == "rows" else [("offsets", False)]
        names += [("per_sample_weights", False)] if self.weighted else []
        return tuple(
            name
            for stem, always in names
            for name in (
                [f"{stem}_{t}" for t in range(self.num_tables)] if always or self.layout != "packed" else [stem]
            )
        )

    @property
    def num_inputs(self) -> int:
        kinds = 1 + (self.layout != "rows") + self.weighted  # behind the tables
        return self.num_tables + kinds * (1 if self.layout == "packed" else self.num_tables)

    @property
    def two_d(self) -> bool:  # type: ignore[override]
        return self.layout == "rows"

    def _input(self, stem: str, t: int) -> str:
        """The input that a table has, or that all have in the packed layout."""
        return stem if self.layout == "packed" and stem != "weight" else f"{stem}_{t}"

    @property
    def bags(self) -> tuple[Bag, ...]:
        return tuple(
            Bag(
                f"weight_{t}",
                self._input("indices", t),
                None if self.two_d else self._input("offsets", t),
                label=f"table {t}",
            )
            for t in range(self.num_tables)
        )

    def values(self, attributes: Attributes, shapes: Mapping[str, Sequence[int]]) -> dict[str, Value]:
        packed = self.layout == "packed"
        found = {}
        for t in range(self.num_tables):
            table = f"weight_{t}"
            found[table] = Value("table", tuple(shapes.get(table, (f"num_rows_{t}", f"embedding_dim_{t}"))))
            for stem, value in bag_values(
                two_d=self.two_d,
                include_last_offset=packed or attributes.include_last_offset,
                number="" if packed else f"_{t}",
            ).items():
                found[self._input(stem, t)] = value
        columns = [shapes[bag.table][1] for bag in self.bags if bag.table in shapes]
        dim: int | str = sum(columns) if len(columns) == self.num_tables else "embedding_dims"
        return {**found, "output": Value("bags", ("num_bags", dim))}

    @property
    def bag(self) -> embedding_bag.Variant:
        """The operator that pools one of the tables."""
        return embedding_bag.variant(two_d=self.layout == "rows", weighted=self.weighted)

    @property
    def signature(self) -> tuple[int, str, bool]:
        """What a function is written for."""
        return self.num_tables, self.layout, self.weighted

    def of(self, attributes: Mapping[str, Any]) -> Variant:
        """This name with the inputs that a node's attributes tell of.

        Raises:
            ValueError: one of them is missing or outside its range.
        """
        for needed in ("num_tables", "layout", "weighted"):
            if not isinstance(attributes.get(needed), int):
                raise ValueError(f"the attribute {needed} is missing, or no INT")
        layout = _LAYOUT.decode("layout", attributes, LAYOUTS[0])
        return Variant(self.name, attributes["num_tables"], layout, bool(attributes["weighted"]))

    def in_model(self, used: dict[tuple[int, str, bool], str]) -> Variant:
        return dataclasses.replace(self, name=name_of(self.signature, used))

    @property
    def calls(self) -> tuple[BaseVariant, ...]:
        return (self.bag,)

    def check_node(self, attributes: Attributes, tables: Sequence[Known]) -> None:
        attributes.check_layout(self)
        for t, (kind, num_rows) in enumerate(tables):
            with in_table(t):
                attributes.check(weighted=self.weighted, num_rows=num_rows)
                if kind and tables[0].type and kind != tables[0].type:
                    raise TypeError(f"weight is {kind}, that of table 0 is {tables[0].type}: they must be equal")


#: The closed set of operator names, each with the least inputs that it can have: see `Variant.of`.
VARIANTS: Mapping[str, Variant] = {
    name: Variant(name) for name in (_NAME, *(f"{_NAME}_{k}" for k in range(1, MOST_SIGNATURES)))
}


def variant(*, num_tables: int, layout: str, weighted: bool) -> Variant:
    """The first name, for a combination of inputs."""
    return Variant(_NAME, num_tables, layout, weighted)


def name_of(signature: tuple[int, str, bool], used: dict[tuple[int, str, bool], str]) -> str:
    """The name for a combination of inputs in a model, noted in ``used``: the first that no other has.

    Raises:
        ValueError: there is none left.
    """
    if signature not in used:
        if len(used) == MOST_SIGNATURES:
            raise ValueError(
                f"the collections of a model may have {MOST_SIGNATURES} combinations of num_tables, layout and "
                f"weighted; this is one more: {signature}"
            )
        used[signature] = list(VARIANTS)[len(used)]
    return used[signature]


@dataclasses.dataclass(frozen=True)
class Attributes(embedding_bag.Attributes):
    """The parameters of all bags, checked. See `..embedding_bag.spec.Attributes`."""

    num_tables: ClassVar[Attribute] = decided(Integer(1), lambda op, double: op.num_tables, "T")
    layout: ClassVar[Attribute] = decided(_LAYOUT, lambda op, double: op.layout, "which inputs there are, as above")
    weighted: ClassVar[Attribute] = decided(
        Flag(), lambda op, double: op.weighted, "whether there are per_sample_weights"
    )

    def check_layout(self, op: Variant) -> None:
        """Raise ValueError for a packed layout without the last offset."""
        if op.layout == "packed" and not self.include_last_offset:
            raise ValueError("include_last_offset = False, but packed offsets are [T * B + 1]")


def arrange(
    x: Any, weights: Sequence[Any], offsets: Any = None, per_sample_weights: Any = None, *, packed: bool = False
) -> tuple[Variant, dict[str, np.ndarray]]:
    """The arguments of a call as an operator name and its inputs.

    Args:
        x, offsets, per_sample_weights: a sequence of arrays, one per table; with ``packed`` one array.
        weights: the tables.

    Raises:
        ValueError: not as many arrays as there are tables.
    """
    rows = not packed and offsets is None and len(x) > 0 and all(np.ndim(i) == 2 for i in x)
    layout = "packed" if packed else "rows" if rows else "ragged"
    op = variant(num_tables=len(weights), layout=layout, weighted=per_sample_weights is not None)
    given = {f"weight_{t}": np.asarray(weight) for t, weight in enumerate(weights)}
    for name, stem, arrays in (
        ("x", "indices", x),
        ("offsets", "offsets", offsets),
        ("per_sample_weights", "per_sample_weights", per_sample_weights),
    ):
        if arrays is None:
            if stem == "offsets" and layout != "rows":
                raise ValueError("offsets missing: only indices [B, L] of every table go without them")
            continue
        if packed:
            given[stem] = np.asarray(arrays)
            continue
        if len(arrays) != len(weights):
            raise ValueError(f"{name} has {len(arrays)} entries for {len(weights)} tables")
        for t, array in enumerate(arrays):
            found = np.asarray(array)
            if stem != "per_sample_weights" and found.size == 0 and not isinstance(array, np.ndarray):
                found = found.astype(np.int64)  # a list of no indices
            given[f"{stem}_{t}"] = found
    return op, given


def of_table(op: Variant, given: Mapping[str, np.ndarray], t: int, stem: str) -> np.ndarray | None:
    """What a table has of an input, or what all have of it in the packed layout; None where there is none."""
    return given.get(stem if op.layout == "packed" and stem != "weight" else f"{stem}_{t}")


def check_layout(op: Variant, given: Mapping[str, np.ndarray], attributes: Attributes) -> None:
    """The part of `check_inputs` that looks at dtypes, shapes and attributes alone."""
    tables = [given[f"weight_{t}"] for t in range(op.num_tables)]
    check_tables(tables)
    attributes.check_layout(op)
    bags: list[int] = []
    for t, table in enumerate(tables):
        with in_table(t):
            indices, offsets, weights = (
                of_table(op, given, t, i) for i in ("indices", "offsets", "per_sample_weights")
            )
            assert indices is not None
            if op.layout == "packed" and indices.ndim != 1:
                raise ValueError(f"indices has shape {list(indices.shape)}, expected [N]")
            embedding_bag.check_layout(indices, offsets, weights, table.dtype, attributes)
            attributes.check(weighted=op.weighted, num_rows=table.shape[0])
        bags.append(len(indices) if offsets is None else len(offsets) - attributes.include_last_offset)
        if bags[t] != bags[0]:
            raise ValueError(f"table {t} has {bags[t]} bags, table 0 has {bags[0]}: they must be equal")
    if op.layout == "packed" and bags[0] % op.num_tables:
        raise ValueError(f"offsets has {len(given['offsets'])} entries, which are not {op.num_tables} * B + 1")


def check_inputs(op: Variant, given: Mapping[str, np.ndarray], attributes: Attributes) -> None:
    """Raise the operator's errors: those of dtypes and shapes, then of one table after another.

    Positions in packed indices and offsets are those among all tables'.

    Raises:
        TypeError, IndexError, ValueError: as `..embedding_bag.spec.check_inputs`.
    """
    check_layout(op, given, attributes)
    if op.layout == "packed":
        embedding_bag.check_offsets(given["offsets"], len(given["indices"]), True)
    for t in range(op.num_tables):
        table = given[f"weight_{t}"]
        with in_table(t):
            if op.layout != "packed":
                indices = given[f"indices_{t}"]
                offsets, weights = (of_table(op, given, t, i) for i in ("offsets", "per_sample_weights"))
                embedding_bag.check_inputs(table, indices, offsets, weights, attributes)
                continue
            inside = bounds(op, given["offsets"], t)
            used = given["indices"][inside[0] : inside[-1]]
            bad = embedding_bag.bad_indices(used, table.shape[0], attributes)
            if bad.any():
                k = int(bad.argmax())
                raise IndexError(f"indices[{int(inside[0]) + k}] = {int(used[k])} is outside [0, {table.shape[0]})")


def bounds(op: Variant, offsets: np.ndarray, t: int) -> np.ndarray:
    """Where the bags of a table begin among packed indices, and the last one ends, [B + 1]."""
    bags = (len(offsets) - 1) // op.num_tables
    return offsets[t * bags : (t + 1) * bags + 1]


def check_tables(weights: Sequence[np.ndarray]) -> None:
    """Raise for no tables, a table that is not [V, D] of a supported dtype, and tables of several dtypes.

    Raises:
        TypeError: the dtype of a table.
        ValueError: its shape, or that there are no tables.
    """
    if not weights:
        raise ValueError("num_tables = 0 must be >= 1")
    for t, weight in enumerate(weights):
        with in_table(t):
            embedding_bag.check_table(weight)
            if weight.dtype != weights[0].dtype:
                raise TypeError(
                    f"weight has dtype {weight.dtype}, that of table 0 has {weights[0].dtype}: they must be equal"
                )


@contextlib.contextmanager
def in_table(t: int) -> Iterator[None]:
    """Errors within it name the table."""
    try:
        yield
    except (TypeError, ValueError, IndexError) as error:
        raise type(error)(f"table {t}: {error}") from error
