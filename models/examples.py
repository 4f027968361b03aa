"""Example models with several bags, built with onnx.helper and with onnxscript.

Tables are small and seeded, so that the files are small and always the same.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxscript import FLOAT, INT64, script
from onnxscript import opset18 as op
from onnxscript.values import Opset

import lucid_onnx

_OPSET = 18
lucid = Opset("ai.lucid", 1)


def _table(seed: int, rows: int, dim: int) -> np.ndarray:
    return (np.random.RandomState(seed).standard_normal((rows, dim)) / np.sqrt(dim)).astype(np.float32)


def two_tower() -> onnx.ModelProto:
    """A retriever: the dot product of a user, a mean of the items seen, and an item, a weighted sum of its words.

    ``history`` and ``history_offsets`` describe users, ``words``, ``word_offsets`` and ``word_weights`` items;
    ``scores`` is [users, items]. Word 0 is padding.
    """
    nodes = [
        lucid_onnx.make_node("item_table", "history", "history_offsets", "user", mode="mean", max_norm=1.0),
        lucid_onnx.make_node(
            "word_table",
            "words",
            "word_offsets",
            "item",
            mode="sum",
            per_sample_weights="word_weights",
            padding_idx=0,
        ),
        helper.make_node("Transpose", ["item"], ["item_t"], perm=[1, 0]),
        helper.make_node("MatMul", ["user", "item_t"], ["scores"]),
    ]
    integers = {"history": "clicks", "history_offsets": "users", "words": "tokens", "word_offsets": "items"}
    graph = helper.make_graph(
        nodes,
        "two_tower",
        [helper.make_tensor_value_info(name, TensorProto.INT64, [dim]) for name, dim in integers.items()]
        + [helper.make_tensor_value_info("word_weights", TensorProto.FLOAT, ["tokens"])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["users", "items"])],
        [
            numpy_helper.from_array(_table(1, 50, 8), "item_table"),
            numpy_helper.from_array(_table(2, 200, 8), "word_table"),
        ],
    )
    imports = [helper.make_opsetid("", _OPSET)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8, producer_name="lucid-onnx")
    return lucid_onnx.to_form(model, "portable")


@script()
def _dlrm(
    dense: FLOAT["batch", 4],  # noqa: F821
    brands: INT64["num_brands"],  # noqa: F821
    brand_offsets: INT64["batch"],  # noqa: F821
    pages: INT64["num_pages"],  # noqa: F821
    page_offsets: INT64["batch"],  # noqa: F821
    tags: INT64["batch", 3],  # noqa: F821
    bottom: FLOAT[4, 8],
    brand_table: FLOAT[40, 8],
    page_table: FLOAT[60, 8],
    tag_table: FLOAT[30, 8],
    top: FLOAT[32, 1],
) -> FLOAT["batch", 1]:  # noqa: F821
    x = op.Relu(op.MatMul(dense, bottom))
    brand = lucid.EmbeddingBag(brand_table, brands, brand_offsets, mode="sum")
    page = lucid.EmbeddingBag(page_table, pages, page_offsets, mode="max", padding_idx=-1)
    tag = lucid.EmbeddingBag2D(tag_table, tags, mode="mean")
    return op.Sigmoid(op.MatMul(op.Concat(x, brand, page, tag, axis=1), top))


def dlrm() -> onnx.ModelProto:
    """A small DLRM-like ranker, written with onnxscript: a dense part, a sum, a max and a 2-D mean bag."""
    model = _dlrm.to_model_proto()
    model.producer_name, model.producer_version, model.ir_version = "lucid-onnx", "", 8
    tables = {
        "bottom": _table(3, 4, 8),
        "brand_table": _table(4, 40, 8),
        "page_table": _table(5, 60, 8),
        "tag_table": _table(6, 30, 8),
        "top": _table(7, 32, 1),
    }
    for value in [i for i in model.graph.input if i.name in tables]:
        model.graph.input.remove(value)
    model.graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in tables.items())
    return lucid_onnx.to_form(model, "portable")


#: File name -> the function that builds it.
MODELS = {"two_tower": two_tower, "dlrm": dlrm}
