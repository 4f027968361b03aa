"""Differential tests over generated calls: native == reference == standard, whatever the shapes."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import lucid_onnx
from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.ops.embedding_bag.cases import Case

DIMS = st.one_of(st.sampled_from([1, 3, 7, 15, 16, 17, 31, 32, 33, 100, 768]), st.integers(0, 140))
# Mostly short bags, some empty, and now and then one that dwarfs the rest.
LENGTHS = st.lists(st.one_of(st.integers(0, 6), st.integers(0, 40), st.sampled_from([63, 64, 65, 1500])), max_size=24)


@st.composite
def calls(draw: st.DrawFn) -> Case:
    seed = draw(st.integers(0, 2**32 - 1))
    random = np.random.RandomState(seed)
    dtype = draw(st.sampled_from(spec.TABLE_DTYPES))
    index_dtype, offsets_dtype = draw(st.sampled_from(spec.INDEX_DTYPES)), draw(st.sampled_from(spec.INDEX_DTYPES))
    rows, dim = draw(st.integers(1, 30)), draw(DIMS)
    mode = draw(st.sampled_from(spec.MODES))
    weight = random.standard_normal((rows, dim)).astype(dtype)
    two_d, ends = draw(st.booleans()), draw(st.booleans())
    offsets = None
    if two_d:
        shape: tuple[int, ...] = (draw(st.integers(0, 12)), draw(st.integers(0, 70)))
    else:
        lengths = draw(LENGTHS)
        bounds = np.cumsum([0, *lengths])
        slack = draw(st.integers(0, 3)) if ends else 0
        shape = (int(bounds[-1]) + slack,)
        offsets = (bounds if ends else bounds[:-1]).astype(offsets_dtype)
        if len(offsets) == 0:
            shape = (0,)
    skew = draw(st.sampled_from([0.0, 1.0, 3.0]))  # towards few rows, so that rows repeat
    indices = np.floor(rows * random.uniform(size=shape) ** (1 + skew)).astype(index_dtype)
    divisor = draw(st.sampled_from([None, *get_args(spec.Divisor)]))
    weighted = mode != "max" and (mode == "sum" or divisor is not None) and draw(st.booleans())
    negative = draw(st.sampled_from(get_args(spec.Negative)))
    if negative == "skip":
        indices[random.uniform(size=shape) < 0.3] = -1
    return Case(
        f"seed {seed}",
        weight,
        indices,
        offsets,
        random.standard_normal(shape).astype(dtype) if weighted else None,
        spec.Attributes(
            mode=mode,
            padding_idx=draw(st.one_of(st.none(), st.integers(-rows, rows - 1))),
            max_norm=draw(st.one_of(st.none(), st.sampled_from([0.0, 0.7, 2.5]))),
            norm_type=draw(st.sampled_from([2.0, 1.0, np.inf, 3.0, 1.7])),
            include_last_offset=ends and not two_d,
            negative=negative,
            divisor=divisor,
        ),
    )


@given(calls())
def test_native_is_the_reference(native: None, case: Case) -> None:
    check(case, form="native", native=True)


@given(calls())
def test_standard_is_the_reference(case: Case) -> None:
    check(case, form="standard", native=False)


@given(calls())
def test_portable_without_library_is_the_reference(case: Case) -> None:
    check(case, form="portable", native=False)


def check(case: Case, *, form: str, native: bool) -> None:
    got = lucid_onnx.embedding_bag(
        case.indices,
        case.weight,
        case.offsets,
        per_sample_weights=case.per_sample_weights,
        form=form,
        native=native,
        **case.keywords,
    )
    case.check(got)


@given(st.floats(allow_nan=False))
@example(0.1)
@example(1e39)
@example(5e-324)
def test_attributes_keep_a_double(value: float) -> None:
    """Two FLOAT attributes hold a double to 48 bits over float32's range; beyond it they saturate."""
    high, low = spec.split_double(value)
    assert np.float32(high) == high
    largest = float(np.finfo(np.float32).max)
    if abs(value) <= largest:
        assert abs(high + low - value) <= 2.0**-48 * abs(value) + 2.0**-150
    else:
        assert high + low == value or abs(high + low) >= largest


@given(
    st.builds(
        spec.Attributes,
        mode=st.sampled_from(spec.MODES),
        padding_idx=st.one_of(st.none(), st.integers(-(2**63) + 1, 2**63 - 1)),
        max_norm=st.one_of(st.none(), st.floats(0, 1e6, width=32)),
        norm_type=st.one_of(st.just(np.inf), st.floats(0.125, 100, width=32)),
        include_last_offset=st.booleans(),
        negative=st.sampled_from(get_args(spec.Negative)),
        divisor=st.one_of(st.none(), st.sampled_from(get_args(spec.Divisor))),
    )
)
def test_attributes_survive_the_node(attributes: spec.Attributes) -> None:
    op = spec.variant(two_d=False, weighted=False)
    assert spec.Attributes.from_onnx(attributes.to_onnx(op, double=False)) == attributes


def test_a_wrong_result_is_caught() -> None:
    """The oracle's own test: one element off by ten tolerances fails, with its place in the message."""
    from lucid_onnx.ops.embedding_bag.cases import all_cases

    case = all_cases()["sum_ragged_float32"]
    got = case.expected()
    got[2, 3] += np.float32(20 * case.tolerance[2, 3])
    with pytest.raises(AssertionError, match=r"output\[2, 3\]"):
        case.check(got)
