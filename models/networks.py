"""Networks with bags, written in torch: a ranker, a text classifier and a retriever.

    python models/networks.py FOLDER

writes each of them to FOLDER as torch's two exporters make it (``dlrm_legacy.onnx``, ``dlrm_dynamo.onnx``), fused
(``dlrm_legacy_fused.onnx``, ...), and as `lucid_onnx.torch.export` makes it (``dlrm.onnx``). Weights are random and
seeded. The files are not in the repository, as torch's exporters do not promise the same bytes twice.

Shapes are those of the published networks. Tables and layers are smaller, so that the script takes seconds.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import lucid_onnx.torch

#: The cardinalities of the 26 columns of the Criteo terabyte data set, with indices modulo 40 million as in MLPerf.
CRITEO = (
    *(39884406, 39043, 17289, 7420, 20263, 3, 7120, 1543, 63, 38532951, 2953546, 403346, 10),
    *(2208, 11938, 155, 4, 976, 14, 39979771, 25641295, 39664984, 585935, 12972, 108, 36),
)
#: The rows of the tables of this script: their square roots.
ROWS = tuple(math.isqrt(n) for n in CRITEO)


def _layers(sizes: Sequence[int], last: nn.Module | None) -> nn.Sequential:
    """Linear layers with a Relu after each, and ``last`` (or nothing) after the last one."""
    found: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        found += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*found[:-1], *([] if last is None else [last]))


class DLRM(nn.Module):
    """A click predictor: 13 numbers and 26 bags, and the dot products of each pair of their vectors.

    Inputs: dense float32 [B, 13]; offsets int64 [26, B]; then the indices of each table, int64 [N of that table].
    Output: the probability of a click, float32 [B, 1].
    """

    def __init__(
        self,
        rows: Sequence[int] = ROWS,
        dim: int = 16,
        bottom: Sequence[int] = (64, 32),
        top: Sequence[int] = (128, 64),
    ) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(n, dim, mode="sum", sparse=True) for n in rows)
        self.bottom = _layers((13, *bottom, dim), nn.ReLU())
        vectors = len(rows) + 1
        row, column = torch.tril_indices(vectors, vectors, offset=-1)
        self.register_buffer("pairs", row * vectors + column, persistent=False)
        self.top = _layers((dim + vectors * (vectors - 1) // 2, *top, 1), nn.Sigmoid())

    def forward(self, dense: Tensor, offsets: Tensor, *indices: Tensor) -> Tensor:
        x = self.bottom(dense)
        bags = [table(i, offsets[k]) for k, (table, i) in enumerate(zip(self.tables, indices, strict=True))]
        vectors = torch.cat([x, *bags], dim=1).unflatten(1, (len(bags) + 1, x.shape[1]))
        products = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1)
        return self.top(torch.cat([x, products.index_select(1, self.pairs)], dim=1))


class TextClassifier(nn.Module):
    """A linear classifier over the mean vector of a text's words and of their n-grams, hashed into buckets.

    Inputs: indices int64 [N] (see `features`) and offsets int64 [B]. Output: logits, float32 [B, classes].
    """

    def __init__(self, words: int = 2000, buckets: int = 3000, dim: int = 24, classes: int = 5) -> None:
        super().__init__()
        self.words, self.buckets = words, buckets
        self.bag = nn.EmbeddingBag(words + buckets, dim, mode="mean")
        self.linear = nn.Linear(dim, classes)

    def forward(self, indices: Tensor, offsets: Tensor) -> Tensor:
        return self.linear(self.bag(indices, offsets))

    def features(self, text: str) -> list[int]:
        """The rows of a text: its words', then those of the pairs of words and of the 3-grams of characters."""

        def hashed(part: str, count: int) -> int:
            return zlib.crc32(part.encode()) % count

        words = text.lower().split()
        parts = [f"{a} {b}" for a, b in itertools.pairwise(words)]
        parts += [f"<{w}>"[k : k + 3] for w in words for k in range(len(w))]
        return [hashed(w, self.words) for w in words] + [self.words + hashed(p, self.buckets) for p in parts]


class TwoTower(nn.Module):
    """A retriever: the cosine between a user, by the items seen, and an item, by its weighted words.

    Inputs: history int64 [N] and history_offsets int64 [U]; words int64 [M], word_offsets int64 [I] and word_weights
    float32 [M]. Output: scores float32 [U, I].
    """

    def __init__(self, items: int = 1500, words: int = 2500, dim: int = 32) -> None:
        super().__init__()
        self.history = nn.EmbeddingBag(items, dim, mode="mean")
        self.words = nn.EmbeddingBag(words, dim, mode="sum")
        self.user = _layers((dim, 48, 16), None)
        self.item = _layers((dim, 48, 16), None)

    def forward(
        self, history: Tensor, history_offsets: Tensor, words: Tensor, word_offsets: Tensor, word_weights: Tensor
    ) -> Tensor:
        user = self.user(self.history(history, history_offsets))
        item = self.item(self.words(words, word_offsets, per_sample_weights=word_weights))
        return nn.functional.normalize(user, dim=1) @ nn.functional.normalize(item, dim=1).T


class Network(NamedTuple):
    """A module, and how it is exported and called."""

    build: Callable[[], nn.Module]
    #: The arguments, for a module and the lengths of bags; the second lengths are those of items, the first of users.
    arguments: Callable[[Any, Sequence[int], Sequence[int]], tuple[Tensor, ...]]
    inputs: tuple[str, ...]
    output: str
    #: The symbols of the inputs' sizes; equal sizes have the same symbol.
    sizes: tuple[dict[int, str], ...]


def bags(random: np.random.Generator, rows: int, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Random indices and the offsets of bags of these lengths."""
    starts = np.cumsum([0, *lengths])[: len(lengths)]
    return torch.from_numpy(random.integers(0, rows, sum(lengths))), torch.from_numpy(starts.astype(np.int64))


def _dlrm_arguments(module: Any, lengths: Sequence[int], others: Sequence[int]) -> tuple[Tensor, ...]:
    random = np.random.default_rng(len(lengths))
    tables = [table.num_embeddings for table in module.tables]
    # Each table has the lengths in another order, so that other bags are empty.
    made = [bags(random, n, np.roll(lengths, k).tolist()) for k, n in enumerate(tables)]
    dense = torch.from_numpy(random.standard_normal((len(lengths), 13)).astype(np.float32))
    return dense, torch.stack([offsets for _, offsets in made]), *(indices for indices, _ in made)


def _text_arguments(module: Any, lengths: Sequence[int], others: Sequence[int]) -> tuple[Tensor, ...]:
    return bags(np.random.default_rng(len(lengths)), module.words + module.buckets, lengths)


def _tower_arguments(module: Any, lengths: Sequence[int], others: Sequence[int]) -> tuple[Tensor, ...]:
    random = np.random.default_rng(len(lengths))
    history = bags(random, module.history.num_embeddings, lengths)
    words = bags(random, module.words.num_embeddings, others)
    return *history, *words, torch.from_numpy(random.random(sum(others), np.float32))


_TABLES = range(len(ROWS))
NETWORKS: dict[str, Network] = {
    "dlrm": Network(
        DLRM,
        _dlrm_arguments,
        ("dense", "offsets", *(f"indices_{k}" for k in _TABLES)),
        "click",
        ({0: "batch"}, {1: "batch"}, *({0: f"count_{k}"} for k in _TABLES)),
    ),
    "text_classifier": Network(
        TextClassifier, _text_arguments, ("indices", "offsets"), "logits", ({0: "words"}, {0: "texts"})
    ),
    "two_tower": Network(
        TwoTower,
        _tower_arguments,
        ("history", "history_offsets", "words", "word_offsets", "word_weights"),
        "scores",
        ({0: "clicks"}, {0: "users"}, {0: "tokens"}, {0: "items"}, {0: "tokens"}),
    ),
}
#: The lengths of bags in the example inputs of an export. No size may become a constant of the file.
EXAMPLE = ((3, 1, 2, 4), (2, 3, 1))


def made(name: str) -> tuple[Network, nn.Module]:
    """A network, and its module with seeded weights."""
    torch.manual_seed(0)
    network = NETWORKS[name]
    return network, network.build().eval()


def export(name: str, module: nn.Module, exporter: str, path: Path) -> None:
    """Write a network with the exporter "legacy", "dynamo" or "lucid"."""
    network = NETWORKS[name]
    arguments = network.arguments(module, *EXAMPLE)
    names = {"input_names": list(network.inputs), "output_names": [network.output]}
    if exporter == "lucid":
        dynamic = _dynamic(network, module)
        lucid_onnx.torch.export(module, arguments, path, dynamic_shapes=dynamic, **names)  # type: ignore[arg-type]
    elif exporter == "dynamo":
        dynamic = _dynamic(network, module)
        torch.onnx.export(
            module, arguments, path, dynamo=True, external_data=False, verbose=False, dynamic_shapes=dynamic, **names
        )
    else:
        axes = dict(zip(network.inputs, network.sizes, strict=True))
        torch.onnx.export(module, arguments, str(path), dynamo=False, opset_version=17, dynamic_axes=axes, **names)


def _dynamic(network: Network, module: nn.Module) -> Any:
    """The dynamic sizes, with one entry for each parameter of forward; ``*indices`` is one parameter."""
    if isinstance(module, DLRM):
        return network.sizes[0], network.sizes[1], network.sizes[2:]
    return network.sizes


def write(folder: Path) -> Iterator[Path]:
    """Write every network with every exporter, and fused."""
    for name in NETWORKS:
        _, module = made(name)
        for exporter in ("legacy", "dynamo", "lucid"):
            path = folder / (f"{name}.onnx" if exporter == "lucid" else f"{name}_{exporter}.onnx")
            export(name, module, exporter, path)
            yield path
            if exporter != "lucid":
                fused = path.with_name(f"{path.stem}_fused.onnx")
                lucid_onnx.fuse(path, fused)
                yield fused


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    logging.disable(logging.WARNING)  # torch's, about its own exporters
    folder.mkdir(parents=True, exist_ok=True)
    for written in write(folder):
        print(f"{written}: {written.stat().st_size / 2**20:.2f} MiB", flush=True)
