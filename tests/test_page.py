"""The page of ``javascript/``: what it shows of a model's bags, what it says when it cannot, and its width."""

from __future__ import annotations

import http.client
import http.server
import json
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import lucid_onnx
from lucid_onnx.parity import html as parity_page
from lucid_onnx.parity import matrix, measure
from lucid_onnx.parity.adapters import javascript
from lucid_onnx.reference import embedding_bag
from lucid_onnx.sources.encoder import TextEncoder
from lucid_testing import sources
from lucid_testing.fasttext_files import SlowFastText, Table

DRIVER = Path(__file__).with_name("drive_page.mjs")
ROOT = Path(__file__).resolve().parents[1]
WEIGHT = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def commands() -> tuple[str, Path, str]:
    """Node, the folder, and Chromium."""
    try:
        node, worker, _, chromium = javascript.command("wasm-1")
    except javascript.NotHereError as error:
        pytest.skip(str(error))
    folder = Path(worker).parent
    if not (folder / "node_modules" / "playwright-core").is_dir():
        pytest.skip(f"the packages of {folder} are not installed: npm ci --ignore-scripts")
    return node, folder, chromium


@pytest.fixture(scope="module")
def url(commands: tuple[str, Path, str]) -> Iterator[str]:
    node, folder, _ = commands
    with subprocess.Popen([node, folder / "start.mjs", "0"], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
        server.kill()


#: Takes steps of drive_page.mjs on a page of their own, and gives their answers.
Drive = Callable[[Sequence[Sequence[Any]]], list[Any]]


@pytest.fixture(scope="module")
def drive(commands: tuple[str, Path, str], url: str) -> Iterator[Drive]:
    node, folder, chromium = commands
    with subprocess.Popen(
        [node, DRIVER, folder, chromium, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as driver:
        assert driver.stdin is not None
        assert driver.stdout is not None
        stdin, stdout = driver.stdin, driver.stdout

        def work(steps: Sequence[Sequence[Any]]) -> list[Any]:
            print(json.dumps([*steps, ["strange"]], default=str), file=stdin, flush=True)
            answer = stdout.readline()
            assert answer, "the driver died; what it said is on stderr"
            *answers, strange = json.loads(answer)
            assert strange == []  # neither exceptions in the page nor anything from elsewhere
            return answers

        yield work


def numbers(text: str, dtype: Any = np.int64) -> np.ndarray:
    return np.array([line.split(", ") for line in text.split("\n")]).astype(dtype)


def test_the_page_pools_what_the_reference_pools(drive: Drive, tmp_path: Path) -> None:
    weighted, last, two_d = tmp_path / "weighted.onnx", tmp_path / "last.onnx", tmp_path / "two_d.onnx"
    lucid_onnx.save(lucid_onnx.build_model(WEIGHT, mode="sum", per_sample_weights=True), weighted)
    long = np.tile(WEIGHT, (40, 1))  # a table that goes to a file of its own
    model = lucid_onnx.build_model(long, mode="mean", include_last_offset=True, form="standard")
    lucid_onnx.save(model, last, external_data=True)
    lucid_onnx.save(lucid_onnx.build_model(WEIGHT, mode="max", two_d=True, index_dtype="int32"), two_d)
    names = ("indices", "offsets", "per_sample_weights")
    typed = ("[9, 0, 3, 3, 1]", "0 2, 2", "0.25, 1, -2\n4 1e-1")
    show = [["press", "Run"], ["error"], ["table"]]
    # What is typed, as lists, lines and words.
    steps: list[Sequence[Any]] = [["files", [weighted]]]
    steps += [["fill", name, text] for name, text in zip(names, typed, strict=True)] + show
    # What is made up, for a model that does not say how many rows it has but in its table.
    steps += [["files", [last, f"{last}.data"]], ["value", "indices"], ["value", "offsets"], *show]
    steps += [["drop", [two_d]], ["value", "indices"], *show]
    # Neither width has anything beside the screen.
    steps += [["width", 420], ["width", 1280]]
    answers = drive(steps)
    *_, error, table = answers[:7]
    assert error is None
    assert table["caption"] == "output float32 [3, 4]"
    assert "WASM" in table["timing"]
    expected = embedding_bag(
        np.array([9, 0, 3, 3, 1]),
        WEIGHT,
        np.array([0, 2, 2]),
        mode="sum",
        per_sample_weights=np.array([0.25, 1, -2, 4, 0.1], np.float32),
    )
    # The page shows seven digits; the sums' order may be another, of at most three numbers of size 4.
    close = {"rtol": 1e-6, "atol": 4 * np.finfo(np.float32).eps}
    np.testing.assert_allclose(np.array(table["rows"], np.float64), expected, **close)

    _, indices, offsets, _, error, table = answers[7:13]
    assert error is None
    made, starts = numbers(indices)[0], numbers(offsets)[0]
    assert len(set(made)) > 1
    expected = embedding_bag(made, long, starts, mode="mean", include_last_offset=True)
    assert len(expected) > 1
    np.testing.assert_allclose(np.array(table["rows"], np.float64), expected, **close)

    _, indices, _, error, table, *widths = answers[13:]
    assert widths == [420, 1280]
    assert error is None
    expected = embedding_bag(numbers(indices, np.int32), WEIGHT, mode="max")
    np.testing.assert_allclose(np.array(table["rows"], np.float64), expected, **close)


def test_the_page_says_what_is_wrong(drive: Drive, tmp_path: Path) -> None:
    good, native, broken, outside = (tmp_path / f"{name}.onnx" for name in ("good", "native", "broken", "outside"))
    model = lucid_onnx.build_model(WEIGHT, mode="sum")
    lucid_onnx.save(model, good)
    lucid_onnx.save(lucid_onnx.to_form(model, "native"), native)
    broken.write_bytes(good.read_bytes()[:-100])
    lucid_onnx.save(lucid_onnx.build_model(np.tile(WEIGHT, (40, 1))), outside, external_data=True)
    files = {
        broken: "broken.onnx could not be loaded. This file is not an ONNX model, or only a part of one.",
        native: "native.onnx could not be loaded. This model is in the native form,",
        outside: "outside.onnx keeps tables in outside.onnx.data: choose both files together.",
    }
    inputs = {
        ("1, 2, 10", "0"): "indices: 10 (position 2) is outside the table, which has 10 rows.",
        ("1, 2, -1", "0"): "indices: -1 (position 2) is outside the table, which has 10 rows.",
        ("1, 2, 3", "1"): "offsets: the first is 1, and must be 0.",
        ("1, 2, 3", "0, 2, 1"): "offsets: 1 (position 2) is less than the one before it, 2.",
        ("1, 2, 3", "0, 4"): "offsets: 4 (position 1) is past the 3 indices.",
        ("1, 2.5", "0"): "indices: 2.5 (position 1) is not an integer",
        ("1, 2", "9223372036854775808"): "offsets: 9223372036854775808 (position 0) is outside int64",
        ("[1, 2", "0"): "indices: a closing bracket ] is missing",
        ("[[1, 2], [3]]", "0"): "indices: row 1 is [1] long, but the ones before it are [2]",
        ("[[1, 2]]", "0"): "indices: its shape is [1, 2], but the model takes [num_indices]",
    }
    steps: list[Sequence[Any]] = []
    for path in files:
        steps += [["files", [path]], ["error"]]
    steps += [["files", [good]], ["error"]]
    for indices, offsets in [*inputs, ("3, 4", "0")]:
        steps += [["fill", "indices", indices], ["fill", "offsets", offsets], ["press", "Run"], ["error"], ["table"]]
    answers = drive(steps)
    found = [answer for step, answer in zip(steps, answers, strict=True) if step[0] == "error"]
    for said, expected in zip(found, [*files.values(), None, *inputs.values(), None], strict=True):
        assert (said is None) if expected is None else (expected in said), (said, expected)
    tables = [answer for step, answer in zip(steps, answers, strict=True) if step[0] == "table"]
    assert tables[:-1] == [None] * len(inputs)  # numbers of an earlier run are not left standing
    np.testing.assert_allclose(np.array(tables[-1]["rows"], np.float64), WEIGHT[3:5].sum(0, keepdims=True), rtol=1e-6)


def test_the_page_warns_where_the_model_does_not_refuse(drive: Drive, tmp_path: Path) -> None:
    path = tmp_path / "rows.onnx"
    graph = helper.make_graph(
        [helper.make_node("Gather", ["weight", "indices"], ["output"])],  # ONNX's Gather takes -1 for the last row
        "rows",
        [helper.make_tensor_value_info("indices", TensorProto.INT64, ["num_indices"])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["num_bags", 4])],
        [numpy_helper.from_array(WEIGHT, "weight")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    show = [["press", "Run"], ["table"]]
    steps = [["files", [path]], ["fill", "indices", "9, -1"], *show, ["fill", "indices", "9"], *show]
    _, _, _, bad, _, _, good = drive(steps)
    assert bad["warning"].startswith("indices: -1 (position 1) is outside the table, which has 10 rows. This backend")
    assert good["warning"] is None


def test_the_page_says_which_part_of_an_output_it_shows(drive: Drive, tmp_path: Path) -> None:
    path, small = tmp_path / "wide.onnx", tmp_path / "small.onnx"
    weight = np.tile(WEIGHT, (1, 10))
    lucid_onnx.save(lucid_onnx.build_model(weight, mode="sum"), path)
    lucid_onnx.save(lucid_onnx.build_model(WEIGHT[:, :2], mode="sum"), small)
    bags = ", ".join(str(k) for k in range(1234))
    fill = [["fill", "indices", ", ".join(["3"] * 1234)], ["fill", "offsets", bags]]
    fewer = [["fill", "indices", "3, 3"], ["fill", "offsets", "0, 1"]]
    show = [["press", "Run"], ["table"]]
    steps = [["width", 400], ["files", [path]], *fill, *show, *fewer, *show, ["files", [small]], *show]
    many, wide, whole = (a for step, a in zip(steps, drive(steps), strict=True) if step[0] == "table")
    assert (len(many["rows"]), len(many["rows"][0])) == (20, 12)
    assert many["cut"] == "Showing the first 20 of 1,234 rows and the first 12 of 40 columns."
    assert many["sideways"] == "Scroll the table sideways to see all of these columns."
    assert wide["cut"] == "Showing the first 12 of 40 columns."
    assert (whole["cut"], whole["sideways"]) == (None, None)
    np.testing.assert_allclose(np.array(wide["rows"], np.float64), weight[[3, 3], :12], rtol=1e-6)


def test_nothing_sticks_out_of_a_narrow_window(drive: Drive, tmp_path: Path) -> None:
    path = tmp_path / f"{'a_long_name_' * 12}.onnx"
    model = lucid_onnx.build_model(np.tile(WEIGHT, (1, 10)), mode="sum", per_sample_weights=True)
    lucid_onnx.save(model, path)
    for width in (320, 400, 1280):
        look = [["width", width], ["outside"]]
        bad = [["fill", "indices", "9" * 60], ["press", "Run"], *look]
        answers = drive([*look, ["files", [path]], *look, ["press", "Run"], *look, ["table"], *bad, ["error"]])
        assert [answer for answer in answers if isinstance(answer, int)] == [width] * 4
        assert [answer for answer in answers if isinstance(answer, list)] == [[]] * 4
        assert any(isinstance(answer, dict) for answer in answers)  # a table was there
        assert "9" * 60 in answers[-1]


def test_the_example_runs_by_one_click(drive: Drive, tmp_path: Path) -> None:
    names = ("history", "history_offsets", "words", "word_offsets", "word_weights")
    other = tmp_path / "other.onnx"
    lucid_onnx.save(lucid_onnx.build_model(WEIGHT, mode="sum"), other)
    show = [["press", "Try the example"], ["error"], ["table"]]
    steps = [*show, *(["value", name] for name in names), ["press", "Run"], ["table"], ["files", [other]], *show]
    _, error, table, *texts = drive(steps)
    assert error is None
    assert table["caption"] == "scores float32 [3, 3]"
    assert texts[6]["rows"] == table["rows"]  # what stands in the fields is what was run
    assert (texts[9], texts[10]["rows"]) == (None, table["rows"])  # after another model, too
    model = onnx.load(ROOT / "models" / "examples" / "two_tower.onnx")
    tables = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    history, starts, words, word_starts = (numbers(text)[0] for text in texts[:4])
    weights = numbers(texts[4], np.float32)[0]
    user = embedding_bag(history, tables["item_table"], starts, mode="mean", max_norm=1.0)
    item = embedding_bag(
        words, tables["word_table"], word_starts, mode="sum", per_sample_weights=weights, padding_idx=0
    )
    scores = np.array(table["rows"], np.float64)
    np.testing.assert_allclose(scores, user @ item.T, rtol=1e-5, atol=1e-6)
    assert not scores[1].any()  # an empty bag
    assert scores[0].all()
    assert 0 in words


def classifier(folder: Path) -> Path:
    """A model that labels texts, with the file beside it."""
    rng = np.random.RandomState(1)
    found = SlowFastText(
        words={b"</s>": 9, b"goal": 3, "näher".encode(): 2},
        labels={f"__label__{name}".encode(): 5 for name in ("sport", "a_long_label_" * 8)},
        input=Table(rng.standard_normal((3 + 40, 4)).astype(np.float32)),
        output=Table(rng.standard_normal((2, 4)).astype(np.float32)),
        minn=2,
        maxn=3,
        bucket=40,
        word_ngrams=2,
    )
    (folder / "topics.bin").write_bytes(found.content())
    lucid_onnx.import_model(folder / "topics.bin", form="standard").save(folder / "topics.onnx")
    return folder / "topics.onnx"


def vectors(folder: Path, *, external: bool = False) -> Path:
    """A model of words' vectors, with the file beside it."""
    rows = sources.table(dim=256)  # large enough for a file of its own
    lines = [" ".join([word, *map(str, row)]) for word, row in zip(sources.WORDS, rows, strict=True)]
    (folder / "vectors.txt").write_text("\n".join(lines), encoding="utf-8")
    found = lucid_onnx.import_model(folder / "vectors.txt", form="standard")
    found.save(folder / "words.onnx", external_data=external)
    return folder / "words.onnx"


def test_the_page_labels_a_text(drive: Drive, tmp_path: Path) -> None:
    path = classifier(tmp_path)
    text = "Goal: näher\n\n goal 😀"
    labels, probabilities = TextEncoder(path, native=False).predict(["Goal: näher goal 😀"], 5)
    look = [["width", 400], ["outside"], ["width", 1280], ["outside"]]
    find = [["press", "Find labels"], ["error"], ["found"]]
    steps = [["files", [path, f"{path}.fasttext"]], ["fill", "Text", text], *find, *look]
    _, _, _, error, found, *sizes = drive(steps)
    assert error is None
    assert sizes == [400, [], 1280, []]
    assert found["title"] == "Labels"
    assert ["__label__" + name for name, _, _ in found["rows"]] == labels[0].tolist()
    shown = np.array([numbers for _, *numbers in found["rows"]])
    np.testing.assert_allclose(shown[:, 0], probabilities[0], atol=5.1e-5)  # four digits are shown
    np.testing.assert_allclose(shown[:, 1], np.minimum(probabilities[0], 1), atol=1e-6)


def test_the_page_searches_by_meaning(drive: Drive, tmp_path: Path) -> None:
    path = vectors(tmp_path, external=True)
    lines = ["the cat sat", "a dog", "", "  on a mat ", "nothing known", *(["cat"] * 12)]
    texts = [line.strip() for line in lines if line.strip() not in ("", "nothing known")]
    query, *rows = TextEncoder(path, native=False).encode(["The dog", *texts])
    cosines = [row @ query / np.linalg.norm(row) / np.linalg.norm(query) for row in rows]
    expected = sorted(zip(cosines, texts, strict=True), key=lambda pair: -pair[0])[:10]
    find = [["press", "Search"], ["error"], ["found"]]
    steps = [
        *[["drop", [path, f"{path}.words.txt", f"{path}.data"]], ["fill", "Texts", "\n".join(lines)]],
        *[["fill", "Query", "The dog"], *find, ["width", 400], ["outside"]],
        *[["fill", "Query", "xyz"], *find, ["fill", "Query", " "], *find],
        *[["fill", "Query", "dog"], ["fill", "Texts", " \n"], *find],
    ]
    answers = drive(steps)
    _, _, _, _, error, found, width, outside = answers[:8]
    assert error is None
    assert (width, outside) == (400, [])
    assert [text for text, _, _ in found["rows"]] == [text for _, text in expected]
    np.testing.assert_allclose([number for _, number, _ in found["rows"]], [c for c, _ in expected], atol=5.1e-5)
    assert "The best 10 of 16 lines" in found["note"]
    assert "1 line is left out: the model knows no word of it." in found["note"]
    said = [answer for step, answer in zip(steps, answers, strict=True) if step[0] == "error"]
    assert said[1:] == ["The model knows no word of the query.", "There is no query.", "There is no text to search in."]
    assert [answer for step, answer in zip(steps, answers, strict=True) if step[0] == "found"][1:] == [None] * 3


def test_the_page_says_what_is_wrong_with_files_of_texts(drive: Drive, tmp_path: Path) -> None:
    path, other = classifier(tmp_path), tmp_path / "other"
    other.mkdir()
    (other / "topics.onnx.fasttext").write_bytes(Path(f"{path}.fasttext").read_bytes()[:-1])
    (tmp_path / "m").mkdir()
    model = sources.model2vec(tmp_path / "m" / "m", {"embeddings": sources.table()})
    lucid_onnx.import_model(model, form="standard").save(tmp_path / "levels.onnx")
    steps = [
        *[["files", [path]], ["error"], ["about"], ["value", "ids"]],
        *[["files", [path, other / "topics.onnx.fasttext"]], ["error"], ["about"]],
        *[["files", [tmp_path / "levels.onnx", tmp_path / "levels.onnx.tokenizer.json"]], ["error"]],
        *[["files", [path, f"{path}.fasttext"]], ["error"], ["press", "Find labels"], ["found"]],
        *[["files", [path]], ["found"], ["value", "ids"]],
    ]
    answers = drive(steps)
    assert answers[1] is None
    assert answers[2].endswith("It takes texts where topics.onnx.fasttext is chosen together with it.")
    assert len(numbers(answers[3])[0]) > 1
    wrong = "topics.onnx.fasttext: is not the file that topics.onnx was written with; import the model again"
    assert answers[5:7] == [wrong, None]
    assert answers[8].startswith("levels.onnx.tokenizer.json: its model is WordLevel, and ids in JavaScript may differ")
    assert answers[10] is None
    assert len(answers[12]["rows"]) == 2
    assert answers[14] is None  # labels of another model are not left standing
    assert answers[15] == answers[3]


def test_the_server_hands_a_model_to_its_own_page(
    commands: tuple[str, Path, str], drive: Drive, tmp_path: Path
) -> None:
    node, folder, _ = commands
    path = vectors(tmp_path, external=True)
    (tmp_path / "secret.txt").write_text("secret")
    command = [node, folder / "start.mjs", "0", path.name]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=folder, env={**os.environ, "INIT_CWD": str(tmp_path)}
    ) as server:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        try:
            url, _, token = address.partition("#")
            assert len(token) == 48
            for place in ("/given", "/given/0", "/given/1", "/given/2"):
                assert answer_of(url, path=place)[0] == 403
                assert answer_of(url, path=place, X_Lucid_Token="0" * 48)[0] == 403
                assert answer_of(url, path=place, X_Lucid_Token=token)[0] == 200
            for place in (
                "/given/3",
                "/given/-1",
                "/given/length",
                "/given/../secret.txt",
                "/secret.txt",
                "/words.onnx",
            ):
                assert answer_of(url, path=place, X_Lucid_Token=token)[0] == 404, place
            steps = [["visit", address], ["error"], ["press", "Search"], ["fill", "Query", "the dog"]]
            steps += [["fill", "Texts", "a cat\ndog"], ["press", "Search"], ["found"], ["visit", f"{url}#{'0' * 48}"]]
            _, error, _, _, _, _, found, _, refused = drive([*steps, ["error"]])
        finally:
            server.kill()
    assert error is None
    assert {text for text, _, _ in found["rows"]} == {"a cat", "dog"}
    assert refused == "The server does not know this address. Open the one that npm start printed last."


def test_the_parity_page_fits_a_narrow_window(drive: Drive, tmp_path: Path) -> None:
    """Every dot of the plots is in the window, at the height of its line, and no label is on top of another."""
    errors = {"exact": [0.0], "good": [1e-4, 0.03, 0.999], "bad": [0.2, 1.001, 3.0, 8e5]}
    titles = {name: f"ONNX Runtime Web on {name} threads, with a name that is long" for name in errors}
    columns = [matrix.Column(name, titles[name], ("standard",), "1.2.3", None) for name in errors]
    cells = [
        matrix.Cell(
            f"job_{k}",
            name,
            "standard",
            matrix.EQUAL if margin <= 1 else matrix.DIFFERS,
            difference=measure.Difference(margin=margin),
            seconds=0.0002 * 10**k,
        )
        for name, margins in errors.items()
        for k, margin in enumerate(margins)
    ]
    rows = [matrix.Row(f"job_{k}", "scale", "a large case") for k in range(4)]
    report = matrix.Report(
        "2026-01-01 00:00:00", "1.0", "a machine", 1.0, tuple(columns), tuple(rows), tuple(cells), ()
    )
    path = tmp_path / "report.html"
    path.write_text(parity_page.page(report), encoding="utf-8")
    for width in (400, 1280):
        places = [["places", f".strip {what}"] for what in ("circle, .beyond path", "> span", "text:not(.small)")]
        _, scroll, dots, labels, ticks = drive([["open", str(path)], ["width", width], *places])
        assert scroll == width
        assert len(dots) == 3 + 4 + sum(map(len, errors.values()))  # of errors, where not exact, and of times
        labels = [label for label in labels if label[0]]
        assert [label[0] for label in labels] == [f"{title}, standard" for title in titles.values()] * 2
        ticks = [tick for tick in ticks if tick[3] > tick[1]]
        assert len(ticks) >= 2 * 2
        for _, left, top, right, bottom in (*dots, *labels, *ticks):
            assert 0 <= left < right <= width
            assert top < bottom
        # Labels are above their dots or left of them.
        assert {min(dot[1] for dot in dots) > max(label[3] for label in labels)} == {width == 1280}
        for a in (*labels, *ticks):
            others = (b for b in (*labels, *ticks, *dots) if b is not a)
            assert not any(a[1] < b[3] and b[1] < a[3] and a[2] < b[4] and b[2] < a[4] for b in others), a


def test_the_page_can_send_nothing_elsewhere(drive: Drive, url: str) -> None:
    asked: list[str] = []

    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

    with http.server.HTTPServer(("127.0.0.1", 0), Other) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        try:
            here, there = drive([["send", f"{url}page.css"], ["send", f"http://127.0.0.1:{other.server_port}/"]])
        finally:
            other.shutdown()
            thread.join()
    assert here == "sent"
    assert there == "TypeError: Failed to fetch"
    assert asked == []


def test_the_server_has_the_pages_and_the_example_alone(url: str) -> None:
    host = url.removeprefix("http://").rstrip("/")

    def status(path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(host, timeout=20)
        connection.request("GET", path)
        answer = connection.getresponse()
        found = answer.status, answer.read()
        connection.close()
        return found

    assert status("/two_tower.onnx") == (200, (ROOT / "models" / "examples" / "two_tower.onnx").read_bytes())
    assert status("/")[0] == status("/page.css")[0] == 200
    others = (
        *("/dlrm.onnx", "/server.mjs", "/package.json", "/models/examples/two_tower.onnx", "/two_tower.onnx/", "/%"),
        *("/../models/examples/dlrm.onnx", "/%2e%2e/models/examples/dlrm.onnx", "/..%2fmodels%2fexamples%2fdlrm.onnx"),
        *("/two_tower.onnx/../dlrm.onnx", "/ort/..%2fpackage.json", "//two_tower.onnx/dlrm.onnx"),
    )
    assert {path: status(path)[0] for path in others} == dict.fromkeys(others, 404)


def answer_of(url: str, method: str = "GET", path: str = "/", **headers: str) -> tuple[int, dict[str, str]]:
    """The status and headers that a request with these headers gets."""
    connection = http.client.HTTPConnection(url.removeprefix("http://").rstrip("/"), timeout=20)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, headers=names)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}


def test_the_server_turns_other_pages_away(url: str) -> None:
    port = url.rstrip("/").rpartition(":")[2]
    for headers in ({"Host": f"localhost:{port}"}, {"Origin": f"http://127.0.0.1:{port}"}, {"Sec_Fetch_Site": "none"}):
        assert answer_of(url, **headers)[0] == 200, headers
    foreign = (
        {"Host": f"attacker.example:{port}"},
        {"Host": "127.0.0.1"},
        {"Origin": "http://attacker.example"},
        {"Origin": "null"},
        {"Origin": f"https://127.0.0.1:{port}"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    )
    for headers in foreign:
        assert answer_of(url, **headers)[0] == 403, headers
    assert {answer_of(url, method)[0] for method in ("POST", "PUT", "DELETE")} == {405}
    _, found = answer_of(url)
    assert found["x-content-type-options"] == "nosniff"
    assert "default-src 'self'" in found["content-security-policy"]


#: A server whose exchange throws on one path, and sends the length of the body on the others.
EXCHANGE = """
import { serve } from "./server.mjs";
const server = await serve(0, async (request, response) => {
  if (request.url === "/throw") throw new Error("a defect");
  let length = 0;
  for await (const chunk of request) length += chunk.length;
  response.end(String(length));
});
console.log(`http://127.0.0.1:${server.address().port}/ ${server.token}`);
"""


def test_results_need_the_token_and_no_error_ends_the_server(commands: tuple[str, Path, str]) -> None:
    node, folder, _ = commands
    command = [node, "--input-type=module", "-e", EXCHANGE]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url, token = server.stdout.readline().split()
        try:
            assert answer_of(url, "POST", "/0")[0] == 403
            assert answer_of(url, "POST", "/0", X_Lucid_Token=token[:-1] + "g")[0] == 403
            assert answer_of(url, "POST", "/0", X_Lucid_Token=token, Origin="http://attacker.example")[0] == 403
            assert answer_of(url, "POST", "/0", X_Lucid_Token=token)[0] == 200
            assert answer_of(url, "POST", "/throw", X_Lucid_Token=token)[0] == 500
            # A client that goes away while it reads or writes.
            host, port = url.removeprefix("http://").rstrip("/").split(":")
            for request in (
                f"GET /ort/ort.wasm.bundle.min.mjs HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n",
                f"POST /0 HTTP/1.1\r\nHost: {host}:{port}\r\nX-Lucid-Token: {token}\r\nContent-Length: 99\r\n\r\nx",
                "no HTTP at all\r\n\r\n",
            ):
                with socket.create_connection((host, int(port))) as connection:
                    connection.sendall(request.encode())
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset
            assert answer_of(url)[0] == 200
            assert server.poll() is None
        finally:
            server.kill()


def test_start_refuses_what_is_no_port(commands: tuple[str, Path, str], url: str) -> None:
    node, folder, _ = commands
    taken = url.rstrip("/").rpartition(":")[2]
    refused = (
        ("65536", 2, "port = 65536 is not an integer in"),
        (taken, 1, f"port {taken} is taken"),
        ("none.onnx", 1, "none.onnx: cannot be read: ENOENT"),
        (str(DRIVER), 1, "drive_page.mjs: is not an ONNX model, or only a part of one"),
    )
    for port, code, said in refused:
        done = subprocess.run(
            [node, folder / "start.mjs", port], capture_output=True, text=True, timeout=20, check=False
        )
        assert done.returncode == code
        assert said in done.stderr
