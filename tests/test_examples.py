"""The example that trains word vectors: its loss falls, its picture is one, and it needs no library."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lucid_testing import scripts

pytest.importorskip("onnxruntime")
pytest.importorskip("rich", reason="rich is not installed")

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "word_vectors.py"


@pytest.fixture(scope="module")
def example() -> Any:
    return scripts.load(EXAMPLE)


@pytest.fixture(scope="module")
def text(example: Any) -> Any:
    from pydoc_data.topics import topics

    return example.text_of(list(topics.values())[:40])


def test_the_loss_is_the_same_without_the_library(native: None, example: Any, text: Any) -> None:
    batches = list(example.batches(text, 1, np.random.default_rng(0)))[:8]
    assert len(batches) == 8
    trainers = {way: example.trainer(text, native=way) for way in (True, False)}
    losses = {way: [trainer.step(example.LEARNING_RATE, **b) for b in batches] for way, trainer in trainers.items()}
    # log 2 for every pair, as the words' other rows are zeros: nothing is known yet
    assert losses[True][0] == pytest.approx(np.log(2), abs=2e-5)  # a float32 sum, one term after another
    np.testing.assert_allclose(losses[True], losses[False], rtol=0, atol=1e-5)
    assert losses[True][-1] < 0.95 * losses[True][0]


def test_batches_are_words_of_one_passage(example: Any) -> None:
    """With passages that have no word in common, no bag may have words of another's passage."""
    passages = tuple(np.arange(30 * k, 30 * k + 30) for k in range(80))
    # No word is so frequent that it is left out.
    text = example.Text(tuple(f"w{i}" for i in range(2400)), np.full(2400, 9), passages)
    (batch, *_) = example.batches(text, 1, np.random.default_rng(0))
    owners = np.repeat(np.arange(example.BATCH), np.diff(batch["offsets"], append=len(batch["indices"])))
    centres = batch["targets"][owners, 0]
    assert (batch["indices"] // 30 == centres // 30).all()
    distance = np.abs(batch["indices"] - centres)
    assert distance.min() == 1
    assert distance.max() == example.WINDOW
    assert (batch["labels"].sum(1) == 1).all()


def test_the_whole_of_it(
    example: Any, text: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(example, "read", lambda: text)
    output = tmp_path / "loss.svg"
    assert example.main(["--output", str(output), "--epochs", "2", "--no-library"]) == 0
    picture = ElementTree.parse(output).getroot()
    (line,) = picture.iter("{http://www.w3.org/2000/svg}polyline")
    heights = [float(point.split(",")[1]) for point in line.attrib["points"].split()]
    assert len(heights) > 10
    assert heights[-1] > heights[0] + 100  # down the page
    assert [path.name for path in tmp_path.iterdir()] == ["loss.svg"]
    printed = capsys.readouterr().out
    assert "standard operators" in printed
    assert "at last" in printed
    with pytest.raises(SystemExit):
        example.main(["--epochs", "0"])


def test_neighbours_make_the_smallest_angles(example: Any) -> None:
    text = example.Text(("a", "b", "c", "d"), np.ones(4), ())
    table = np.array([[1.0, 0.0], [-2.0, 0.1], [9.0, 1.0], [0.1, 0.1]])
    assert example.neighbours(text, table, "a", 2) == ["c", "d"]
    with pytest.raises(ValueError):
        example.neighbours(text, table, "e")
