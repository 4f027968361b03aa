"""Word vectors from Python's own documentation, trained with ONNX Runtime alone.

    python examples/word_vectors.py

This is CBOW with negative sampling. The words around a word are a bag. Their mean should score high with that word and
low with random words::

    bag    = mean of table[words around]                       (ai.lucid::EmbeddingBag)
    loss   = -log sigmoid(bag . other[word]) - sum over the drawn of log sigmoid(-bag . other[drawn])
    update = rowwise Adagrad of the rows of the batch           (ai.lucid::EmbeddingBagSparseGrad, ScatterND)

One graph does all of that (`lucid_onnx.build_training_model`); Python makes the batches. The text is pydoc_data.topics
and the docstrings of the standard library. The loss is plotted to an SVG file, and the neighbours of some words are
printed. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import os
import re
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import lucid_onnx
from lucid_onnx.builder import Replacing

DIM = 64
WINDOW = 4  # words to each side, at most
NEGATIVES = 8
BATCH = 1024
EPOCHS = 15
LEARNING_RATE = 0.15
_LEAST = 8  # rarer words are dropped
_FREQUENT = 5e-4  # words with a larger share of the text are dropped at random
ASKED = ("integer", "string", "exception", "file", "class", "loop", "thread", "socket", "key", "left", "month")


@dataclasses.dataclass(frozen=True)
class Text:
    """``words`` by id, most frequent first, their ``counts`` [V], and the ids of each of the ``passages``."""

    words: tuple[str, ...]
    counts: np.ndarray
    passages: tuple[np.ndarray, ...]


def read() -> Text:
    """Paragraphs of the topics of Python's documentation, and of the docstrings of its top-level modules.

    Raises:
        ImportError: this Python comes without pydoc_data.topics.
    """
    from pydoc_data.topics import topics

    texts = list(topics.values())
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        tree = ast.parse(path.read_bytes())
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts += [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
    return text_of(texts)


def text_of(texts: Sequence[str]) -> Text:
    """The words of texts in lower case, of those that occur `_LEAST` times or more."""
    passages = [re.findall(r"[a-z]+", passage.lower()) for text in texts for passage in re.split(r"\n\s*\n", text)]
    counts = Counter(word for passage in passages for word in passage if len(word) > 1)
    kept = [(word, count) for word, count in counts.most_common() if count >= _LEAST]
    number = {word: i for i, (word, _) in enumerate(kept)}
    known = ([number[word] for word in passage if word in number] for passage in passages)
    return Text(
        words=tuple(word for word, _ in kept),
        counts=np.array([count for _, count in kept]),
        passages=tuple(np.array(ids) for ids in known if len(ids) > 1),
    )


def batches(text: Text, epochs: int, random: np.random.Generator) -> Iterator[dict[str, np.ndarray]]:
    """The batches of steps, of `BATCH` bags each. Each epoch drops other frequent words."""
    share = text.counts / text.counts.sum()
    keep = np.minimum(1, np.sqrt(_FREQUENT / share))
    drawn = text.counts**0.75 / (text.counts**0.75).sum()
    for _ in range(epochs):
        kept = [passage[random.random(len(passage)) < keep[passage]] for passage in text.passages]
        kept = [passage for passage in kept if len(passage) > 1]
        # The words around position i of the text, [n, 2 * WINDOW], and which of them are in its passage.
        words, owner = np.concatenate(kept), np.repeat(np.arange(len(kept)), [len(passage) for passage in kept])
        steps = np.array([d for d in range(-WINDOW, WINDOW + 1) if d])
        at = np.arange(len(words))[:, None] + steps
        inside = (at >= 0) & (at < len(words))
        at = at.clip(0, len(words) - 1)
        inside &= owner[at] == owner[:, None]
        inside &= np.abs(steps) <= random.integers(1, WINDOW + 1, len(words))[:, None]  # near words more often
        order = random.permutation(len(words))
        for begin in range(0, len(words) - BATCH + 1, BATCH):
            chosen = order[begin : begin + BATCH]
            around = inside[chosen]
            targets = np.empty((BATCH, 1 + NEGATIVES), np.int64)
            targets[:, 0] = words[chosen]
            targets[:, 1:] = random.choice(len(text.words), (BATCH, NEGATIVES), p=drawn)
            labels = np.zeros(targets.shape, np.float32)
            labels[:, 0] = 1
            yield {
                "indices": words[at[chosen][around]],
                "offsets": np.cumsum(np.r_[0, around.sum(1)[:-1]]),
                "targets": targets,
                "labels": labels,
            }


def trainer(text: Text, *, native: bool, seed: int = 0) -> lucid_onnx.Trainer:
    """The training step with its initial tables: small random rows for the words in a bag, zeros for the targets."""
    random = np.random.default_rng(seed)
    shape = len(text.words), DIM
    tables = {
        "weight": (random.random(shape, np.float32) - np.float32(0.5)) / np.float32(DIM),
        "target_weight": np.zeros(shape, np.float32),
        "state": np.zeros(shape[0], np.float32),
        "target_state": np.zeros(shape[0], np.float32),
    }
    model = lucid_onnx.build_training_model(loss="logistic", optimizer="rowwise_adagrad", mode="mean")
    return lucid_onnx.Trainer(model, tables, native=native)


def neighbours(text: Text, table: np.ndarray, word: str, count: int = 6) -> list[str]:
    """The words whose rows have the largest cosines with a word's.

    Raises:
        ValueError: the text has no such word.
    """
    row = table[text.words.index(word)]
    cosines = table @ row / (np.linalg.norm(table, axis=1) * np.linalg.norm(row))
    return [text.words[i] for i in np.argsort(-cosines)[1 : count + 1]]


def curve(losses: Sequence[float], every: int) -> str:
    """The losses as an SVG, each point a mean of ``every`` steps."""
    width, height, left, bottom = 640, 360, 60, 40
    means = [float(np.mean(losses[i : i + every])) for i in range(0, len(losses), every)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0

    def place(i: int, value: float) -> str:
        x = left + (width - left - 20) * (i + 0.5) / len(means)
        return f"{x:.1f},{20 + (height - bottom - 20) * (high - value) / span:.1f}"

    line = " ".join(place(i, value) for i, value in enumerate(means))
    ticks = [high, (high + low) / 2, low]
    marks = "".join(
        f'<text x="{left - 8}" y="{20 + (height - bottom - 20) * k / 2 + 4:.1f}" text-anchor="end">{tick:.3f}</text>'
        for k, tick in enumerate(ticks)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif"'
        f' font-size="12"><rect width="{width}" height="{height}" fill="white"/>{marks}'
        f'<path d="M{left} 20V{height - bottom}H{width - 20}" fill="none" stroke="gray"/>'
        f'<polyline points="{line}" fill="none" stroke="steelblue" stroke-width="2"/>'
        f'<text x="{(left + width) / 2}" y="{height - 12}" text-anchor="middle">{len(losses)} steps: loss, mean of'
        f" {every} at a time</text></svg>\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train word vectors with ONNX Runtime alone.")
    parser.add_argument("--output", type=Path, default=Path("word-vectors-loss.svg"), help="the plot of the loss")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="passes over the text")
    parser.add_argument("--no-library", action="store_true", help="run standard operators, not our kernels")
    given = parser.parse_args(arguments)
    if given.epochs < 1:
        parser.error(f"--epochs {given.epochs} is below 1")
    console = Console()
    begin = time.perf_counter()
    text = read()
    total = sum(map(len, text.passages))
    console.print(f"{total} words, {len(text.words)} of them different, in {len(text.passages)} passages")
    step = trainer(text, native=not given.no_library)
    console.print(f"a step runs {'standard operators' if given.no_library else 'on our kernels'}")
    losses: list[float] = []
    columns = (
        TextColumn("loss {task.fields[loss]:.4f}"),
        BarColumn(),
        TextColumn("{task.completed:.0f} steps"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=None, loss=np.nan)
        for batch in batches(text, given.epochs, np.random.default_rng(1)):
            losses.append(step.step(LEARNING_RATE, **batch))
            if len(losses) % 20 == 0:
                progress.update(task, completed=len(losses), loss=float(np.mean(losses[-100:])))
    every = max(1, len(losses) // 100)
    with Replacing(given.output) as files:
        files.open(given.output.name).write(curve(losses, every).encode())
    console.print(
        f"{len(losses)} steps in {time.perf_counter() - begin:.0f} s: loss {np.mean(losses[:20]):.4f} at first,"
        f" {np.mean(losses[-100:]):.4f} at last; drawn to {os.fspath(given.output)}",
        soft_wrap=True,
    )
    for word in ASKED:
        if word in text.words:
            console.print(
                f"[bold]{word:<10}[/] {' '.join(neighbours(text, step.tables['weight'], word))}", soft_wrap=True
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
