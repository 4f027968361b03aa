"""Encode 10,000 texts by imported models and by the libraries that they are from, tokenizing aside and with it.

    pip install '.[cpu,text]' wordllama model2vec sentence-transformers tokenlearn-static-model
    python benchmarks/text.py

The texts are lines of Python's documentation. The answers are checked first; then the sides take turns, and medians are
reported. "Tokenizing aside" means that both are given ids: ours as arrays, theirs as what their tokenizer gave before.
What is not installed is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import lucid_onnx
from common import quiet_torch


class Side(NamedTuple):
    """A library: what it is from, its own call over texts, and the same over what it has tokenized before."""

    name: str
    source: Path
    encode: Callable[[Sequence[str]], np.ndarray]
    pool: Callable[[], np.ndarray]


def lines(count: int) -> list[str]:
    """Lines of Python's documentation, again from the first where they are too few."""
    from pydoc_data.topics import topics

    found = [line.strip() for text in topics.values() for line in text.split("\n") if len(line.split()) > 4]
    return (found * (count // len(found) + 1))[:count]


def has(*modules: str) -> bool:
    return all(importlib.util.find_spec(module) for module in modules)


def table_of(package: Path) -> tuple[np.ndarray, Any]:
    """wordllama's table in float32, and its tokenizer."""
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    table = load_file(package / "weights" / "l2_supercat_256.safetensors")["embedding.weight"]
    tokenizer = Tokenizer.from_file(str(package / "tokenizers" / "l2_supercat_tokenizer_config.json"))
    return table.astype(np.float32), tokenizer


def model2vec_side(name: str, model: Any, source: Path, texts: Sequence[str]) -> Side:
    batches = [model.tokenize(texts[begin : begin + 1024]) for begin in range(0, len(texts), 1024)]

    def pool() -> np.ndarray:
        waiting = iter(batches)
        tokenize, model.tokenize = model.tokenize, lambda sentences: next(waiting)
        try:
            return np.asarray(model.encode(texts, use_multiprocessing=False))
        finally:
            model.tokenize = tokenize

    return Side(name, source, model.encode, pool)


def sides(texts: Sequence[str], folder: Path) -> Iterator[Side]:
    if not has("wordllama"):
        return
    import wordllama

    package = Path(wordllama.__file__).parent
    llama = wordllama.WordLlama.load(cache_dir=package, disable_download=True)
    tokenized = [llama.tokenize(list(texts[begin : begin + 64])) for begin in range(0, len(texts), 64)]

    def pool() -> np.ndarray:
        waiting = iter(tokenized)
        tokenize, llama.tokenize = llama.tokenize, lambda chunk: next(waiting)
        try:
            return np.asarray(llama.embed(list(texts)))
        finally:
            llama.tokenize = tokenize

    weights = package / "weights" / "l2_supercat_256.safetensors"
    yield Side("wordllama, 256", weights, lambda given: np.asarray(llama.embed(list(given))), pool)
    table, tokenizer = table_of(package)
    if has("model2vec"):
        from model2vec import StaticModel

        model = StaticModel(table, tokenizer, normalize=True)
        model.save_pretrained(folder / "model2vec")
        yield model2vec_side("model2vec, 256", model, folder / "model2vec", texts)
        if has("static_model"):
            import static_model

            source = Path(static_model.__file__).parent / "model"
            small = StaticModel.from_pretrained(source)
            yield model2vec_side("model2vec, 64, int8 with mapping and weights", small, source, texts)
    if has("sentence_transformers"):
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import StaticEmbedding

        module = StaticEmbedding(tokenizer, embedding_weights=table)
        sentences = SentenceTransformer(modules=[module], device="cpu")
        sentences.save(str(folder / "static"))
        import torch

        batches = [module.preprocess(list(texts[begin : begin + 1024])) for begin in range(0, len(texts), 1024)]

        def bags() -> np.ndarray:
            with torch.no_grad():
                return np.concatenate([module(dict(batch))["sentence_embedding"].numpy() for batch in batches])

        call = lambda given: np.asarray(sentences.encode(list(given), batch_size=1024, show_progress_bar=False))  # noqa: E731
        yield Side("StaticEmbedding, 256", folder / "static", call, bags)


def medians(calls: Sequence[Callable[[], object]], turns: int) -> list[float]:
    """The median seconds of each call; they take turns."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(turns):
        for call, found in zip(calls, seconds, strict=True):
            begin = time.perf_counter()
            call()
            found.append(time.perf_counter() - begin)
    return [statistics.median(found) for found in seconds]


def row(side: Side, texts: Sequence[str], folder: Path, turns: int) -> str:
    """A library's row of the table."""
    encoders = []
    expected = side.encode(texts)
    close = {"rtol": 1e-5, "atol": 1e-5 * np.abs(expected).max()}
    np.testing.assert_allclose(side.pool(), expected, **close)
    for layout in ("ragged", "padded"):
        model = folder / f"{layout}.onnx"
        lucid_onnx.import_model(side.source, layout=layout).save(model)  # type: ignore[arg-type]
        encoders.append(lucid_onnx.TextEncoder(model))
        np.testing.assert_allclose(encoders[-1].encode(texts), expected, **close)
    ragged, padded = ([e.feeds(texts[i : i + 1024]) for i in range(0, len(texts), 1024)] for e in encoders)
    calls: list[Callable[[], object]] = [
        side.pool,
        lambda: [encoders[0].session.run(None, feed) for feed in ragged],
        lambda: [encoders[1].session.run(None, feed) for feed in padded],
    ]
    aside = medians(calls, turns)
    whole = medians([lambda: side.encode(texts), lambda: encoders[0].encode(texts)], turns)
    pool, flat, filled, theirs, ours = (seconds * 1e3 for seconds in (*aside, *whole))
    return (
        f"| {side.name} | {pool:.0f} | {flat:.1f}, {pool / flat:.1f}x | {filled:.1f}, {pool / filled:.1f}x "
        f"| {theirs:.0f} | {ours:.0f}, {theirs / ours:.1f}x |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=10_000)
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    quiet_torch()
    texts = lines(arguments.texts)
    print(
        f"{len(texts)} texts of {statistics.mean(len(t.split()) for t in texts):.1f} words; medians of milliseconds\n"
    )
    print("| | tokenizing aside: theirs | ours, ragged | ours, padded | with it: theirs | ours, ragged |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for side in sides(texts, folder):
            print(row(side, texts, folder, arguments.turns))


if __name__ == "__main__":
    main()
