"""Collections of TorchRec's, exported; modules with their attributes stand for them, as TorchRec is not installed.

`tests/real_torchrec.py` exports TorchRec's own: `nox -s modules`.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

import lucid_onnx
from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.ops.embedding_bag_collection import spec as collection

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

import lucid_onnx.torch as lucid_torch  # noqa: E402  # needs torch
from lucid_onnx.torch.features import replace_batched  # noqa: E402
from lucid_onnx.torch.placeholders import BATCHED  # noqa: E402
from lucid_onnx.torch.simplify import simplify  # noqa: E402
from lucid_testing.models import attributes, bags  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("translations"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]
ROWS = 10


class KeyedJaggedTensor:
    """TorchRec's name, and the methods by which it tells of its parts."""

    def __init__(self, keys: Any, values: Any, weights: Any = None, lengths: Any = None, offsets: Any = None) -> None:
        self._keys, self._values, self._weights, self._lengths, self._offsets = keys, values, weights, lengths, offsets

    def keys(self) -> Any:
        return self._keys

    def values(self) -> Any:
        return self._values

    def weights_or_none(self) -> Any:
        return self._weights

    weights = weights_or_none

    def lengths_or_none(self) -> Any:
        return self._lengths

    def offsets(self) -> Any:
        if self._offsets is not None:
            return self._offsets
        return torch.nn.functional.pad(self._lengths.cumsum(0, dtype=self._lengths.dtype), (1, 0))

    def stride(self) -> int:
        return (len(self.offsets()) - 1) // len(self._keys)

    def variable_stride_per_key(self) -> bool:
        return False

    def inverse_indices_or_none(self) -> Any:
        return None


class KeyedTensor:
    def __init__(self, keys: Any, length_per_key: Any, values: Any) -> None:
        self._keys, self._length_per_key, self._values = keys, length_per_key, values

    def keys(self) -> Any:
        return self._keys

    def length_per_key(self) -> Any:
        return self._length_per_key

    def values(self) -> Any:
        return self._values


class EmbeddingBagCollection(torch.nn.Module):
    """TorchRec's, of tables (dim, features, mode)."""

    def __init__(self, tables: list[tuple[int, list[str], str]], *, weighted: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding_bags = torch.nn.ModuleDict(
            {
                f"t{k}": torch.nn.EmbeddingBag(ROWS, dim, mode=mode, include_last_offset=True)
                for k, (dim, _, mode) in enumerate(tables)
            }
        )
        self._feature_names = [features for _, features, _ in tables]
        self._embedding_names = [f"{name}@t{k}" for k, names in enumerate(self._feature_names) for name in names]
        self._is_weighted = weighted

    def forward(self, features: Any) -> Any:
        edges = features.offsets().reshape(-1)
        count, pooled = features.stride(), []
        for bag, names in zip(self.embedding_bags.values(), self._feature_names, strict=True):
            for name in names:
                k = features.keys().index(name)
                own = edges[k * count : (k + 1) * count + 1]
                part = slice(int(own[0]), int(own[-1]))
                weights = features.weights()[part] if self._is_weighted else None
                pooled.append(bag(features.values()[part], own - own[0], weights))
        return KeyedTensor(self._embedding_names, [p.shape[1] for p in pooled], torch.cat(pooled, 1))


EmbeddingBagCollection.forward.__module__ = "torchrec.modules.embedding_modules"


class SplitTableBatchedEmbeddingBagsCodegen(torch.nn.Module):
    """FBGEMM's, of two tables."""

    def __init__(self, features: list[int], mode: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tables = [torch.randn(ROWS, 4 * (k + 1)) for k in range(2)]
        self.embedding_specs = [(ROWS, 4, None, None), (ROWS, 8, None, None)]
        self.feature_table_map, self.pooling_mode, self.output_dtype = features, mode, 0
        self.weights_precision = SimpleNamespace(value="fp32")

    def split_embedding_weights(self) -> list[Any]:
        return self.tables

    def forward(self, indices: Any, offsets: Any, per_sample_weights: Any = None) -> Any:
        raise NotImplementedError


def jagged(keys: str, lengths: list[int], *, weighted: bool = False, dtype: Any = torch.int64) -> KeyedJaggedTensor:
    seeded = torch.Generator().manual_seed(len(lengths))
    values = torch.randint(0, ROWS, (sum(lengths),), generator=seeded).to(dtype)
    weights = torch.rand(len(values), generator=seeded) if weighted else None
    return KeyedJaggedTensor(list(keys), values, weights, torch.tensor(lengths, dtype=dtype))


def test_features_in_another_order_and_of_two_modes() -> None:
    """In a module that has more inputs, one of which shares the number of bags."""

    class Ranker(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.collection = EmbeddingBagCollection([(4, ["a", "b"], "sum"), (6, ["c"], "mean"), (2, ["a"], "sum")])

        def forward(self, dense: Any, features: Any) -> Any:
            return torch.cat([dense, self.collection(features).values()], 1)

    module = Ranker().eval()
    lengths = [2, 0, 1, 3, 1, 0, 0, 2]
    example = (torch.rand(2, 3), jagged("cxba", lengths))
    model = lucid_torch.export(module, example)
    assert "forward" not in vars(module.collection)
    assert [i.name for i in model.graph.input] == ["dense", "values", "lengths"]
    assert sorted(n.op_type for n in bags(model)) == ["EmbeddingBag", "EmbeddingBagCollection"]
    assert "collection.embedding_bags.t0.weight" in {i.name for i in model.graph.initializer}
    for native in (True, False):
        session = lucid_onnx.InferenceSession(model, native=native)
        for given in (lengths, [1, 0, 2, 1], [0] * 12, []):
            features, dense = jagged("cxba", given), torch.rand(len(given) // 4, 3)
            feed = {"dense": dense, "values": features.values(), "lengths": features.lengths_or_none()}
            (got,) = session.run(None, {name: tensor.numpy() for name, tensor in feed.items()})
            if given:
                np.testing.assert_allclose(got, module(dense, features).detach().numpy(), rtol=0, atol=1e-6)
            assert got.shape == (len(given) // 4, 3 + 4 + 4 + 6 + 2)


def test_features_in_their_order_are_packed() -> None:
    module = EmbeddingBagCollection([(4, ["a", "b"], "sum"), (6, ["c"], "sum")], weighted=True).eval()
    model = lucid_torch.from_module(module, index_dtype="int32")
    (node,) = bags(model)
    assert node.op_type == "EmbeddingBagCollection"
    assert attributes(node)["layout"] == collection.LAYOUTS.index("packed")
    assert [i.name for i in model.graph.input] == ["values", "lengths", "weights"]
    metadata = {p.key: p.value for p in model.metadata_props}
    assert json.loads(metadata["torchrec.values.keys"]) == ["a", "b", "c"]
    assert json.loads(metadata["torchrec.output.keys"]) == ["a@t0", "b@t0", "c@t1"]
    assert json.loads(metadata["torchrec.output.length_per_key"]) == [4, 4, 6]
    features = jagged("abc", [2, 0, 1, 3, 0, 4], weighted=True, dtype=torch.int32)
    feed = {"values": features.values(), "lengths": features.lengths_or_none(), "weights": features.weights()}
    (got,) = lucid_onnx.InferenceSession(model).run(None, {name: tensor.numpy() for name, tensor in feed.items()})
    np.testing.assert_allclose(got, module(features).values().detach().numpy(), rtol=0, atol=1e-6)


def test_tables_for_training_divide_by_the_count() -> None:
    module = SplitTableBatchedEmbeddingBagsCodegen([1, 0], mode=1).eval()
    model = lucid_torch.from_module(module, per_sample_weights=True, bounds="offsets")
    (node,) = bags(model)
    assert node.op_type == "EmbeddingBagCollection"
    assert [i.name for i in model.graph.input] == ["indices", "offsets", "per_sample_weights"]
    indices, offsets = np.array([3, 1, 4, 9]), np.array([0, 2, 2, 3, 4])
    weights = np.array([0.5, 2, 1, 3], np.float32)
    first, second = (t.numpy() for t in module.tables)
    expected = np.zeros((2, 12), np.float32)
    expected[0, :8] = (0.5 * second[3] + 2 * second[1]) / 2
    expected[0, 8:], expected[1, 8:] = first[4], 3 * first[9]
    feed = {"indices": indices, "offsets": offsets, "per_sample_weights": weights}
    (got,) = lucid_onnx.InferenceSession(model).run(None, feed)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"keys": ["a", "b"]}, ValueError, "expected each of a, b, c, once"),
        ({"keys": ["a", "b", "c", "a"]}, ValueError, "expected each of a, b, c, once"),
        ({"bounds": "starts"}, ValueError, "bounds = 'starts' is not one of lengths, offsets"),
        ({"per_sample_weights": True}, ValueError, "but the collection's is_weighted = False"),
        ({"index_dtype": "int16"}, TypeError, "index_dtype = int16 is not int32 or int64"),
        ({"opset": 17}, ValueError, "opset = 17"),
    ],
)
def test_arguments_that_are_not_valid(given: dict[str, Any], error: type[Exception], message: str) -> None:
    module = EmbeddingBagCollection([(4, ["a", "b"], "sum"), (6, ["c"], "sum")])
    with pytest.raises(error, match=message):
        lucid_torch.from_module(module, **given)


def test_what_is_not_a_collection() -> None:
    changed = EmbeddingBagCollection([(4, ["a"], "sum")])
    changed.embedding_bags["t0"].max_norm = 1.0
    for module in (torch.nn.EmbeddingBag(4, 4), changed):
        with pytest.raises(TypeError, match="expected TorchRec's EmbeddingBagCollection with bags as it makes them"):
            lucid_torch.from_module(module)
    tables = SplitTableBatchedEmbeddingBagsCodegen([0, 1], mode=2)
    with pytest.raises(ValueError, match="does not pool its rows"):
        lucid_torch.from_module(tables)
    tables = SplitTableBatchedEmbeddingBagsCodegen([0, 1], mode=0)
    with pytest.raises(ValueError, match="keys are given, and FBGEMM's tables have none"):
        lucid_torch.from_module(tables, keys=["a"])
    tables.weights_precision.value = "int8"
    with pytest.raises(ValueError, match="has tables of int8; expected fp32 or fp16"):
        lucid_torch.from_module(tables)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("variable_stride_per_key", "a batch size for each key"),
        ("inverse_indices_or_none", "with inverse_indices"),
    ],
)
def test_keyed_tensors_that_no_model_takes(changed: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KeyedJaggedTensor, changed, lambda self: True)
    with pytest.raises(ValueError, match=message):
        lucid_torch.export(EmbeddingBagCollection([(4, ["a"], "sum")]), jagged("a", [1, 2]))


# ---- Graphs.


def batched_model(counts: list[int]) -> ir.Model:
    """A placeholder of bags of so many tables, for each count."""
    table = helper.make_tensor("table", TensorProto.FLOAT, [3, 2], [1.0, 2, 3, 4, 5, 6])
    inputs, outputs, made = [], [], []
    for k, count in enumerate(counts):
        inputs += [
            helper.make_tensor_value_info(f"indices{k}", TensorProto.INT64, [None]),
            helper.make_tensor_value_info(f"offsets{k}", TensorProto.INT64, [None]),
        ]
        outputs.append(helper.make_tensor_value_info(f"output{k}", TensorProto.FLOAT, [None, 2 * count]))
        made.append(
            helper.make_node(
                BATCHED,
                ["table", f"indices{k}", f"offsets{k}"],
                [f"output{k}"],
                domain=spec.DOMAIN,
                num_tables=1,
                num_keys=count,
                keys=list(range(count)),
                table_of=[0] * count,
                bits=[0],
                names=[""],
                mode=0,
            )
        )
    graph = helper.make_graph(made, "g", inputs, outputs, [table])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(spec.DOMAIN, spec.VERSION)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=8))


def test_more_kinds_of_collections_than_a_model_may_have() -> None:
    """What is one too many is a bag for each feature, and a kind that there is already is a collection."""
    model = batched_model([2, 3])
    seen: set[tuple[int, str, bool]] = {(k, "rows", False) for k in range(collection.MOST_SIGNATURES - 1)}
    for node in list(model.graph):
        replace_batched(node, model.graph, seen)
    proto = lucid_onnx.to_form(ir.to_proto(model), "portable")
    assert [n.op_type for n in bags(proto)] == ["EmbeddingBagCollection", *["EmbeddingBag"] * 3]
    feed: dict[str, Any] = {}
    for k, count in enumerate((2, 3)):  # a bag of one row of each table, and one of two
        feed[f"indices{k}"] = np.arange(3 * count) % 3
        feed[f"offsets{k}"] = np.array([0, *np.cumsum([1, 2] * count)])
    table = np.arange(1, 7, dtype=np.float32).reshape(3, 2)
    for native in (True, False):
        got = lucid_onnx.InferenceSession(proto, native=native).run(None, feed)
        for count, output in zip((2, 3), got, strict=True):
            np.testing.assert_array_equal(output, np.tile([table[0], table[1] + table[2]], count))


@pytest.mark.parametrize(
    ("pieces", "axis", "is_whole"),
    [
        (["a", "b"], 1, True),
        (["a", "b"], -1, True),
        (["other", "a", "b"], 1, True),
        (["b", "a"], 1, False),
        (["a"], 1, False),
        (["a", "other", "b"], 1, False),
        (["a", "b"], 0, False),
    ],
)
def test_what_is_split_and_concatenated(pieces: list[str], axis: int, is_whole: bool) -> None:
    """All pieces in their order, over the axis they were split over, are what was split; nothing else is."""
    made = [
        helper.make_node("Split", ["x"], ["a", "b"], axis=1, num_outputs=2),
        helper.make_node("Neg", ["x"], ["other"]),
        helper.make_node("Concat", pieces, ["joined"], axis=axis),
        helper.make_node("Neg", ["joined"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", "d"])
    opsets = [helper.make_opsetid("", 18)]
    proto = helper.make_model(helper.make_graph(made, "g", [x], [y]), opset_imports=opsets, ir_version=8)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    simplify(model)
    assert (not any(n.op_type == "Split" for n in model.graph)) == is_whole
    array = np.arange(8, dtype=np.float32).reshape(2, 4)
    expected = lucid_onnx.InferenceSession(proto).run(None, {"x": array})[0]
    got = lucid_onnx.InferenceSession(ir.to_proto(model)).run(None, {"x": array})[0]
    np.testing.assert_array_equal(got, expected)
