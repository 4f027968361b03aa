"""What is known of the numbers of tables that the model holds: whether they are finite, and how large.

External data is mapped, and of it no more is read than is looked at.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from lucid_onnx.rewrite.expressions import Expression

from .bag import FLOATS, INTEGERS
from .columns import whole_array
from .truth import MOVES

#: Among so many rows one that is finite is looked for.
_FEW = 1000
#: Elements that are looked at together: they stay in a core's caches.
_AT_ONCE = 2**16
#: By the bytes of a number: the integers of that size.
_BITS: dict[int, type[np.unsignedinteger]] = {2: np.uint16, 4: np.uint32, 8: np.uint64}
#: The largest difference of a quantized value from a zero_point, by the type of both.
_SPANS = {ir.DataType.INT8: 255, ir.DataType.UINT8: 255, ir.DataType.INT4: 15, ir.DataType.UINT4: 15}


def constant_table(weight: Expression) -> np.ndarray | None:
    """The rows of a constant table."""
    return whole_array(weight)


def is_finite_row(weight: Expression, row: int) -> bool:
    """Whether a row of a constant table is known, and finite."""
    table = constant_table(weight)
    return table is not None and row < len(table) and bool(np.isfinite(table[row].astype(np.float64)).all())


def finite_row(weight: Expression) -> int | None:
    """The first row of a constant table that is finite, if it is among the first few."""
    table = constant_table(weight)
    if table is None or not len(table):
        return None
    finite = np.isfinite(table[:_FEW].astype(np.float64)).all(axis=1)
    return int(finite.argmax()) if finite.any() else None


class Magnitudes:
    """The largest magnitude of a table's numbers, each table read once.

    1. A constant.
    2. What only moves or repeats numbers, or picks some.
    3. A Cast to a type that has them.
    4. A DequantizeLinear, by its scale alone.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[Expression, float]] = {}  # by id; the expression keeps its id

    def largest(self, e: Expression) -> float:
        """Infinity where it is not known, and where there is NaN or infinity."""
        if id(e) not in self._known:
            self._known[id(e)] = e, self._computed(e)
        return self._known[id(e)][1]

    def is_finite(self, e: Expression) -> bool:
        """Whether all numbers are known to be finite."""
        return math.isfinite(self.largest(e))

    def _computed(self, e: Expression) -> float:
        table = constant_table(e)
        if table is not None:  # 1
            return _largest_magnitude(table)
        first = e.inputs[0] if e.inputs else None
        if first is None:
            return math.inf
        if e.op in MOVES:
            return self.largest(first)  # 2
        if e.op == "Cast" and e.type in FLOATS:  # 3
            if first.type is not None and (first.type in INTEGERS or first.type == ir.DataType.BOOL):
                bits = 1 if first.type == ir.DataType.BOOL else 2 ** (8 * first.type.itemsize - 1)
                return float(bits) if bits <= _largest_number(e.type) else math.inf
            found = self.largest(first) if first.type in FLOATS else math.inf
            return found if found <= _largest_number(e.type) else math.inf
        scale = e.inputs[1] if e.op == "DequantizeLinear" and len(e.inputs) > 1 else None
        if scale is not None and first.type in _SPANS and e.type is not None:  # 4
            found = self.largest(scale) * _SPANS[first.type]
            return found if found <= _largest_number(e.type) else math.inf
        return math.inf


def _largest_number(dtype: ir.DataType) -> float:
    """The largest finite number of a type of floats; a rounding up to infinity begins above it."""
    if dtype == ir.DataType.BFLOAT16:
        return 3.3895313892515355e38
    return float(np.finfo(dtype.numpy()).max)


def _largest_magnitude(table: np.ndarray) -> float:
    """Read by bits, which takes a fifth of the time of `numpy.isfinite` and makes no array of the table's size."""
    if not table.size:
        return 0.0
    if table.dtype.kind in "iub":
        return float(max(abs(int(table.max())), abs(int(table.min()))))
    if table.dtype.itemsize not in _BITS:
        return math.inf
    bits = _BITS[table.dtype.itemsize]
    flat = np.ascontiguousarray(table).reshape(-1)
    magnitude, largest = bits(np.iinfo(bits).max >> 1), bits(0)
    for k in range(0, flat.size, _AT_ONCE):
        largest = max(largest, (flat[k : k + _AT_ONCE].view(bits) & magnitude).max())
    found = float(np.asarray([largest], bits).view(table.dtype)[0])
    return found if math.isfinite(found) else math.inf
