"""A search through Python's own documentation, pooled by one model in all of its forms.

The text is `pydoc_data.topics`, which comes with Python. Every topic, every passage of it and every query is a bag of
word ids, weighted by how frequent a word is there and how rare it is elsewhere::

    vector(text) = sum over its words of  weight(word) * table[id(word)]       (the model, mode "sum")
    score        = cosine of vector(query) and vector(topic)

A word's id is a hash of its stem, so that the model needs no vocabulary. Its row is its position in the `DIM` main
directions of the passages (latent semantic indexing), so that words with similar neighbours are close. The row of a
word that the text does not have is zero. Nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import statistics
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from lucid_onnx import reference
from lucid_onnx.builder import build_model, save, to_form
from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.runtime import info

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_OUTPUT = "lucid-onnx-demo.onnx"
QUERIES = (
    "how do I leave a loop early",
    "call a function with keyword arguments",
    "which numbers have an imaginary part",
)
#: The largest difference between two forms, relative to the sum of the magnitudes of the terms.
TOLERANCE = 1e-6
NUM_IDS = 2**16
DIM = 256
_HITS = 3
_PASSAGE = 300  # characters, at least
_SNIPPET = 150  # characters, at most
_RUNS = 9

# Words of questions, without `for`, `in`, `is` and `with`, which Python has topics about.
_FILLERS = (
    "a an and are be can could do does how i it its me my of or own should that the there this to "
    "what when which who why you your"
)


class DemoError(Exception):
    """There is no text to search, or a query has none of its words."""


@dataclasses.dataclass(frozen=True)
class Bags:
    """What the model takes: ``indices`` int64 [N], ``offsets`` int64 [B], ``per_sample_weights`` float32 [N]."""

    indices: np.ndarray
    offsets: np.ndarray
    per_sample_weights: np.ndarray

    def feeds(self) -> dict[str, np.ndarray]:
        """By the names of the model's inputs."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclasses.dataclass(frozen=True)
class Text:
    """The documents, and the table learnt from them.

    The first ``len(topics)`` bags are the topics, the others the passages; ``owners[i]`` is passage i's topic.
    """

    topics: tuple[str, ...]
    passages: tuple[str, ...]
    owners: np.ndarray
    bags: Bags
    rarity: dict[int, float]
    table: np.ndarray


@dataclasses.dataclass(frozen=True)
class Hit:
    """A topic that answers a query, with its best sentence."""

    topic: str
    score: float
    snippet: str


@dataclasses.dataclass(frozen=True)
class Form:
    """One way in which the bags were pooled.

    ``ran`` counts nodes by (operator, provider) in onnxruntime's profile; None for NumPy. ``milliseconds`` is the
    median over ``runs`` runs.
    """

    name: str
    ran: dict[tuple[str, str], int] | None
    milliseconds: float
    runs: int


@dataclasses.dataclass(frozen=True)
class Result:
    """The results of a demo. ``library`` is None if the native kernels are not installed."""

    output: Path
    num_bags: int
    num_indices: int
    library: info.Library | None
    hits: dict[str, tuple[Hit, ...]]
    forms: tuple[Form, ...]
    difference: float
    relative_difference: float

    @property
    def agrees(self) -> bool:
        """Whether all forms are equal within `TOLERANCE`."""
        return self.relative_difference <= TOLERANCE


def word_ids(text: str) -> list[int]:
    """The ids of a text's words in [0, NUM_IDS), in order: of stems of six letters, without the fillers."""
    fillers = set(_FILLERS.split())
    words = (word for word in re.findall(r"[a-z]+", text.lower()) if word not in fillers)
    return [zlib.crc32(_stem(word).encode()) % NUM_IDS for word in words]


def _stem(word: str) -> str:
    if len(word) > 3 and word.endswith("s") and not word.endswith("ss"):
        word = word[:-1]
    return word[:6]


def read() -> Text:
    """The topics of Python's documentation, and the table learnt from them.

    Raises:
        DemoError: this Python comes without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DemoError("this Python comes without its documentation, pydoc_data.topics") from error

    passages, owners = [], []
    for number, text in enumerate(topics.values()):
        for passage in _passages(text):
            passages.append(passage)
            owners.append(number)
    titles = [name.replace("-", " ") for name in topics]
    topic_counts = [Counter(word_ids(f"{title} {text}")) for title, text in zip(titles, topics.values(), strict=True)]
    counts = [Counter(word_ids(f"{titles[o]} {text}")) for o, text in zip(owners, passages, strict=True)]
    spread = Counter(i for count in counts for i in count)
    rarity = {i: math.log(len(counts) / in_passages) for i, in_passages in spread.items()}
    return Text(
        topics=tuple(topics),
        passages=tuple(passages),
        owners=np.array(owners),
        bags=_bags([*topic_counts, *counts], rarity),
        rarity=rarity,
        table=_learn(_bags(counts, rarity)),
    )


def query_bags(queries: Sequence[str], rarity: dict[int, float]) -> Bags:
    """A bag per query.

    Raises:
        DemoError: naming the first query that has no word of the text.
    """
    counts = [Counter(word_ids(query)) for query in queries]
    for query, count in zip(queries, counts, strict=True):
        if not any(rarity.get(i) for i in count):
            raise DemoError(f"query {query!r}: the text has none of its words")
    return _bags(counts, rarity)


def _passages(text: str) -> list[str]:
    """Paragraphs, a line each, taken together until they have `_PASSAGE` characters."""
    found = [""]
    for paragraph in re.split(r"\n\s*\n", text):
        if len(found[-1]) >= _PASSAGE:
            found.append("")
        plain = re.sub(r"([*=~^-])\1{3,}", " ", paragraph)  # the lines under headings
        found[-1] += " ".join(plain.split()) + "\n"
    return found


def _bags(counts: Sequence[Counter[int]], rarity: dict[int, float]) -> Bags:
    """Bags of distinct ids, each with the weight (1 + log count) * rarity."""
    known = [[(i, n) for i, n in count.items() if i in rarity] for count in counts]
    lengths = [len(bag) for bag in known]
    return Bags(
        indices=np.array([i for bag in known for i, _ in bag], np.int64),
        offsets=np.cumsum([0, *lengths[:-1]], dtype=np.int64),
        per_sample_weights=np.array([(1 + math.log(n)) * rarity[i] for bag in known for i, n in bag], np.float32),
    )


def _learn(passages: Bags) -> np.ndarray:
    """Rows for the words, float32 [NUM_IDS, DIM]: right singular vectors of the passages x words matrix."""
    ids, columns = np.unique(passages.indices, return_inverse=True)
    lengths = np.diff(passages.offsets, append=len(passages.indices))
    matrix = np.zeros((len(lengths), len(ids)), np.float32)
    matrix[np.repeat(np.arange(len(lengths)), lengths), columns] = passages.per_sample_weights
    norms = np.linalg.norm(matrix, axis=1, keepdims=True)
    matrix /= np.where(norms > 0, norms, 1)
    values, left = np.linalg.eigh(matrix @ matrix.T)  # the singular values squared, ascending
    rows = matrix.T @ (left[:, -DIM:] / np.sqrt(values[-DIM:]))
    # Words that always occur together would have equal rows, whose sum rounds the same way at every step.
    rows *= 1 + 0.01 * np.random.default_rng(0).standard_normal(rows.shape, np.float32)
    table = np.zeros((NUM_IDS, DIM), np.float32)
    table[ids] = rows
    return table


def run(output: str | os.PathLike[str], queries: Sequence[str] = QUERIES) -> Result:
    """Write the model to ``output``, pool with each of its forms, and answer the queries.

    Raises:
        DemoError: see `read` and `query_bags`; nothing is written then.
        ImportError: onnxruntime is not installed.
        OSError: the file cannot be written, or the library cannot be loaded.
        ValueError: LUCID_FORCE_ISA names an instruction set that this machine lacks.
    """
    library = info.library()
    text = read()
    asked = query_bags(queries, text.rarity)
    model = build_model(text.table, mode="sum", per_sample_weights=True)
    save(model, output)

    portable, standard = os.fspath(output), to_form(model, "standard")
    sources: list[tuple[str, str | onnx.ModelProto, bool]] = [
        *([("the file, native kernel", portable, True)] if library else []),
        ("the file, without the library", portable, False),
        ("the standard form of it", standard, False),
    ]
    forms, pooled, answers = [], [], []
    for name, source, native in sources:
        pool = _pooler(source, native)
        pooled.append(pool(text.bags))
        answers.append(pool(asked))
        milliseconds, runs = _median(pool, text.bags)
        forms.append(Form(name, _profile(source, native, text.bags), milliseconds, runs))

    def in_numpy(bags: Bags) -> np.ndarray:
        return _reference(text.table, bags)

    pooled.append(in_numpy(text.bags))
    answers.append(in_numpy(asked))
    forms.append(Form("NumPy reference", None, *_median(in_numpy, text.bags)))

    magnitudes = np.abs(text.table)
    differences = [_difference(results, magnitudes, bags) for results, bags in ((pooled, text.bags), (answers, asked))]
    return Result(
        output=Path(output),
        num_bags=len(text.bags.offsets),
        num_indices=len(text.bags.indices),
        library=library,
        hits=_answer(text, queries, pooled[0], answers[0]),
        forms=tuple(forms),
        difference=float(np.max([absolute for absolute, _ in differences])),
        relative_difference=float(np.max([relative for _, relative in differences])),
    )


def _session(source: str | onnx.ModelProto, native: bool, profile: str | None = None) -> Any:
    import onnxruntime

    from lucid_onnx.runtime.session import InferenceSession

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    return InferenceSession(source, native=native, session_options=options)


def _pooler(source: str | onnx.ModelProto, native: bool) -> Callable[[Bags], np.ndarray]:
    session = _session(source, native)
    return lambda bags: np.asarray(session.run(["output"], bags.feeds())[0])


def _reference(table: np.ndarray, bags: Bags) -> np.ndarray:
    return reference.embedding_bag(
        bags.indices, table, bags.offsets, mode="sum", per_sample_weights=bags.per_sample_weights
    )


def _median(pool: Callable[[Bags], np.ndarray], bags: Bags) -> tuple[float, int]:
    """The milliseconds of the median run, and the number of runs: `_RUNS`, or fewer if they take more than a second."""
    times: list[float] = []
    while len(times) < _RUNS and sum(times) < 1:
        begin = time.perf_counter()
        pool(bags)
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e3, len(times)


def _profile(source: str | onnx.ModelProto, native: bool, bags: Bags) -> dict[tuple[str, str], int]:
    """How many nodes of each operator ran on which provider, from onnxruntime's own profile of one run."""
    with tempfile.TemporaryDirectory(prefix="lucid_onnx") as folder:
        session = _session(source, native, os.path.join(folder, "profile"))
        session.run(["output"], bags.feeds())
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    ran = {
        event["name"]: (event["args"]["op_name"], event["args"]["provider"])
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    }
    return dict(Counter(ran.values()))


def _difference(results: Sequence[np.ndarray], magnitudes: np.ndarray, bags: Bags) -> tuple[float, float]:
    """The largest difference between any two results, and as a part of the sum of magnitudes; NaN if one has NaN."""
    scale = _reference(magnitudes, dataclasses.replace(bags, per_sample_weights=np.abs(bags.per_sample_weights)))
    stacked = np.stack(results)
    spread = stacked.max(axis=0) - stacked.min(axis=0)
    return float(spread.max()), float((spread / np.where(scale > 0, scale, 1)).max())


def _answer(text: Text, queries: Sequence[str], pooled: np.ndarray, answers: np.ndarray) -> dict[str, tuple[Hit, ...]]:
    documents, wanted = _unit(pooled), _unit(answers)
    scores = wanted @ documents.T
    hits = {}
    for query, score in zip(queries, scores, strict=True):
        by_topic, by_passage = score[: len(text.topics)], score[len(text.topics) :]
        found = []
        for topic in np.argsort(-by_topic, kind="stable")[:_HITS]:
            own = np.flatnonzero(text.owners == topic)
            best = own[by_passage[own].argmax()]
            snippet = _snippet(text.passages[best], query, text.rarity)
            found.append(Hit(text.topics[topic], float(by_topic[topic]), snippet))
        hits[query] = tuple(found)
    return hits


def _unit(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)


def _snippet(passage: str, query: str, rarity: dict[int, float]) -> str:
    """The sentence of a passage that has most of the query; a grammar rule only if there is no other sentence."""
    wanted = set(word_ids(query))

    def rank(sentence: str) -> tuple[bool, float]:
        return "::=" not in sentence, sum(rarity.get(i, 0) for i in wanted & set(word_ids(sentence)))

    best = max(re.split(r"(?<=[.;!?]) |\n", passage.rstrip()), key=rank)
    return best if len(best) <= _SNIPPET else best[: _SNIPPET - 4].rsplit(" ", 1)[0] + " ..."


def show(result: Result, console: Console) -> None:
    """Print a result."""
    from rich.table import Table
    from rich.text import Text as Line

    def say(text: str = "", style: str = "") -> None:
        console.print(Line(text, style), soft_wrap=True)

    say(f"{result.num_bags} bags of Python's documentation, {result.num_indices} words, table [{NUM_IDS}, {DIM}]")
    say(f"wrote {result.output} ({result.output.stat().st_size / 2**20:.1f} MiB)")
    for query, hits in result.hits.items():
        say()
        say(query, "bold")
        for hit in hits:
            say(f"  {hit.score:.2f}  {hit.topic:<16} {hit.snippet}")
    say()
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("form")
    table.add_column("ran, by onnxruntime's profile")
    table.add_column("median ms", justify="right")
    first = "the native kernel" if result.library else "the file"
    table.add_column(f"as long as {first}", justify="right")
    for form in result.forms:
        ratio = form.milliseconds / result.forms[0].milliseconds
        table.add_row(form.name, _ran(form.ran), f"{form.milliseconds:.2f}", f"{ratio:.1f}x")
    console.print(table)
    say(
        f"These bags have {result.num_indices / result.num_bags:.0f} weighted rows of {DIM} columns on average. Other "
        "bags have other ratios, and torch is not compared here: see docs/benchmarks.md."
    )
    if result.library is None:
        say("native kernel: not installed; the same file runs as standard operators")
    else:
        say(f"native kernel: {result.library.active}{', forced by ' + info.FORCE_ISA if result.library.forced else ''}")
    say(
        f"largest difference between forms: {result.difference:.2g}, "
        f"{result.relative_difference:.2g} of the sum of magnitudes (allowed: {TOLERANCE:g})",
        "" if result.agrees else "bold red",
    )


def _ran(nodes: dict[tuple[str, str], int] | None) -> str:
    if nodes is None:
        return "-"
    providers = ", ".join(sorted({provider.removesuffix("ExecutionProvider") for _, provider in nodes}))
    ours = [f"{count} x {op}" for (op, _), count in nodes.items() if op in spec.VARIANTS]
    others = sum(count for (op, _), count in nodes.items() if op not in spec.VARIANTS)
    return f"{', '.join([*ours, *([f'{others} standard nodes'] if others else [])])} ({providers})"
