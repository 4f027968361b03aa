"""Hostile input: everything invalid is rejected with its name, value and position, and nothing crashes."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import lucid_onnx
from lucid_onnx.builder.conformance import case_model
from lucid_onnx.ops import OPERATOR_OF
from lucid_onnx.ops.embedding_bag import cases, spec
from lucid_testing.hostile import BAD_STRUCTS, MAX64, MIN64, SLACK, check_attribute_types, garbage_cases
from lucid_testing.kernels import arguments, call, isas, library, needs_library, num_bags, pool

ort = pytest.importorskip("onnxruntime")
ort.set_default_logger_severity(4)  # every refusal would be logged as an error

MIN32, MAX32 = -(2**31), 2**31 - 1
TABLE = np.arange(20, dtype=np.float32).reshape(10, 2)

#: Which expression runs: form, and whether the library is registered.
CALLS = [("portable", True), ("portable", False), ("standard", True), ("standard", False), ("native", True)]
each_call = pytest.mark.parametrize(
    ("form", "native"),
    [pytest.param(f, n, marks=needs_library if n and f != "standard" else ()) for f, n in CALLS],
)


def ints(*values: int, dtype: Any = np.int64) -> np.ndarray:
    return np.array(values, dtype)


def floats(*values: float, dtype: Any = np.float32) -> np.ndarray:
    return np.array(values, dtype)


# ---- The call.


@dataclasses.dataclass(frozen=True)
class Bad:
    """A call that must raise."""

    error: type[Exception]
    message: str
    keywords: dict[str, Any]


def bad(error: type[Exception], message: str, **keywords: Any) -> Bad:
    return Bad(error, message, {"x": ints(1, 2, 3), "weight": TABLE, "offsets": ints(0, 2), "mode": "sum", **keywords})


# What the operator refuses in its inputs: the texts are those of a session with the library, too.
BAD_OFFSETS = [
    bad(ValueError, "offsets[0] = 1 must be 0", offsets=ints(1, 2)),
    bad(ValueError, "offsets[0] = -1 must be 0", offsets=ints(-1, 2)),
    bad(ValueError, f"offsets[0] = {MIN64} must be 0", offsets=ints(MIN64, MAX64)),
    bad(ValueError, f"offsets[0] = {MAX32} must be 0", offsets=ints(MAX32, dtype=np.int32)),
    bad(
        ValueError,
        "offsets[2] = 1 is below offsets[1] = 2: offsets must not decrease",
        offsets=ints(0, 2, 1),
    ),
    bad(
        ValueError,
        f"offsets[1] = {MIN64} is below offsets[0] = 0: offsets must not decrease",
        offsets=ints(0, MIN64, MAX64),
    ),
    bad(
        ValueError,
        f"offsets[1] = {MIN32} is below offsets[0] = 0: offsets must not decrease",
        offsets=ints(0, MIN32, dtype=np.int32),
    ),
    bad(ValueError, "offsets[1] = 4 is past the number of indices, 3", offsets=ints(0, 4)),
    bad(ValueError, f"offsets[1] = {MAX64} is past the number of indices, 3", offsets=ints(0, MAX64)),
    # MAX64 and MIN64 are further apart than int64 can tell, and their difference wraps to a small number.
    bad(ValueError, f"offsets[1] = {MAX64} is past the number of indices, 3", offsets=ints(0, MAX64, MIN64)),
    # Of several bad ones, the first.
    bad(ValueError, "offsets[1] = 4 is past the number of indices, 3", offsets=ints(0, 4, 2, -7)),
    bad(
        ValueError,
        "offsets[2] = 0 is below offsets[1] = 1: offsets must not decrease",
        offsets=ints(0, 1, 0, 9),
    ),
    bad(
        ValueError,
        "offsets[1] = 4 is past the number of indices, 3",
        offsets=ints(0, 4),
        include_last_offset=True,
    ),
    bad(
        ValueError,
        "offsets is empty, shape [0]: include_last_offset needs at least one entry",
        offsets=ints(),
        include_last_offset=True,
    ),
    bad(
        ValueError,
        "offsets is empty, shape [0]: include_last_offset needs at least one entry",
        x=ints(),
        offsets=ints(),
        include_last_offset=True,
    ),
    bad(ValueError, "offsets is empty, shape [0], but indices has 3 entries", offsets=ints()),
    bad(ValueError, "offsets[1] = 1 is past the number of indices, 0", x=ints(), offsets=ints(0, 1)),
    # The offsets come before the indices.
    bad(ValueError, "offsets[1] = 4 is past the number of indices, 3", x=ints(99, 99, 99), offsets=ints(0, 4)),
]
_ROWS = np.arange(6).reshape(2, 3)


def _with(position: Any, value: int, base: np.ndarray = _ROWS) -> np.ndarray:
    copy = base.copy()
    copy[position] = value
    return copy


BAD_INDICES = [
    bad(IndexError, "indices[1] = 10 is outside [0, 10)", x=ints(1, 10, 3)),
    bad(IndexError, "indices[2] = -1 is outside [0, 10)", x=ints(1, 2, -1)),
    bad(IndexError, f"indices[0] = {MAX64} is outside [0, 10)", x=ints(MAX64, 2, 3)),
    bad(IndexError, f"indices[0] = {MIN64} is outside [0, 10)", x=ints(MIN64, 2, 3)),
    # The attribute that stands for "no padding", and what becomes of it when V is added, are no padding.
    bad(IndexError, f"indices[0] = {MIN64 + 10} is outside [0, 10)", x=ints(MIN64 + 10, 2, 3)),
    bad(IndexError, f"indices[0] = {MIN32} is outside [0, 10)", x=ints(MIN32, 2, 3, dtype=np.int32)),
    bad(IndexError, f"indices[2] = {MAX32} is outside [0, 10)", x=ints(1, 2, MAX32, dtype=np.int32)),
    # 2**32 + 1 and 2**32 would be rows if somebody kept 32 bits of them.
    bad(IndexError, f"indices[1] = {2**32 + 1} is outside [0, 10)", x=ints(1, 2**32 + 1, 2**32)),
    # Of several bad ones, the lowest position.
    bad(IndexError, "indices[1] = 11 is outside [0, 10)", x=ints(1, 11, -5)),
    bad(IndexError, "indices[0, 1] = 10 is outside [0, 10)", x=_with((0, 1), 10), offsets=None),
    bad(IndexError, "indices[1, 2] = 17 is outside [0, 10)", x=_with((1, 2), 17), offsets=None),
    bad(
        IndexError,
        "indices[0, 2] = -3 is outside [0, 10)",
        x=_with((1, 0), 12, _with((0, 2), -3)),
        offsets=None,
    ),
    bad(IndexError, "indices[1, 2] = 17 is outside [0, 10)", x=_with((1, 2), 17).astype(np.int32), offsets=None),
    # A padding of -1 is the last row; the index -1 is no row.
    bad(IndexError, "indices[1] = -1 is outside [0, 10)", x=ints(9, -1, 3), padding_idx=-1),
    bad(IndexError, "indices[2] = 10 is outside [0, 10)", x=ints(9, 9, 10), padding_idx=9),
    bad(
        IndexError,
        "indices[1] = 10 is outside [0, 10)",
        x=ints(1, 10, 99),
        offsets=ints(0, 2),
        include_last_offset=True,
    ),
    bad(IndexError, "indices[0] = 0 is outside [0, 0)", weight=TABLE[:0], x=ints(0, 1, 2)),
    bad(IndexError, "indices[0, 0] = 0 is outside [0, 0)", weight=TABLE[:0], x=_ROWS, offsets=None),
    # There is nothing to compute without columns, and still the indices are wrong.
    bad(IndexError, "indices[1] = 10 is outside [0, 10)", weight=TABLE[:, :0], x=ints(1, 10, 3)),
    bad(IndexError, "indices[1] = 10 is outside [0, 10)", x=ints(1, 10, 3), mode="max"),
    bad(IndexError, "indices[1] = 10 is outside [0, 10)", x=ints(1, 10, 3), mode="mean", max_norm=0.0),
    bad(
        IndexError,
        "indices[1] = 10 is outside [0, 10)",
        x=ints(1, 10, 3),
        per_sample_weights=floats(0, 0, 0),
    ),
]
BAD_SHAPES = [
    bad(
        ValueError,
        "per_sample_weights has shape [2], indices has shape [3]: they must be equal",
        per_sample_weights=floats(1, 2),
    ),
    bad(
        ValueError,
        "per_sample_weights has shape [3, 1], indices has shape [3]: they must be equal",
        per_sample_weights=floats(1, 2, 3).reshape(3, 1),
    ),
    bad(
        ValueError,
        "per_sample_weights has shape [3, 2], indices has shape [2, 3]: they must be equal",
        x=_ROWS,
        offsets=None,
        per_sample_weights=np.ones((3, 2), np.float32),
    ),
    bad(
        ValueError,
        "per_sample_weights has shape [6], indices has shape [2, 3]: they must be equal",
        x=_ROWS,
        offsets=None,
        per_sample_weights=np.ones(6, np.float32),
    ),
    bad(ValueError, "weight has shape [20], expected [V, D]", weight=TABLE.reshape(20)),
    bad(ValueError, "weight has shape [], expected [V, D]", weight=np.float32(3)),
    bad(ValueError, "weight has shape [2, 5, 2], expected [V, D]", weight=TABLE.reshape(2, 5, 2)),
    bad(ValueError, "offsets has shape [1, 2], expected one dimension", offsets=ints(0, 2).reshape(1, 2)),
    bad(ValueError, "offsets has shape [], expected one dimension", offsets=np.int64(0)),
]
#: What only the Python call can be given.
BAD_LAYOUTS = [
    bad(ValueError, "indices has shape [], expected [N] or [B, L]", x=5),
    bad(ValueError, "indices has shape [2, 3, 1], expected [N] or [B, L]", x=_ROWS[..., None], offsets=None),
    bad(ValueError, "offsets missing: indices has shape [3], and [N] needs them", offsets=None),
    bad(
        ValueError,
        "offsets given, shape [2], but indices has shape [2, 3]: with [B, L] every row is a bag",
        x=_ROWS,
    ),
]
_TABLES = "weight has dtype {}, expected float32, float16, bfloat16 or float64"
BAD_DTYPES = [
    *(
        bad(TypeError, _TABLES.format(np.dtype(t)), weight=TABLE.astype(t))
        for t in (np.int64, np.uint8, np.bool_, np.complex64, np.longdouble, object, "S4")
    ),
    *(
        bad(TypeError, f"indices has dtype {np.dtype(t)}, expected int32 or int64", x=np.ones(3, t))
        for t in (np.float32, np.uint32, np.uint64, np.int16, np.bool_, object)
    ),
    *(
        bad(TypeError, f"offsets has dtype {np.dtype(t)}, expected int32 or int64", offsets=np.zeros(2, t))
        for t in (np.float64, np.uint64, np.int8, np.bool_, object)
    ),
    bad(TypeError, "indices has dtype float64, expected int32 or int64", x=[0.0, 1.0, 2.0]),
    bad(TypeError, "indices has dtype float64, expected int32 or int64", x=np.zeros(0)),
    bad(TypeError, "indices has dtype object, expected int32 or int64", x=None),
    bad(TypeError, "offsets has dtype float64, expected int32 or int64", offsets=[0.0]),
    *(
        bad(
            TypeError,
            f"per_sample_weights has dtype {np.dtype(t)}, weight has float32: they must be equal",
            per_sample_weights=np.ones(3, t),
        )
        for t in (np.float64, np.float16, spec.BFLOAT16, np.int64)
    ),
]
BAD_ATTRIBUTES = [
    *(
        bad(ValueError, f"mode = {mode!r} is not one of 'sum', 'mean', 'max', 'sqrtn'", mode=mode)
        for mode in ("SUM", "", None, 0, b"sum", "median")
    ),
    *(
        bad(
            ValueError,
            f"padding_idx = {row} is outside [-10, 10), the rows of weight",
            padding_idx=row,
        )
        for row in (10, -11, MAX64, MIN64, 2**63, -(2**80), np.int64(10))
    ),
    bad(
        ValueError,
        "padding_idx = 0 is outside [-0, 0), the rows of weight",
        weight=TABLE[:0],
        x=ints(),
        offsets=ints(0),
        padding_idx=0,
    ),
    *(bad(TypeError, f"padding_idx = {v!r} must be an integer or None", padding_idx=v) for v in (1.0, True, "1", 2j)),
    *(bad(ValueError, f"max_norm = {v!r} must be >= 0", max_norm=v) for v in (-1.0, math.nan, -math.inf, -1e-300)),
    *(bad(TypeError, f"max_norm = {v!r} must be a real number", max_norm=v) for v in ("1", True, 1j, [1.0])),
    *(bad(ValueError, f"norm_type = {v!r} must be > 0", norm_type=v) for v in (0.0, -2.0, math.nan, -math.inf)),
    *(bad(TypeError, f"norm_type = {v!r} must be a real number", norm_type=v) for v in ("2", False, None, 1j)),
    *(
        bad(TypeError, f"include_last_offset = {v!r} must be a bool", include_last_offset=v)
        for v in (1, None, "False", 0.0)
    ),
    *(
        bad(
            ValueError,
            f"per_sample_weights needs mode 'sum', got mode = {mode!r}",
            mode=mode,
            per_sample_weights=floats(1, 2, 3),
        )
        for mode in ("mean", "max")
    ),
]
BAD_CALLS = [*BAD_OFFSETS, *BAD_INDICES, *BAD_SHAPES, *BAD_LAYOUTS, *BAD_DTYPES, *BAD_ATTRIBUTES]


def _good_answer(form: str, native: bool) -> None:
    got = lucid_onnx.embedding_bag(
        ints(1, 2, 3),
        TABLE,
        ints(0, 2),
        mode="sum",
        form=form,
        native=native,  # type: ignore[arg-type]
    )
    assert got.tolist() == [[6, 8], [6, 7]]


@each_call
def test_the_call_refuses(form: Any, native: bool) -> None:
    for refused in BAD_CALLS:
        with pytest.raises(refused.error) as caught:
            lucid_onnx.embedding_bag(**refused.keywords, form=form, native=native)
        assert (type(caught.value), str(caught.value)) == (refused.error, refused.message)
    _good_answer(form, native)


def test_the_reference_refuses_in_the_same_words() -> None:
    for refused in BAD_CALLS:
        with pytest.raises(refused.error) as caught:
            lucid_onnx.reference.embedding_bag(**refused.keywords)
        assert (type(caught.value), str(caught.value)) == (refused.error, refused.message)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"form": "fast"}, "form = 'fast' is not one of 'portable', 'standard', 'native'"),
        ({"form": None}, "form = None is not one of 'portable', 'standard', 'native'"),
        ({"form": "native", "native": False}, "native = False, but form 'native' is the kernel alone"),
        ({"provider": "tpu"}, "provider = 'tpu' is not one of 'cpu', 'cuda'"),
    ],
)
def test_the_call_refuses_its_own_arguments(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        lucid_onnx.embedding_bag(ints(1), TABLE, ints(0), **keywords)
    assert str(caught.value) == message


def test_a_number_that_no_double_holds_is_a_bad_value() -> None:
    for name in ("max_norm", "norm_type"):
        with pytest.raises(ValueError, match=rf"^{name} = 10+ "):
            lucid_onnx.embedding_bag(ints(1), TABLE, ints(0), **{name: 10**400})


@each_call
def test_what_is_not_read_may_be_garbage(form: Any, native: bool) -> None:
    """Positions behind the last offset, the padded row, and the weights of padded positions."""
    weight = TABLE.copy()
    weight[4] = np.nan
    for garbage in ([10, -1], [MIN64, MAX64], [-11, 2**32]):
        got = lucid_onnx.embedding_bag(
            ints(4, 3, 2, 4, *garbage),
            weight,
            ints(0, 1, 1, 4),
            mode="sum",
            per_sample_weights=floats(np.nan, 1, 2, -np.inf, np.nan, np.inf),
            include_last_offset=True,
            padding_idx=-6,
            form=form,
            native=native,
        )
        assert got.tolist() == [[0, 0], [0, 0], [6 + 2 * 4, 7 + 2 * 5]]
    # No position belongs to a bag at all: also with no rows to choose from.
    for rows in (10, 0):
        got = lucid_onnx.embedding_bag(
            ints(77, -5), TABLE[:rows], ints(0, 0), include_last_offset=True, form=form, native=native
        )
        assert got.tolist() == [[0, 0]]


# ---- Sessions.


def session_of(keywords: dict[str, Any], form: str, *, native: bool = True, ranks: bool = True, **options: Any) -> Any:
    """A session for such a call, the table an input.

    Args:
        ranks: whether the model says what ranks its inputs have; then ONNX Runtime checks them itself.
    """
    k = {"mode": "mean", "max_norm": None, "norm_type": 2.0, "padding_idx": None, "include_last_offset": False}
    k |= {name: value for name, value in keywords.items() if name in k}
    arrays = [keywords.get(name) for name in ("weight", "x", "offsets", "per_sample_weights")]
    arrays = [None if array is None else np.asarray(array) for array in arrays]
    model = case_model(cases.Case("call", *arrays, spec.Attributes(**k)), form)
    if not ranks:
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.ClearField("shape")
    session_options = ort.SessionOptions()
    for name, value in options.items():
        setattr(session_options, name, value)
    return lucid_onnx.InferenceSession(model, native=native, session_options=session_options)


def feeds(keywords: dict[str, Any]) -> dict[str, np.ndarray]:
    names = {"weight": "weight", "indices": "x", "offsets": "offsets", "per_sample_weights": "per_sample_weights"}
    return {k: np.asarray(keywords[v]) for k, v in names.items() if keywords.get(v) is not None}


def refusal(session: Any, feed: dict[str, np.ndarray]) -> str:
    """What the kernel says, without ONNX Runtime's words before it."""
    with pytest.raises(Exception) as caught:
        session.run(None, feed)
    kind, text = type(caught.value).__name__, str(caught.value)
    # bfloat16 goes through an IoBinding, where onnxruntime's Python has one exception for everything.
    bound = any(array.dtype == spec.BFLOAT16 for array in feed.values())
    assert kind == ("RuntimeError" if bound else "InvalidArgument"), text
    head, mark, tail = text.partition(" node. Name:")
    assert mark, text
    op = head.rpartition(" ")[2]
    assert op in spec.VARIANTS
    said = tail.partition("Status Message: ")[2]
    assert said.startswith(f"{op}: "), text
    return said.removeprefix(f"{op}: ")


@needs_library
@pytest.mark.parametrize("form", ["portable", "native"])
@pytest.mark.parametrize("ranks", [True, False])
def test_a_session_refuses_and_goes_on(form: str, ranks: bool) -> None:
    for refused in [*BAD_OFFSETS, *BAD_INDICES, *(() if ranks else BAD_SHAPES)]:
        session = session_of(refused.keywords, form, ranks=ranks)
        assert refusal(session, feeds(refused.keywords)) == refused.message
        good = dict(refused.keywords, weight=TABLE)
        x = np.asarray(good["x"])
        good["x"] = np.arange(x.size, dtype=x.dtype).reshape(x.shape) % 9  # 9 is a padding_idx
        if good["offsets"] is not None:
            ends = [0, len(good["x"])] if good.get("include_last_offset") else [0]
            good["offsets"] = np.array(ends, np.asarray(good["offsets"]).dtype)
        if good.get("per_sample_weights") is not None:
            good["per_sample_weights"] = np.ones(x.shape, np.float32)
        expected = lucid_onnx.reference.embedding_bag(**good)
        # Whole numbers below 2**24, or a mean or a norm of few of them: 1e-6 is 8 roundings of float32.
        np.testing.assert_allclose(session.run(None, feeds(good))[0], expected, rtol=1e-6)


@needs_library
@pytest.mark.parametrize("form", ["portable", "native"])
def test_a_session_refuses_a_padding_outside_the_table(form: str) -> None:
    for row, rows in ((9, 9), (-10, 9), (0, 0), (MAX64, 10), (MIN64 + 1, 10)):
        keywords = {"x": ints(), "weight": TABLE[:rows], "offsets": ints(0), "padding_idx": row}
        session = session_of(keywords, form)
        with pytest.raises(ValueError) as caught:
            lucid_onnx.reference.embedding_bag(**keywords)
        assert refusal(session, feeds(keywords)) == str(caught.value)
        if row in range(-10, 10):
            assert session.run(None, feeds(dict(keywords, weight=TABLE)))[0].tolist() == [[0, 0]]


@needs_library
@pytest.mark.parametrize("form", ["portable", "native"])
def test_a_session_refuses_other_dtypes_and_ranks(form: str) -> None:
    """These are ONNX Runtime's own checks, of what the model says; that it says it is ours."""
    good = {"weight": TABLE, "indices": ints(1, 2), "offsets": ints(0)}
    session = session_of({"x": good["indices"], "weight": TABLE, "offsets": good["offsets"]}, form)
    for name, array in (
        ("weight", TABLE.astype(np.float64)),
        ("weight", TABLE.astype(np.float16)),
        ("indices", ints(1, 2, dtype=np.int32)),
        ("indices", floats(1, 2)),
        ("offsets", ints(0, dtype=np.int32)),
        ("indices", ints(1, 2).reshape(1, 2)),
        ("offsets", ints(0).reshape(1, 1)),
        ("weight", TABLE.reshape(20)),
    ):
        with pytest.raises(Exception, match=r"INVALID_ARGUMENT : (Unexpected input data type|Invalid rank for input)"):
            session.run(None, {**good, name: array})
        assert session.run(None, good)[0].tolist() == [[3, 4]]
    with pytest.raises(ValueError, match="offsets"):
        session.run(None, {"weight": TABLE, "indices": ints(1, 2)})
    assert session.run(None, good)[0].tolist() == [[3, 4]]


@needs_library
def test_a_constant_table_is_checked_too() -> None:
    for weight, message in (
        (TABLE, "indices[1] = 10 is outside [0, 10)"),
        (TABLE[:0], "indices[0] = 3 is outside [0, 0)"),
    ):
        session = lucid_onnx.InferenceSession(lucid_onnx.build_model(weight, form="native"))
        assert refusal(session, {"indices": ints(3, 10), "offsets": ints(0)}) == message
        assert session.run(None, {"indices": ints(), "offsets": ints(0)})[0].tolist() == [[0, 0]]


@needs_library
@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("places", [(150_000,), (149_999, 5), (77_777, 149_999, 1024), (1024, 1023), (0, 149_999)])
def test_the_lowest_position_is_named_at_any_number_of_threads(threads: int, places: tuple[int, ...]) -> None:
    """In one giant bag, in many short ones and in rows; the work is large enough to be split."""
    weight = np.ones((10, 8), np.float32)
    x = np.zeros(150_001, np.int64)
    x[list(places)] = -9
    lowest = min(places)
    layouts: list[tuple[np.ndarray, np.ndarray | None, str]] = [
        (x, ints(0), f"{lowest}"),
        (x, np.arange(0, 150_000, 3), f"{lowest}"),
        (x, np.concatenate([np.arange(0, 1500, 10), ints(1500, 40_000, 140_000)]), f"{lowest}"),
        (x[: 150_000 if lowest < 150_000 else 0].reshape(-1, 50), None, f"{lowest // 50}, {lowest % 50}"),
    ]
    for indices, offsets, where in layouts:
        if not indices.size:
            continue
        keywords = {"x": indices, "weight": weight, "offsets": offsets}
        session = session_of(keywords, "native", intra_op_num_threads=threads)
        for _ in range(5):
            assert refusal(session, feeds(keywords)) == f"indices[{where}] = -9 is outside [0, 10)"
        good = {**keywords, "x": np.abs(indices) % 9}
        assert (session.run(None, feeds(good))[0] == 1).all()


@needs_library
def test_the_lowest_position_through_the_c_interface() -> None:
    random = np.random.RandomState(7)
    for _ in range(20):
        lengths = random.choice([0, 1, 5, 1500], 200)
        x = random.randint(0, 50, lengths.sum())
        x[random.randint(0, len(x), 4)] = random.choice([50, -1, MIN64, MAX64], 4)
        offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        case = cases.Case("bad", np.ones((50, 4), np.float32), x, offsets, None, spec.Attributes("max", padding_idx=3))
        with pytest.raises(IndexError) as caught:
            case.expected()
        for isa, threads in itertools.product(isas(), (1, 3, 8)):
            output = np.zeros((200, 4), np.float32)
            assert call(arguments(case, output), isa, threads) == (1, str(caught.value))


# ---- Small requests with large answers.

MAX_OUTPUT_BYTES = "lucid.max_output_bytes"


def _quiet() -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return options


def _limited(model: onnx.ModelProto, most: int | str) -> Any:
    options = _quiet()
    options.add_session_config_entry(MAX_OUTPUT_BYTES, str(most))
    return lucid_onnx.InferenceSession(model, session_options=options)


@needs_library
@pytest.mark.parametrize("form", ["portable", "native"])
def test_offsets_are_checked_before_there_is_an_output(form: str) -> None:
    """No machine has room for this output, and nobody asks for it."""
    model = lucid_onnx.build_model(np.zeros((1, 2**20), np.float32), mode="sum", form=form)
    session = lucid_onnx.InferenceSession(model, session_options=_quiet())
    offsets = np.zeros(2**22, np.int64)  # 16 TiB of zeros
    offsets[-1] = 2
    message = refusal(session, {"indices": ints(0), "offsets": offsets})
    assert message == f"offsets[{2**22 - 1}] = 2 is past the number of indices, 1"
    collection = lucid_onnx.build_collection_model([np.zeros((1, 2**20), np.float32)] * 2, mode="sum", form=form)
    session = lucid_onnx.InferenceSession(collection, session_options=_quiet())
    feed = {"indices_0": ints(0), "offsets_0": offsets * 0, "indices_1": ints(0), "offsets_1": offsets}
    with pytest.raises(Exception, match=re.escape(f"table 1: offsets[{2**22 - 1}] = 2 is past")):
        session.run(None, feed)


@needs_library
@pytest.mark.parametrize("form", ["portable", "native"])
def test_an_output_of_more_than_the_session_allows(form: str) -> None:
    model = lucid_onnx.build_model(np.ones((3, 64), np.float32), mode="sum", two_d=True, form=form)
    session = _limited(model, 2560)
    assert session.run(None, {"indices": np.zeros((10, 0), np.int64)})[0].shape == (10, 64)
    for rows, size in ((11, 2816), (5_000_000, 1_280_000_000), (2**59, 2**63 - 1)):
        with pytest.raises(Exception) as caught:
            session.run(None, {"indices": np.empty((rows, 0), np.int64)})
        assert (
            f"EmbeddingBag2D: output 0 of shape [{rows}, 64] takes {size} bytes, more than {MAX_OUTPUT_BYTES} = 2560"
        ) in str(caught.value)
        assert "INVALID_ARGUMENT" in str(caught.value)
    assert session.run(None, {"indices": np.ones((10, 1), np.int64)})[0].tolist() == [[1.0] * 64] * 10


@needs_library
def test_the_outputs_of_every_operator_are_limited() -> None:
    weight, offsets = np.ones((30, 8), np.float32), np.zeros(100, np.int64)
    x, ones = ints(1, 2), ints(*[1] * 30)
    quantized = lucid_onnx.QuantizedTable.quantize(weight)
    for model, feed, expected in (
        (
            lucid_onnx.build_quantized_model(quantized, mode="sum"),
            {"indices": x, "offsets": offsets},
            "output 0 of shape [100, 8] takes 3200 bytes",
        ),
        (
            lucid_onnx.build_collection_model([weight, weight], mode="sum"),
            {"indices_0": x, "indices_1": x, "offsets_0": offsets, "offsets_1": offsets},
            "output 0 of shape [100, 16] takes 6400 bytes",
        ),
        (
            lucid_onnx.build_grad_model(mode="sum"),
            {"grad_output": np.ones((2, 8), np.float32), "weight": weight, "indices": x, "offsets": ints(0, 1)},
            "output 0 of shape [30, 8] takes 960 bytes",
        ),
        (
            lucid_onnx.build_grad_model(mode="sum", sparse=True),
            {
                "grad_output": np.ones((1, 8), np.float32),
                "weight": weight,
                "indices": ones,
                "offsets": ints(0),
            },
            "output 1 of shape [30, 8] takes 960 bytes",
        ),
    ):
        with pytest.raises(Exception, match=re.escape(f"{expected}, more than {MAX_OUTPUT_BYTES} = 900")):
            _limited(model, 900).run(None, feed)
        _limited(model, 6400).run(None, feed)


@needs_library
@pytest.mark.parametrize("value", ["", "0", "-1", "1.5", "1 MB", "0x10", "9223372036854775808"])
def test_a_limit_that_is_not_a_number(value: str) -> None:
    text = f"{MAX_OUTPUT_BYTES} = '{value}' is not a positive whole number"
    with pytest.raises(Exception, match=re.escape(text)):
        _limited(lucid_onnx.build_model(np.ones((3, 4), np.float32)), value)


@needs_library
@pytest.mark.skipif(
    tuple(map(int, ort.__version__.split(".")[:2])) < (1, 24),
    reason="a kernel sees its session's entries from onnxruntime 1.24 on",
)
def test_a_limit_set_after_the_registration() -> None:
    model = lucid_onnx.build_model(np.ones((3, 4), np.float32), mode="sum")
    options = _quiet()
    lucid_onnx.register(options)
    options.add_session_config_entry(MAX_OUTPUT_BYTES, "16")
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert session.run(None, {"indices": ints(1), "offsets": ints(0)})[0].tolist() == [[1.0] * 4]
    with pytest.raises(Exception, match=f"more than {MAX_OUTPUT_BYTES} = 16"):
        session.run(None, {"indices": ints(1), "offsets": ints(0, 1)})


# ---- Attributes in a model that did not come from here.


def _node_model(op: spec.Variant, dtype: int = TensorProto.FLOAT, **attributes: Any) -> onnx.ModelProto:
    """A native model with attributes as they are given, whatever they are."""
    shapes = {"weight": ["V", "D"], "indices": ["B", "L"] if op.two_d else ["N"], "offsets": ["O"]}
    shapes["per_sample_weights"] = shapes["indices"]
    types = {"weight": dtype, "per_sample_weights": dtype}
    graph = helper.make_graph(
        [helper.make_node(op.name, list(op.inputs), ["output"], domain=spec.DOMAIN, **attributes)],
        "bag",
        [helper.make_tensor_value_info(n, types.get(n, TensorProto.INT64), shapes[n]) for n in op.inputs],
        [helper.make_tensor_value_info("output", dtype, ["B", "D"])],
    )
    imports = [helper.make_opsetid("", 18), helper.make_opsetid(spec.DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


PLAIN, WEIGHTED = spec.VARIANTS["EmbeddingBag"], spec.VARIANTS["EmbeddingBagWeighted"]
FLAT, ROWS = TensorProto.FLOAT, spec.VARIANTS["EmbeddingBag2D"]
BAD_NODES = [
    (PLAIN, {"mode": 4}, "mode = 4 is not 0 (sum), 1 (mean), 2 (max) or 3 (sqrtn)"),
    (PLAIN, {"mode": -1}, "mode = -1 is not 0 (sum), 1 (mean), 2 (max) or 3 (sqrtn)"),
    (PLAIN, {"mode": 2**32}, f"mode = {2**32} is not 0 (sum), 1 (mean), 2 (max) or 3 (sqrtn)"),
    (PLAIN, {"mode": "sum"}, "mode must be an INT attribute"),
    (PLAIN, {"mode": 1.0}, "mode must be an INT attribute"),
    (PLAIN, {"padding_idx": 1.0}, "padding_idx must be an INT attribute"),
    (PLAIN, {"max_norm": 1}, "max_norm must be a FLOAT attribute"),
    (PLAIN, {"norm_type": "inf"}, "norm_type must be a FLOAT attribute"),
    (PLAIN, {"include_last_offset": 1.0}, "include_last_offset must be an INT attribute"),
    (PLAIN, {"max_norm": math.nan}, "max_norm = nan must be >= 0"),
    (PLAIN, {"max_norm": -1.5}, "max_norm = -1.5 must be >= 0"),
    (PLAIN, {"max_norm": 1.0, "max_norm_lo": -2.5}, "max_norm = -1.5 must be >= 0"),
    (PLAIN, {"max_norm": 1.0, "max_norm_lo": math.nan}, "max_norm = nan must be >= 0"),
    (PLAIN, {"norm_type": 0.0}, "norm_type = 0 must be > 0"),
    (PLAIN, {"norm_type": math.nan}, "norm_type = nan must be > 0"),
    (PLAIN, {"norm_type": -math.inf}, "norm_type = -inf must be > 0"),
    (PLAIN, {"stash_type": 11}, "stash_type = 11 must be 1 for this type of weight"),
    (ROWS, {"stash_type": 7}, "stash_type = 7 must be 1 for this type of weight"),
    (WEIGHTED, {"mode": 1}, "per_sample_weights needs mode 'sum', got mode = 'mean'"),
    (WEIGHTED, {"mode": 2}, "per_sample_weights needs mode 'sum', got mode = 'max'"),
    (WEIGHTED, {}, "per_sample_weights needs mode 'sum', got mode = 'mean'"),  # mean is the default
]


@needs_library
@pytest.mark.parametrize(("op", "attributes", "message"), BAD_NODES)
def test_a_session_refuses_bad_attributes(op: spec.Variant, attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception) as caught:
        lucid_onnx.InferenceSession(_node_model(op, **attributes))
    assert str(caught.value).endswith(f"{op.name}: {message}")
    # The process goes on: the library's domain is shared by all sessions.
    session = lucid_onnx.InferenceSession(_node_model(PLAIN, mode=0))
    got = session.run(None, {"weight": TABLE, "indices": ints(1, 2), "offsets": ints(0)})[0]
    assert got.tolist() == [[6, 8]]


@needs_library
@pytest.mark.parametrize("op", spec.VARIANTS.values(), ids=spec.VARIANTS)
def test_an_attribute_of_another_type_is_not_absent(op: spec.Variant) -> None:
    model = _node_model(
        op, mode=0, padding_idx=1, max_norm=1.0, max_norm_lo=0.0, norm_type=2.0, norm_type_lo=0.0, stash_type=1
    )
    if not op.two_d:
        model.graph.node[0].attribute.append(helper.make_attribute("include_last_offset", 0))
    lucid_onnx.InferenceSession(model)
    check_attribute_types(model, op.name)


@needs_library
def test_an_attribute_of_another_name_is_not_seen() -> None:
    """A custom op can only ask by name, so the model decides, and `to_form` checks the names."""
    lucid_onnx.InferenceSession(_node_model(PLAIN, modus=2))


@needs_library
def test_a_double_table_needs_a_double_stash() -> None:
    with pytest.raises(Exception) as caught:
        lucid_onnx.InferenceSession(_node_model(PLAIN, TensorProto.DOUBLE, stash_type=1))
    assert str(caught.value).endswith("EmbeddingBag: stash_type = 1 must be 11 for this type of weight")
    with pytest.raises(Exception) as caught:
        lucid_onnx.InferenceSession(_node_model(PLAIN, TensorProto.INT32))
    assert "EmbeddingBag" in str(caught.value)


# ---- Building.


def _built(*nodes: onnx.NodeProto, opset: int = 18, **tables: np.ndarray) -> onnx.ModelProto:
    """A model of nodes over inputs of the names that they use."""
    names = {i for n in nodes for i in n.input if i and i not in tables}
    graph = helper.make_graph(
        nodes,
        "graph",
        [
            helper.make_tensor_value_info(n, FLAT if n.startswith("w") else TensorProto.INT64, None)
            for n in sorted(names)
        ],
        [helper.make_tensor_value_info(n.output[0], FLAT, None) for n in nodes if n.output],
        [onnx.numpy_helper.from_array(a, n) for n, a in tables.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(spec.DOMAIN, 1)])


def _ours(
    op: str = "EmbeddingBag", inputs: tuple[str, ...] = ("w", "i", "o"), name: str = "", **k: Any
) -> onnx.NodeProto:
    return helper.make_node(op, inputs, ["y"], domain=spec.DOMAIN, name=name, **k)


def _convert(*args: Any, form: Any = "portable", **keywords: Any) -> Callable[[], Any]:
    return lambda: lucid_onnx.to_form(_built(*args, **keywords), form)


def _build(**keywords: Any) -> Callable[[], Any]:
    return lambda: lucid_onnx.build_model(**{"weight": TABLE, **keywords})


def _make(**keywords: Any) -> Callable[[], Any]:
    return lambda: lucid_onnx.make_node("w", "i", **{"offsets": "o", **keywords})


_FORMS = "is not one of 'portable', 'standard', 'native'"
_FLOATS = "float32, float16, bfloat16, float64"
_NUMBERS = "is not 0 (sum), 1 (mean), 2 (max) or 3 (sqrtn)"
_MODES = "is not one of 'sum', 'mean', 'max', 'sqrtn'"
_TAKES = "EmbeddingBag takes weight, indices, offsets; it was given"
BAD_BUILDS: list[tuple[str, type[Exception], str, Callable[[], Any]]] = [
    *(
        (f"{name} {label}", error, message, make(**keywords))
        for name, make in (("build_model", _build), ("make_node", _make))
        for label, error, message, keywords in (
            ("mode", ValueError, f"mode = 'Sum' {_MODES}", {"mode": "Sum"}),
            ("mode None", ValueError, f"mode = None {_MODES}", {"mode": None}),
            ("max_norm nan", ValueError, "max_norm = nan must be >= 0", {"max_norm": math.nan}),
            ("max_norm negative", ValueError, "max_norm = -0.5 must be >= 0", {"max_norm": -0.5}),
            ("max_norm text", TypeError, "max_norm = '1' must be a real number", {"max_norm": "1"}),
            ("norm_type 0", ValueError, "norm_type = 0.0 must be > 0", {"norm_type": 0}),
            ("norm_type nan", ValueError, "norm_type = nan must be > 0", {"norm_type": math.nan}),
            ("norm_type None", TypeError, "norm_type = None must be a real number", {"norm_type": None}),
            ("padding float", TypeError, "padding_idx = 1.0 must be an integer or None", {"padding_idx": 1.0}),
            ("last offset", TypeError, "include_last_offset = 1 must be a bool", {"include_last_offset": 1}),
            (
                "dtype",
                TypeError,
                f"weight_dtype = int32 is not one of {_FLOATS}",
                {"weight": None, "weight_dtype": "int32"} if make is _build else {"weight_dtype": "int32"},
            ),
            (
                "no dtype",
                TypeError,
                "weight_dtype = 'float31' is not a dtype",
                {"weight": None, "weight_dtype": "float31"} if make is _build else {"weight_dtype": "float31"},
            ),
        )
    ),
    (
        "make_node padding",
        ValueError,
        f"padding_idx = {2**63} does not fit int64",
        _make(padding_idx=2**63),
    ),
    # INT64_MIN is the attribute of no padding: let through it would pad nothing.
    (
        "make_node padding of the sentinel",
        ValueError,
        f"padding_idx = {MIN64} does not fit int64",
        _make(padding_idx=MIN64),
    ),
    (
        "make_node weights",
        ValueError,
        "per_sample_weights needs mode 'sum', got mode = 'mean'",
        _make(per_sample_weights="p"),
    ),
    (
        "build_model weights",
        ValueError,
        "per_sample_weights needs mode 'sum', got mode = 'max'",
        _build(mode="max", per_sample_weights=True),
    ),
    ("opset 15", ValueError, "opset = 15 is outside [16, 26]", _build(opset=15)),
    ("opset 27", ValueError, "opset = 27 is outside [16, 26]", _build(opset=27)),
    ("opset -1", ValueError, "opset = -1 is outside [16, 26]", _build(opset=-1)),
    ("opset True", TypeError, "opset = True must be an integer", _build(opset=True)),
    ("opset 18.0", TypeError, "opset = 18.0 must be an integer", _build(opset=18.0)),
    ("opset None", TypeError, "opset = None must be an integer", _build(opset=None)),
    ("form", ValueError, f"form = 'onnx' {_FORMS}", _build(form="onnx")),
    ("form None", ValueError, f"form = None {_FORMS}", _build(form=None)),
    ("padding", ValueError, "padding_idx = 10 is outside [-10, 10), the rows of weight", _build(padding_idx=10)),
    ("low padding", ValueError, "padding_idx = -11 is outside [-10, 10), the rows of weight", _build(padding_idx=-11)),
    ("table int", TypeError, _TABLES.format("int64"), _build(weight=np.ones((2, 2), np.int64))),
    ("table list of ints", TypeError, _TABLES.format("int64"), _build(weight=[[1, 2]])),
    ("table 1-D", ValueError, "weight has shape [2], expected [V, D]", _build(weight=floats(1, 2))),
    ("index_dtype", TypeError, "index_dtype = uint32 is not one of int32, int64", _build(index_dtype="uint32")),
    ("index_dtype float", TypeError, "index_dtype = float32 is not one of int32, int64", _build(index_dtype="float32")),
    ("to_form form", ValueError, f"form = 'fast' {_FORMS}", _convert(_ours(), form="fast")),
    ("to_form opset", ValueError, "the model imports opset 15, which is outside [16, 26]", _convert(_ours(), opset=15)),
    ("to_form opset", ValueError, "the model imports opset 27, which is outside [16, 26]", _convert(_ours(), opset=27)),
    (
        "to_form no opset",
        ValueError,
        "the model imports no standard opset",
        lambda: lucid_onnx.to_form(onnx.ModelProto(), "portable"),
    ),
    (
        "to_form name",
        ValueError,
        f"node 'bag': ai.lucid::EmbeddingSack is not one of {', '.join(OPERATOR_OF)}",
        _convert(_ours("EmbeddingSack", name="bag")),
    ),
    ("to_form attribute", ValueError, "node 'y': EmbeddingBag has no attribute 'modus'", _convert(_ours(modus=1))),
    (
        "to_form attribute of another variant",
        ValueError,
        "node 'y': EmbeddingBag2D has no attribute 'include_last_offset'",
        _convert(_ours("EmbeddingBag2D", ("w", "i"), include_last_offset=1)),
    ),
    ("to_form few", ValueError, f"node 'y': {_TAKES} ['w', 'i']", _convert(_ours(inputs=("w", "i")))),
    (
        "to_form many",
        ValueError,
        f"node 'y': {_TAKES} ['w', 'i', 'o', 'wp']",
        _convert(_ours(inputs=("w", "i", "o", "wp"))),
    ),
    ("to_form absent", ValueError, f"node 'y': {_TAKES} ['w', 'i', '']", _convert(_ours(inputs=("w", "i", "")))),
    ("to_form none", ValueError, f"node 'y': {_TAKES} []", _convert(_ours(inputs=()))),
    (
        "to_form outputs",
        ValueError,
        "node 'y, z': EmbeddingBag has one output, not 2",
        _convert(helper.make_node("EmbeddingBag", ["w", "i", "o"], ["y", "z"], domain=spec.DOMAIN)),
    ),
    ("to_form mode", ValueError, f"node 'y': mode = 'median' {_MODES}", _convert(_ours(mode="median"))),
    ("to_form mode 4", ValueError, f"node 'y': mode = 4 {_NUMBERS}", _convert(_ours(mode=4))),
    ("to_form mode 1.5", ValueError, f"node 'y': mode = 1.5 {_NUMBERS}", _convert(_ours(mode=1.5))),
    ("to_form mode 1.0", ValueError, f"node 'y': mode = 1.0 {_NUMBERS}", _convert(_ours(mode=1.0))),
    ("to_form mode bytes", ValueError, None, _convert(_ours(mode=b"\xff\xfe"))),
    ("to_form max_norm", ValueError, "node 'y': max_norm = nan must be >= 0", _convert(_ours(max_norm=math.nan))),
    ("to_form max_norm text", ValueError, None, _convert(_ours(max_norm="big"))),
    ("to_form padding text", ValueError, None, _convert(_ours(padding_idx="0"))),
    ("to_form padding ints", ValueError, None, _convert(_ours(padding_idx=[0]))),
    ("to_form padding float", ValueError, None, _convert(_ours(padding_idx=1.7))),
    ("to_form last offset text", ValueError, None, _convert(_ours(include_last_offset="0"))),
    ("to_form norm_type", ValueError, "node 'y': norm_type = 0.0 must be > 0", _convert(_ours(norm_type=0.0))),
    (
        "to_form weights with mean",
        ValueError,
        "node 'y': per_sample_weights needs mode 'sum', got mode = 'mean'",
        _convert(_ours("EmbeddingBagWeighted", ("w", "i", "o", "wp"))),
    ),
    (
        "to_form padding",
        ValueError,
        "node 'y': padding_idx = 10 is outside [-10, 10), the rows of weight",
        _convert(_ours(padding_idx=10), w=TABLE),
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "message", "build"), [pytest.param(*row[1:], id=row[0].replace(" ", "-")) for row in BAD_BUILDS]
)
def test_building_refuses(error: type[Exception], message: str | None, build: Callable[[], Any]) -> None:
    with pytest.raises(error) as caught:
        build()
    assert type(caught.value) is error
    if message is None:  # an attribute of a wrong type: any text that names the node
        assert str(caught.value).startswith("node 'y': ")
    else:
        assert str(caught.value) == message


def test_a_refused_model_is_left_as_it_was() -> None:
    model = _built(_ours(mode="max"), _ours("EmbeddingSack"))
    before = model.SerializeToString(deterministic=True)
    with pytest.raises(ValueError):
        lucid_onnx.to_form(model, "standard")
    assert model.SerializeToString(deterministic=True) == before


# ---- Garbage.


def _session(case: cases.Case, form: str, native: bool) -> Any:
    return lucid_onnx.InferenceSession(case_model(case, form), native=native)


@needs_library
def test_garbage_is_refused_or_answered_rightly_by_the_kernel() -> None:
    for case, message in garbage_cases(range(300)):
        session = _session(case, "native", native=True)
        if message is None:
            case.check(session.run(None, case.inputs)[0], slack=SLACK)
        else:
            assert refusal(session, case.inputs) == message, case.name


@needs_library
def test_garbage_through_the_c_interface() -> None:
    for case, message in garbage_cases(range(1000, 2000)):
        if message is None:
            case.check(pool(case, threads=3), slack=SLACK)
            continue
        for isa in isas():
            fill = np.full((max(num_bags(case), 0), case.weight.shape[1]), 7, np.uint8)
            output = np.empty(fill.shape, case.weight.dtype)
            assert call(arguments(case, output), isa, 3) == (1, message), case.name


@pytest.mark.parametrize("form", ["portable", "standard"])
def test_garbage_does_not_crash_the_graph(form: str) -> None:
    """Standard operators reject less than the contract does: what is valid is right, and the rest does not crash."""
    for case, message in garbage_cases(range(5000, 5200)):
        session = _session(case, form, native=False)
        if message is None:
            case.check(session.run(None, case.inputs)[0], slack=SLACK)
        else:
            # Whatever it says or answers, it comes back, and the session lives on.
            with contextlib.suppress(Exception):
                session.run(None, case.inputs)
            if case.offsets is not None and len(case.offsets):
                empty = dict(case.inputs, indices=case.indices[:0], offsets=case.offsets[:1] * 0)
                if "per_sample_weights" in empty:
                    empty["per_sample_weights"] = case.per_sample_weights[:0]  # type: ignore[index]
                got = session.run(None, empty)[0]
                bags = 0 if case.attributes.include_last_offset else 1
                assert got.shape == (bags, case.weight.shape[1])
                assert not got.astype(np.float64).any()


@pytest.mark.parametrize("form", ["portable", "standard"])
def test_the_graph_refuses_every_index_outside_the_table(form: str) -> None:
    """As the documentation says, ONNX Runtime's operators on the CPU check this part of the contract."""
    for refused in BAD_INDICES:
        if refused.keywords["weight"].shape[1] == 0 or refused.keywords["weight"].shape[0] == 0:
            continue  # there is no element to read
        session = session_of(refused.keywords, form, native=False)
        with pytest.raises(Exception, match="indices element out of data bounds"):
            session.run(None, feeds(refused.keywords))


# ---- The C interface.


def _c_case() -> cases.Case:
    return cases.make("weights", mode="sum", weighted=True)


@needs_library
@pytest.mark.parametrize(("overrides", "message"), BAD_STRUCTS)
def test_the_c_interface_refuses(overrides: dict[str, Any], message: str | None) -> None:
    case = _c_case()
    if message is None:
        rows = overrides["weight_shape"][0]
        k = int(np.flatnonzero(case.indices >= rows)[0])
        message = f"indices[{k}] = {case.indices[k]} is outside [0, {rows})"
    output = np.full(case.expected().shape, 5, np.float32)
    for isa in isas():
        assert call(arguments(case, output, **overrides), isa) == (1, message)
    case.check(pool(case))


@needs_library
def test_sizes_that_take_no_memory_may_be_anything() -> None:
    case = cases.make("rows", mode="sum", layout="rows")
    huge = 2**62
    for overrides in (
        {"indices_shape": (huge, 0), "weight_shape": (0, 0)},  # B rows of nothing over a table of nothing
        {"indices_shape": (0, huge), "weight_shape": (huge, 0)},
        {"indices_shape": (0, huge), "weight_shape": (0, huge)},
    ):
        nothing = dict.fromkeys(("weight", "indices"))
        assert call(arguments(case, **nothing, **overrides)) == (0, "")
    flat = cases.make("ragged", mode="sum")
    nothing = dict.fromkeys(("weight", "indices", "offsets"))
    assert call(arguments(flat, **nothing, indices_shape=(0, 0), num_offsets=0)) == (0, "")


@needs_library
def test_a_message_is_cut_to_the_room_that_it_has() -> None:
    case = _c_case()
    args = arguments(case, np.zeros(case.expected().shape, np.float32), dtype=9)
    whole = b"dtype = 9 is unknown"
    for size in (0, 1, 2, 10, len(whole), len(whole) + 1, 64):
        room = ctypes.create_string_buffer(b"#" * 80, 81)
        assert library().lucid_embedding_bag(ctypes.byref(args), None, 1, room, size) == 1
        kept = whole[: size - 1] + b"\0" if size else b""
        assert room.raw[: len(kept)] == kept
        assert room.raw[max(size, len(kept)) : 80] == b"#" * (80 - max(size, len(kept)))
    assert library().lucid_embedding_bag(ctypes.byref(args), None, 1, None, 0) == 1
