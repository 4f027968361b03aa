"""Hostile input: calls that every kernel must reject, with the messages, and random ones that it may have to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, TensorProto, helper

import lucid_onnx
from lucid_onnx.ops.embedding_bag import cases, spec

MIN64, MAX64 = -(2**63), 2**63 - 1

#: Tolerances of a case that its values may be off. A case's tolerance is for rows that differ; here one row may
#: stand in a bag 3000 times, and the roundings of its sum all go one way: 63 of them within a group of 64 rows and
#: 15 between the groups of a piece, 78 * 2**-24 = 4.7e-6 of the sum of magnitudes at most.
SLACK = 5

#: Fields of the C interface's struct for the case ``weights``, and the message that rejects them; None where it depends
#: on the indices.
BAD_STRUCTS: list[tuple[dict[str, Any], str | None]] = [
    ({"size_bytes": 0}, "size_bytes = 0 is not 184"),
    ({"size_bytes": 137}, "size_bytes = 137 is not 184"),
    ({"size_bytes": -1}, "size_bytes = -1 is not 184"),
    ({"dtype": -1}, "dtype = -1 is unknown"),
    ({"dtype": 8}, "dtype = 8 is unknown"),
    ({"index_type": 2}, "index_type = 2 is unknown"),
    ({"index_type": -1}, "index_type = -1 is unknown"),
    ({"offset_type": 2}, "offset_type = 2 is unknown"),
    ({"indices_rank": 0}, "indices_rank = 0 is not 1 or 2"),
    ({"indices_rank": 3}, "indices_rank = 3 is not 1 or 2"),
    ({"weight_shape": (-1, 5)}, "a size is negative"),
    ({"weight_shape": (10, -1)}, "a size is negative"),
    ({"indices_shape": (-1, 0)}, "a size is negative"),
    ({"indices_shape": (3, MIN64), "indices_rank": 2}, "a size is negative"),
    ({"num_offsets": -1}, "a size is negative"),
    ({"mode": 4}, "mode = 4 is not 0 (sum), 1 (mean), 2 (max) or 3 (sqrtn)"),
    ({"mode": -1}, "mode = -1 is not 0 (sum), 1 (mean), 2 (max) or 3 (sqrtn)"),
    ({"negative": 2}, "negative = 2 is not 0 (refuse) or 1 (skip)"),
    ({"negative": -1}, "negative = -1 is not 0 (refuse) or 1 (skip)"),
    ({"divisor": 3}, "divisor = 3 is not 0 (none), 1 (count) or 2 (weights)"),
    ({"divisor": -1}, "divisor = -1 is not 0 (none), 1 (count) or 2 (weights)"),
    ({"mode": 3}, "per_sample_weights needs mode 'sum', got mode = 'sqrtn'"),
    ({"mode": 2, "divisor": 1}, "per_sample_weights needs mode 'sum', got mode = 'max'"),
    ({"mode": 1}, "per_sample_weights needs mode 'sum', got mode = 'mean'"),
    ({"max_norm": -1.0}, "max_norm = -1 must be >= 0"),
    ({"max_norm": math.nan}, "max_norm = nan must be >= 0"),
    ({"norm_type": 0.0}, "norm_type = 0 must be > 0"),
    ({"norm_type": math.nan}, "norm_type = nan must be > 0"),
    ({"num_offsets": 0}, "offsets is empty, shape [0], but indices has 9 entries"),
    (
        {"num_offsets": 0, "include_last_offset": 1},
        "offsets is empty, shape [0]: include_last_offset needs at least one entry",
    ),
    # The table is smaller than the case's: [0, 0) holds nothing, and nothing is read.
    ({"weight_shape": (0, 5), "weight": None}, None),
    ({"weight_shape": (0, MAX64), "weight": None}, None),
    ({"weight_shape": (1, 5)}, None),
]


def bad_offsets(offsets: np.ndarray, count: int) -> Iterator[tuple[np.ndarray, str]]:
    """Copies with one of the offsets out of place, over ``count`` indices, and the messages that reject them."""
    for value in (-1, -(2**63), 2**63 - 1, count + 1, 2**40):
        for place in range(len(offsets)):
            wrong = offsets.copy()
            wrong[place] = value
            before = int(offsets[place - 1]) if place else 0
            if place == 0:
                text = f"offsets[0] = {value} must be 0"
            elif value < before:
                text = f"offsets[{place}] = {value} is below offsets[{place - 1}] = {before}: offsets must not decrease"
            else:
                text = f"offsets[{place}] = {value} is past the number of indices, {count}"
            yield wrong, text


def bad_indices(
    indices: np.ndarray, rows: int, values: Iterable[int], places: Iterable[int]
) -> Iterator[tuple[np.ndarray, str]]:
    """Copies with one of the indices outside of [0, rows), and the messages that reject them."""
    places = list(places)
    for value in values:
        for place in places:
            wrong = indices.copy()
            wrong[place] = value
            yield wrong, f"indices[{place}] = {value} is outside [0, {rows})"


def contents_in_turn(array: np.ndarray, limit: int, *, ascending: bool) -> list[np.ndarray]:
    """An array of integers, others that are as legal, and one with values that nothing has.

    Args:
        limit: legal values are below it.
        ascending: as offsets are, from 0 on.
    """
    random, ends = np.random.RandomState(3), np.iinfo(array.dtype)
    found = [array]
    for kind in ("random", "equal", "wild"):
        values = random.randint(0, limit, array.shape) if kind != "equal" else np.full(array.shape, limit - 1)
        if ascending:
            values.sort()
        if kind == "wild":
            places = random.randint(0, array.size, array.size // 4)
            values.reshape(-1)[places] = random.choice([-1, limit, ends.min, ends.max, 2**31 - 1], len(places))
        if ascending:
            values[:1] = 0
        found.append(values.astype(array.dtype))
    return found


def _garbage(seed: int) -> cases.Case:
    """A request with random values and sizes: half the seeds stay near what is legal."""
    random = np.random.RandomState(seed)
    rows, dim = random.choice([0, 1, 2, 7, 40]), random.choice([0, 1, 3, 16, 35])
    two_d, wild = random.rand() < 0.25, random.rand() < 0.5
    count = random.choice([0, 1, 5, 60, 3000])
    index_dtype, offset_dtype = random.choice([np.int32, np.int64]), random.choice([np.int32, np.int64])
    ends = np.iinfo(index_dtype)
    x = random.randint(0, max(rows, 1), count).astype(index_dtype)
    if wild and count:
        places = random.randint(0, count, random.choice([0, 1, 4]))
        x[places] = random.choice([-1, rows, -rows - 1, ends.min, ends.max, 2**31 - 1, -(2**31)], len(places))
    offsets = None
    if two_d:
        length = random.choice([0, 1, 4])
        x = x[: count // max(length, 1) * length].reshape(-1, length) if length else np.zeros((count, 0), index_dtype)
    else:
        offsets = np.sort(random.randint(0, count + 1, random.choice([0, 1, 2, 30])))
        offsets[:1] = 0
        if wild and len(offsets):
            ends = np.iinfo(offset_dtype)
            places = random.randint(0, len(offsets), random.choice([0, 0, 1, 3]))
            offsets[places] = random.choice([-1, count + 1, ends.min, ends.max, count, 2**31 - 1], len(places))
        offsets = offsets.astype(offset_dtype)
    mode = str(random.choice(spec.ATEN_MODES))
    dtype = spec.TABLE_DTYPES[random.randint(len(spec.TABLE_DTYPES))]
    weighted = mode == "sum" and random.rand() < 0.5
    return cases.Case(
        f"garbage {seed}",
        random.standard_normal((rows, dim)).astype(dtype),
        x,
        offsets,
        random.standard_normal(x.shape).astype(dtype) if weighted else None,
        spec.Attributes(
            mode,
            padding_idx=int(random.randint(-rows, rows)) if rows and random.rand() < 0.3 else None,
            max_norm=float(random.choice([0.0, 0.5, 1e30])) if random.rand() < 0.3 else None,
            norm_type=float(random.choice([1.0, 2.0, 3.0, np.inf])),
            include_last_offset=bool(random.rand() < 0.4),
        ),
    )


def refusal_of(case: cases.Case) -> str | None:
    """The message that the contract rejects a case with, or None."""
    try:
        spec.check_inputs(case.weight, case.indices, case.offsets, case.per_sample_weights, case.attributes)
    except (IndexError, ValueError) as error:
        return str(error)
    return None


def garbage_cases(seeds: range) -> Iterator[tuple[cases.Case, str | None]]:
    """A random case for each seed, and the message that rejects it or None; between a fifth and four fifths are bad."""
    refused = 0
    for seed in seeds:
        case = _garbage(seed)
        message = refusal_of(case)
        refused += message is not None
        yield case, message
    # Neither all refused nor all legal, or the test says less than it seems.
    assert len(seeds) // 5 < refused < 4 * len(seeds) // 5


def _other_types() -> dict[str, Any]:
    """A value for an attribute of every type, each of which would be a legal value as a number."""
    tensor = helper.make_tensor("t", TensorProto.INT64, [], [1])
    return {
        "INT": 1,
        "FLOAT": 1.0,
        "STRING": "1",
        "TENSOR": tensor,
        "GRAPH": helper.make_graph([], "g", [], []),
        "INTS": [1],
        "FLOATS": [1.0],
        "STRINGS": ["1"],
        "TENSORS": [tensor],
    }


def check_attribute_types(model: onnx.ModelProto, op_name: str) -> None:
    """Give each attribute of the model's first node every other type; no session may be created from any of them."""
    count = len(model.graph.node[0].attribute)
    assert count > 0
    for i in range(count):
        attribute = model.graph.node[0].attribute[i]
        name, kind = attribute.name, AttributeProto.AttributeType.Name(attribute.type)
        expected = f"{op_name}: {name} must be {'an' if kind == 'INT' else 'a'} {kind} attribute"
        for other, value in _other_types().items():
            if other == kind:
                continue
            changed = onnx.ModelProto()
            changed.CopyFrom(model)
            changed.graph.node[0].attribute[i].CopyFrom(helper.make_attribute(name, value))
            with pytest.raises(Exception) as caught:
                lucid_onnx.InferenceSession(changed)
            assert expected in str(caught.value), f"{name} as {other}"
