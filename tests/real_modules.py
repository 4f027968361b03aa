"""Modules that people have, installed from PyPI: their poolings become bags, and say what they said.

Not collected by default, since it wants packages that nothing else here does: ``nox -s modules`` installs them and runs
``pytest tests/real_modules.py``. What is not installed is skipped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import lucid_onnx
from lucid_onnx.ops.embedding_bag import spec
from lucid_testing.graphs import nodes

os.environ["KERAS_BACKEND"] = "torch"  # before keras is imported
torch = pytest.importorskip("torch", reason="torch is not installed")

import lucid_onnx.torch as from_torch  # noqa: E402  # needs torch

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

#: Ids with padding (0) at the end, and a row of nothing else.
IDS = torch.tensor([[3, 7, 1, 0], [5, 0, 0, 0], [9, 9, 2, 4]])
MASK = (IDS != 0).long()
FLAT, OFFSETS = torch.tensor([3, 7, 1, 5, 9, 9, 2, 4]), torch.tensor([0, 3, 4])
VOCABULARY = ["[PAD]", *(f"word{k}" for k in range(1, 12)), "[UNK]"]


@pytest.fixture(scope="module", autouse=True)
def _translations_read_once(translations: None) -> None:
    """For every test of this file."""
    torch.manual_seed(0)


class Wrapped(torch.nn.Module):
    """A function of tensors, over modules that it reads."""

    def __init__(self, function: Callable[..., Any], *modules: Any) -> None:
        super().__init__()
        self.function, self.parts = function, torch.nn.ModuleList(modules)

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def bags(model: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in nodes(model.graph) if n.domain == spec.DOMAIN]


def exports(module: Any, args: Sequence[Any], path: Path) -> dict[str, onnx.ModelProto]:
    """By our exporter, and by torch's with `fuse` behind it."""
    names = [f"x{k}" for k in range(len(args))]
    axes = [[k for k in range(a.dim()) if a.shape[k] > 1] for a in args]
    shapes: Any = tuple(dict.fromkeys(found, torch.export.Dim.DYNAMIC) for found in axes)
    shapes = (shapes,) if isinstance(module, Wrapped) else shapes  # which takes any number
    options: dict[str, Any] = {"input_names": names, "dynamic_shapes": shapes}
    torch.onnx.export(module, tuple(args), path, dynamo=True, verbose=False, **options)
    return {"lucid": from_torch.export(module, tuple(args), **options), "dynamo": lucid_onnx.fuse(path).model}


def check(models: dict[str, onnx.ModelProto], expected: Any, args: Sequence[Any], *, count: int = 1) -> None:
    """Each has so many bags, no pooling is left, and both forms say what torch says."""
    for way, model in models.items():
        assert len(bags(model)) == count, (way, [n.op_type for n in model.graph.node])
        feed = {f"x{k}": a.numpy() for k, a in enumerate(args)}
        for native in (True, False):
            (got,) = lucid_onnx.InferenceSession(model, native=native).run(None, feed)
            # A dozen roundings of numbers of about 4.
            np.testing.assert_allclose(got, expected.detach().numpy(), rtol=0, atol=12 * 4 * 2.0**-24, err_msg=way)


# ---- sentence-transformers.


def tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({word: k for k, word in enumerate(VOCABULARY)}, unk_token="[UNK]")
    made = tokenizers.Tokenizer(words)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return made


def test_sentence_transformers_static_embedding(tmp_path: Path) -> None:
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    static = modules.StaticEmbedding(tokenizer(), embedding_dim=8).eval()

    def call(ids: Any, offsets: Any) -> Any:
        return static({"input_ids": ids, "offsets": offsets})["sentence_embedding"]

    module = Wrapped(call, static).eval()
    check(exports(module, (FLAT, OFFSETS), tmp_path / "x.onnx"), call(FLAT, OFFSETS), (FLAT, OFFSETS))


@pytest.mark.parametrize("mode", ["mean", "mean_sqrt_len_tokens", "weightedmean"])
def test_sentence_transformers_word_embeddings(mode: str, tmp_path: Path) -> None:
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    tokenizers = pytest.importorskip("sentence_transformers.sentence_transformer.modules.tokenizer")
    words = modules.WordEmbeddings(tokenizers.WhitespaceTokenizer(VOCABULARY), torch.randn(len(VOCABULARY), 8))
    pooling = modules.Pooling(8, pooling_mode=mode)

    def call(ids: Any, mask: Any) -> Any:
        return pooling(words({"input_ids": ids, "attention_mask": mask}))["sentence_embedding"]

    module = Wrapped(call, words, pooling).eval()
    check(exports(module, (IDS, MASK), tmp_path / "x.onnx"), call(IDS, MASK), (IDS, MASK))


# ---- model2vec.


@pytest.mark.parametrize("weighted", [False, True])
def test_model2vec(weighted: bool, tmp_path: Path) -> None:
    export = pytest.importorskip("model2vec.onnx")
    model2vec = pytest.importorskip("model2vec")
    rng = np.random.default_rng(0)
    table = rng.standard_normal((len(VOCABULARY), 8)).astype(np.float32)
    further: dict[str, Any] = {}
    if weighted:
        further = {"weights": rng.random(len(VOCABULARY)), "token_mapping": rng.permutation(len(VOCABULARY))}
    model = model2vec.StaticModel(table, tokenizer(), normalize=False, **further)
    module = export.TorchStaticModel(model).eval()
    expected = module(IDS, MASK.clone())
    check(exports(Wrapped(module, module).eval(), (IDS, MASK), tmp_path / "x.onnx"), expected, (IDS, MASK))
    export.export_model_to_onnx(model, tmp_path / "exported")  # as its users do
    report = lucid_onnx.fuse(tmp_path / "exported" / "model.onnx")
    assert len(report.fused) == 1, report.unfused
    feed = {"input_ids": IDS.numpy(), "attention_mask": MASK.numpy()}
    (got,) = lucid_onnx.InferenceSession(report.model).run(None, feed)
    np.testing.assert_allclose(got, expected.numpy(), rtol=0, atol=12 * 4 * 2.0**-24)


# ---- Recommenders.


@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_torch_rechub(pooling: str, tmp_path: Path) -> None:
    layers = pytest.importorskip("torch_rechub.basic.layers")
    features = pytest.importorskip("torch_rechub.basic.features")
    items = features.SequenceFeature("history", len(VOCABULARY), embed_dim=8, pooling=pooling, padding_idx=0)
    layer = layers.EmbeddingLayer([items])

    def call(ids: Any) -> Any:
        return layer({"history": ids}, [items], squeeze_dim=True)

    check(exports(Wrapped(call, layer).eval(), (IDS,), tmp_path / "x.onnx"), call(IDS), (IDS,))


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("masking", [True, False])
def test_deepctr_torch(mode: str, masking: bool, tmp_path: Path) -> None:
    sequence = pytest.importorskip("deepctr_torch.layers.sequence")
    table = torch.nn.Embedding(len(VOCABULARY), 8)
    layer = sequence.SequencePoolingLayer(mode=mode, supports_masking=masking)
    second = MASK if masking else MASK.sum(1, keepdim=True)

    def call(ids: Any, second: Any) -> Any:
        return layer([table(ids), second])

    module = Wrapped(call, table, layer).eval()
    check(exports(module, (IDS, second), tmp_path / "x.onnx"), call(IDS, second), (IDS, second))


def test_deepctr_torch_maximum(tmp_path: Path) -> None:
    """1e9 is taken from the rows that are masked, by a mask of truth values (by lengths, torch itself raises)."""
    sequence = pytest.importorskip("deepctr_torch.layers.sequence")
    table = torch.nn.Embedding(len(VOCABULARY), 8)
    layer = sequence.SequencePoolingLayer(mode="max", supports_masking=True)

    def call(ids: Any, mask: Any) -> Any:
        return layer([table(ids), mask])

    args = (IDS, MASK.bool())
    check(exports(Wrapped(call, table, layer).eval(), args, tmp_path / "x.onnx"), call(*args), args)


@pytest.mark.parametrize("mask_zero", [True, False])
def test_keras_global_average_pooling(mask_zero: bool, tmp_path: Path) -> None:
    keras = pytest.importorskip("keras")
    layers = [keras.layers.Embedding(len(VOCABULARY), 8, mask_zero=mask_zero), keras.layers.GlobalAveragePooling1D()]
    model = keras.Sequential([keras.Input((4,), dtype="int64"), *layers])
    expected = model(IDS)
    check(exports(Wrapped(model, model).eval(), (IDS,), tmp_path / "x.onnx"), expected, (IDS,))


@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
@pytest.mark.parametrize("weighted", [False, True])
def test_keras_rs_embed_reduce(combiner: str, weighted: bool, tmp_path: Path) -> None:
    keras_rs = pytest.importorskip("keras_rs")
    layer = keras_rs.layers.EmbedReduce(len(VOCABULARY), 8, combiner=combiner)
    args = (IDS, torch.rand(IDS.shape)) if weighted else (IDS,)
    expected = layer(*args)
    check(exports(Wrapped(layer, layer).eval(), args, tmp_path / "x.onnx"), expected, args)


class Jagged(torch.nn.Module):
    """A collection of torchrec, over two features of flat values."""

    def __init__(self, collection: torch.nn.Module) -> None:
        super().__init__()
        self.collection = collection

    def forward(self, values: Any, lengths: Any) -> Any:
        import torchrec

        features = torchrec.KeyedJaggedTensor(["f0", "f1"], values, lengths=lengths)
        return self.collection(features).values()


def test_torchrec_embedding_bag_collection(tmp_path: Path) -> None:
    torchrec = pytest.importorskip("torchrec")
    configs = [
        torchrec.EmbeddingBagConfig(name=f"t{k}", embedding_dim=4, num_embeddings=12, feature_names=[f"f{k}"])
        for k in range(2)
    ]
    collection = torchrec.EmbeddingBagCollection(tables=configs)

    jagged = Jagged(collection).eval()
    args = (torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([2, 0, 1, 3]))
    expected = jagged(*args)
    model = from_torch.export(jagged, args, input_names=["x0", "x1"])
    assert bags(model) == ["EmbeddingBagCollection"]
    check({"lucid": model}, expected, args)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("pooling", ["SUM", "MEAN"])
def test_torchrec_quantized_embedding_bag_collection(bits: int, pooling: str) -> None:
    torchrec = pytest.importorskip("torchrec")
    quant = pytest.importorskip("torchrec.quant")
    from torch.ao.quantization import PlaceholderObserver, QConfig

    how = getattr(torchrec.PoolingType, pooling)
    configs = [
        torchrec.EmbeddingBagConfig(
            name=f"t{k}", embedding_dim=4 * (k + 1), num_embeddings=12, feature_names=[f"f{k}"], pooling=how
        )
        for k in range(2)
    ]
    collection = torchrec.EmbeddingBagCollection(tables=configs)
    dtype = torch.qint8 if bits == 8 else torch.quint4x2
    collection.qconfig = QConfig(
        activation=PlaceholderObserver.with_args(dtype=torch.float32),
        weight=PlaceholderObserver.with_args(dtype=dtype),
    )
    quantized = quant.EmbeddingBagCollection.from_float(collection)

    jagged = Jagged(quantized).eval()
    args = (torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([2, 0, 1, 3]))
    expected = jagged(*args)
    model = from_torch.export(jagged, args, input_names=["x0", "x1"])
    assert set(bags(model)) == {"QuantizedEmbeddingBagBias"}
    check({"lucid": model}, expected, args, count=2)
    other = (args[0].flip(0), torch.tensor([0, 3, 3, 0]))  # the other way round
    check({"lucid": model}, jagged(*other), other, count=2)


class Dlrm(torch.nn.Module):
    """facebookresearch/dlrm's embeddings: a QREmbeddingBag (two bags, multiplied) and weighted pooling ("learned")."""

    def __init__(self) -> None:
        super().__init__()
        self.quotients = torch.nn.EmbeddingBag(4, 8, mode="sum")
        self.remainders = torch.nn.EmbeddingBag(3, 8, mode="sum")
        self.table = torch.nn.EmbeddingBag(12, 8, mode="sum")
        self.row_weights = torch.nn.Parameter(torch.rand(12))

    def forward(self, indices: Any, offsets: Any) -> Any:
        quotients = self.quotients((indices / 3).long(), offsets)
        remainders = self.remainders(torch.remainder(indices, 3).long(), offsets)
        weights = self.row_weights.gather(0, indices)
        weighted = self.table(indices, offsets, per_sample_weights=weights)
        return torch.cat([quotients * remainders, weighted], 1)


def test_dlrm(tmp_path: Path) -> None:
    module = Dlrm().eval()
    check(exports(module, (FLAT, OFFSETS), tmp_path / "x.onnx"), module(FLAT, OFFSETS), (FLAT, OFFSETS), count=3)
