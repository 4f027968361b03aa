"""Expressions: what the values of a graph are computed from, to be compared with each other.

`lucid_onnx.rewrite.normal_form` builds them in a normal form, so that two ways to write one computation compare equal;
`lucid_onnx.rewrite.reader` reads them from a graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

Dim = int | str | None


@dataclasses.dataclass(eq=False)
class Expression:
    """A computation. Compare with `difference`, never with ``==``.

    Attributes:
        op: the operator; "Constant" with ``array``, "Value" for a value whose computation is not looked at (such as an
            input of the graph), "Variable" for an input of a loop's body.
        output: which output of the operator.
        body: of a Loop: the body's variables and its results.
        value: the graph's value that this is, where there is one.
        folded_from: the inputs that a constant was computed from.
        dtype, shape: what follows from the inputs alone: two equal expressions agree in them, whatever their graphs
            declare. The normal form looks at nothing else.
        declared: what its graph declares of the value, for `type` and `dims`.
    """

    op: str
    inputs: tuple[Expression | None, ...] = ()
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    output: int = 0
    body: Body | None = None
    array: np.ndarray | None = None
    dtype: ir.DataType | None = None
    shape: tuple[Dim, ...] | None = None
    value: ir.Value | None = None
    folded_from: tuple[Expression, ...] = ()
    declared: Expression | None = None

    @property
    def type(self) -> ir.DataType | None:
        """The element type; of a sequence, that of its tensors."""
        return self.dtype if self.dtype is not None or self.declared is None else self.declared.dtype

    @property
    def dims(self) -> tuple[Dim, ...] | None:
        """The dimensions: numbers, names, or None."""
        declared = None if self.declared is None else self.declared.shape
        if self.shape is None or declared is None or len(self.shape) != len(declared):
            return declared if self.shape is None else self.shape
        return tuple(a if a is not None else b for a, b in zip(self.shape, declared, strict=True))

    @property
    def rank(self) -> int | None:
        """The number of dimensions."""
        return None if self.dims is None else len(self.dims)

    def __str__(self) -> str:
        if self.array is not None:
            text = np.array2string(self.array, threshold=8, separator=", ").replace("\n", "")
            dtype = "?" if self.dtype is None else self.dtype.name.lower()
            return f"the constant {text} ({dtype} {list(self.array.shape)})"
        if self.op in ("Value", "Variable"):
            return f"{self.op.lower()} {self.value.name!r}" if self.value is not None else self.op.lower()
        settings = ", ".join(f"{k}={v}" for k, v in self.attributes.items())
        name = "" if self.value is None or not self.value.name else f" {self.value.name!r}"
        return f"{self.op}({settings}){name}" if settings else f"{self.op}{name}"


@dataclasses.dataclass(eq=False)
class Body:
    """A loop's body: its variables, and what it computes from them and from outside."""

    variables: tuple[Expression, ...]
    results: tuple[Expression | None, ...]


# ---- Constants.


def constant(value: Any, dtype: Any = np.int64) -> Expression:
    """A constant, by default int64."""
    return from_array(np.asarray(value, dtype))


def from_array(
    array: np.ndarray, value: ir.Value | None = None, folded_from: tuple[Expression, ...] = ()
) -> Expression:
    """The constant ``array``."""
    return Expression(
        "Constant",
        array=array,
        dtype=ir.DataType.from_numpy(array.dtype),
        shape=array.shape,
        value=value,
        folded_from=folded_from,
    )


def number(e: Expression | None) -> int | float | bool | None:
    """The number of a constant with one element; None for everything else."""
    if e is None or e.array is None or e.array.size != 1:
        return None
    return e.array.reshape(-1)[0].item()  # type: ignore[no-any-return]


# ---- Walking.


def first_input(e: Expression | None) -> Expression | None:
    """The first input, or None."""
    return e.inputs[0] if e is not None and e.inputs else None


def input_of(e: Expression | None, op: str) -> Expression | None:
    """``x`` where ``e`` is ``op(x, ...)``; None where it is another operator."""
    return first_input(e) if e is not None and e.op == op else None


def subexpressions(expression: Expression | None, limit: int = 2000) -> Iterator[Expression]:
    """An expression and what it is computed from, breadth first, loops' bodies included; at most ``limit`` of them."""
    waiting: list[Expression | None] = [expression]
    seen: set[int] = set()
    for found in waiting:  # grows while it is walked
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        if len(seen) > limit:
            return
        yield found
        waiting += found.inputs
        if found.body is not None:
            waiting += found.body.results


# ---- Comparing.

_Pair = tuple[Expression | None, Expression | None]


def difference(a: Expression | None, b: Expression | None) -> _Pair | None:
    """None where both compute the same; else the first place where they differ."""
    waiting: list[_Pair] = [(a, b)]
    seen: set[tuple[int, int]] = set()
    counterparts: dict[int, Expression] = {}  # of the variables of the loops on the left
    while waiting:
        x, y = waiting.pop()
        if x is y:
            continue
        if x is None or y is None:
            return x, y
        if (id(x), id(y)) in seen:
            continue
        seen.add((id(x), id(y)))
        if x.op == "Variable" and counterparts.get(id(x)) is y:
            continue
        if not _same_node(x, y):
            return x, y
        if x.body is not None and y.body is not None:
            counterparts.update((id(p), q) for p, q in zip(x.body.variables, y.body.variables, strict=True))
            waiting += reversed(list(zip(x.body.results, y.body.results, strict=True)))
        waiting += reversed(list(zip(x.inputs, y.inputs, strict=True)))
    return None


def _same_node(x: Expression, y: Expression) -> bool:
    """Whether two different expressions are equal if their inputs and bodies are."""
    if x.op != y.op or x.op in ("Value", "Variable") or x.output != y.output:
        return False
    if x.array is not None or y.array is not None:
        # A folded constant keeps no inputs, so that there is nothing more to compare.
        return _same_array(x, y)
    if len(x.inputs) != len(y.inputs) or dict(x.attributes) != dict(y.attributes):
        return False
    if x.body is None or y.body is None:
        return True
    one, other = x.body, y.body
    return len(one.variables) == len(other.variables) and len(one.results) == len(other.results)


def _same_array(x: Expression, y: Expression) -> bool:
    if x.array is None or y.array is None or x.dtype != y.dtype or x.array.shape != y.array.shape:
        return False
    return x.array.tobytes() == y.array.tobytes()
