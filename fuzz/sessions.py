"""Random calls of every operator: reference == native == portable == standard.

    python fuzz/sessions.py --seconds 60 --seed 0

A plan is what a session is made for: an operator, its attributes, dtypes and layout, and how bags are lowered. Its
sessions are made once and run with many inputs: other lengths of bags, rows, columns and values, with NaN, infinities,
zeros of both signs, numbers whose powers overflow, equal rows, and now and then an index or an offset that is invalid,
which all must reject. Plan and call follow from the seed and their numbers alone.

The first difference is made smaller and printed as code to paste, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

import lucid_onnx
from lucid_onnx.builder import convert
from lucid_onnx.builder.conformance import case_model
from lucid_onnx.ops.embedding_bag import cases as bags
from lucid_onnx.ops.embedding_bag import reference as bag_reference
from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.ops.embedding_bag.lowering import RAGGED, Ragged
from lucid_onnx.ops.embedding_bag_collection import cases as collections_of_bags
from lucid_onnx.ops.embedding_bag_grad import cases as gradients
from lucid_onnx.ops.embedding_bag_grad import reference as gradient_reference
from lucid_onnx.ops.embedding_bag_grad import spec as gradient_spec
from lucid_onnx.ops.quantized_embedding_bag import cases as quantized
from lucid_onnx.ops.quantized_embedding_bag import spec as quantized_spec
from lucid_onnx.parity.measure import Expected, compare

OPERATORS = ("embedding_bag", "quantized_embedding_bag", "embedding_bag_collection", "embedding_bag_grad")
#: How often the sessions of a plan run.
CALLS = 64
_DIMS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65, 130)
#: What a number's square or cube overflows with, and sums do not; float16 accumulates in float32, where nothing does.
_HUGE = {"float32": 1e25, "bfloat16": 1e25, "float64": 1e200, "float16": 6e4}
_TINY = {"float32": 1e-30, "bfloat16": 1e-30, "float64": 1e-200, "float16": 1e-4}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the sessions of some calls have in common."""

    number: int
    operator: str
    dtype: str
    layout: str  #: "ragged", "ends", "rows"; "packed" of collections
    weighted: bool
    keywords: dict[str, Any]  #: mode, padding_idx, max_norm, norm_type
    index_dtypes: tuple[str, ...]  #: of each table
    offsets_dtypes: tuple[str, ...]
    ragged: Ragged
    opset: int
    constant: bool  #: the tables are initializers
    threads: int
    sparse: bool = False
    freq: bool = False
    codes_type: str = "int8"
    second: str | None = None
    dim: int = 0  #: of quantized tables

    @property
    def seen(self) -> str:
        """For counts."""
        return f"{self.operator}, {self.dtype}, {self.keywords['mode']}, {self.layout}, {self.ragged.way}"


def plan_of(seed: int, number: int, operators: Sequence[str] = OPERATORS) -> Plan:
    """The plan of a number; the same for the same seed and operators."""
    r = np.random.RandomState([seed % 2**32, number])

    def one(values: Sequence[Any]) -> Any:
        return values[r.randint(len(values))]

    operator = operators[number % len(operators)]
    collection, gradient = operator == "embedding_bag_collection", operator == "embedding_bag_grad"
    dtypes = quantized_spec.SCALE_DTYPES if operator == "quantized_embedding_bag" else spec.TABLE_DTYPES
    layout = one(("ragged", "ends", "rows", *(("packed",) * 2 if collection else ())))
    mode = one(("sum", "sum", "mean", "max", "max"))
    tables = r.randint(1, 4) if collection else 1
    if layout == "packed":  # one array has them all
        indices, offsets = (one(spec.INDEX_DTYPES).name,) * tables, (one(spec.INDEX_DTYPES).name,) * tables
    else:
        indices, offsets = (tuple(one(spec.INDEX_DTYPES).name for _ in range(tables)) for _ in range(2))
    way = one((*RAGGED, "pieces"))  # a gradient is in pieces whatever is asked for
    plan = Plan(
        number,
        operator,
        one(dtypes).name,
        layout,
        mode == "sum" and r.random_sample() < 0.5,
        {
            "mode": mode,
            "padding_idx": one((None, None, 0, -1, 1)),
            "max_norm": one(
                (None, 0.0, 0.6875, 1.3125, 2.5, np.inf)
            ),  # a node holds 48 bits, so 1.3 would be another number
            "norm_type": one((2.0, 2.0, np.inf, np.inf, 1.0, 3.0, 0.5, 1.7)),
        },
        indices,
        offsets,
        Ragged(way, one((1, 5, 64, 70, 200)) if way == "padded" else None),
        min(int(r.randint(spec.MIN_OPSET, spec.MAX_OPSET + 1)), newest_opset()),
        bool(r.random_sample() < 0.25),
        one((1, 1, 3)),
        gradient and bool(r.random_sample() < 0.5),
        gradient and bool(r.random_sample() < 0.4),
        one(tuple(quantized_spec.CODES_TYPES)),
        one((None, *quantized_spec.SECOND_NUMBERS)),
        one(_DIMS),
    )
    further: dict[str, Any] = {"negative": one(("refuse", "refuse", "skip"))}
    if mode == "mean":
        further |= {"mode": one(("mean", "sqrtn")), "divisor": one((None, "count", "weights"))}
    weighted = plan.weighted or further.get("divisor") is not None
    return dataclasses.replace(plan, keywords=plan.keywords | further, weighted=weighted)


@functools.cache
def newest_opset() -> int:
    """The newest opset that we write and this onnxruntime loads."""
    table = np.zeros((1, 1), np.float32)
    for opset in range(spec.MAX_OPSET, spec.DEFAULT_OPSET, -1):
        with contextlib.suppress(Exception):  # onnxruntime has an exception class per status code
            ort.InferenceSession(lucid_onnx.build_model(table, opset=opset).SerializeToString())
            return opset
    return spec.DEFAULT_OPSET


# ---- Calls.


@dataclasses.dataclass(frozen=True)
class Table:
    """What a table is in a call, or in all calls if it is constant."""

    weight: np.ndarray  #: rows, or quantized values
    scale: np.ndarray | None = None
    zero_point: np.ndarray | None = None
    bias: np.ndarray | None = None


def _dtype(name: str) -> np.dtype:
    return spec.BFLOAT16 if name == "bfloat16" else np.dtype(name)


def numbers(r: np.random.RandomState, shape: tuple[int, ...], dtype: str, *, infinite: bool, huge: bool) -> np.ndarray:
    """Numbers of one of some kinds; tiny ones where there are huge ones, as two tiny factors would underflow."""
    kind = r.choice(["normal", "normal", "grid", "special", "special", "large"])
    found = r.standard_normal(shape)
    if kind == "grid":  # exact sums, many ties
        found = np.round(2 * found) / 2
    elif kind == "large" and huge:
        found *= _HUGE[dtype] / 100 if dtype == "float16" else _HUGE[dtype]
    elif kind == "special":
        chosen = [0.0, -0.0, np.nan, *([np.inf, -np.inf] if infinite else [])]
        chosen += [_HUGE[dtype], -_HUGE[dtype], _TINY[dtype]] if huge else []
        chosen = [chosen[k] for k in r.permutation(len(chosen))[: r.randint(1, 4)]]
        found = np.where(r.random_sample(shape) < r.choice([0.02, 0.1, 0.5]), r.choice(chosen, shape), found)
    with np.errstate(all="ignore"):
        return found.astype(_dtype(dtype))


def table_of(plan: Plan, r: np.random.RandomState) -> Table:
    """A random table. It has the row that padding_idx names, and none only where there is no padding."""
    rows = int(r.choice([1, 2, 3, 8, 30, 200]))
    if plan.keywords["padding_idx"] is not None:
        rows = max(rows, 2)
    elif r.random_sample() < 0.03:
        rows = 0
    if plan.operator != "quantized_embedding_bag":
        dim = int(r.choice(_DIMS))
        weight = numbers(r, (rows, dim), plan.dtype, infinite=True, huge=True)
        if rows and r.random_sample() < 0.15:  # equal rows, or rows of equal numbers
            weight = weight[r.randint(0, rows, rows) // 2]
        elif dim and r.random_sample() < 0.1:
            weight = np.repeat(weight[:, :1], dim, axis=1)
        return Table(weight)
    kind = quantized_spec.CODES_TYPES[plan.codes_type]
    codes = r.randint(kind.lowest, kind.highest + 1, (rows, plan.dim)).astype(kind.dtype)
    scale = (numbers(r, (rows,), plan.dtype, infinite=True, huge=False).astype(np.float64) / kind.highest).astype(
        plan.dtype
    )
    if plan.second is None:
        return Table(codes, scale)
    if plan.second == "bias":
        return Table(codes, scale, bias=numbers(r, (rows,), plan.dtype, infinite=True, huge=False))
    return Table(codes, scale, zero_point=r.randint(kind.lowest, kind.highest + 1, rows).astype(plan.dtype))


def _lengths(plan: Plan, r: np.random.RandomState, count: int) -> list[int]:
    """Of bags: mostly short ones, some empty, now and then one that dwarfs the rest."""
    cap = plan.ragged.longest_bag or 10**6
    kind = r.choice(["short", "short", "mixed", "equal", "empty"])
    if kind == "empty":
        return [0] * count
    if kind == "equal" or plan.layout == "rows":
        return [min(cap, int(r.choice([1, 2, 5, 16, 17, 64, 65, 150])))] * count
    lengths = r.randint(0, 7, count)
    if kind == "mixed":
        lengths = np.where(r.random_sample(count) < 0.2, r.choice([15, 33, 64, 65, 66, 130, 700], count), lengths)
    return [min(cap, int(n)) for n in lengths]


def bag_of(plan: Plan, r: np.random.RandomState, t: int, table: Table, num_bags: int, *, last: bool) -> bags.Case:
    """The bags of a table, whose rows are those of ``table.weight``, or stand for them."""
    rows = len(table.weight)
    lengths = [0] * num_bags if rows == 0 else _lengths(plan, r, num_bags)
    count = sum(lengths)
    slack = int(r.randint(0, 4)) if plan.layout in ("ends", "packed") and last and r.random_sample() < 0.3 else 0
    index_dtype = np.dtype(plan.index_dtypes[t])
    skew = r.choice([0, 0, 1, 4])  # towards few rows, so that rows repeat
    indices = np.floor(max(rows, 1) * r.uniform(size=count) ** (1 + skew)).astype(index_dtype)
    if plan.keywords["negative"] == "skip":
        indices[r.random_sample(count) < r.choice([0.0, 0.2])] = r.choice([-1, np.iinfo(index_dtype).min])
    padding = plan.keywords["padding_idx"]
    if padding is not None:
        indices[r.random_sample(count) < r.choice([0.0, 0.1, 0.5, 1.0])] = padding % rows
    ends = np.iinfo(index_dtype)
    indices = np.concatenate([indices, r.choice([-1, rows, 0, ends.min, ends.max], slack).astype(index_dtype)])
    shape: tuple[int, ...] = (len(indices),)
    offsets = None
    if plan.layout == "rows":
        shape = (num_bags, lengths[0] if lengths else int(r.choice([0, 3])))
    else:
        bounds = np.cumsum([0, *lengths])
        offsets = (bounds[:-1] if plan.layout == "ragged" else bounds).astype(plan.offsets_dtypes[t])
    weights = None
    if plan.weighted:
        infinite = plan.keywords["max_norm"] is None or not _may_underflow(table.weight)
        weights = numbers(r, (len(indices),), plan.dtype, infinite=infinite, huge=False).reshape(shape)
        if plan.keywords.get("divisor") == "weights":  # roundings would decide of sums that nearly cancel
            weights = r.uniform(0.5, 2.0, shape).astype(weights.dtype)
    attributes = spec.Attributes(**plan.keywords, include_last_offset=plan.layout in ("ends", "packed"))
    weight = table.weight if table.scale is None else np.zeros(table.weight.shape, table.scale.dtype)
    return bags.Case("", weight, indices.reshape(shape), offsets, weights, attributes)


def _may_underflow(weight: np.ndarray) -> bool:
    """Whether a number of a clipped row may underflow: graphs have 0 there, and NaN for 0 times infinity."""
    with np.errstate(all="ignore"):
        sizes = np.abs(weight.astype(np.float64))
    sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
    smallest = 1e-290 if weight.dtype == np.float64 else 1e-32
    return bool(sizes.size) and bool(sizes.min() / max(1.0, sizes.max()) < smallest)


def call_of(plan: Plan, r: np.random.RandomState, tables: Sequence[Table], *, broken: float = 0.05) -> Any:
    """A call as a case of its operator; invalid with the probability ``broken``, most often."""
    num_bags = int(r.choice([0, 1, 1, 2, 2, 3, 3, 5, 5, 12, 40], p=[0.1, *[0.11] * 8, 0.015, 0.005]))
    found = [bag_of(plan, r, t, table, num_bags, last=table is tables[-1]) for t, table in enumerate(tables)]
    if r.random_sample() < broken:
        t = r.randint(len(found))
        found[t] = _broken(plan, r, t, found[t])
    if plan.operator == "embedding_bag_collection":
        return collections_of_bags.Case("", tuple(found), "ragged" if plan.layout == "ends" else plan.layout)
    bag, table = found[0], tables[0]
    given = bag.indices, bag.offsets, bag.per_sample_weights
    if plan.operator == "embedding_bag":
        return bag
    if plan.operator == "quantized_embedding_bag":
        attributes = quantized_spec.Attributes(**bag.keywords, codes_type=plan.codes_type, embedding_dim=plan.dim)
        assert table.scale is not None
        return quantized.Case("", table.weight, table.scale, table.zero_point, table.bias, *given, attributes)
    gradient = numbers(r, (num_bags, bag.weight.shape[1]), plan.dtype, infinite=True, huge=False)
    attributes = gradient_spec.Attributes(**bag.keywords, scale_grad_by_freq=plan.freq)
    return gradients.Case("", gradient, bag.weight, *given, attributes, plan.sparse)


def _broken(plan: Plan, r: np.random.RandomState, t: int, bag: bags.Case) -> bags.Case:
    """The bags of a table with an index or an offset changed, most often to an invalid one."""
    # With another offset a padded bag could be too long, and not be invalid.
    fixed = bag.offsets is None or plan.ragged.way == "padded"
    name = "indices" if fixed or r.random_sample() < 0.5 else "offsets"
    array = getattr(bag, name).copy()
    packed = plan.layout == "packed"
    if name == "offsets" and not packed and r.random_sample() < 0.1:
        return dataclasses.replace(bag, offsets=array[:0])
    ends = np.iinfo(array.dtype)
    changed = array.reshape(-1)
    if name == "offsets" and packed:  # where a table ends, the next one begins
        changed = array[t > 0 : len(array) - (t + 1 < len(plan.index_dtypes))]
    if changed.size:
        changed[r.randint(changed.size)] = r.choice([-1, len(bag.weight), array.size + 1, ends.min, ends.max])
    return dataclasses.replace(bag, **{name: array})


# ---- What must come out.


class UndecidedError(Exception):
    """Which row has a column's maximum depends on the rounding of norms."""


def expected_of(case: Any) -> list[Expected] | None:
    """What each output must be; None where the reference rejects the call."""
    try:
        rounded = case.expected()
    except (IndexError, ValueError):
        return None
    if isinstance(case, gradients.Case) and case.attributes.mode == "max" and case.attributes.max_norm is not None:
        _check_decided(case)
    with np.errstate(all="ignore"):
        found = rounded, case.exact, _tolerance(case)
    if not isinstance(rounded, tuple):
        found = tuple((value,) for value in found)  # type: ignore[assignment]
    return [Expected(*values) for values in zip(*found, strict=True)]


def _tolerance(case: Any) -> Any:
    """The case's own, more for long bags; where a maximum is beside an infinity, that of the maximum."""
    if isinstance(case, collections_of_bags.Case):
        return np.concatenate([_tolerance(table) for table in case.tables], axis=1)
    if not isinstance(case, (bags.Case, quantized.Case)):
        return case.tolerance
    # The roundings of a row that a bag repeats all go one way: up to 64 of half a bit in each of two rounds.
    tolerance = np.where(np.isfinite(case.tolerance), 8 * case.tolerance, np.inf)
    if isinstance(case, bags.Case) and case.attributes.mode == "max":
        own = 2.0**-7 if case.weight.dtype.itemsize == 2 else 2e-6 if case.weight.dtype == np.float32 else 2e-12
        tolerance = np.minimum(tolerance, own * np.abs(case.exact) + np.finfo(np.float32).tiny)
        tolerance = np.where(np.isfinite(tolerance), tolerance, np.inf)
    return tolerance


def _check_decided(case: gradients.Case) -> None:
    """Raise `UndecidedError` if clipped rows that differ are so near each other that roundings decide their order.

    The infinity norm has no rounding, and neither have norms 1 and 2 of a single column.
    """
    a = case.attributes
    dim = case.weight.shape[1]
    if np.isinf(a.norm_type) or (dim == 1 and a.norm_type in (1, 2)):
        return
    flat = case.indices.reshape(-1)
    skipped = None if a.padding_idx is None else a.padding_idx % len(case.weight)
    with np.errstate(all="ignore"):
        for bag in gradient_reference._bags(case.indices, case.offsets, a):
            used = np.unique([flat[k] for k in bag if flat[k] != skipped and flat[k] >= 0]).astype(np.int64)
            rows = gradient_reference._clipped(case.weight[used], a).astype(np.float64)
            if len(rows) < 2:
                continue
            largest = rows.max(axis=0)
            near = (np.abs(rows - largest) <= 1e-5 * np.abs(largest)) & (largest != 0)
            for column in np.flatnonzero(near.sum(axis=0) > 1):
                alike = case.weight[used[near[:, column]]].tobytes()
                if alike != alike[: case.weight.itemsize * dim] * int(near[:, column].sum()):
                    raise UndecidedError


# ---- Sessions.


@dataclasses.dataclass
class Form:
    """A session of a plan."""

    name: str
    native: bool
    session: Any
    inputs: list[str]
    same_bits: bool  #: as the other graph form: a function has no matrix of rows

    def run(self, case: Any) -> list[np.ndarray] | str:
        """The outputs, or the message of an error."""
        feed = case.inputs
        try:
            return [np.asarray(a) for a in self.session.run(None, {name: feed[name] for name in self.inputs})]
        except Exception as error:  # onnxruntime has an exception class per status code
            return str(error)


#: The forms: the name, and whether the kernels run.
FORMS = (("native", True), ("portable", False), ("standard", False))


def sessions_of(plan: Plan, case: Any, *, arena: bool = True) -> list[Form]:
    """A session in each form; without an arena it keeps no memory from run to run."""
    found = []
    for form, native in FORMS:
        model = case_model(case, "native", plan.opset, constant=plan.constant)
        if form != "native":
            convert(model, form, plan.ragged)
        options = ort.SessionOptions()
        options.intra_op_num_threads = plan.threads
        options.log_severity_level = 4
        options.enable_cpu_mem_arena = options.enable_mem_pattern = arena
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = lucid_onnx.InferenceSession(model, native=native, session_options=options)
        same_bits = plan.ragged.way != "pieces"
        found.append(Form(form, native, session, [value.name for value in model.graph.input], same_bits))
    return found


def difference(case: Any, expected: list[Expected] | None, forms: Sequence[Form]) -> str | None:
    """What is wrong with a call in the first form that differs from what is expected (see `expected_of`), or None."""
    outputs: dict[str, list[np.ndarray]] = {}
    for form in forms:
        got = form.run(case)
        if expected is None:
            if not isinstance(got, str):
                return f"{form.name}: the reference rejects what this form takes"
            continue
        if isinstance(got, str):
            return f"{form.name}: {got}"
        with np.errstate(all="ignore"):
            found = compare(got, expected)
        if found.kind != "equal":
            return f"{form.name}: {found.kind}, {found.where} ({found.wrong} of {found.size} elements are off)"
        outputs[form.name] = got
    if {"portable", "standard"} <= outputs.keys() and all(form.same_bits for form in forms):
        for one, other in zip(outputs["portable"], outputs["standard"], strict=True):
            if not np.array_equal(_bits(one), _bits(other)):
                return "portable: other bits than the standard form's"
    return None


def _bits(array: np.ndarray) -> np.ndarray:
    """The bits of an array, where all NaNs are alike."""
    if array.dtype.kind == "i":
        return array
    bits = np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")
    return np.where(np.isnan(array), bits.dtype.type(0x7FC0), bits)


# ---- A failing call.


@dataclasses.dataclass
class Failure:
    """A call that differs, made small."""

    plan: Plan
    call: int
    case: Any
    why: str

    def code(self) -> str:
        """Python that shows it."""
        form = self.why.split(":")[0]
        lines = [
            "import ml_dtypes",
            "import numpy as np",
            "import lucid_onnx",
            "from lucid_onnx.builder import convert",
            "from lucid_onnx.builder.conformance import case_model",
            "from lucid_onnx.ops.embedding_bag.lowering import Ragged",
            f"from lucid_onnx.ops import {self.plan.operator} as op",
            *(["from lucid_onnx.ops import embedding_bag"] if self.plan.operator == "embedding_bag_collection" else []),
            "",
            "nan, inf = np.nan, np.inf",
            f"case = {_source(self.case, 'op')}",
            f"model = case_model(case, 'native', {self.plan.opset}, constant={self.plan.constant})",
            *([] if form == "native" else [f"convert(model, {form!r}, {_source(self.plan.ragged, '')})"]),
            f"session = lucid_onnx.InferenceSession(model, native={form == 'native'})",
            "feed = {value.name: case.inputs[value.name] for value in model.graph.input}",
            "print('expected', case.expected(), 'got', session.run(None, feed), sep='\\n')",
        ]
        return "\n".join(lines) + "\n"


def _source(value: Any, module: str) -> str:
    """A value as Python that makes it again."""
    if isinstance(value, np.ndarray):
        name = value.dtype.name
        package = "np" if hasattr(np, name) else "ml_dtypes"
        numbers = value.astype(np.float64 if value.dtype.kind == "f" or name == "bfloat16" else np.int64)
        return f"np.array({numbers.reshape(-1).tolist()}).astype({package}.{name}).reshape({value.shape})"
    if isinstance(value, tuple):
        return f"({', '.join(_source(v, 'embedding_bag') for v in value)},)"
    if isinstance(value, spec.Attributes):
        return f"{module}.spec.Attributes({', '.join(f'{k}={v!r}' for k, v in dataclasses.asdict(value).items())})"
    if dataclasses.is_dataclass(value):
        fields = [f"{f.name}={_source(getattr(value, f.name), module)}" for f in dataclasses.fields(value)]
        return f"{module + '.cases.' if module else ''}{type(value).__name__}({', '.join(fields)})"
    return repr(value)


def smaller(case: Any, still_fails: Callable[[Any], bool]) -> Any:
    """A case with fewer bags and columns that still fails."""
    until = time.process_time() + 20
    changed = True
    while changed:
        changed = False
        for candidate in _candidates(case):
            if time.process_time() > until:
                return case
            if still_fails(candidate):
                case, changed = candidate, True
                break
    return case


def _candidates(case: Any) -> Iterator[Any]:
    if isinstance(case, collections_of_bags.Case):
        num_bags = len(case.tables[0].exact)
        for i in range(num_bags):
            yield dataclasses.replace(case, tables=tuple(_without_bag(t, i) for t in case.tables))
        return
    offsets = case.offsets
    num_bags = len(case.indices) if offsets is None else len(offsets) - case.attributes.include_last_offset
    for i in range(num_bags):
        yield _without_bag(case, i)
    if offsets is not None:
        for k in range(len(case.indices)):
            yield dataclasses.replace(
                case,
                indices=np.delete(case.indices, k),
                offsets=offsets - (offsets > k).astype(offsets.dtype),
                per_sample_weights=None if case.per_sample_weights is None else np.delete(case.per_sample_weights, k),
            )
    if hasattr(case, "weight"):
        width = case.weight.shape[1]
        halves = [slice(width // 2), slice(width // 2, None)] if width > 3 else []
        for d in (*halves, *range(width)):
            columns = {n: np.delete(getattr(case, n), d, 1) for n in ("weight", "grad_output") if hasattr(case, n)}
            yield dataclasses.replace(case, **columns)
        used = np.unique(case.indices)
        if case.attributes.padding_idx is None and case.indices.min(initial=0) >= 0 and len(used) < len(case.weight):
            fields = {"weight": case.weight[used], "indices": np.searchsorted(used, case.indices)}
            yield dataclasses.replace(
                case, weight=fields["weight"], indices=fields["indices"].astype(case.indices.dtype)
            )


def _without_bag(case: Any, i: int) -> Any:
    fields: dict[str, Any] = {}
    if case.offsets is None:
        kept: Any = np.arange(len(case.indices)) != i
    else:
        bounds = [*case.offsets.tolist(), *([] if case.attributes.include_last_offset else [len(case.indices)])]
        begin, end = bounds[i], bounds[i + 1]
        kept = np.ones(len(case.indices), np.bool_)
        kept[begin:end] = False
        after = np.arange(len(case.offsets)) > i
        fields["offsets"] = np.delete(case.offsets - np.where(after, end - begin, 0).astype(case.offsets.dtype), i)
    fields["indices"] = case.indices[kept]
    if case.per_sample_weights is not None:
        fields["per_sample_weights"] = case.per_sample_weights[kept]
    if hasattr(case, "grad_output"):
        fields["grad_output"] = np.delete(case.grad_output, i, 0)
    return dataclasses.replace(case, **fields)


# ---- The run.


@dataclasses.dataclass
class Report:
    """What a run did."""

    seconds: float = 0.0
    plans: int = 0
    cases: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)  #: by operator
    rejected: int = 0
    undecided: int = 0
    failures: list[Failure] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in sorted(self.cases.items()))
        return (
            f"{self.cases.total()} cases ({counts}) of {self.plans} plans in {self.seconds:.0f} s; "
            f"all forms rejected {self.rejected}, {self.undecided} undecided, {len(self.failures)} failed"
        )


def run(
    seed: int,
    *,
    seconds: float = np.inf,
    cases: float = np.inf,
    operators: Sequence[str] = OPERATORS,
    first_plan: int = 0,
    failures: int = 1,
) -> Report:
    """Run plan after plan, until the time is up, or so many cases or failures were seen.

    Args:
        first_plan: the number of the plan to begin with.
        failures: the most to look for; a plan that failed is left at once.
    """
    with _fast_powers():
        return _run(Report(), seed, seconds, cases, operators, first_plan, failures)


@contextlib.contextmanager
def _fast_powers() -> Iterator[None]:
    """The reference's float64 powers from 80 bits. From 40 digits each of them takes a tenth of a millisecond."""
    exact = bag_reference._power

    def power(x: np.ndarray, p: np.floating) -> np.ndarray:
        if x.dtype != np.float64 or p in (0.5, 1, 2):
            return exact(x, p)
        return (x.astype(np.longdouble) ** np.longdouble(p)).astype(np.float64)

    if np.finfo(np.longdouble).nmant < 63:  # no such type on this machine
        yield
        return
    bag_reference._power = power
    try:
        yield
    finally:
        bag_reference._power = exact


def _run(
    report: Report,
    seed: int,
    seconds: float,
    cases: float,
    operators: Sequence[str],
    first_plan: int,
    failures: int,
) -> Report:
    start = time.monotonic()
    for number in itertools.count(first_plan):
        report.seconds = time.monotonic() - start
        if report.seconds >= seconds or report.cases.total() >= cases or len(report.failures) >= failures:
            return report
        report.plans += 1
        _run_plan(seed, plan_of(seed, number, operators), report)
    raise AssertionError("plans have no end")


def _run_plan(seed: int, plan: Plan, report: Report) -> None:
    r = np.random.RandomState([seed % 2**32, plan.number, 1])
    forms: list[Form] = []
    tables = [table_of(plan, r) for _ in plan.index_dtypes]
    for call in range(CALLS):
        if not plan.constant:
            tables = [table_of(plan, r) for _ in plan.index_dtypes]
        case = call_of(plan, r, tables)
        forms = forms or sessions_of(plan, case)
        try:
            expected = expected_of(case)
        except UndecidedError:
            report.undecided += 1
            continue
        why = difference(case, expected, forms)
        report.rejected += expected is None
        report.cases[plan.operator] += 1
        if why is not None:
            report.failures.append(_made_small(Failure(plan, call, case, why), forms))
            return


def _made_small(failure: Failure, forms: Sequence[Form]) -> Failure:
    """The same difference in a smaller case."""
    kind = failure.why.split(",")[0]

    def why(case: Any) -> str | None:
        try:
            return difference(case, expected_of(case), forms)
        except UndecidedError:
            return None

    if expected_of(failure.case) is None:  # its bags are not where its offsets say
        return failure
    case = smaller(failure.case, lambda case: (why(case) or "").split(",")[0] == kind)
    return Failure(failure.plan, failure.call, case, why(case) or failure.why)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--cases", type=float, default=np.inf, help="stop after so many cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plan", type=int, default=0, help="the number of the plan to begin with")
    parser.add_argument("--failures", type=int, default=1, help="stop after so many failures")
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=OPERATORS)
    given = parser.parse_args()
    report = run(
        given.seed,
        seconds=given.seconds,
        cases=given.cases,
        operators=given.operators,
        first_plan=given.plan,
        failures=given.failures,
    )
    for failure in report.failures:
        print(f"# --seed {given.seed} --plan {failure.plan.number}, call {failure.call}: {failure.plan.seen}")
        print(f"# {failure.why}\n{failure.code()}")
    print(report)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
