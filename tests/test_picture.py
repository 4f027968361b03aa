"""The picture of `lucid-onnx inspect --svg`: where bags are and what feeds them, at any size of a model."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import lucid_onnx

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")
from lucid_onnx.rewrite import picture  # needs onnx-ir

EXAMPLES = Path(__file__).resolve().parents[1] / "models" / "examples"
SVG = "{http://www.w3.org/2000/svg}"
#: A window of a laptop: a picture of one bag is seen whole, and a wide one does not scroll sideways.
WINDOW = 1280, 800


def drawn(model: onnx.ModelProto) -> tuple[int, int, list[str]]:
    """Width, height and texts; nothing is outside of the picture or on top of something else."""
    report = lucid_onnx.fuse(model)
    text = picture.draw(model, report, "m.onnx")
    assert text == picture.draw(model, report, "m.onnx")
    root = ElementTree.fromstring(text)
    width, height = int(root.attrib["width"]), int(root.attrib["height"])
    known = set(re.findall(r"\.(\w)\{", "".join(e.text or "" for e in root.iter(f"{SVG}style"))))
    boxes = [
        (float(e.attrib["x"]), float(e.attrib["y"]), float(e.attrib["width"]), float(e.attrib["height"]))
        for e in root
        if "rx" in e.attrib
    ]
    for e in root:
        assert set(e.attrib.get("class", "").split()) <= known  # what has no style is black
    for k, (x, y, w, h) in enumerate(boxes):
        assert 0 <= x < x + w <= width
        assert 0 <= y < y + h <= height
        assert not any(x < x2 + w2 and x2 < x + w and y < y2 + h2 and y2 < y + h for x2, y2, w2, h2 in boxes[:k])
    return width, height, [e.text or "" for e in root.iter(f"{SVG}text")]


def count(model: onnx.ModelProto) -> int:
    return sum(n.op_type != "Constant" for n in model.graph.node)


def example(name: str, form: str = "portable") -> onnx.ModelProto:
    return lucid_onnx.to_form(onnx.load(EXAMPLES / f"{name}.onnx"), form)


def whole(texts: list[str]) -> list[str]:
    """What the part that draws the model says."""
    start = next(k for k, text in enumerate(texts) if text.startswith("the model"))
    ends = (k for k, text in enumerate(texts) if k > start and ("standard form, " in text or "left as it is" in text))
    return texts[start : next(ends, None)]


def nodes_told(texts: list[str]) -> int:
    """How many nodes the boxes of the model stand for, by what they say."""
    names = {s.name for s in onnx.defs.get_all_schemas()}
    total = 0
    for text in texts:
        if found := re.fullmatch(r"(\d+) nodes", text):
            total += int(found[1])
            continue
        times, _, op = text.rpartition(" x ")
        if op in names or op.startswith("EmbeddingBag"):
            total += int(times or 1)
    return total


@pytest.mark.parametrize("ragged", ["blocks", "padded", "loop"])
def test_the_standard_form_is_folded(ragged: str) -> None:
    """One bag fits a window; its nodes are a number, and no node of them is drawn."""
    weight = np.ones((1000, 64), np.float32)
    model = lucid_onnx.build_model(weight, mode="mean", padding_idx=0, form="native")
    longest = {"longest_bag": 64} if ragged == "padded" else {}
    model = lucid_onnx.lower(model, ragged=ragged, **longest)
    width, height, texts = drawn(model)
    assert width <= WINDOW[0]
    assert height <= WINDOW[1]
    (folded,) = (text for text in texts if text.endswith(" nodes: EmbeddingBag in standard operators"))
    (before,) = (text for text in texts if text.startswith("before: "))
    told = int(folded.split()[0])
    assert before == f"before: {told} nodes"
    assert told > 50
    if ragged != "loop":  # whose nodes are inside
        assert told == count(model)
    assert f"was {told} nodes" in texts
    assert "Gather" not in texts
    parts = [text for text in texts if re.fullmatch(r"(\d+ \w+,? ?)+", text) and not text.endswith(" nodes")]
    assert sum(int(n) for text in parts for n in re.findall(r"\d+", re.sub(r"[A-Za-z]+\d*", "", text))) == told
    assert {"weight [1000, 64]", "indices", "offsets", "mean, padding_idx 0", "output"} <= set(texts)


def test_more_bags_of_the_standard_form() -> None:
    """Three kinds of bags, each with a part of its own below the model: as wide as a window, and 200 px high each."""
    width, height, texts = drawn(example("dlrm", "standard"))
    assert width <= WINDOW[0]
    assert height <= WINDOW[1] + 3 * 200
    assert sum(" in standard operators" in text for text in texts) == 3
    assert nodes_told(whole(texts)) == count(example("dlrm"))


def test_bags_that_a_model_has_are_drawn() -> None:
    for form in ("portable", "native"):
        width, height, texts = drawn(example("two_tower", form))
        assert width <= WINDOW[0]
        assert height <= WINDOW[1]
        assert texts[:3] == ["m.onnx", "2 ai.lucid nodes; nothing to fuse", "the model"]
        assert sorted(texts[3:]) == sorted(
            [
                *("history", "history_offsets", "item_table [50, 8]", "EmbeddingBag", "mean, max_norm 1"),
                *("words", "word_offsets", "word_weights", "word_table [200, 8]"),
                *("EmbeddingBagWeighted", "sum, padding_idx 0", "Transpose", "MatMul", "scores"),
            ]
        )


def recommender(tables: int, layers: int) -> onnx.ModelProto:
    """Bags of every table, each with a Cast before it, beside a dense part; a deep part behind them."""
    inputs = [helper.make_tensor_value_info("dense", TensorProto.FLOAT, ["batch", 8])]
    nodes, held = [], [numpy_helper.from_array(np.ones((8, 8), np.float32), "matrix")]
    for k in range(tables):
        inputs.append(helper.make_tensor_value_info(f"category_{k}", TensorProto.INT32, ["batch", 3]))
        held.append(numpy_helper.from_array(np.ones((10 + k, 8), np.float32), f"table_{k}"))
        nodes.append(helper.make_node("Cast", [f"category_{k}"], [f"wide_{k}"], to=TensorProto.INT64))
        mode = "sum" if k % 2 else "mean"
        nodes.append(lucid_onnx.make_node(f"table_{k}", f"wide_{k}", None, f"bag_{k}", mode=mode))
    last = "dense"
    for k in range(layers):
        nodes.append(helper.make_node("MatMul", [last, "matrix"], [f"bottom_{k}"]))
        last = f"bottom_{k}"
    nodes.append(helper.make_node("Sum", [last, *(f"bag_{k}" for k in range(tables))], ["all"]))
    last = "all"
    for k in range(layers):
        nodes.append(helper.make_node("Tanh", [last], [f"top_{k}"]))
        last = f"top_{k}"
    output = helper.make_tensor_value_info(last, TensorProto.FLOAT, ["batch", 8])
    graph = helper.make_graph(nodes, "recommender", inputs, [output], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return lucid_onnx.to_form(model, "portable")


def test_a_large_model_is_folded_around_its_bags() -> None:
    model = recommender(26, 50)
    width, height, texts = drawn(model)
    assert width <= WINDOW[0]
    assert height <= WINDOW[1]
    assert texts[2] == "the model, folded around its bags"
    assert texts.count("13 x EmbeddingBag2D") == 2
    assert texts.count("13 x Cast") == 2
    assert {"50 x MatMul", "51 nodes", "50 Tanh, 1 Sum", "sum", "mean", "dense"} <= set(texts)
    assert texts.count("13 tables") == texts.count("13 inputs") == 2
    assert "table_0 … table_24" in texts
    assert nodes_told(texts) == count(model)
    # One table more or ten layers are no larger picture.
    assert drawn(recommender(40, 200))[:2] == pytest.approx((width, height), abs=40)


def test_every_node_of_a_folded_model_is_counted() -> None:
    """Graphs at random, where bags feed bags: each node is in one box, and no two boxes wait for each other."""
    random = np.random.default_rng(0)
    folded = 0
    for _ in range(40):
        values, nodes, held = ["x"], [], []
        for k in range(int(random.integers(10, 60))):
            a, b = (values[int(i)] for i in random.integers(max(0, len(values) - 6), len(values), 2))
            if random.random() < 0.25:
                held.append(numpy_helper.from_array(np.ones((9, 9), np.float32), f"table_{k}"))
                nodes.append(helper.make_node("Cast", [a], [f"ids_{k}"], to=TensorProto.INT64))
                mode = ("sum", "mean", "max")[int(random.integers(3))]
                nodes.append(lucid_onnx.make_node(f"table_{k}", f"ids_{k}", None, f"v{k}", mode=mode))
            else:
                nodes.append(helper.make_node(str(random.choice(["Add", "Mul", "Max"])), [a, b], [f"v{k}"]))
            values.append(f"v{k}")
        graph = helper.make_graph(
            nodes,
            "random",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [9, 9])],
            [helper.make_tensor_value_info(v, TensorProto.FLOAT, [9, 9]) for v in values[-3:]],
            held,
        )
        imports = [helper.make_opsetid("", 18), helper.make_opsetid("ai.lucid", 1)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=8)
        report = lucid_onnx.rewrite.FuseReport(model, (), ())
        texts = [e.text or "" for e in ElementTree.fromstring(picture.draw(model, report, "m")).iter(f"{SVG}text")]
        if held:
            assert nodes_told(whole(texts)) == count(model)
            folded += "the model, folded around its bags" in texts
    assert folded > 20


def test_bags_inside_of_functions_and_branches_are_told() -> None:
    bag = lucid_onnx.make_node("table", "ids", None, "pooled", mode="max")
    imports = [helper.make_opsetid(domain, version) for domain, version in (("", 18), ("ai.lucid", 1), ("own", 1))]
    inner = helper.make_function("own", "Pool", ["table", "ids"], ["pooled"], [bag], imports)
    call = helper.make_node("Pool", ["table", "ids"], ["twice"], domain="own")
    outer = helper.make_function("own", "Outer", ["table", "ids"], ["twice"], [call], imports)
    branch = helper.make_graph([bag], "b", [], [helper.make_tensor_value_info("pooled", TensorProto.FLOAT, None)])
    nodes = [
        helper.make_node("Outer", ["table", "ids"], ["y"], domain="own"),
        helper.make_node("If", ["flag"], ["z"], then_branch=branch, else_branch=branch),
    ]
    graph = helper.make_graph(
        nodes,
        "inside",
        [
            helper.make_tensor_value_info("ids", TensorProto.INT64, ["b", 3]),
            helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 4]) for name in "yz"],
        [numpy_helper.from_array(np.ones((9, 4), np.float32), "table")],
    )
    model = helper.make_model(graph, opset_imports=imports, ir_version=8, functions=[inner, outer])
    texts = drawn(model)[2]
    assert texts[1] == "3 ai.lucid nodes; nothing to fuse"
    assert texts[texts.index("Outer") + 1] == "1 ai.lucid node inside"
    assert texts[texts.index("If") + 1] == "2 ai.lucid nodes inside"


def test_a_model_without_bags_has_no_picture_of_itself() -> None:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    assert drawn(model)[2] == ["m.onnx", "nothing to fuse"]
