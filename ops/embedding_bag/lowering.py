"""EmbeddingBag in standard ONNX, in one of four ways (`Ragged`); right at any thread count.

Pieces, which `lucid_onnx.lower` asks for, are what a person would write. Indices [B, L] are a matrix: Gather its rows,
and reduce them over L. Four things are not obvious:

1. No If is in another. ONNX Runtime removes one whose condition it finds constant, as all are where somebody fixes B
   and L in the file or for a session, and then an If in it reads values by names that are gone: it fails, or crashes.
2. Sums run over the axis that keeps ONNX Runtime's order of additions the same at any thread count (see `_Matrix`).
3. More than 64 rows are added up 64 at a time, and those sums in float64: long bags are as exact as short ones.
4. Sums are ReduceSum, not MatMul with ones. That is no slower: over the middle axis, ReduceSum is such a MatMul inside
   of ONNX Runtime's CPU provider. But a MatMul node rounds rows to 11 bits on its CUDA and TensorRT providers, which
   use TF32 unless told otherwise, and to 8 bits in OpenVINO on CPUs that multiply matrices of bfloat16 (AMX). So their
   documentation says; neither was run.

Positions that are skipped are overwritten with the reduction's identity: selected, never multiplied by zero. ScatterND
does that, without a reduction and to targets that occur once. Its form with a reduction, which would pool a bag in one
node, races in ONNX Runtime (onnxruntime#18048).

Bags of different lengths are cut into blocks, in memory in proportion to what goes in and out. Every bag is cut into
blocks of C positions; ``[C, blocks, D]`` is gathered and reduced over C, and that is done again over the blocks of
those bags that have more than one. Three rounds are enough for any input:

1. C is about the mean bag length (16 to 64), so at most ``N + 16 B`` rows are gathered beyond a full block.
2. Only bags of more than one block come here, with about as many blocks each as they have on average.
3. Only bags that are still in pieces; C is the most pieces that any of them has.

No block ever mixes two bags, so that NaN and infinity stay in their own.

A row of the dummy bag behind the last keeps every tensor non-empty when there are no bags or no indices. A
table without rows has nothing to gather, not even for the dummy; then there are no blocks at all.

A loop goes over the bags, one after another: a quarter of the nodes, and slow where there are many bags. It adds up in
float64, so that a long bag is as exact as in blocks.

Padded bags are a matrix of positions [longest, B], gathered and reduced at once; bags of more than 64 positions in
equal pieces. Memory is in proportion to that matrix, whatever is in it. A longer bag is rejected, and comes out as NaN
where a runtime rejects nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import onnx

from ..attributes import check_choice
from ..emit import Emitter, forms
from . import spec

_INT, _FLOAT = onnx.AttributeProto.INT, onnx.AttributeProto.FLOAT
_SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 64
_LANES = 16  # float32 numbers in the widest vector register
_MEAN, _MAX, _SQRTN = (spec.MODES.index(mode) for mode in ("mean", "max", "sqrtn"))
_REFUSE, _WEIGHTS = 0, 2  # of negative and divisor


#: The ways to write bags.
RAGGED = ("pieces", "blocks", "loop", "padded")
#: What pieces of 64 positions can be, of which there are 64 at most: no more than that is added up in a row.
LONGEST_BAG = _LARGEST_BLOCK**2


@dataclasses.dataclass(frozen=True)
class Ragged:
    """How bags are written: one of `RAGGED`, and for "padded" the most positions that a bag may have.

    Without ``longest_bag`` that is the length of indices [B, L]; flat indices need it.

    Raises:
        TypeError: longest_bag is not an integer.
        ValueError: another way, longest_bag outside [1, `LONGEST_BAG`], or given where nothing is padded.
    """

    way: str = "blocks"
    longest_bag: int | None = None

    def __post_init__(self) -> None:
        check_choice("ragged", self.way, RAGGED)
        if self.longest_bag is None:
            return
        if isinstance(self.longest_bag, bool) or not isinstance(self.longest_bag, int):
            raise TypeError(f"longest_bag = {self.longest_bag!r} must be an integer or None")
        if self.way != "padded":
            raise ValueError(
                f"longest_bag = {self.longest_bag}, but ragged = {self.way!r}: only 'padded' has a longest"
            )
        if not 1 <= self.longest_bag <= LONGEST_BAG:
            raise ValueError(f"longest_bag = {self.longest_bag} is outside [1, {LONGEST_BAG}]")


PIECES = Ragged("pieces")
BLOCKS = Ragged()


#: Writes a value where it is needed.
_Write = Callable[[Emitter], str]


class Table(NamedTuple):
    """What the lowering reads rows from."""

    num_rows: str  #: [1]: V
    dim: str  #: [1]: D
    #: row numbers -> rows in the accumulation type, one dimension more; written where the Emitter writes
    rows: Callable[[Emitter, str], str]
    like: str | None  #: a value of the output's type; None where that is the accumulation type


class Layout(Protocol):
    """What the lowering needs to know of an operator name."""

    @property
    def two_d(self) -> bool: ...
    @property
    def weighted(self) -> bool: ...
    @property
    def inputs(self) -> tuple[str, ...]: ...


def expand(e: Emitter, op: spec.Variant, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Write the operator's nodes into ``e``."""
    weight = inputs[0]
    wide = e.knows(lambda a: a["stash_type"] == e.fact(weight).type)

    def rows(e: Emitter, index: str) -> str:
        found = e.Gather(weight, index)
        return found if wide else e.cast_to_attribute(found, "stash_type")

    e.part("num_rows")
    table = Table(e.Shape(weight, start=0, end=1), e.Shape(weight, start=1), rows, None if wide else weight)
    pool(e, op, inputs, outputs[0], table)


def pool(e: Emitter, op: Layout, inputs: Sequence[str], output: str, table: Table) -> None:
    """Write into ``e`` the nodes that pool the rows of a table, whatever it is made of, in the way of ``e.choice``."""
    spec.check_opset(e.opset)
    ragged = e.choice or BLOCKS
    if ragged == PIECES and not e.is_static:
        # A function's branches would be Ifs inside of Ifs. ONNX Runtime (1.32) inlines those whose conditions it finds
        # constant, as where B and L are fixed, and then refuses the model: "is not If node's input".
        ragged = BLOCKS
    named = dict(zip(op.inputs, inputs, strict=True))
    e.part("")
    ways = {"pieces": _in_pieces, "blocks": _in_blocks, "loop": _in_a_loop, "padded": _padded}
    pooled = ways[ragged.way](e, op, named, table)
    if table.like is not None:
        e.node("CastLike", (pooled, table.like), {}, output)
    else:
        e.rename(pooled, output)


class Skipped:
    """Which positions are skipped: those of one row. If that is known to be none, nothing is computed.

    The row is the padded one. Without padding it is -1, which no index is, but those that are skipped for being
    negative. Gather takes it for the last row, so that it can be read where there are rows.
    """

    def __init__(self, e: Emitter, num_rows: str) -> None:
        self._e = e
        self.is_none = e.knows(lambda a: a["padding_idx"] == spec.NO_PADDING and a["negative"] == _REFUSE)
        if e.knows(lambda a: a["padding_idx"] == spec.NO_PADDING):
            self.row = e.int64([-1])
            return
        value = e.attribute("padding_idx", _INT)
        self.row = e.Where(e.Less(value, 0), e.Add(value, num_rows), value)  # [1]
        if not e.is_static:  # NO_PADDING + V is far below -1
            self.row = e.Max(self.row, -1)

    def is_off(self) -> str:
        """Scalar: no position is skipped."""
        e = self._e
        if e.is_static:
            return e.constant(np.bool_(self.is_none))
        return str(
            e.And(
                e.Equal(e.attribute("padding_idx", _INT), spec.NO_PADDING),
                e.Equal(e.attribute("negative", _INT), _REFUSE),
            )
        )

    def at(self, index: str) -> str | None:
        """Which of ``index`` [C, M] are skipped; None where that is known to be none."""
        return None if self.is_none else str(self._e.Equal(index, self.row))

    def in_place_of_negative(self, indices: str, num_rows: str) -> str:
        """``indices`` with V in place of negative ones, which no runtime should take for rows, or with the row."""
        e = self._e
        other = num_rows
        if not e.knows(lambda a: a["negative"] == _REFUSE):
            refused = e.Equal(e.attribute("negative", _INT), _REFUSE)
            other = self.row if e.is_static else e.Where(refused, num_rows, self.row)
        return str(e.Where(e.Less(indices, 0), other, indices))

    def count_of_rows(self, e: Emitter, indices: str, length: str) -> str:
        """How many positions of each row of ``indices`` [B, L] are not skipped: [B], or [1] where that is L."""
        if self.is_none:
            return length
        kept = e.Cast(e.Not(e.Equal(indices, self.row)), to=onnx.TensorProto.INT64)
        return e.reduce("ReduceSum", kept, 1)

    def count(self, segments: Segments) -> str:
        """How many positions of each segment are not skipped."""

        def counted(b: Emitter) -> str:
            skipped = b.Cast(b.Equal(segments.indices, self.row), to=onnx.TensorProto.INT64)
            before = b.CumSum(b.Concat([0], skipped, axis=0), 0)  # [N + 1]: skipped ones before a position
            inside = b.Sub(b.Gather(before, segments.ends), b.Gather(before, segments.starts))
            return b.Sub(segments.lengths, inside)

        e = self._e
        return e.select(
            lambda a: not self.is_none,
            lambda: str(e.Not(self.is_off())),
            counted,
            lambda b: segments.lengths,
        )


class Segments(NamedTuple):
    """Bags as segments of the positions."""

    num_bags: str  #: [1]: B
    starts: str  #: [B]
    ends: str  #: [B]
    lengths: str  #: [B]
    num_indices: str  #: [1]: N
    indices: str  #: [N], int64; in place of negative ones V, or the row of `Skipped` where they are skipped
    skipped: Skipped


def read_bags(e: Emitter, op: Layout, named: Mapping[str, str], num_rows: str) -> Segments:
    """The bags, and an error where the offsets do not start at 0, decrease, or pass the indices.

    Without that error, offsets that run back and forth could ask for more memory than there is. (The maximum is
    taken of zeros and ones: ONNX Runtime 1.23 finds 0 the largest of [0, 2**31, -2**31 - 1, 0, 0, 0].)
    """
    if op.two_d:
        shape = e.Shape(named["indices"])
        num_bags = e.Slice(shape, [0], [1])
        length = e.Slice(shape, [1], [2])
        bags = e.Range(0, e.Squeeze(num_bags), 1)
        starts = e.Mul(bags, length)
        ends = e.Add(starts, length)
        indices = e.Reshape(named["indices"], [-1])
    else:
        indices = named["indices"]
        offsets = e.Cast(named["offsets"], to=onnx.TensorProto.INT64)
        num_bags = e.Sub(e.Shape(offsets), e.attribute("include_last_offset", _INT))
        bounds = e.Concat(offsets, e.Shape(indices), axis=0)
        starts = e.Slice(bounds, [0], num_bags)
        ends = e.Slice(bounds, [1], e.Add(num_bags, 1))
        # Without any offset the first bound is the number of indices, which must be 0 too.
        # There are -1 bags with include_last_offset and no offset.
        first = e.Slice(bounds, [0], [1])
        # Nothing is subtracted: the difference of two int64 may have another sign than theirs.
        below = e.Less(e.Concat(first, num_bags, axis=0), 0)
        past = e.Greater(ends, e.Shape(indices))
        wrong = e.Concat(below, e.Greater(first, 0), e.Greater(starts, ends), past, axis=0)
        starts = e.Add(starts, refusal(e, wrong))
    lengths = e.Sub(ends, starts)
    num_indices = e.Shape(indices)
    indices = e.Cast(indices, to=onnx.TensorProto.INT64)
    # Gather takes -1 for the last row. An index past the table is an error where Gather makes it one.
    skipped = Skipped(e, num_rows)
    indices = skipped.in_place_of_negative(indices, num_rows)
    return Segments(num_bags, starts, ends, lengths, num_indices, indices, skipped)


def refusal(e: Emitter, flags: str, **name: str) -> str:
    """[1]: 0, where no flag of at least one is set; elsewhere an error.

    Standard operators have no way to raise one, but Gather rejects an index past its data in ONNX Runtime on the CPU.
    The ``name`` of the node, if it is given one, is in the error.
    """
    numbers = e.Cast(flags, to=onnx.TensorProto.INT64)
    return str(e.Gather([0], e.reduce("ReduceMax", numbers, 0, keepdims=1), **name))


# ---- Pieces.

_PIECE = 64  # rows that are added up one after another, at most
_MANY_BAGS = 512  # no session should have more threads: bits are the same up to so many (see `_Matrix`)


def _in_pieces(e: Emitter, op: Layout, named: Mapping[str, str], table: Table) -> str:
    return _of_matrix(e, op, named, table) if op.two_d else _in_blocks(e, op, named, table)


def _of_matrix(e: Emitter, op: Layout, named: Mapping[str, str], table: Table) -> str:
    """[B, D] of indices [B, L]."""
    e.part("indices")
    indices = e.Cast(named["indices"], to=onnx.TensorProto.INT64)
    # Gather takes -1 for the last row. An index past the table is an error where Gather makes it one.
    skipped = Skipped(e, table.num_rows)
    indices = skipped.in_place_of_negative(indices, table.num_rows)
    indices = _none_without_rows(e, indices, table)
    weights = None
    if op.weighted:
        e.part("weights")
        weights = e.cast_to_attribute(named["per_sample_weights"], "stash_type")
        weights = _none_without_rows(e, weights, table)
    dims = e.fact(named["indices"]).dims or ()
    num_bags, known_length = dims if len(dims) == 2 else (None, None)
    if not e.knows(lambda a: a["negative"] == _REFUSE):
        known_length = None
    e.part("bag_length")
    length = e.Shape(indices, start=1, end=2) if known_length is None else e.int64([known_length])

    def count(b: Emitter) -> str:
        return skipped.count_of_rows(b, indices, length)

    if not e.is_static:  # outside of the branches, here and in what they call
        for number in (math.nan, -math.inf, 0, 1):
            stash(e, number)
        for name in ("max_norm", "norm_type"):
            _double_attribute(e, name)

    def read(b: Emitter, index: str, weights: str | None) -> str:
        b.part("rows")
        rows = clipped(b, table.rows(b, index))
        if weights is not None:
            rows = _weighted(b, rows, b.Unsqueeze(weights, [2]))
        return _without_skipped(b, rows, index, skipped)

    def reduced(b: Emitter, rows: str, length: str) -> str:
        """[B, L, D] -> [B, D]"""
        b.part("sums")

        def maximum(c: Emitter) -> str:
            return _maximum_of_matrix(c, rows, length, known_length)

        return b.select(
            lambda a: a["mode"] == _MAX, lambda: _is_max(b), maximum, lambda c: c.reduce("ReduceSum", rows, 1)
        )

    pooled = _Matrix(read, reduced, indices, weights, length).write(e, num_bags, known_length)
    if not skipped.is_none:
        e.part("empty_bags")
        pooled = e.select(
            lambda a: a["mode"] == _MAX,
            lambda: _is_max(e),
            lambda b: b.Where(b.Unsqueeze(b.Greater(count(b), 0), [1]), pooled, stash(b, 0)),
            lambda b: pooled,
        )
    e.part("divided")
    if skipped.is_none and e.knows(lambda a: divides(a) and not by_weights(a)):
        if known_length is not None:
            total = stash(e, max(known_length, 1))
        else:
            total = e.cast_to_attribute(e.Max(length, 1), "stash_type")
        return str(e.Div(pooled, divisor_of(e, total)))

    def dim(b: Emitter) -> str:
        if b.is_static:
            return b.int64([-1])
        return str(b.Sub(b.Shape(pooled, start=1), b.Cast(is_by_weights(b), to=onnx.TensorProto.INT64)))

    return _divided(e, op, pooled, count, dim)


def _none_without_rows(e: Emitter, matrix: str, table: Table) -> str:
    """``matrix`` [B, L], or [B, 0] if negative indices are skipped in a table without rows: they are all skipped."""

    def some(b: Emitter) -> str:
        return str(b.Slice(matrix, [0], b.Mul(b.Shape(matrix, start=1, end=2), b.Min(table.num_rows, [1])), [1]))

    return e.select(
        lambda a: a["negative"] != _REFUSE,
        lambda: str(e.Not(e.Equal(e.attribute("negative", _INT), _REFUSE))),
        some,
        lambda b: matrix,
    )


class _Matrix(NamedTuple):
    """Bags of a matrix of indices, [B, D].

    ONNX Runtime adds up the middle axis of [B, L, D] in one order if it has no more threads than B, and in another if
    it has more. Over the first axis of [L, B, D] it has one order, but is slower. So many bags are read as [B, L], and
    few as [L, B]. A maximum depends on no order, and is faster over the middle axis.
    """

    read: Callable[[Emitter, str, str | None], str]  #: index and weights, both [X, Y] -> rows [X, Y, D]
    reduced: Callable[[Emitter, str, str], str]  #: rows [B, L, D] and L -> [B, D]
    indices: str  #: [B, L]
    weights: str | None  #: [B, L]
    length: str  #: [1]: L

    def write(self, e: Emitter, num_bags: int | None, length: int | None) -> str:
        """``num_bags`` and ``length`` are B and L where they are known."""
        if length is not None and length > _PIECE:
            return self._of_long(e, length)
        if length is not None and e.knows(lambda a: a["mode"] == _MAX):
            return self._many(e)
        if length is not None and (num_bags is None or num_bags < _MANY_BAGS):
            return self._few(e)
        if length is not None:
            return self._many(e)
        return self._of_any_length(e)

    def _of_any_length(self, e: Emitter) -> str:
        """Whole pieces of 64 positions, where there are any, and the 0 to 64 that are left."""
        e.part("pieces_of_64")
        count = e.Div(e.Max(e.Sub(self.length, 1), [0]), _PIECE)
        whole = e.Mul(count, _PIECE)
        e.part("rest")
        index = e.Slice(self.indices, whole, self.length, [1])
        weights = None if self.weights is None else e.Slice(self.weights, whole, self.length, [1])
        of_rest = self._replace(indices=index, weights=weights, length=e.Sub(self.length, whole))
        is_max = e.knows(lambda a: a["mode"] == _MAX)
        rest = of_rest._many(e) if is_max else of_rest._in_rows_or_columns(e)
        e.part("bags")
        are_long = e.Squeeze(e.Greater(count, 0))
        long = lambda b: self._long(b, count, whole, rest)  # noqa: E731
        return e.branch(are_long, long, lambda b: rest, names=("long_bags", "short_bags"), rank=2)

    def _in_rows_or_columns(self, e: Emitter) -> str:
        """Sums of indices read as [B, L] if there are many bags, as [L, B] if there are few."""
        e.part("bags_are_many")
        are_many = e.Squeeze(e.GreaterOrEqual(e.Shape(self.indices, start=0, end=1), _MANY_BAGS))

        def laid_out(matrix: str, kind: int | None = None) -> str:
            turned = lambda b: b.Transpose(matrix, perm=[1, 0])  # noqa: E731
            names = ("bags_in_rows", "bags_in_columns")
            return e.branch(are_many, lambda b: matrix, turned, names=names, rank=2, kind=kind)

        e.part("layout")
        weights = None if self.weights is None else laid_out(self.weights)
        rows = self.read(e, laid_out(self.indices, onnx.TensorProto.INT64), weights)

        def in_columns(b: Emitter) -> str:
            b.part("sums")
            return b.reduce("ReduceSum", rows, 0)

        e.part("sums")
        return e.branch(
            are_many, lambda b: self.reduced(b, rows, self.length), in_columns, names=("many_bags", "few_bags"), rank=2
        )

    def _turned(self, e: Emitter) -> tuple[str, str | None]:
        """Indices and weights as [L, B]."""
        e.part("layout")
        weights = None if self.weights is None else e.Transpose(self.weights, perm=[1, 0])
        return e.Transpose(self.indices, perm=[1, 0]), weights

    def _many(self, e: Emitter) -> str:
        return self.reduced(e, self.read(e, self.indices, self.weights), self.length)

    def _few(self, e: Emitter) -> str:
        rows = self.read(e, *self._turned(e))
        e.part("sums")
        return e.reduce("ReduceSum", rows, 0)

    def _of_long(self, e: Emitter, length: int) -> str:
        """As `_of_any_length`, where the length is known and above 64."""
        count = (length - 1) // _PIECE
        index, weights = self._turned(e)

        def left(x: str) -> str:
            return str(e.Slice(x, [count * _PIECE], [length], [0]))

        e.part("rest")
        rest = self._pooled_columns(e, left(index), None if weights is None else left(weights))  # [B, D]
        return self._long(e, e.int64([count]), e.int64([count * _PIECE]), rest)

    def _long(self, e: Emitter, count: str, whole: str, rest: str) -> str:
        """``count`` pieces of 64 of a bag's rows, it does not matter which, and the pooled ``rest`` [B, D]."""
        index, weights = self._turned(e)
        e.part("pieces_of_64")

        def pieces(x: str) -> str:
            return str(e.Reshape(e.Slice(x, [0], whole, [0]), [_PIECE, -1]))

        pooled = self._pooled_columns(e, pieces(index), None if weights is None else pieces(weights))  # [F B, D]
        e.part("pools_of_pieces")
        pooled = e.Reshape(pooled, e.Concat(count, e.Shape(rest), axis=0), allowzero=1)
        pooled = e.Concat(pooled, e.Unsqueeze(rest, [0]), axis=0)
        return e.select(
            lambda a: a["mode"] == _MAX,
            lambda: _is_max(e),
            lambda b: _maximum(b, pooled, 0),
            lambda b: _exact_sum(b, pooled),
        )

    def _pooled_columns(self, e: Emitter, index: str, weights: str | None) -> str:
        """[M, D] of indices [X, M]. Maxima are taken over the middle axis: see above."""
        if weights is None:  # of weights there is no maximum
            index = e.select(
                lambda a: a["mode"] == _MAX,
                lambda: _is_max(e),
                lambda b: b.Transpose(index, perm=[1, 0]),
                lambda b: index,
            )
        rows = self.read(e, index, weights)
        return e.select(
            lambda a: a["mode"] == _MAX,
            lambda: _is_max(e),
            lambda b: _maximum(b, rows),
            lambda b: b.reduce("ReduceSum", rows, 0),
        )


def _maximum_of_matrix(e: Emitter, rows: str, length: str, known_length: int | None) -> str:
    """[B, L, D] -> [B, D], where a NaN wins; zeros where L is 0.

    The sums of the rows tell whether there may be a NaN, which seldom is so.
    """
    if known_length == 0:
        e.part("empty_bags")
        return str(e.Expand(stash(e, 0), e.Concat(e.Shape(rows, start=0, end=1), e.Shape(rows, start=2), axis=0)))
    nans = e.Cast(e.IsNaN(e.reduce("ReduceSum", rows, 1)), to=onnx.TensorProto.FLOAT)
    count = e.ReduceSum(nans, [0, 1], keepdims=0)
    is_quick = e.LessOrEqual(count, e.constant(np.float32(0)))
    if known_length is None:
        is_quick = e.And(is_quick, e.Squeeze(e.Greater(length, 0)))

    def careful(b: Emitter) -> str:
        if known_length is not None:
            return _maximum(b, rows)
        # A row more, so that there is one.
        least = b.Expand(stash(b, -math.inf), b.Concat(b.Shape(rows, end=1), [1], b.Shape(rows, start=2), axis=0))
        largest = _maximum(b, b.Concat(rows, least, axis=1))
        return b.Where(b.Greater(length, 0), largest, stash(b, 0))

    return e.branch(
        is_quick,
        lambda b: b.reduce("ReduceMax", rows, 1),
        careful,
        names=("no_nan", "maybe_nan_or_no_rows"),
        rank=2,
    )


def _without_skipped(e: Emitter, rows: str, index: str, skipped: Skipped) -> str:
    """``rows`` with the reduction's identity where ``index`` is skipped."""

    def filled(b: Emitter) -> str:
        b.part("skipped")
        holes = b.Transpose(b.NonZero(b.Equal(index, skipped.row)), perm=[1, 0])  # [K, 2]
        fill = b.Expand(_identity(b), b.Concat(b.Shape(holes, end=1), b.Shape(rows, start=2), axis=0))
        return str(b.ScatterND(rows, holes, fill))

    return e.select(lambda a: not skipped.is_none, lambda: str(e.Not(skipped.is_off())), filled, lambda b: rows)


# ---- Blocks.


def _in_blocks(e: Emitter, op: Layout, named: Mapping[str, str], table: Table) -> str:
    num_rows, dim = table.num_rows, _columns(e, op, table)
    live = e.Min(num_rows, [1])  # [1]: 1, or 0 for a table without rows

    bags = read_bags(e, op, named, num_rows)
    num_bags, starts, ends, lengths, num_indices, indices, skipped = bags

    longest = e.reduce("ReduceMax", e.Concat(lengths, [1], axis=0), 0, keepdims=1)
    mean_length = e.Div(num_indices, e.Max(num_bags, [1]))
    cap = e.Min(e.Max(mean_length, [_SMALLEST_BLOCK]), [_LARGEST_BLOCK])
    # Blocks of equal size for the longest, and so for all where all are alike: no holes.
    block = ceil_div(e, longest, ceil_div(e, longest, cap))

    # Behind the bags two dummies, over a block of positions behind the last that all read row 0: one empty and
    # one full, so that neither kind of block is ever missing.
    segments = e.Mul(e.Add(num_bags, 2), live)
    behind = e.Add(num_indices, block)
    segment_starts = e.Slice(e.Concat(starts, num_indices, num_indices, axis=0), [0], segments)
    segment_ends = e.Slice(e.Concat(ends, num_indices, behind, axis=0), [0], segments)
    positions = {"indices": e.Concat(indices, e.Expand(0, block), axis=0)}
    if op.weighted:
        flat = e.Reshape(named["per_sample_weights"], [-1])
        flat = e.cast_to_attribute(flat, "stash_type")
        extra = e.Expand(stash(e, 0), block)
        positions["weights"] = e.Concat(flat, extra, axis=0)

    counts = skipped.count(bags)
    identity = _identity(e)

    def index(at: str) -> str:
        # GatherElements takes a fifth of the time on ONNX Runtime, and onnx.reference fails on more than 64 numbers.
        return str(e.Gather(positions["indices"], at))

    def table_rows(at: str) -> str:
        rows = clipped(e, table.rows(e, index(at)))
        if op.weighted:
            rows = _weighted(e, rows, e.Unsqueeze(e.Gather(positions["weights"], at), [-1]))
        return rows

    def skip(at: str) -> str | None:
        return skipped.at(index(at))

    first = _first(e, segment_starts, segment_ends, block, num_indices, identity, dim, table_rows, skip, skipped)

    # The second and third round read the rows of the one before. Few bags need them, often none.
    second, long = _again(e, first, live, identity, dim, final=False)
    third, longer = _again(e, second, live, identity, dim, final=True)
    num_first, num_second = e.Shape(first.rows, end=1), e.Shape(second.rows, end=1)
    place = e.Add(second.begins, num_first)
    place = e.ScatterElements(place, longer, _real(e, e.Add(third.begins, e.Add(num_first, num_second)), longer))
    place = e.ScatterElements(first.at(e, first.begins), long, _real(e, place, long))

    # Empty bags, and all bags of a table without rows, read the row of zeros at the end.
    zero = e.Expand(stash(e, 0), e.Concat([1], dim, axis=0))
    zero_place = e.Add(e.Add(num_first, num_second), e.Shape(third.rows, end=1))
    place = e.Slice(e.Concat(place, e.Expand(zero_place, num_bags), axis=0), [0], num_bags)
    place = e.Where(e.Greater(counts, 0), place, zero_place)
    pooled = e.Gather(e.Concat(first.rows, second.rows, third.rows, zero, axis=0), place)
    return _divided(e, op, pooled, lambda b: counts, lambda b: table.dim)


class _Round(NamedTuple):
    """What a round leaves."""

    begins: str  #: [S]: the first block of each segment
    pieces: str  #: [S]: how many blocks it has
    rows: str  #: [M, D]: the blocks' results
    place: str | None = None  #: [M]: where in ``rows`` a block is, if not at its own number

    def at(self, e: Emitter, blocks: str) -> str:
        """Where in ``rows`` the given blocks are."""
        return blocks if self.place is None else str(e.Gather(self.place, blocks))


_Read = Callable[[str], str]  #: positions [C, M] -> rows [C, M, D]
_Skip = Callable[[str], "str | None"]  #: positions [C, M] -> which of them to skip [C, M], or None


class _Blocks(NamedTuple):
    """Segments cut into blocks: of each segment as in `_Round`, of each block where it starts and must end."""

    begins: str
    pieces: str
    total: str  # [1]: M
    first: str  # [M]
    end: str  # [M]


def _cut(e: Emitter, starts: str, ends: str, block: str) -> _Blocks:
    """Cut segments [S] into ``ceil(length / block)`` blocks each, at least one."""
    pieces = e.Max(ceil_div(e, e.Sub(ends, starts), block), 1)
    begins = e.CumSum(pieces, 0, exclusive=1)
    total = e.reduce("ReduceSum", pieces, 0, keepdims=1)
    # Which segment each block is of: every segment has a first block, so the targets are distinct.
    marks = e.ScatterElements(e.Expand(0, total), begins, e.Expand(1, e.Shape(begins)))
    segment = e.Sub(e.CumSum(marks, 0), 1)
    base = e.Gather(e.Sub(starts, e.Mul(begins, block)), segment)
    first = e.Add(base, e.Mul(e.Range(0, e.Squeeze(total), 1), block))
    return _Blocks(begins, pieces, total, first, e.Gather(ends, segment))


def _positions(e: Emitter, first: str, count: str, step: str | None = None) -> str:
    """The positions of blocks that start at ``first`` [M]: [C, M] or [M, C], see `_axes`."""
    across, along = _axes(e)
    first = e.Unsqueeze(first, along)
    steps = e.Range(0, e.Squeeze(count), 1)
    steps = steps if step is None else e.Mul(steps, step)
    return str(e.Add(first, e.Unsqueeze(steps, across)))


def _with_holes(
    e: Emitter,
    first: str,
    end: str,
    block: str,
    absent: str,
    identity: str,
    dim: str,
    read: _Read,
    skip: _Skip = lambda at: None,
) -> str:
    """Reduce blocks that may have holes: positions at or past ``end`` [M], and those to ``skip``.

    Args:
        absent: a position that exists and belongs to no bag, to read in place of a hole, [1].
        identity: the reduction's identity, scalar.
        dim: the rows' length D, [1].
    """
    at = _positions(e, first, block)
    hole = e.GreaterOrEqual(at, e.Unsqueeze(end, _axes(e)[1]))
    at = e.Where(hole, absent, at)
    rows, also = read(at), skip(at)
    if also is not None:
        hole = e.Or(hole, also)
    holes = e.Transpose(e.NonZero(hole), perm=[1, 0])  # [K, 2]
    fill = e.Expand(identity, e.Concat(e.Shape(holes, end=1), dim, axis=0))
    return _reduced(e, e.ScatterND(rows, holes, fill))


def _first(
    e: Emitter,
    starts: str,
    ends: str,
    block: str,
    absent: str,
    identity: str,
    dim: str,
    read: _Read,
    skip: _Skip,
    skipped: Skipped,
) -> _Round:
    """The round over the table, where the time goes: blocks without holes are spared the pass that fills them."""
    cut = _cut(e, starts, ends, block)
    whole = e.LessOrEqual(e.Add(cut.first, block), cut.end)
    # Where positions are skipped, every block may have holes, except the full dummy: it is the last block.
    spared = e.GreaterOrEqual(e.Range(0, e.Squeeze(cut.total), 1), e.Sub(cut.total, 1))
    whole = e.And(whole, e.Or(skipped.is_off(), spared))
    # Whole blocks first. Two NonZero would find both kinds, but IREE gives one the other's positions.
    number = e.Range(0, e.Squeeze(cut.total), 1)
    flags = e.Cast(whole, to=onnx.TensorProto.INT64)
    before, count = e.CumSum(flags, 0, exclusive=1), e.reduce("ReduceSum", flags, 0, keepdims=1)
    place = e.Where(whole, before, e.Add(count, e.Sub(number, before)))
    order = e.ScatterElements(number, place, number)  # the inverse of place
    full, rest = e.Slice(order, [0], count), e.Slice(order, count, cut.total)
    first, end = e.Gather(cut.first, rest), e.Gather(cut.end, rest)
    rows = e.Concat(
        _reduced(e, read(_positions(e, e.Gather(cut.first, full), block))),
        _with_holes(e, first, end, block, absent, identity, dim, read, skip),
        axis=0,
    )
    return _Round(cut.begins, cut.pieces, rows, place)


def _again(e: Emitter, before: _Round, live: str, identity: str, dim: str, *, final: bool) -> tuple[_Round, str]:
    """Reduce the rows of those segments that a round left in several pieces; also returns which they are.

    A dummy segment is the last of the new round, so that it is never empty.
    """
    several = e.Squeeze(e.NonZero(e.Greater(before.pieces, 1)), [0])
    starts = e.Concat(e.Gather(before.begins, several), e.Expand(0, live), axis=0)
    lengths = e.Concat(e.Gather(before.pieces, several), e.Expand(1, live), axis=0)
    block = e.reduce("ReduceMax", e.Concat(lengths, [1], axis=0), 0, keepdims=1)
    if not final:
        mean = e.Div(e.reduce("ReduceSum", lengths, 0, keepdims=1), e.Max(e.Shape(lengths), [1]))
        # With C at the cube root of the longest, the third round stays as small as this one.
        root = e.Pow(e.Cast(block, to=onnx.TensorProto.FLOAT), e.constant(np.float32(1 / 3)))
        root = e.Cast(e.Ceil(root), to=onnx.TensorProto.INT64)
        # The largest block is a bound on the rounding too: additions run one after another in a block.
        block = e.Min(block, e.Max(e.Min(mean, [_LARGEST_BLOCK]), root, [_SMALLEST_BLOCK]))

    def read(at: str) -> str:
        return str(e.Gather(before.rows, before.at(e, at)))

    cut = _cut(e, starts, e.Add(starts, lengths), block)
    rows = _with_holes(e, cut.first, cut.end, block, e.int64([0]), identity, dim, read)
    return _Round(cut.begins, cut.pieces, rows), several


def _real(e: Emitter, values: str, several: str) -> str:
    """``values`` without the dummy segment's."""
    return e.Slice(values, [0], e.Shape(several))


# ---- A loop.


def _in_a_loop(e: Emitter, op: Layout, named: Mapping[str, str], table: Table) -> str:
    """[B, D], a bag an iteration.

    An iteration has a position more than its bag, so that it is never without any: after an iteration with tensors of
    no elements, ONNX Runtime before 1.19 gives values the memory of others.
    """
    bags = read_bags(e, op, named, table.num_rows)
    num_bags, starts, ends, lengths, num_indices, indices, skipped = bags
    counts = skipped.count(bags)
    live = e.Min(table.num_rows, [1])  # [1]: 1, or 0 for a table without rows
    if not e.knows(lambda a: a["negative"] == _REFUSE):  # without rows all positions may be skipped: read none
        ends = e.Add(starts, e.Mul(lengths, e.Max(live, e.Sub(1, e.attribute("negative", _INT)))))
    # An empty bag behind the others: where there are none, a runtime could not tell D.
    starts, ends = (e.Concat(bounds, num_indices, axis=0) for bounds in (starts, ends))
    behind = e.Add(ends, live)  # a table without rows has none to read there
    positions = e.Concat(indices, [0], axis=0)
    weights = None
    if op.weighted:
        flat = e.cast_to_attribute(e.Reshape(named["per_sample_weights"], [-1]), "stash_type")
        weights = e.Concat(flat, e.Expand(stash(e, 0), [1]), axis=0)
    identity = _identity(e)
    dim = _columns(e, op, table)
    nothing = e.Expand(identity, e.Concat([1], [1], dim, axis=0))
    absent = e.Squeeze(num_indices)
    if not e.is_static:  # written out here, and not in the loop
        _is_max(e)

    def bag(b: Emitter, number: str) -> str:
        at = b.Range(b.Gather(starts, number), b.Gather(behind, number), 1)
        hole = b.GreaterOrEqual(at, b.Gather(ends, number))
        at = b.Where(hole, absent, at)
        index = b.Gather(positions, at)
        if not skipped.is_none:
            hole = b.Or(hole, b.Equal(index, skipped.row))
        rows = clipped(b, table.rows(b, b.Unsqueeze(index, [1])))  # [n + 1, 1, D]
        if weights is not None:
            rows = _weighted(b, rows, b.Unsqueeze(b.Gather(weights, at), [1, 2]))
        rows = b.Concat(b.Where(b.Unsqueeze(hole, [1, 2]), identity, rows), nothing, axis=0)
        return b.select(
            lambda a: a["mode"] == _MAX,
            lambda: _is_max(b),
            lambda c: _maximum(c, rows, 0),
            lambda c: _exact_sum(c, rows),
        )

    pooled = e.stacked(e.Add(num_bags, 1), bag)
    # [B + 1, 1, D], but onnx.reference stacks to [B + 1, D].
    pooled = e.Reshape(pooled, e.Concat(e.Add(num_bags, 1), dim, axis=0), allowzero=1)
    pooled = e.Slice(pooled, [0], num_bags)
    pooled = e.select(
        lambda a: a["mode"] == _MAX,
        lambda: _is_max(e),
        lambda b: b.Where(b.Unsqueeze(b.Greater(counts, 0), [1]), pooled, stash(b, 0)),
        lambda b: pooled,
    )
    return _divided(e, op, pooled, lambda b: counts, lambda b: table.dim)


def _exact_sum(e: Emitter, rows: str) -> str:
    """[n, 1, D] -> [1, D], added up in float64 and rounded once: one after another, in float32 1000 rows would show."""
    if e.knows(lambda a: a["stash_type"] == onnx.TensorProto.DOUBLE):
        return e.reduce("ReduceSum", rows, 0)
    return e.cast_to_attribute(e.reduce("ReduceSum", e.Cast(rows, to=onnx.TensorProto.DOUBLE), 0), "stash_type")


# ---- Padded.


def _padded(e: Emitter, op: Layout, named: Mapping[str, str], table: Table) -> str:
    """[B, D], of all bags at once, each as long as the longest may be."""
    num_rows, dim = table.num_rows, _columns(e, op, table)
    longest = e.choice.longest_bag
    if longest is None and not op.two_d:
        raise ValueError("ragged = 'padded' needs longest_bag: the lengths of bags are only in the offsets")
    limit = LONGEST_BAG if longest is None else longest
    bags = read_bags(e, op, named, num_rows)
    num_bags, starts, ends, lengths, num_indices, indices, skipped = bags
    live = e.Min(num_rows, [1])  # [1]: 1, or 0 for a table without rows
    too_long = e.Greater(lengths, limit)
    refused = e.Concat(too_long, e.constant(np.zeros(1, np.bool_)), axis=0)
    starts = e.Add(starts, refusal(e, refused, name=f"{e.prefix}no_bag_is_longer_than_{limit}"))
    if op.two_d:
        length = e.Max(e.Min(e.Slice(e.Shape(named["indices"]), [1], [2]), [limit]), [1])
        pieces = ceil_div(e, length, e.int64([_LARGEST_BLOCK]))
        block = ceil_div(e, length, pieces)
    else:
        count = -(-limit // _LARGEST_BLOCK)
        pieces, block = e.int64([count]), e.int64([-(-limit // count)])

    counts = skipped.count(bags)
    # Behind the bags an empty one, and behind the positions one that reads row 0, so that nothing is ever empty.
    some = e.Mul(e.Add(num_bags, 1), live)
    starts, ends = (e.Slice(e.Concat(bounds, num_indices, axis=0), [0], some) for bounds in (starts, ends))
    positions = e.Concat(indices, [0], axis=0)
    weights = None
    if op.weighted:
        flat = e.cast_to_attribute(e.Reshape(named["per_sample_weights"], [-1]), "stash_type")
        weights = e.Concat(flat, e.Expand(stash(e, 0), [1]), axis=0)

    def read(at: str) -> str:
        rows = clipped(e, table.rows(e, e.Gather(positions, at)))
        return rows if weights is None else _weighted(e, rows, e.Unsqueeze(e.Gather(weights, at), [-1]))

    def skip(at: str) -> str | None:
        return skipped.at(e.Gather(positions, at))

    identity = _identity(e)
    if longest is not None and longest <= _LARGEST_BLOCK:
        rows = _with_holes(e, starts, ends, block, num_indices, identity, dim, read, skip)
    else:
        first = _positions(e, starts, pieces, block)  # [P, B], or [B, P] to take the maximum
        end = e.Expand(e.Unsqueeze(ends, _axes(e)[1]), e.Shape(first))
        rows = _with_holes(
            e, e.Reshape(first, [-1]), e.Reshape(end, [-1]), block, num_indices, identity, dim, read, skip
        )
        rows = _reduced(e, e.Reshape(rows, e.Concat(e.Shape(first), dim, axis=0), allowzero=1))

    # Bags without rows read zeros, and those that are too long, where no runtime has rejected them, NaN.
    zeros, nans = (e.Expand(stash(e, number), e.Concat([1], dim, axis=0)) for number in (0, math.nan))
    place = e.Range(0, e.Squeeze(num_bags), 1)
    place = e.Where(e.Greater(e.Mul(counts, live), 0), place, some)
    place = e.Where(too_long, e.Add(some, 1), place)
    pooled = e.Gather(e.Concat(rows, zeros, nans, axis=0), place)
    return _divided(e, op, pooled, lambda b: counts, lambda b: table.dim)


# ---- What they share.


def ceil_div(e: Emitter, a: str, b: str) -> str:
    return e.Div(e.Add(a, e.Sub(b, 1)), b)


def divides(a: Mapping[str, int | float]) -> bool:
    """Whether the mode is mean or sqrtn."""
    return a["mode"] in (_MEAN, _SQRTN)


def is_dividing(e: Emitter) -> str:
    """`divides`, as a scalar: these modes have the odd numbers."""
    return str(e.Equal(e.Mod(e.attribute("mode", _INT), 2), 1))


def by_weights(a: Mapping[str, int | float]) -> bool:
    """Whether per_sample_weights, if there are any, are what is divided by."""
    return divides(a) and a["divisor"] == _WEIGHTS


def is_by_weights(e: Emitter) -> str:
    """`by_weights`, as a scalar."""
    return str(e.And(is_dividing(e), e.Equal(e.attribute("divisor", _INT), _WEIGHTS)))


def where_sqrtn(e: Emitter, then: str, otherwise: str) -> str:
    """``then`` if the mode is sqrtn."""
    if e.is_static:
        return then if e.knows(lambda a: a["mode"] == _SQRTN) else otherwise
    return str(e.Where(e.Equal(e.attribute("mode", _INT), _SQRTN), then, otherwise))


def divisor_of(e: Emitter, total: str) -> str:
    """What mean and sqrtn divide by, from the number or the sum of weights of each bag."""
    return where_sqrtn(e, e.Sqrt(total), total)


def as_counts(e: Emitter, counts: str) -> str:
    """The number of positions of each bag, 1 for none, as a column [B, 1]."""
    return str(e.Unsqueeze(e.cast_to_attribute(e.Max(counts, 1), "stash_type"), [1]))


def _columns(e: Emitter, op: Layout, table: Table) -> str:
    """How many columns are pooled, [1]: D, and one of weights where these are divided by."""
    if not op.weighted or (e.is_static and not e.knows(by_weights)):
        return table.dim
    return str(e.Add(table.dim, e.Cast(is_by_weights(e), to=onnx.TensorProto.INT64)))


def _weighted(e: Emitter, rows: str, weights: str) -> str:
    """Rows [..., D] times their weights [..., 1]; behind them the weights or their squares, if `by_weights`."""
    product = e.Mul(rows, weights)
    if not e.is_static:
        stash(e, 1)
    return e.select(
        by_weights,
        lambda: is_by_weights(e),
        lambda b: b.Concat(product, b.Mul(weights, where_sqrtn(b, weights, stash(b, 1))), axis=-1),
        lambda b: product,
    )


def _divided(e: Emitter, op: Layout, pooled: str, count: _Write, dim: _Write) -> str:
    """What was pooled, of `_columns`, divided as mean and sqrtn say: [B, D].

    A bag without positions, which has a row of zeros, is divided by 1.

    Args:
        count: writes the number of each bag's positions, where it is needed.
        dim: writes D, or -1 for all columns but the last, [1].
    """

    def divided(b: Emitter) -> str:
        counts = count(b)
        total, sums = as_counts(b, counts), pooled
        if op.weighted and (not b.is_static or b.knows(by_weights)):
            some = b.Unsqueeze(b.Greater(counts, 0), [1])
            if not b.is_static:
                some = b.And(some, is_by_weights(b))
            total = b.Where(some, b.Slice(pooled, [-1], [2**31 - 1], [1]), total)
            sums = b.Slice(pooled, [0], dim(b), [1])
        return b.Div(sums, divisor_of(b, total))

    return e.select(divides, lambda: is_dividing(e), divided, lambda b: pooled)


def _is_max(e: Emitter) -> str:
    return e.Equal(e.attribute("mode", _INT), _MAX)


def _identity(e: Emitter) -> str:
    """What does not change a sum, or a maximum, scalar."""
    if not e.is_static:  # outside of the branches, here and in `_maximum`
        for number in (math.nan, -math.inf, 0):
            stash(e, number)
    return e.select(
        lambda a: a["mode"] == _MAX,
        lambda: _is_max(e),
        lambda b: stash(b, -math.inf),
        lambda b: stash(b, 0),
    )


def _axes(e: Emitter) -> tuple[str, str]:
    """The axes of M and of C in a block matrix, each [1]: [C, M] to sum, [M, C] to take the maximum.

    Summing over the first axis, ONNX Runtime adds row after row at any thread count. Over the middle axis it
    changes its order of additions when there are fewer blocks than threads, and with it the bits. A maximum has no
    such order, and over the first axis it is 14 times slower (0.6 ms and 7.9 ms for [20, 2048, 64]).
    """
    if e.is_static:
        along = int(e.knows(lambda a: a["mode"] == _MAX))
        return e.int64([1 - along]), e.int64([along])
    axis = e.Unsqueeze(e.Cast(_is_max(e), to=onnx.TensorProto.INT64), [0])
    return e.Sub([1], axis), axis


def _reduced(e: Emitter, blocks: str) -> str:
    """[C, M, D] (sum) or [M, C, D] (max) -> [M, D]."""
    return e.select(
        lambda a: a["mode"] == _MAX,
        lambda: _is_max(e),
        lambda b: _maximum(b, blocks),
        lambda b: b.reduce("ReduceSum", blocks, 0),
    )


def _maximum(e: Emitter, blocks: str, axis: int = 1, keepdims: int = 0) -> str:
    """The maximum, where a NaN wins. ONNX Runtime's ReduceMax drops every NaN but one in the first place."""
    nans = e.reduce("ReduceSum", e.Cast(e.IsNaN(blocks), to=onnx.TensorProto.FLOAT), axis, keepdims)
    largest = e.reduce("ReduceMax", blocks, axis, keepdims)
    return e.Where(e.Greater(nans, e.constant(np.float32(0))), stash(e, math.nan), largest)


def clipped(e: Emitter, rows: str, *, ties: bool = False) -> str:
    """Scale rows [C, M, D] whose norm is above max_norm down to it. The table itself is never copied.

    With ``ties`` equal rows stay equal, to the bit. ONNX Runtime adds up a row in an order that depends on where its
    first number lies in a vector register, so rows are extended by zeros until all of them lie alike.
    A row with a NaN has the norm NaN, which is above nothing, so its other numbers stay as they are.
    Two selections in a row, and not one in the other: ONNX Runtime fails to inline an If inside an If.
    """

    def infinite() -> str:
        return str(e.IsInf(e.attribute("norm_type", _FLOAT)))

    def given() -> str:
        return str(e.Not(e.IsInf(e.attribute("max_norm", _FLOAT))))

    def scaled(b: Emitter, norm: str) -> str:
        limit, epsilon = _double_attribute(b, "max_norm"), stash(b, spec.EPSILON)
        return b.Mul(rows, b.Where(b.Greater(norm, limit), b.Div(limit, b.Add(norm, epsilon)), stash(b, 1)))

    def power(b: Emitter) -> str:
        p = _double_attribute(b, "norm_type")
        powers = b.Pow(b.Abs(rows), p)
        if ties:
            width = b.Shape(rows, start=2)
            missing = b.Sub(b.Mul(ceil_div(b, width, b.int64([_LANES])), _LANES), width)
            zeros = b.Expand(stash(b, 0), b.Concat(b.Shape(rows, end=2), missing, axis=0))
            powers = b.Concat(powers, zeros, axis=2)
        sums = b.reduce("ReduceSum", powers, 2, keepdims=1)
        return scaled(b, b.Pow(sums, b.Div(stash(b, 1), p)))

    def largest(b: Emitter) -> str:
        # A column of zeros: a maximum over no columns (D = 0) is an error to some runtimes.
        zeros = b.Expand(stash(b, 0), b.Concat(b.Shape(rows, end=2), [1], axis=0))
        return scaled(b, _maximum(b, b.Concat(b.Abs(rows), zeros, axis=2), 2, keepdims=1))

    if not e.is_static:  # what is written out here is not written in every branch again
        _double_attribute(e, "max_norm")
        _double_attribute(e, "norm_type")
        for number in (1, 0, math.nan):  # not EPSILON, which is a DOUBLE first
            stash(e, number)
    by_power = e.select(
        lambda a: not math.isinf(a["max_norm"]) and not math.isinf(a["norm_type"]),
        lambda: e.And(given(), e.Not(infinite())),
        power,
        lambda b: rows,
    )
    return e.select(
        lambda a: not math.isinf(a["max_norm"]) and math.isinf(a["norm_type"]),
        lambda: e.And(given(), infinite()),
        largest,
        lambda b: by_power,
    )


def stash(e: Emitter, value: float) -> str:
    """A number in the accumulation type, scalar."""
    exact = np.float32(value) == value or np.isnan(value)
    if exact and e.knows(lambda a: a.get("stash_type") == onnx.TensorProto.FLOAT):
        return e.constant(np.float32(value))
    return e.cast_to_attribute(e.constant(np.float32(value) if exact else np.float64(value)), "stash_type")


def _double_attribute(e: Emitter, name: str) -> str:
    """A number that is split over two FLOAT attributes, in the accumulation type.

    Their sum has 48 bits, and is rounded once. No DOUBLE comes in unless the table is float64: WebGPU has none.
    """
    return e.Add(*(e.cast_to_attribute(e.attribute(n, _FLOAT), "stash_type") for n in (name, name + "_lo")))


function, nodes = forms(spec, expand)
