"""TorchRec's and FBGEMM's own modules as models: one collection, and the numbers that they give themselves.

Not collected by default, since it wants packages that nothing else here does: ``nox -s modules`` installs them and runs
``pytest tests/real_torchrec.py``.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import lucid_onnx
from lucid_testing.models import attributes, bags

torch: Any = pytest.importorskip("torch", reason="torch is not installed")
torchrec: Any = pytest.importorskip("torchrec", reason="torchrec is not installed")
quant: Any = pytest.importorskip("torchrec.quant")

import lucid_onnx.torch as lucid_torch  # noqa: E402  # needs torch

pytestmark = [
    pytest.mark.usefixtures("translations"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]

NARROW, WIDE, THIRD = ("t0", 4, ["a", "b"]), ("t1", 12, ["c"]), ("t2", 8, ["d", "a"])  # name, dim, features
ROWS = 10
#: Bags of four numbers of about 1: a dozen roundings of what is below 8.
TOLERANCE = 1e-6


def collection(
    tables: Sequence[tuple[str, int, list[str]]] = (NARROW, WIDE),
    poolings: str | Sequence[str] = "SUM",
    *,
    weighted: bool = False,
    half: bool = False,
) -> Any:
    torch.manual_seed(0)
    each = [poolings] * len(tables) if isinstance(poolings, str) else poolings
    return torchrec.EmbeddingBagCollection(
        tables=[
            torchrec.EmbeddingBagConfig(
                name=name,
                embedding_dim=dim,
                num_embeddings=ROWS + k,
                feature_names=list(features),
                pooling=getattr(torchrec.PoolingType, pooling),
                **({"data_type": torchrec.DataType.FP16} if half else {}),
            )
            for k, ((name, dim, features), pooling) in enumerate(zip(tables, each, strict=True))
        ],
        is_weighted=weighted,
    ).eval()


def quantized(made: Any, bits: int, dtype: Any = torch.float32) -> Any:
    from torch.ao.quantization import PlaceholderObserver, QConfig

    made.qconfig = QConfig(
        activation=PlaceholderObserver.with_args(dtype=dtype),
        weight=PlaceholderObserver.with_args(dtype=torch.qint8 if bits == 8 else torch.quint4x2),
    )
    return quant.EmbeddingBagCollection.from_float(made)


def features(
    keys: Sequence[str],
    batch: int,
    *,
    dtype: Any = torch.int64,
    weighted: bool = False,
    offsets: bool = False,
    longest: int = 4,
) -> Any:
    seeded = torch.Generator().manual_seed(batch)
    lengths = torch.randint(0, longest + 1, (len(keys) * batch,), generator=seeded)
    count = int(lengths.sum())
    values = torch.randint(0, ROWS, (count,), generator=seeded).to(dtype)
    weights = torch.rand(count, generator=seeded) if weighted else None
    if offsets:
        edges = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(dtype)
        return torchrec.KeyedJaggedTensor(list(keys), values, weights, offsets=edges)
    return torchrec.KeyedJaggedTensor(list(keys), values, weights, lengths=lengths.to(dtype))


def feed(session: Any, given: Any) -> dict[str, np.ndarray]:
    """The inputs of a model, of those that a KeyedJaggedTensor has."""
    found = {"values": given.values(), "lengths": given.lengths(), "offsets": given.offsets()}
    found["weights"] = given.weights_or_none()
    return {i.name: found[i.name].numpy() for i in session.get_inputs()}


def check(
    model: onnx.ModelProto, module: Any, keys: Sequence[str], *, tolerance: float = TOLERANCE, **how: Any
) -> None:
    """The model and the module agree about batches of every size, and bags of none."""
    for native in (True, False):
        session = lucid_onnx.InferenceSession(model, native=native)
        for batch, longest in ((3, 4), (1, 1), (7, 4), (2, 0)):
            given = features(keys, batch, longest=longest, **how)
            expected = module(given)
            (got,) = session.run(None, feed(session, given))
            assert got.dtype == expected.values().detach().numpy().dtype
            np.testing.assert_allclose(got, expected.values().detach().numpy(), rtol=0, atol=tolerance)
        (got,) = session.run(None, feed(session, features(keys, 0, **how)))  # which TorchRec raises for
        assert got.shape == (0, sum(expected.length_per_key()))


@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize("order", ["abc", "cxba"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=["int64", "int32"])
def test_a_collection_is_one_model(bits: int, order: str, dtype: Any) -> None:
    module = quantized(collection(), bits) if bits else collection()
    model = lucid_torch.export(module, features(order, 3, dtype=dtype))
    assert [i.name for i in model.graph.input] == ["values", "lengths"]
    found = bags(model)
    if bits:
        assert [n.op_type for n in found] == ["QuantizedEmbeddingBagBias"] * 3
    else:
        assert [n.op_type for n in found] == ["EmbeddingBagCollection"]
        assert attributes(found[0])["layout"] == (1 if order == "abc" else 0)
    check(model, module, order, dtype=dtype)


RANDOM = random.Random(1)
SETTINGS = [
    {
        "bits": bits,
        "poolings": [RANDOM.choice(["SUM", "MEAN"]) for _ in range(3)] if bits or not weighted else ["SUM"] * 3,
        "weighted": weighted,
        "order": "".join(RANDOM.sample("abcd", 4)) + RANDOM.choice(["", "x"]),
        "dtype": RANDOM.choice([torch.int64, torch.int32]),
        "offsets": offsets,
    }
    for bits, weighted, offsets in itertools.product([0, 8, 4], [False, True], [False, True])
]


@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_what_differs_from_table_to_table(number: int) -> None:
    """Poolings, widths, a feature that two tables have, and a table that two features have."""
    setting = SETTINGS[number]
    made = collection([NARROW, WIDE, THIRD], setting["poolings"], weighted=setting["weighted"])
    module = quantized(made, setting["bits"]) if setting["bits"] else made
    how = {"dtype": setting["dtype"], "weighted": setting["weighted"], "offsets": setting["offsets"]}
    model = lucid_torch.export(module, features(setting["order"], 3, **how))
    assert [i.name for i in model.graph.input][1] == ("offsets" if setting["offsets"] else "lengths")
    check(model, module, setting["order"], **how)
    metadata = {p.key: p.value for p in model.metadata_props}
    expected = module(features(setting["order"], 3, **how))
    assert json.loads(metadata["torchrec.values.keys"]) == list(setting["order"])
    assert json.loads(metadata["torchrec.output.keys"]) == list(expected.keys())
    assert json.loads(metadata["torchrec.output.length_per_key"]) == expected.length_per_key()


@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_without_an_example(bits: int, weighted: bool) -> None:
    made = collection([NARROW, WIDE, THIRD], weighted=weighted)
    module = quantized(made, bits) if bits else made
    model = lucid_torch.from_module(module, index_dtype="int32")
    check(model, module, "abcd", dtype=torch.int32, weighted=weighted)
    model = lucid_torch.from_module(module, keys=list("dxcba"), bounds="offsets")
    check(model, module, "dxcba", weighted=weighted, offsets=True)


def test_float16() -> None:
    module = collection(half=True)
    check(lucid_torch.export(module, features("abc", 3)), module, "abc", tolerance=8 * 2.0**-11)
    module = quantized(collection(), 8, torch.float16)
    check(lucid_torch.export(module, features("abc", 3)), module, "abc", tolerance=8 * 2.0**-11)


def test_one_feature() -> None:
    one = collection([("t", 4, ["a"])])
    model = lucid_torch.export(one, features("a", 3))
    assert [n.op_type for n in bags(model)] == ["EmbeddingBag"]
    check(model, one, "a")
    two = collection([("t", 4, ["a"]), ("u", 8, ["a"])])
    check(lucid_torch.export(two, features("a", 3)), two, "a")


def test_what_two_tables_have_is_called_after_both() -> None:
    module = collection([NARROW, THIRD])
    assert "a@t0" in module(features("abd", 3)).keys()  # noqa: SIM118  # a method of a KeyedTensor
    check(lucid_torch.export(module, features("abd", 3)), module, "abd")


def test_a_feature_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="the features have no key 'c'; they have a, b"):
        lucid_torch.export(collection(), features("ab", 3))


def test_weighted_means_are_no_bags_of_torchs() -> None:
    module = collection(poolings="MEAN", weighted=True)
    with pytest.raises(Exception, match="per_sample_weights"):
        lucid_torch.export(module, features("abc", 3, weighted=True))
    with pytest.raises(TypeError, match="with bags as it makes them"):
        lucid_torch.from_module(module)


@pytest.mark.parametrize("dynamo", [True, False])
def test_what_torch_exported_is_fused_and_merged(dynamo: bool, tmp_path: Path) -> None:
    module, given = collection(), features("abc", 3)

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.collection = module

        def forward(self, values: Any, lengths: Any) -> Any:
            made = torchrec.KeyedJaggedTensor(["a", "b", "c"], values, lengths=lengths)
            return self.collection(made).values()

    n, b = torch.export.Dim("n"), torch.export.Dim("b")
    how = {"dynamic_shapes": ({0: n}, {0: 3 * b}), "verbose": False}
    if not dynamo:
        how = {"dynamic_axes": {"values": {0: "n"}, "lengths": {0: "b"}}, "opset_version": 17}
    path, names = tmp_path / "plain.onnx", ["values", "lengths"]
    call = (given.values(), given.lengths())
    torch.onnx.export(Plain(), call, path, dynamo=dynamo, input_names=names, **how)
    model = lucid_onnx.fuse(path, merge_tables=True).model
    assert [n.op_type for n in bags(model)] == ["EmbeddingBagCollection"]
    session = lucid_onnx.InferenceSession(model)
    for batch in (3, 1, 7) if dynamo else (3,):  # the older exporter writes the example's lengths into the file
        given = features("abc", batch)
        (got,) = session.run(None, feed(session, given))
        np.testing.assert_allclose(got, module(given).values().detach().numpy(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("order", [[3, 2, 0, 1], [2, 0, 1]], ids=["all", "some"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=["int64", "int32"])
def test_a_module_that_moves_features(order: list[int], dtype: Any) -> None:
    """By KeyedJaggedTensor.permute, and by split where it reads some of them."""

    class Moves(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.whole, self.part = collection(weighted=True), collection([("t", 4, ["c"])])

        def forward(self, features: Any) -> Any:
            moved = features.permute(order)
            part = moved.split([len(order) - 3, 1, 2])[1]
            pooled = torch.cat([self.whole(moved).values(), self.part(part).values()], 1)
            return torchrec.KeyedTensor(["all"], [pooled.shape[1]], pooled)

    module = Moves().eval()
    how = {"weighted": True, "dtype": dtype}
    model = lucid_torch.export(module, features("abcd", 3, **how))
    check(model, module, "abcd", **how)


def test_processed_features() -> None:
    """Weights by position are computed beside one collection."""
    from torchrec.modules import feature_processor_ as processors
    from torchrec.modules import fp_embedding_modules as modules

    positions = processors.PositionWeightedModuleCollection(dict.fromkeys("abc", 4))
    module = modules.FeatureProcessedEmbeddingBagCollection(collection(weighted=True), positions).eval()
    for weights in positions.parameters():
        torch.nn.init.uniform_(weights)
    model = lucid_torch.export(module, features("abc", 3))
    assert [n.op_type for n in bags(model)] == ["EmbeddingBagCollection"]
    check(model, module, "abc")


def test_bags_that_somebody_changed() -> None:
    """What is not as TorchRec makes it is exported as torch reads it."""
    module = collection()
    module.embedding_bags["t0"].max_norm = 0.5
    model = lucid_torch.export(module, features("abc", 3))
    assert {n.op_type for n in bags(model)} == {"EmbeddingBag"}
    session = lucid_onnx.InferenceSession(model)
    given = features("abc", 3)
    (got,) = session.run(None, feed(session, given))
    np.testing.assert_allclose(got, module(given).values().detach().numpy(), rtol=0, atol=TOLERANCE)


def test_a_program_with_fbgemms_operators() -> None:
    program = torch.export.export(quantized(collection(), 8), (features("abc", 3),), strict=False)
    with pytest.raises(ValueError, match=r"give the module itself, not what torch\.export made of it"):
        lucid_torch.export(program)


def dlrm(kind: str) -> Any:
    from torchrec.models import deepfm
    from torchrec.models import dlrm as models

    torch.manual_seed(0)
    made = collection([("t0", 8, ["a"]), ("t1", 8, ["b", "c"]), ("t2", 8, ["d"])])
    if kind == "dcn":
        return models.DLRM_DCN(made, 5, [16, 8], [16, 8, 1], 2, 4).eval()
    if kind == "projection":
        return models.DLRM_Projection(made, 5, [16, 8], [16, 8, 1], [32, 32], [32, 32]).eval()
    if kind == "deepfm":
        return deepfm.SimpleDeepFMNN(5, made, 16, 8).eval()
    model = models.DLRM(made, 5, [16, 8], [16, 8, 1]).eval()
    if kind == "quantized":
        from torchrec.inference.modules import quantize_inference_model

        return quantize_inference_model(model)
    return model


@pytest.mark.parametrize("kind", ["dlrm", "dcn", "projection", "deepfm", "quantized"])
def test_inside_a_recommender(kind: str) -> None:
    module = dlrm(kind)
    order = "dabc" if kind == "dcn" else "abcd"
    model = lucid_torch.export(module, (torch.rand(3, 5), features(order, 3)))
    found = [n.op_type for n in bags(model)]
    assert found == (["QuantizedEmbeddingBagBias"] * 4 if kind == "quantized" else ["EmbeddingBagCollection"])
    if kind == "dlrm":  # what is taken apart and put together again is as it was
        assert not any(n.op_type == "Split" for n in model.graph.node)
    for native in (True, False):
        session = lucid_onnx.InferenceSession(model, native=native)
        for batch in (3, 1, 7):
            dense, sparse = torch.rand(batch, 5), features(order, batch)
            inputs = {"values": sparse.values().numpy(), "lengths": sparse.lengths().numpy()}
            (name,) = {i.name for i in session.get_inputs()} - set(inputs)
            (got,) = session.run(None, {name: dense.numpy(), **inputs})
            np.testing.assert_allclose(got, module(dense, sparse).detach().numpy(), rtol=0, atol=TOLERANCE)
        none = {name: np.zeros((0, 5), np.float32), "values": np.zeros(0, np.int64), "lengths": np.zeros(0, np.int64)}
        assert session.run(None, none)[0].shape == (0, 1)


def test_two_keyed_inputs_and_sizes_of_the_callers() -> None:
    """Each is called after its parameter, and what varies is what dynamic_shapes says."""

    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.users, self.items = collection([NARROW]), collection([WIDE])

        def forward(self, users: Any, items: Any) -> Any:
            return self.users(users), self.items(items).values() * 2

    module, n, b = Both().eval(), torch.export.Dim("n"), torch.export.Dim("b")
    shapes = ({"values": {0: n}, "lengths": {0: 2 * b}}, None)
    model = lucid_torch.export(module, (features("ab", 3), features("c", 2)), dynamic_shapes=shapes)
    assert [i.name for i in model.graph.input] == ["users_values", "users_lengths", "items_values", "items_lengths"]
    users, items = features("ab", 5), features("c", 2)
    given = [users.values(), users.lengths(), items.values(), items.lengths()]
    session = lucid_onnx.InferenceSession(model)
    got = session.run(None, {i.name: g.numpy() for i, g in zip(session.get_inputs(), given, strict=True)})
    expected = module(users, items)
    np.testing.assert_allclose(got[0], expected[0].values().detach().numpy(), rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(got[1], expected[1].detach().numpy(), rtol=0, atol=TOLERANCE)
    with pytest.raises(ValueError, match="a KeyedJaggedTensor takes sizes by the names of its parts"):
        lucid_torch.export(module, (users, items), dynamic_shapes=({"value": {0: n}}, None))


# ---- FBGEMM's own modules.


def batched(kinds: Sequence[str], poolings: str, table_of: Sequence[int], result: str = "FP32") -> Any:
    """Tables for inference of some types of rows."""
    from fbgemm_gpu import split_table_batched_embeddings_ops_inference as fbgemm
    from fbgemm_gpu.split_embedding_configs import SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode

    types = [getattr(SparseType, kind) for kind in kinds]
    tables = fbgemm.IntNBitTableBatchedEmbeddingBagsCodegen(
        [(f"table{k}", ROWS, 8 * (k + 1), kind, EmbeddingLocation.HOST) for k, kind in enumerate(types)],
        pooling_mode=getattr(PoolingMode, poolings),
        device="cpu",
        output_dtype=getattr(SparseType, result),
        feature_table_map=list(table_of),
    )
    torch.manual_seed(0)
    tables.fill_random_weights()
    whole = tables.split_embedding_weights_with_scale_bias(2)
    for kind, (rows, scale, bias) in zip(types, whole, strict=True):
        if scale is None:
            rows.copy_(torch.randn(ROWS, rows.shape[1] * 8 // kind.bit_rate()).to(kind.as_dtype()).view(torch.uint8))
        else:
            scale.copy_(torch.rand_like(scale.float()) / 16)
            bias.copy_(torch.rand_like(bias.float()) - 0.5)
    return tables


def trained(precision: str, poolings: str, table_of: Sequence[int]) -> Any:
    """Tables for training."""
    from fbgemm_gpu import split_table_batched_embeddings_ops_training as fbgemm
    from fbgemm_gpu.split_embedding_configs import SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode

    place = (EmbeddingLocation.HOST, fbgemm.ComputeDevice.CPU)
    tables = fbgemm.SplitTableBatchedEmbeddingBagsCodegen(
        [(ROWS, 8 * (k + 1), *place) for k in range(2)],
        pooling_mode=getattr(PoolingMode, poolings),
        weights_precision=getattr(SparseType, precision),
        feature_table_map=list(table_of),
        device="cpu",
    )
    torch.manual_seed(0)
    tables.init_embedding_weights_uniform(-1, 1)
    return tables.eval()


@pytest.mark.parametrize(
    ("made", "weighted"),
    [
        (lambda: batched(["INT8", "INT4"], "SUM", [0, 1]), False),
        (lambda: batched(["INT8", "FP16", "INT4"], "MEAN", [2, 0, 1, 0]), True),
        (lambda: batched(["FP32", "FP16"], "MEAN", [0, 1]), False),
        (lambda: batched(["INT8", "INT8"], "SUM", [1, 0], "FP16"), True),
        (lambda: trained("FP32", "SUM", [0, 1]), False),
        (lambda: trained("FP16", "MEAN", [1, 0, 1]), True),
    ],
    ids=["sum", "kinds", "floats", "half", "trained", "trained16"],
)
def test_fbgemms_tables(made: Any, weighted: bool) -> None:
    module = made()
    count = len(module.feature_table_map)
    for index_dtype in ("int64", "int32"):
        model = lucid_torch.from_module(module, per_sample_weights=weighted, index_dtype=index_dtype)
        for native in (True, False):
            session = lucid_onnx.InferenceSession(model, native=native)
            for batch in (3, 1, 7):
                given = features(
                    [str(k) for k in range(count)], batch, weighted=weighted, dtype=getattr(torch, index_dtype)
                )
                call = [given.values(), given.offsets(), *([given.weights()] if weighted else [])]
                expected = module(*call).detach().numpy()
                (got,) = session.run(None, {i.name: c.numpy() for i, c in zip(session.get_inputs(), call, strict=True)})
                assert got.dtype == expected.dtype
                # Results of float16 are rounded once more, and are below 8.
                tolerance = TOLERANCE if expected.dtype == np.float32 else 8 * 2.0**-11
                np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)
