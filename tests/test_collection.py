"""Collections: every case in every form with the bits of its tables alone, and bags merged into them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest
from onnx import TensorProto, helper, numpy_helper

import lucid_onnx
from lucid_onnx import builder
from lucid_onnx.builder.conformance import case_model
from lucid_onnx.ops.embedding_bag_collection import reference, spec
from lucid_onnx.ops.embedding_bag_collection.cases import Case, all_cases
from lucid_onnx.parity import inputs, oracle
from lucid_onnx.runtime import info
from lucid_testing.hostile import check_attribute_types

ort = pytest.importorskip("onnxruntime")

CASES = all_cases()
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def run(model: onnx.ModelProto, feed: dict[str, np.ndarray], *, native: bool, **options: Any) -> list[np.ndarray]:
    return lucid_onnx.InferenceSession(model, native=native, **options).run(None, feed)


# ---- The operator.


@every_case
def test_native(case: Case, native: None) -> None:
    case.check(case.expected())
    (got,) = run(case_model(case, "portable"), case.inputs, native=True)
    case.check(got)
    alone = [
        lucid_onnx.embedding_bag(t.indices, t.weight, t.offsets, per_sample_weights=t.per_sample_weights, **t.keywords)
        for t in case.tables
    ]
    assert got.tobytes() == np.concatenate(alone, axis=1).tobytes()
    constant = {n: a for n, a in case.inputs.items() if not n.startswith("weight_")}
    assert run(case_model(case, "native", constant=True), constant, native=True)[0].tobytes() == got.tobytes()


@every_case
def test_without_the_library(case: Case) -> None:
    (got,) = run(case_model(case, "portable"), case.inputs, native=False)
    case.check(got)
    standard = case_model(case, "standard")
    assert "ai.lucid" not in str(standard)
    assert run(standard, case.inputs, native=False)[0].tobytes() == got.tobytes()


@pytest.mark.parametrize("name", ["collection_ragged_float16", "collection_packed_max", "collection_rows_mean"])
def test_onnx_reference_and_the_oracle(name: str) -> None:
    case = CASES[name]
    for form in ("portable", "standard"):
        model = case_model(case, form)
        onnx.checker.check_model(model, full_check=True)
        case.check(np.asarray(onnx.reference.ReferenceEvaluator(model).run(None, case.inputs)[0]))
    assert oracle.outputs(case_model(case, "portable"), case.inputs)[0].tobytes() == case.expected().tobytes()
    made = inputs.random_inputs(case_model(case, "portable", constant=True), {})
    model = case_model(case, "native", constant=True)
    assert oracle.outputs(model, made)[0].shape[1] == case.exact.shape[1]


def test_the_call(native: None) -> None:
    for name in ("collection_packed_weights_padding", "collection_ragged_bfloat16", "collection_rows_max"):
        case = CASES[name]
        for form, library in (("portable", True), ("portable", False), ("standard", False)):
            case.check(lucid_onnx.embedding_bag_collection(**case.call, form=form, native=library))


# ---- Several collections in one model, and where they may stand.

TABLES = {f"table_{t}": np.random.RandomState(t).standard_normal((6 + t, 2 + t)).astype(np.float32) for t in range(3)}
FEED = {
    "ids": np.array([1, 0, 5, 3, 2]),
    "starts": np.array([0, 2]),
    "packed": np.array([0, 1, 2, 3, 4, 5]),
    "bounds": np.array([0, 1, 3, 4, 6]),
    "rows": np.array([[1, 2], [3, 4]], np.int32),
    "flag": np.array(True),
}


def several() -> onnx.ModelProto:
    """Four collections of three signatures, one of them in a branch and one in a function."""
    first, second, third = TABLES
    node = lucid_onnx.make_collection_node
    nodes = [
        node([first, second], ["ids", "ids"], ["starts", "starts"], "ragged", mode="sum"),
        node([first, second], "packed", "bounds", "packed_sum", mode="sum", include_last_offset=True),
        node([first, second, third], ["rows"] * 3, None, "rows_max", mode="max", padding_idx=-1),
        helper.make_node("Mine", [third, "rows"], ["called"], domain="mine"),
    ]
    branches = [
        helper.make_graph([inner], name, [], [helper.make_tensor_value_info("chosen", TensorProto.FLOAT, None)])
        for name, inner in (
            ("then", node([second, third], ["ids", "ids"], ["starts", "starts"], "chosen", mode="mean", max_norm=1.0)),
            ("else", helper.make_node("Identity", [first], ["chosen"])),
        )
    ]
    nodes.append(helper.make_node("If", ["flag"], ["branch"], then_branch=branches[0], else_branch=branches[1]))
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("ai.lucid", 1)]
    function = helper.make_function(
        "mine", "Mine", ["w", "i"], ["o"], [node(["w", "w"], ["i", "i"], None, "o", mode="mean")], imports
    )
    kinds = {"rows": TensorProto.INT32, "flag": TensorProto.BOOL}
    graph = helper.make_graph(
        nodes,
        "several",
        [helper.make_tensor_value_info(n, kinds.get(n, TensorProto.INT64), [None] * a.ndim) for n, a in FEED.items()],
        [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, [None, None])
            for n in ("ragged", "packed_sum", "rows_max", "called", "branch")
        ],
        [numpy_helper.from_array(a, n) for n, a in TABLES.items()],
    )
    imports = [*imports, helper.make_opsetid("mine", 1)]
    return helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=8)


def several_expected() -> list[np.ndarray]:
    pool, (first, second, third) = reference.embedding_bag_collection, TABLES.values()
    ids, starts, rows = FEED["ids"], FEED["starts"], FEED["rows"]
    return [
        pool([ids, ids], [first, second], [starts, starts], mode="sum"),
        pool(FEED["packed"], [first, second], FEED["bounds"], mode="sum", include_last_offset=True, packed=True),
        pool([rows] * 3, [first, second, third], mode="max", padding_idx=-1),
        pool([rows] * 2, [third, third], mode="mean"),
        pool([ids, ids], [second, third], [starts, starts], mode="mean", max_norm=1.0),
    ]


@pytest.mark.parametrize(
    ("form", "library"), [("native", True), ("portable", True), ("portable", False), ("standard", False)]
)
def test_several_in_one_model(form: Any, library: bool, native: None) -> None:
    model = lucid_onnx.to_form(several(), form)
    onnx.checker.check_model(model, full_check=form != "native")
    for level in (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL):
        options = ort.SessionOptions()
        options.graph_optimization_level = level
        for got, expected in zip(
            run(model, FEED, native=library, session_options=options), several_expected(), strict=True
        ):
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)  # a few float32 roundings of values near 1


def test_names_and_forms() -> None:
    portable = lucid_onnx.to_form(several(), "portable")
    names = [f.name for f in portable.functions if f.domain == "ai.lucid"]
    assert names == [
        *("EmbeddingBag", "EmbeddingBag2D"),
        *("EmbeddingBagCollection", "EmbeddingBagCollection_1", "EmbeddingBagCollection_2", "EmbeddingBagCollection_3"),
    ]
    native = lucid_onnx.to_form(portable, "native")
    assert lucid_onnx.to_form(native, "portable") == portable
    standard = lucid_onnx.to_form(portable, "standard")
    assert "ai.lucid" not in str(standard)
    assert lucid_onnx.to_form(standard, "native") == standard


def many(signatures: int) -> onnx.ModelProto:
    nodes = [
        lucid_onnx.make_collection_node(["w"] * (t + 1), ["i"] * (t + 1), None, f"o{t}") for t in range(signatures)
    ]
    graph = helper.make_graph(
        nodes,
        "many",
        [
            helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 2]),
            helper.make_tensor_value_info("i", TensorProto.INT64, [3, 2]),
        ],
        [helper.make_tensor_value_info(n.output[0], TensorProto.FLOAT, [None, None]) for n in nodes],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("ai.lucid", 1)], ir_version=8
    )


def test_as_many_signatures_as_there_are_names(native: None) -> None:
    feed = {"w": np.ones((4, 2), np.float32), "i": np.zeros((3, 2), np.int64)}
    got = run(lucid_onnx.to_form(many(8), "portable"), feed, native=True)
    assert [o.shape for o in got] == [(3, 2 * t) for t in range(1, 9)]
    with pytest.raises(ValueError, match=r"may have 8 combinations .* this is one more: \(9, 'rows', False\)"):
        lucid_onnx.to_form(many(9), "portable")
    assert "Concat" in str(lucid_onnx.to_form(many(9), "standard"))


def test_shapes_are_inferred(native: None, infers_shapes: None) -> None:
    weights = [np.zeros((3, 2), np.float32), np.zeros((3, 5), np.float32)]
    for layout, sizes, expected in (
        ("ragged", {"num_bags": 7}, [7, 7]),
        ("packed", {"num_offsets": 9}, [4, 7]),
        ("rows", {"num_bags": 6}, [6, 7]),
    ):
        model = lucid_onnx.build_collection_model(
            weights, layout=layout, include_last_offset=layout == "packed", form="native"
        )
        for value in model.graph.input:
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param in sizes:
                    dim.dim_value = sizes[dim.dim_param]
        del model.graph.output[0].type.tensor_type.shape.dim[:]
        model.graph.output[0].type.tensor_type.ClearField("shape")
        assert lucid_onnx.InferenceSession(model).get_outputs()[0].shape == expected, layout


# ---- What is refused.

WEIGHTS = [np.ones((4, 2), np.float32), np.ones((5, 3), np.float32)]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [[0, 1], [0, 5]]}, IndexError, r"table 1: indices\[1\] = 5 is outside \[0, 5\)"),
        ({"x": [[0, -1], [0, 5]]}, IndexError, r"table 0: indices\[1\] = -1 is outside \[0, 4\)"),
        ({"offsets": [[0], [0, 1]]}, ValueError, "table 1 has 2 bags, table 0 has 1: they must be equal"),
        ({"offsets": [[0], [1]]}, ValueError, r"table 1: offsets\[0\] = 1 must be 0"),
        ({"offsets": [[0]]}, ValueError, "offsets has 1 entries for 2 tables"),
        ({"offsets": None}, ValueError, "offsets missing"),
        (
            {"weights": [WEIGHTS[0], WEIGHTS[1].astype(np.float16)]},
            TypeError,
            "table 1: weight has dtype float16, that of table 0",
        ),
        ({"weights": []}, ValueError, "num_tables = 0 must be >= 1"),
        ({"x": [[0, 1], [0.5]]}, TypeError, "table 1: indices has dtype float64"),
        ({"per_sample_weights": [[1.0, 2.0], [1.0]]}, (TypeError, ValueError), "table 0: per_sample_weights"),
        ({"padding_idx": 4}, ValueError, r"table 0: padding_idx = 4 is outside \[-4, 4\)"),
        ({"packed": True}, ValueError, r"include_last_offset = False, but packed offsets are \[T \* B \+ 1\]"),
    ],
)
def test_the_call_refuses(change: dict[str, Any], error: Any, message: str, native: None) -> None:
    arguments: dict[str, Any] = {"x": [[0, 1], [0, 1]], "weights": WEIGHTS, "offsets": [[0], [0]]} | change
    if change.get("packed"):
        arguments |= {"x": [0, 1, 2, 3], "offsets": [0, 2, 4]}
    for library in (True, False):
        with pytest.raises(error, match=message):
            lucid_onnx.embedding_bag_collection(**arguments, native=library)


@pytest.mark.parametrize("layout", ["ragged", "rows"])
@pytest.mark.parametrize("bags", [(0, 3), (3, 0), (2, 3), (3, 2), (3, 3, 0), (0, 0, 1)], ids=str)
@pytest.mark.parametrize(
    ("dims", "dtype"), [((2, 4, 3), np.int32), ((0, 4, 3), np.int64), ((2, 0, 3), np.int32)], ids=str
)
def test_other_numbers_of_bags_are_refused_in_every_form(
    layout: str, bags: tuple[int, ...], dims: tuple[int, ...], dtype: Any, native: None
) -> None:
    """ONNX Runtime's Concat leaves out inputs without elements, so that it takes some of these."""
    weights = [np.ones((4, dim), np.float32) for dim in dims[: len(bags)]]
    feed: dict[str, np.ndarray] = {}
    for t, count in enumerate(bags):
        feed[f"indices_{t}"] = np.zeros((count, 1) if layout == "rows" else count, dtype)
        if layout == "ragged":
            feed[f"offsets_{t}"] = np.arange(count, dtype=dtype)
    kinds = {"index_dtype": np.dtype(dtype).name, "layout": layout}
    for form, library in (("native", True), ("portable", False), ("standard", False)):
        session = lucid_onnx.InferenceSession(
            lucid_onnx.build_collection_model(weights, form=form, **kinds), native=library
        )
        # The last is ONNX Runtime's: the model says that the tables' offsets have equal lengths.
        refused = r"must be equal|tables_have_as_many_bags|re-use buffer"
        with pytest.raises(Exception, match=refused):  # ONNX Runtime has an exception class per status code
            session.run(None, feed)
        equal = {name: value[: min(bags)] for name, value in feed.items()}
        (got,) = session.run(None, equal)
        assert got.shape == (min(bags), sum(w.shape[1] for w in weights))
        assert (got == 1).all()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("indices", np.array([0, 1, 4, 2]), r"table 0: indices\[2\] = 4 is outside \[0, 4\)"),
        ("indices", np.array([0, 1, 2, -1]), r"table 1: indices\[3\] = -1 is outside \[0, 5\)"),
        ("offsets", np.array([0, 1]), r"offsets has 2 entries, which are not 2 \* B \+ 1"),
        ("offsets", np.array([0, 3, 2]), r"offsets\[2\] = 2 is below offsets\[1\] = 3"),
        ("offsets", np.array([1, 3, 4]), r"offsets\[0\] = 1 must be 0"),
        ("offsets", np.array([0, 3, 9]), r"offsets\[2\] = 9 is past the number of indices, 4"),
    ],
)
def test_packed_input_is_refused_and_the_session_goes_on(
    name: str, value: np.ndarray, message: str, packed_sessions: dict[bool, Any]
) -> None:
    good = {"indices": np.array([0, 1, 2, 3]), "offsets": np.array([0, 3, 4])}
    for library, session in packed_sessions.items():
        before = session.run(None, good)[0]
        # Standard operators refuse in words of their own.
        with pytest.raises(Exception, match=f"EmbeddingBagCollection: {message}" if library else None):
            session.run(None, {**good, name: value})
        assert session.run(None, good)[0].tobytes() == before.tobytes()


@pytest.fixture(scope="module")
def packed_sessions(native: None) -> dict[bool, Any]:
    """By whether the library is in it, a session of packed bags of `WEIGHTS`."""
    model = lucid_onnx.build_collection_model(WEIGHTS, layout="packed", include_last_offset=True)
    return {library: lucid_onnx.InferenceSession(model, native=library) for library in (True, False)}


def test_nodes_that_are_none(native: None) -> None:
    model = lucid_onnx.build_collection_model(WEIGHTS, form="native")
    node = model.graph.node[0]

    def changed(**attributes: Any) -> onnx.ModelProto:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        kept = [a for a in node.attribute if a.name not in attributes]
        del copy.graph.node[0].attribute[:]
        added = [helper.make_attribute(n, v) for n, v in attributes.items() if v is not None]
        copy.graph.node[0].attribute.extend([*kept, *added])
        return copy

    for attributes, said, loaded in (
        (
            {"num_tables": 3},
            "takes weight_0, weight_1, weight_2",
            "num_tables = 3 and layout = 0 do not match 6 inputs",
        ),
        ({"num_tables": 0}, "num_tables = 0 must be >= 1", "num_tables = 0 and layout = 0 do not match 6 inputs"),
        ({"num_tables": None}, "num_tables is missing", "num_tables = -1"),
        ({"layout": 3}, "layout = 3 is not 0", "layout = 3 do not match"),
        ({"mode": 4}, "mode = 4 is not", "mode = 4 is not"),
    ):
        with pytest.raises(ValueError, match=said):
            lucid_onnx.to_form(changed(**attributes), "portable")
        with pytest.raises(Exception, match=loaded):
            lucid_onnx.InferenceSession(changed(**attributes))
    tables = [
        numpy_helper.from_array(a, f"weight_{t}") for t, a in enumerate([WEIGHTS[0], WEIGHTS[1].astype(np.float64)])
    ]
    copy = changed()
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(tables)
    with pytest.raises(ValueError, match="table 1: weight is DOUBLE, that of table 0 is FLOAT"):
        lucid_onnx.to_form(copy, "portable")
    feed = {f"{n}_{t}": np.zeros(1, np.int64) for n in ("indices", "offsets") for t in range(2)}
    session = lucid_onnx.InferenceSession(copy)
    with pytest.raises(
        Exception, match="table 1: weight is float64, the weight of table 0 is float32: they must be equal"
    ):
        session.run(None, feed)


def test_a_session_says_at_its_start_which_attribute_is_wrong(native: None) -> None:
    for layout, attributes, message in (
        ("packed", {"include_last_offset": 0}, r"layout = 1 \(packed\) needs include_last_offset = 1, got 0"),
        ("ragged", {"num_tables": 2.0}, "num_tables must be an INT attribute"),
        ("ragged", {"layout": "ragged"}, "layout must be an INT attribute"),
        ("ragged", {"max_norm": -1.0}, "max_norm = -1 must be >= 0"),
    ):
        model = lucid_onnx.build_collection_model(
            WEIGHTS, layout=layout, include_last_offset=layout == "packed", form="native"
        )
        node = model.graph.node[0]
        kept = [a for a in node.attribute if a.name not in attributes]
        del node.attribute[:]
        node.attribute.extend([*kept, *(helper.make_attribute(n, v) for n, v in attributes.items())])
        with pytest.raises(Exception, match=f"EmbeddingBagCollection: {message}"):
            lucid_onnx.InferenceSession(model)


@pytest.mark.parametrize("layout", ["ragged", "packed", "rows"])
def test_an_attribute_of_another_type_is_not_absent(layout: str, native: None) -> None:
    model = lucid_onnx.build_collection_model(
        WEIGHTS, layout=layout, include_last_offset=layout == "packed", form="native"
    )
    check_attribute_types(model, "EmbeddingBagCollection")


# ---- Merging.


def beside(
    changes: dict[int, dict[str, Any]] | None = None,
    *,
    axis: int = 1,
    stacked: bool = False,
    dense: tuple[int, ...] = (),
    outputs: tuple[str, ...] = (),
    extra: list[onnx.NodeProto] | None = None,
) -> onnx.ModelProto:
    """Four bags of the tables `TABLES`, the first one twice, concatenated.

    Args:
        changes: keywords of the node of a bag.
        stacked: each goes through an Unsqueeze; all tables have the columns of the first one.
        dense: numbers of inputs of the Concat before which another value, "dense", stands.
    """
    widths = [3, 3, 3, 3] if stacked else [2, 3, 4, 2]
    nodes, joined = [], []
    for k, _ in enumerate(widths):
        if k in dense:
            joined.append("dense")
        keywords = {"mode": "sum", **(changes or {}).get(k, {})}
        nodes.append(lucid_onnx.make_node(f"t{k}", f"i{k}", "starts", f"bag{k}", **keywords))
        joined.append(f"bag{k}")
        if stacked:
            nodes.append(helper.make_node("Unsqueeze", [f"bag{k}", "one"], [f"wide{k}"]))
            joined[-1] = f"wide{k}"
    nodes += [helper.make_node("Concat", joined, ["joined"], axis=axis), *(extra or [])]
    shape: list[Any] = ["B", 1, 3] if stacked else ["B", 5]
    graph = helper.make_graph(
        nodes,
        "beside",
        [
            helper.make_tensor_value_info("starts", TensorProto.INT64, ["B"]),
            *(helper.make_tensor_value_info(f"i{k}", TensorProto.INT64, [f"N{k}"]) for k in range(4)),
            *([helper.make_tensor_value_info("dense", TensorProto.FLOAT, shape)] if dense else []),
        ],
        [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, [None] * (3 if stacked and n == "joined" else 2))
            for n in ("joined", *outputs)
        ],
        [
            *(
                numpy_helper.from_array(np.full((5, w), k, np.float32) + np.arange(w, dtype=np.float32), f"t{k}")
                for k, w in enumerate(widths)
            ),
            numpy_helper.from_array(np.array([1]), "one"),
        ],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("ai.lucid", 1)], ir_version=8
    )


def same(before: onnx.ModelProto, after: onnx.ModelProto, bags: int = 3, *, first: int | None = None) -> None:
    """Both models give the same bits, without the library too (where there are bags); ``first``: an index of each."""
    feed = {f"i{k}": np.arange(k, k + bags) % 5 for k in range(4)} | {"starts": np.arange(bags)}
    if first is not None:
        for k in range(4):
            feed[f"i{k}"][0] = first
    for value in before.graph.input:
        if value.name == "dense":
            dims = [d.dim_value or bags for d in value.type.tensor_type.shape.dim]
            feed["dense"] = np.full(dims, 7, np.float32)
    expected = run(lucid_onnx.to_form(before, "standard"), feed, native=False)
    for native in (False, True) if bags else (True,):
        for a, b in zip(run(after, feed, native=native), expected, strict=True):
            assert a.shape == b.shape
            assert a.tobytes() == b.tobytes()


def types(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def test_a_concat_of_bags(native: None) -> None:
    pytest.importorskip("onnx_ir")
    before = beside()
    report = lucid_onnx.fuse(before, merge_tables=True)
    assert types(report.model) == {"EmbeddingBagCollection": 1}
    assert [o.name for o in report.model.graph.output] == ["joined"]
    (merged,) = report.merged
    assert (merged.op, merged.mode, merged.tables) == ("EmbeddingBag", "sum", ("t0", "t1", "t2", "t3"))
    assert report.unmerged == ()
    same(before, report.model)
    same(before, report.model, bags=0)
    assert json.loads(json.dumps(report.as_dict()))["merged"][0]["tables"] == ["t0", "t1", "t2", "t3"]
    lowered = lucid_onnx.lower(report.model)
    assert "ai.lucid" not in str(lowered)
    same(before, lowered)
    assert types(lucid_onnx.fuse(lowered, merge_tables=True).model) == {"EmbeddingBagCollection": 1}
    # Unasked, nothing is merged.
    assert types(lucid_onnx.fuse(before).model) == {"EmbeddingBag": 4, "Concat": 1}


@pytest.mark.parametrize("opset", [16, 17, 18, 26])
@pytest.mark.parametrize("layout", ["ragged", "rows"])
@pytest.mark.parametrize("index_dtype", ["int32", "int64"])
def test_a_lowered_collection_comes_back_whole(opset: int, layout: str, index_dtype: str) -> None:
    """At every opset, without the check that its tables have as many bags."""
    pytest.importorskip("onnx_ir")
    model = lucid_onnx.build_collection_model(WEIGHTS, layout=layout, index_dtype=index_dtype, opset=opset)
    back = lucid_onnx.fuse(lucid_onnx.lower(model), form="native", merge_tables=True).model
    assert types(back) == types(lucid_onnx.to_form(model, "native"))


@pytest.mark.parametrize(
    "common",
    [
        {"mode": "sqrtn", "negative": "skip"},
        {"mode": "mean", "negative": "skip", "divisor": "weights"},
        {"mode": "max", "negative": "skip"},
    ],
)
def test_a_collection_has_the_attributes_of_its_bags(common: dict[str, Any], native: None) -> None:
    pytest.importorskip("onnx_ir")
    before = beside(dict.fromkeys(range(4), common))
    report = lucid_onnx.fuse(before, merge_tables=True)
    (node,) = report.model.graph.node
    assert node.op_type == "EmbeddingBagCollection"
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    found = spec.Attributes.from_onnx(given).keywords
    assert {name: found[name] for name in common} == common
    same(before, report.model)
    same(before, report.model, first=-1)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(("dense", "expected"), [((0,), 1), ((2,), 2)])
def test_other_inputs_of_the_concat_stay(stacked: bool, dense: tuple[int, ...], expected: int, native: None) -> None:
    pytest.importorskip("onnx_ir")
    before = beside(dense=dense, stacked=stacked)
    report = lucid_onnx.fuse(before, merge_tables=True)
    assert types(report.model)["Concat"] == 1
    assert sum(n.startswith("EmbeddingBagCollection") for n in types(report.model).elements()) == expected
    assert "EmbeddingBag" not in types(report.model)
    assert report.unmerged == ()
    same(before, report.model)
    if dense == (0,):
        same(before, report.model, bags=0)


@pytest.mark.parametrize(
    ("keywords", "left", "reason"),
    [
        ({"changes": {1: {"mode": "mean"}}}, {0, 1}, "has mode = 'mean', and it has 'sum'"),
        ({"changes": {3: {"mode": "sqrtn"}}}, {3}, "has mode = 'sum', and it has 'sqrtn'"),
        ({"changes": {1: {"negative": "skip"}}}, {0, 1}, "has negative = 'skip', and it has 'refuse'"),
        ({"changes": {3: {"divisor": "count"}}}, {3}, "has divisor = None, and it has 'count'"),
        ({"changes": {0: {"divisor": "count"}, 1: {"divisor": "weights"}}}, {0, 1}, "has divisor = 'weights', and"),
        ({"changes": {3: {"max_norm": 2.0}}}, {3}, "has max_norm = inf, and it has 2.0"),
        ({"changes": {0: {"padding_idx": 0}}}, {0}, "has padding_idx = "),
        ({"outputs": ("bag1",)}, {0, 1}, "'bag1' is an output of the graph"),
        (
            {"extra": [helper.make_node("Relu", ["bag2"], ["again"])], "outputs": ("again",)},
            {2, 3},
            "'bag2' is read 2 times",
        ),
        ({"stacked": True, "axis": 2}, {0, 1, 2, 3}, "the Concat is over axis 2"),
    ],
)
def test_look_alikes_stay(keywords: dict[str, Any], left: set[int], reason: str, native: None) -> None:
    pytest.importorskip("onnx_ir")
    before = beside(**keywords)
    report = lucid_onnx.fuse(before, merge_tables=True)
    assert {u.bag for u in report.unmerged} == {f"node 'bag{k}' (EmbeddingBag)" for k in left}
    assert any(reason in u.reason for u in report.unmerged), report.unmerged
    assert types(report.model).get("EmbeddingBag", 0) == len(left)
    same(before, report.model)


def test_bags_are_merged_without_all_attributes_written_on_them(native: None) -> None:
    """A default that is left out, and a mode in words, are the same attributes."""
    pytest.importorskip("onnx_ir")
    before = beside()
    expected = lucid_onnx.fuse(before, merge_tables=True)
    short, in_words = before.graph.node[0], before.graph.node[1]
    kept = [a for a in short.attribute if a.name == "mode"]
    del short.attribute[:]
    short.attribute.extend(kept)
    mode = next(a for a in in_words.attribute if a.name == "mode")
    mode.CopyFrom(helper.make_attribute("mode", "sum"))
    report = lucid_onnx.fuse(before, merge_tables=True)
    assert (report.merged, report.unmerged) == (expected.merged, ())
    assert report.model == expected.model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"padding_idx": 7}, "padding_idx = 7 is outside [-5, 5), the rows of weight"),
        ({"padding_idx": 1.0}, "padding_idx = 1.0 must be an INT attribute"),
        ({"mode": "median"}, "mode = 'median' is not one of 'sum', 'mean', 'max', 'sqrtn'"),
        ({"rows": 1}, "EmbeddingBag has no attribute 'rows'"),
    ],
)
def test_a_bag_that_is_not_valid_is_named_and_not_merged(change: dict[str, Any], message: str) -> None:
    pytest.importorskip("onnx_ir")
    model = beside()
    node = model.graph.node[2]
    kept = [a for a in node.attribute if a.name not in change]
    del node.attribute[:]
    node.attribute.extend([*kept, *(helper.make_attribute(name, value) for name, value in change.items())])
    with pytest.raises(ValueError, match=re.escape(f"node 'bag2': {message}")):
        lucid_onnx.fuse(model, merge_tables=True)


def test_codes_are_not_merged(native: None) -> None:
    pytest.importorskip("onnx_ir")
    small = lucid_onnx.quantize(beside(), dtype="int8").model
    report = lucid_onnx.fuse(small, merge_tables=True)
    assert report.merged == ()
    assert len(report.unmerged) == 4
    assert all("QuantizedEmbeddingBag" in u.reason for u in report.unmerged)


def test_quantize_and_info_see_the_tables_of_a_collection(tmp_path: Path) -> None:
    pytest.importorskip("onnx_ir")
    merged = lucid_onnx.fuse(beside(), tmp_path / "merged.onnx", merge_tables=True).model
    report = lucid_onnx.quantize(merged, dtype="uint4")
    assert report.quantized == ()
    assert {u.table for u in report.unquantized} == {"t0", "t1", "t2", "t3"}
    assert all(u.reason.startswith("a collection pools it") for u in report.unquantized)
    found = info.model(str(tmp_path / "merged.onnx"))
    assert [(n.op, n.table.name, n.table_bytes) for n in found.nodes] == [
        ("EmbeddingBagCollection", f"t{k}", 20 * width) for k, width in enumerate((2, 3, 4, 2))
    ]


def test_the_command_line(tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx_ir")
    cli = pytest.importorskip("lucid_onnx.cli", reason="typer is not installed")
    monkeypatch.setenv("COLUMNS", "200")
    builder.save(lucid_onnx.to_form(beside({3: {"mode": "max"}}), "portable"), tmp_path / "a.onnx")
    arguments = ["fuse", str(tmp_path / "a.onnx"), "-o", str(tmp_path / "b.onnx"), "--merge-tables"]
    assert cli.main(arguments) == 0
    out = capfd.readouterr().out
    assert "3: t0, t1, t2" in out
    assert "node 'bag3' (EmbeddingBag)" in out
    assert types(onnx.load(tmp_path / "b.onnx")) == {"EmbeddingBagCollection": 1, "EmbeddingBag": 1, "Concat": 1}
    assert cli.main(["info", str(tmp_path / "b.onnx")]) == 0
    assert "table 2" in capfd.readouterr().out


def test_more_kinds_than_there_are_names(native: None) -> None:
    """Runs of 2 to 10 bags: the ninth kind stays as it is."""
    pytest.importorskip("onnx_ir")
    nodes, outputs = [], []
    for count in range(2, 11):
        bags = [lucid_onnx.make_node("w", "i", None, f"b{count}_{k}") for k in range(count)]
        nodes += [*bags, helper.make_node("Concat", [b.output[0] for b in bags], [f"o{count}"], axis=-1)]
        outputs.append(helper.make_tensor_value_info(f"o{count}", TensorProto.FLOAT, [None, None]))
    model = many(1)
    del model.graph.node[:], model.graph.output[:]
    model.graph.node.extend(nodes)
    model.graph.output.extend(outputs)
    report = lucid_onnx.fuse(model, merge_tables=True)
    assert len(report.merged) == spec.MOST_SIGNATURES
    assert {u.reason for u in report.unmerged} == {
        "the model has collections of 8 kinds already, and may not have more"
    }
    assert types(report.model)["EmbeddingBag2D"] == 10


def _joined(made: list[onnx.NodeProto], outputs: Sequence[str] = ("y",)) -> onnx.ModelProto:
    """A model of nodes over tables q, r and t, and a matrix; flat indices i and offsets o."""
    tables = {n: np.random.default_rng(k).standard_normal((20, 4)).astype(np.float32) for k, n in enumerate("qrt")}
    graph = helper.make_graph(
        made,
        "g",
        [helper.make_tensor_value_info(n, TensorProto.INT64, [n]) for n in ("i", "o")],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs],
        [numpy_helper.from_array(a, n) for n, a in {**tables, "p": np.eye(4, dtype=np.float32)}.items()],
    )
    for value in graph.output:
        value.type.tensor_type.shape.dim.add(), value.type.tensor_type.shape.dim.add()
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return lucid_onnx.to_form(model, "portable")


def _bags_of(names: str, **keywords: Any) -> list[onnx.NodeProto]:
    return [lucid_onnx.make_node(n, "i", "o", f"{n}_bag", name=f"{n}_node", mode="sum", **keywords) for n in names]


@pytest.mark.parametrize(
    ("joined", "wrong"),
    [
        (["Concat"], {}),
        (["Concat"], {"axis": 1.0}),
        (["Concat"], {"axis": [1]}),
        (["Unsqueeze", "Concat"], {"axes": 1}),
        (["Unsqueeze", "Concat"], {"axes": "1"}),
    ],
    ids=str,
)
def test_joined_by_nodes_that_are_not_valid(joined: list[str], wrong: dict[str, Any]) -> None:
    """fuse says what onnx.checker says of the Concat, or of the Unsqueeze before it."""
    made, names = _bags_of("qr"), ["q_bag", "r_bag"]
    if "Unsqueeze" in joined:
        made += [helper.make_node("Unsqueeze", [n], [f"{n}_3"], **wrong) for n in names]
        made.append(helper.make_node("Concat", [f"{n}_3" for n in names], ["y"], axis=1))
    else:
        made.append(helper.make_node("Concat", names, ["y"], **wrong))
    with pytest.raises(ValueError, match=f"onnx.checker: .*{joined[0]}"):
        lucid_onnx.fuse(_joined(made), merge_tables=True)


@pytest.mark.parametrize(
    ("made", "outputs", "reasons"),
    [
        (  # quotient and remainder
            [*_bags_of("qr"), helper.make_node("Mul", ["q_bag", "r_bag"], ["y"], name="qr")],
            ("y",),
            {n: ("node 'qr' (Mul)", f"'{n}_bag' is read by node 'qr' (Mul)") for n in "qr"},
        ),
        (  # mixed dimensions: some are projected
            [
                *_bags_of("qrt"),
                helper.make_node("MatMul", ["q_bag", "p"], ["wide"], name="project"),
                helper.make_node("Concat", ["wide", "r_bag", "t_bag"], ["y"], axis=1),
            ],
            ("y",),
            {"q": ("node 'project' (MatMul)", "'q_bag' is read by node 'project' (MatMul)")},
        ),
        (
            [*_bags_of("q"), helper.make_node("Relu", ["q_bag"], ["y"], name="next")],
            ("y",),
            {"q": ("node 'next' (Relu)", "it is the only bag of the model")},
        ),
        (
            [
                *_bags_of("qr"),
                helper.make_node("Concat", ["q_bag", "p"], ["y"], axis=0, name="join"),
                helper.make_node("Concat", ["p", "r_bag"], ["z"], axis=0, name="other"),
            ],
            ("y", "z"),
            {"q": ("node 'join' (Concat)", "no Concat has"), "r": ("node 'other' (Concat)", "no Concat has")},
        ),
        (_bags_of("qr"), ("q_bag", "r_bag"), dict.fromkeys("qr", ("", "is an output of the graph, and no Concat"))),
        (
            [
                *_bags_of("qr"),
                *(helper.make_node(op, ["q_bag"], [f"{op}_y"], name=op) for op in ("Relu", "Neg")),
                helper.make_node("Concat", ["r_bag", "Relu_y", "Neg_y"], ["y"], axis=1, name="join"),
            ],
            ("y",),
            {"q": ("node 'Relu' (Relu)", "'q_bag' is read 2 times"), "r": ("node 'join' (Concat)", "no Concat has")},
        ),
    ],
    ids=["quotient and remainder", "mixed dimensions", "one bag", "apart", "outputs", "read twice"],
)
def test_every_bag_that_is_not_merged_says_why(
    made: list[onnx.NodeProto], outputs: tuple[str, ...], reasons: dict[str, tuple[str, str]]
) -> None:
    pytest.importorskip("onnx_ir")
    report = lucid_onnx.fuse(_joined(made, outputs), merge_tables=True)
    found = {u.bag: u for u in report.unmerged}
    assert set(found) == {f"node '{n}_node' (EmbeddingBag)" for n in reasons}
    for name, (where, reason) in reasons.items():
        unmerged = found[f"node '{name}_node' (EmbeddingBag)"]
        assert unmerged.where == where
        assert reason in unmerged.reason
    assert len(report.merged) == ("t_bag" in [i for n in made for i in n.input])
