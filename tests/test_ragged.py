"""Bags of different lengths in a loop, and padded: what blocks are, in other nodes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest
from onnx import helper

import lucid_onnx
from lucid_onnx import cli
from lucid_onnx.builder import convert
from lucid_onnx.builder.conformance import AnyCase, case_model
from lucid_onnx.ops import OPERATORS
from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.ops.embedding_bag.lowering import LONGEST_BAG, Ragged
from lucid_testing.graphs import nodes
from lucid_testing.models import swapped_operators, two_bags

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

WAYS = ("blocks", "loop", "padded")
CASES: list[AnyCase] = [
    case
    for name in ("embedding_bag", "quantized_embedding_bag", "embedding_bag_collection")
    for case in OPERATORS[name].cases.all_cases().values()
]


def ragged(way: str, case: Any) -> Ragged:
    """The way, padded to exactly the longest bag that a case has."""
    if way != "padded" or (offsets := getattr(case, "offsets", None)) is None:
        return Ragged(way, LONGEST_BAG if way == "padded" and hasattr(case, "tables") else None)
    ends = [] if case.attributes.include_last_offset else [len(case.indices)]
    return Ragged(way, max(int(np.diff([*offsets, *ends]).max(initial=0)), 1))


def written(case: AnyCase, way: str, form: str, opset: int = spec.DEFAULT_OPSET, **kwargs: Any) -> onnx.ModelProto:
    model = case_model(case, "native", opset, **kwargs)
    convert(model, form, ragged(way, case))
    return model


def session(model: onnx.ModelProto, threads: int = 1, *, native: bool = False) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return lucid_onnx.InferenceSession(model, native=native, session_options=options)


# ---- What they compute.


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", ["standard", "portable"])
def test_cases(way: str, form: str, newest_opset: int) -> None:
    """Every ninth named case as plain nodes and every eighteenth as functions, others in each way; opsets in turn."""
    turn, step = WAYS.index(way), 9 if form == "standard" else 18
    for k, case in enumerate(CASES[turn::step]):
        opset = (spec.MIN_OPSET, spec.DEFAULT_OPSET, newest_opset)[k % 3]
        model = written(case, way, form, opset)
        onnx.checker.check_model(model, full_check=True)
        case.check(*session(model).run(None, case.inputs))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, about the infinities that the cases hold
def test_onnx_reference(way: str) -> None:
    for k, case in enumerate(CASES[WAYS.index(way) :: 16]):
        model = written(case, way, ("standard", "portable")[k % 2])
        case.check(*(np.asarray(a) for a in onnx.reference.ReferenceEvaluator(model).run(None, case.inputs)))


@pytest.mark.parametrize("way", WAYS)
def test_a_function_in_another_way_is_the_same_operator(way: str, native: None) -> None:
    case = OPERATORS["embedding_bag"].cases.all_cases()["everything_ends_float32"]
    model = written(case, way, "portable")
    expected = session(case_model(case, "native"), native=True).run(None, case.inputs)[0]
    assert session(model, native=True).run(None, case.inputs)[0].tobytes() == expected.tobytes()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", spec.MODES)
def test_the_same_bits_at_any_thread_count(way: str, mode: str) -> None:
    """Few long bags, many short ones, and one column: where a runtime could split the additions."""
    rng = np.random.default_rng(5)
    for dim, lengths in ((1, (700, 3, 0, 300)), (64, (900, 1)), (33, (5,) * 300)):
        table = rng.standard_normal((500, dim)).astype(np.float32)
        model = lucid_onnx.build_model(table, mode=mode)
        lowered = lucid_onnx.lower(model, ragged=way, longest_bag=1000 if way == "padded" else None)  # type: ignore[arg-type]
        feed = {"indices": rng.integers(0, 500, sum(lengths)), "offsets": np.cumsum([0, *lengths[:-1]])}
        found = {session(lowered, threads).run(None, feed)[0].tobytes() for threads in (1, 2, 3)}
        assert len(found) == 1


@pytest.mark.parametrize("way", WAYS)
def test_long_bags_are_exact(way: str) -> None:
    """A row that is added again and again: in float32, one after another, 4096 times 0.1 is off by 3e-5."""
    table = np.full((2, 3), 0.1, np.float32)
    model = lucid_onnx.build_model(table, mode="sum")
    lowered = lucid_onnx.lower(model, ragged=way, longest_bag=LONGEST_BAG if way == "padded" else None)  # type: ignore[arg-type]
    feed = {"indices": np.zeros(LONGEST_BAG + 5, np.int64), "offsets": np.array([0, LONGEST_BAG])}
    (found,) = session(lowered).run(None, feed)
    exact = np.array([[LONGEST_BAG], [5]]) * np.float64(np.float32(0.1)) * np.ones(3)
    np.testing.assert_allclose(found, exact, rtol=2e-6)


# ---- What they refuse.


@functools.cache
def refusing(way: str) -> Any:
    model = lucid_onnx.build_model(np.eye(4, 3, dtype=np.float32), mode="sum")
    return session(lucid_onnx.lower(model, ragged=way, longest_bag=3 if way == "padded" else None))  # type: ignore[arg-type]


@pytest.mark.parametrize("way", ["pieces", *WAYS])
@pytest.mark.parametrize("offsets", [[], [1], [-1], [-(2**63)], [-(2**63), 0], [0, -(2**63)], [0, -(2**63), 0]])
def test_bad_offsets_of_no_positions_are_refused(way: str, offsets: list[int]) -> None:
    """With include_last_offset, which needs one offset at least, and 0 as the first."""
    model = lucid_onnx.build_model(np.eye(4, 3, dtype=np.float32), include_last_offset=True)
    at = session(lucid_onnx.lower(model, ragged=way, longest_bag=3 if way == "padded" else None))  # type: ignore[arg-type]
    nothing = np.zeros(0, np.int64)
    with pytest.raises(Exception, match=r"out of data bounds|out of bounds"):
        at.run(None, {"indices": nothing, "offsets": np.array(offsets, np.int64)})
    assert at.run(None, {"indices": nothing, "offsets": np.array([0])})[0].shape == (0, 3)


@pytest.mark.parametrize("way", ["pieces", *WAYS])
@pytest.mark.parametrize(
    ("indices", "offsets"),
    [
        ([0, -1, 2], [0, 1]),
        ([0, 1, 4], [0, 1]),
        ([0, 2**62, 1], [0, 1]),
        ([0, 1, 2], [1, 2]),
        ([0, 1, 2], [-1, 2]),
        ([0, 1, 2], [0, 2, 1]),
        ([0, 1, 2], [0, 4]),
        ([0, 1, 2], [0, -(2**62), 2]),
    ],
)
def test_bad_input_is_refused(way: str, indices: list[int], offsets: list[int]) -> None:
    at = refusing(way)
    with pytest.raises(Exception, match=r"out of data bounds|out of bounds"):
        at.run(None, {"indices": np.array(indices), "offsets": np.array(offsets)})
    good = {"indices": np.array([0, 1, 2]), "offsets": np.array([0, 2])}
    np.testing.assert_array_equal(at.run(None, good)[0], [[1, 1, 0], [0, 0, 1]])


MIN, MAX = -(2**63), 2**63 - 1


@pytest.mark.parametrize(
    "offsets", [[0, MIN], [0, 2, MIN], [0, 2, MIN + 1], [0, MIN, MIN + 1], [0, 3, 2, MIN + 3], [0, MAX]]
)
@pytest.mark.parametrize("form", ["portable", "standard"])
def test_offsets_whose_differences_overflow_are_refused(form: Any, offsets: list[int]) -> None:
    """In every operator: the difference of two int64 may have another sign than theirs."""
    table, bags = np.eye(4, 3, dtype=np.float32), len(offsets) - 1
    few = {"indices": np.array([0, 1, 2]), "offsets": np.array(offsets)}
    both = few | {"offsets": np.array([0] * bags + offsets)}  # of two tables; the first has no indices
    quantized = lucid_onnx.QuantizedTable.quantize(table)
    keywords: Any = {"form": form, "include_last_offset": True}
    for model, feed in (
        (lucid_onnx.build_model(table, **keywords), few),
        (lucid_onnx.build_quantized_model(quantized, **keywords), few),
        (lucid_onnx.build_collection_model([table, table], layout="packed", **keywords), both),
        (lucid_onnx.build_grad_model(table, **keywords), few | {"grad_output": np.ones((bags, 3), np.float32)}),
    ):
        with pytest.raises(Exception, match=r"out of data bounds|out of bounds"):
            session(model).run(None, feed)


def test_a_bag_that_is_too_long_is_refused() -> None:
    with pytest.raises(Exception, match=r"no_bag_is_longer_than_3.*out of data bounds"):
        refusing("padded").run(None, {"indices": np.array([0, 1, 2, 0, 0]), "offsets": np.array([0, 1])})
    weight = np.eye(2, dtype=np.float32)
    two_d = session(lucid_onnx.lower(lucid_onnx.build_model(weight, mode="max", two_d=True), ragged="padded"))
    for length in (0, 1, 64, 65, LONGEST_BAG):
        assert two_d.run(None, {"indices": np.zeros((2, length), np.int64)})[0].sum() == 2 * (length > 0)
    with pytest.raises(Exception, match=rf"no_bag_is_longer_than_{LONGEST_BAG}.*out of data bounds"):
        two_d.run(None, {"indices": np.zeros((1, LONGEST_BAG + 1), np.int64)})


@pytest.mark.parametrize("mode", spec.MODES)
def test_where_nobody_refuses_it_a_bag_that_is_too_long_is_nan(mode: str) -> None:
    model = lucid_onnx.build_model(np.eye(4, 3, dtype=np.float32), mode=mode)
    model = lucid_onnx.lower(model, ragged="padded", longest_bag=3)
    (refusal,) = [node for node in model.graph.node if node.name.endswith("no_bag_is_longer_than_3")]
    quiet = helper.make_node("Sub", [refusal.input[1], refusal.input[1]], list(refusal.output))
    refusal.CopyFrom(quiet)
    feed = {"indices": np.array([0, 1, 2, 0, 0, 1, 1, 1]), "offsets": np.array([0, 1, 5, 5])}
    expected = lucid_onnx.reference.embedding_bag(
        feed["indices"], np.eye(4, 3, dtype=np.float32), feed["offsets"], mode=mode
    )
    expected[1] = np.nan
    np.testing.assert_allclose(session(model).run(None, feed)[0], expected, rtol=2e-7)  # sqrtn rounds twice


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ragged": "zip"}, ValueError, "ragged = 'zip' is not one of 'pieces', 'blocks', 'loop', 'padded'"),
        ({"ragged": "padded"}, ValueError, "node 'output': ragged = 'padded' needs longest_bag"),
        ({"ragged": "padded", "form": "portable"}, ValueError, "EmbeddingBag: ragged = 'padded' needs longest_bag"),
        ({"ragged": "padded", "longest_bag": 0}, ValueError, r"longest_bag = 0 is outside \[1, 4096\]"),
        ({"ragged": "padded", "longest_bag": 4097}, ValueError, r"longest_bag = 4097 is outside \[1, 4096\]"),
        ({"ragged": "padded", "longest_bag": 2.0}, TypeError, "longest_bag = 2.0 must be an integer or None"),
        ({"ragged": "padded", "longest_bag": True}, TypeError, "longest_bag = True must be an integer or None"),
        ({"longest_bag": 3}, ValueError, "longest_bag = 3, but ragged = 'pieces'"),
        ({"ragged": "loop", "form": "native"}, ValueError, "ragged = 'loop', but form = 'native'"),
    ],
)
def test_arguments_that_cannot_be(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = lucid_onnx.build_model(np.eye(3, dtype=np.float32))
    before = model.SerializeToString()
    with pytest.raises(error, match=message):
        lucid_onnx.lower(model, **arguments)
    assert model.SerializeToString() == before


# ---- Out and in again.


@pytest.mark.parametrize("way", WAYS)
def test_what_was_lowered_comes_back(way: str) -> None:
    bags = [case for case in CASES if not hasattr(case, "tables")]
    for k, case in enumerate(bags[WAYS.index(way) :: 29]):
        opset, constant = (16, 18, 20)[k % 3], k % 2 == 0
        wanted = case_model(case, "native", opset, constant=constant)
        report = lucid_onnx.fuse(written(case, way, "standard", opset, constant=constant), form="native")
        assert report.unfused == ()
        (found,), (node,) = report.model.graph.node, wanted.graph.node
        assert (found.op_type, list(found.input), list(found.output)) == (node.op_type, list(node.input), ["output"])
        assert sorted(map(str, found.attribute)) == sorted(map(str, node.attribute)), case.name
        assert report.model.graph.initializer == wanted.graph.initializer


@pytest.mark.parametrize("way", WAYS)
def test_what_is_changed_stays(way: str) -> None:
    # A negative padding_idx: of another, the row that it would be is computed and not looked at.
    model = lucid_onnx.build_model(np.eye(3, dtype=np.float32), mode="sum", padding_idx=-2)
    standard = lucid_onnx.lower(model, ragged=way, longest_bag=70 if way == "padded" else None)  # type: ignore[arg-type]
    assert len(lucid_onnx.fuse(standard).fused) == 1
    swaps = {"Add": "Sub", "Sub": "Add", "Max": "Min", "GreaterOrEqual": "Greater", "Or": "And", "Mul": "Add"}
    for what, model in swapped_operators(standard, swaps, step=3, more_than=6):
        assert lucid_onnx.fuse(model).fused == (), what


def test_a_loop_is_small_and_a_model_keeps_the_rest() -> None:
    """Two bags over one table and another node; only the blocks have a scatter."""
    model = two_bags(np.eye(3, dtype=np.float32), added=True)
    lowered = {
        way: lucid_onnx.lower(model, ragged=way, longest_bag=64 if way == "padded" else None)  # type: ignore[arg-type]
        for way in ("pieces", *WAYS)
    }
    sizes = {way: len(nodes(m.graph)) for way, m in lowered.items()}
    assert sizes["loop"] < sizes["padded"] < sizes["blocks"] / 2
    assert sizes["loop"] < sizes["blocks"] / 3
    feed = {"i": np.array([0, 1, 2, 2, 1], np.int32), "o": np.array([0, 0, 4], np.int32)}
    found = {way: session(m).run(None, feed)[0] for way, m in lowered.items()}
    native = lucid_onnx.to_form(model, "native").graph.node
    bags = [(n.op_type, n.input, n.output, n.attribute) for n in native]
    for way in WAYS:
        np.testing.assert_allclose(found[way], found["blocks"], rtol=1e-6)
        assert b"ai.lucid" not in lowered[way].SerializeToString()
        assert not any(n.op_type == "ScatterND" for n in nodes(lowered["loop"].graph))
        back = lucid_onnx.fuse(lowered[way], form="native").model.graph.node
        assert [(n.op_type, n.input, n.output, n.attribute) for n in back] == bags


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    model = lucid_onnx.build_model(np.eye(3, dtype=np.float32))
    lucid_onnx.save(model, "fast.onnx")

    def run(*arguments: str) -> tuple[int, str]:
        code = cli.main(["lower", "fast.onnx", "-o", "small.onnx", *arguments])
        return code, capsys.readouterr().err

    assert run("--ragged", "loop") == (0, "")
    assert onnx.load("small.onnx") == lucid_onnx.lower(model, ragged="loop")
    assert run("--ragged", "padded", "--longest-bag", "64") == (0, "")
    assert onnx.load("small.onnx") == lucid_onnx.lower(model, ragged="padded", longest_bag=64)
    for arguments, message in (
        (("--ragged", "zip"), "ragged = 'zip' is not one of"),
        (("--ragged", "padded"), "node 'output': ragged = 'padded' needs --longest-bag"),
        (("--longest-bag", "9"), "--longest-bag = 9, but ragged = 'pieces'"),
    ):
        code, err = run(*arguments)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err
