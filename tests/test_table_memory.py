"""Where a session keeps its constant tables: what is shared, what it costs, and what happens to the file."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import lucid_onnx
from lucid_onnx.runtime import info
from lucid_testing.kernels import library, needs_library
from lucid_testing.models import save_hollow
from lucid_testing.processes import free_memory, run_script

ort = pytest.importorskip("onnxruntime")

pytestmark = [
    needs_library,
    pytest.mark.skipif(sys.platform != "linux", reason="tables are moved on Linux alone"),
]

CHOICES = ("auto", "inplace", "hugepage_copy", "mmap")
ENTRY = "lucid.table_memory"
ROWS, DIM = 40_000, 64  # 9.8 MiB
OLD = 1_000_000_000  # a time of change: a file changed just now could change again and show the same time
FEED = {"indices": np.arange(0, ROWS, 7), "offsets": np.arange(0, ROWS // 7, 20)}
SEES_LATER_ENTRIES = tuple(map(int, ort.__version__.split(".")[:2])) >= (1, 24)
needs_huge_pages = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").is_file()
    or "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(),
    reason="this system has no transparent huge pages",
)


def count(what: str = "copies") -> int:
    function = getattr(library(), f"lucid_table_{what}")
    function.restype = ctypes.c_int64
    return int(function())


@pytest.fixture(autouse=True)
def _all_copies_go() -> Iterator[None]:
    gc.collect()
    assert count() == 0
    yield
    gc.collect()
    assert (count(), count("copy_bytes")) == (0, 0)


@pytest.fixture(scope="module")
def table() -> np.ndarray:
    return np.random.RandomState(0).standard_normal((ROWS, DIM)).astype(np.float32)


@pytest.fixture(scope="module")
def expected(table: np.ndarray) -> bytes:
    return lucid_onnx.embedding_bag(FEED["indices"], table, FEED["offsets"], mode="sum").tobytes()


@pytest.fixture
def path(table: np.ndarray, tmp_path: Path) -> Path:
    """A model with its table in another file, at a byte that no number begins at."""
    model = lucid_onnx.build_model(table, mode="sum")
    move_out(model, tmp_path, 4096 + 49)
    onnx.save(model, tmp_path / "m.onnx")
    os.utime(tmp_path / "m.data", (OLD, OLD))
    return tmp_path / "m.onnx"


def move_out(model: onnx.ModelProto, folder: Path, offset: int) -> None:
    """Put every large tensor of the model into one file, each so many bytes behind what comes before."""
    with open(folder / "m.data", "wb") as file:
        for tensor in (t for t in model.graph.initializer if len(t.raw_data) > 10**6):
            file.write(b"\xff" * offset)
            place = {"location": "m.data", "offset": str(file.tell()), "length": str(len(tensor.raw_data))}
            file.write(tensor.raw_data)
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in place.items():
                tensor.external_data.add(key=key, value=value)


def answer(session: Any) -> bytes:
    return session.run(None, FEED)[0].tobytes()


def quiet() -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return options


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("external", [True, False], ids=["file", "memory"])
def test_the_same_bits_in_every_choice(
    choice: str, external: bool, path: Path, table: np.ndarray, expected: bytes
) -> None:
    before = count("copies_made")
    model = path if external else lucid_onnx.build_model(table, mode="sum").SerializeToString()
    session = lucid_onnx.InferenceSession(model, table_memory=choice)
    assert answer(session) == expected
    plan = info.table_memory(info.model(str(path)), choice).tables[0].plan  # type: ignore[union-attr]
    copied = external and plan == "copied"
    assert copied or choice != "hugepage_copy" or not external
    assert (count(), count("copies_made") - before) == (copied, copied)
    assert count("copy_bytes") == copied * 10 * 2**20


@needs_huge_pages
def test_without_a_choice_it_is_auto(path: Path, expected: bytes) -> None:
    if free_memory() < 2**28:
        pytest.skip("less than 256 MiB of memory are free")
    session = lucid_onnx.InferenceSession(path)
    assert count() == 1
    assert answer(session) == expected


def test_sessions_share_a_copy_until_the_last_goes(path: Path, expected: bytes) -> None:
    made = count("copies_made")
    sessions = [lucid_onnx.InferenceSession(path, table_memory="hugepage_copy") for _ in range(3)]
    assert (count(), count("copies_made")) == (1, made + 1)
    del sessions[0], sessions[0]
    gc.collect()
    assert count() == 1
    assert answer(sessions[0]) == expected
    del sessions
    gc.collect()
    assert count() == 0
    session = lucid_onnx.InferenceSession(path, table_memory="hugepage_copy")
    assert (count(), count("copies_made")) == (1, made + 2)
    assert answer(session) == expected


def test_nodes_share_a_copy(path: Path, expected: bytes) -> None:
    model = onnx.load(path, load_external_data=False)
    (node,) = model.graph.node
    twin = onnx.NodeProto()
    twin.CopyFrom(node)
    twin.name, twin.output[0] = "twin", "twin"
    maximum = next(a for a in twin.attribute if a.name == "mode")
    maximum.i = 2  # otherwise the runtime merges the two
    model.graph.node.append(twin)
    model.graph.output.append(helper.make_tensor_value_info("twin", TensorProto.FLOAT, None))
    onnx.save(model, path)
    session = lucid_onnx.InferenceSession(path, table_memory="hugepage_copy")
    assert count() == 1
    assert session.run(["output"], FEED)[0].tobytes() == expected


def test_a_file_written_just_now_is_shared_by_its_content(path: Path, expected: bytes) -> None:
    os.utime(path.with_name("m.data"))
    sessions = [lucid_onnx.InferenceSession(path, table_memory="hugepage_copy") for _ in range(2)]
    assert count() == 1
    assert {answer(session) for session in sessions} == {expected}


def test_a_file_that_was_replaced_is_another(path: Path, table: np.ndarray, expected: bytes) -> None:
    old = lucid_onnx.InferenceSession(path, table_memory="hugepage_copy")
    data = path.with_name("m.data")
    (path.parent / "new").write_bytes(b"\xff" * (4096 + 49) + (table + 1).tobytes())
    os.utime(path.parent / "new", (OLD, OLD))
    os.replace(path.parent / "new", data)
    new = lucid_onnx.InferenceSession(path, table_memory="hugepage_copy")
    assert count() == 2
    assert answer(old) == expected
    want = lucid_onnx.embedding_bag(FEED["indices"], table + 1, FEED["offsets"], mode="sum")
    assert answer(new) == want.tobytes()


def test_a_file_that_was_changed_in_place_is_another(path: Path, table: np.ndarray, expected: bytes) -> None:
    """Also where its time of change was set back to what it was: there is another one that nobody can set."""
    old = lucid_onnx.InferenceSession(path, table_memory="hugepage_copy")
    assert answer(old) == expected
    with open(path.with_name("m.data"), "r+b") as file:
        file.seek(4096 + 49)
        file.write((table + 1).tobytes())
    os.utime(path.with_name("m.data"), (OLD, OLD))
    new = lucid_onnx.InferenceSession(path, table_memory="hugepage_copy")
    want = lucid_onnx.embedding_bag(FEED["indices"], table + 1, FEED["offsets"], mode="sum")
    assert answer(new) == want.tobytes()
    assert answer(old) == expected


@pytest.mark.parametrize("choice", ["hugepage_copy", "mmap"])
def test_a_deleted_file(choice: str, path: Path, expected: bytes) -> None:
    session = lucid_onnx.InferenceSession(path, table_memory=choice)
    path.with_name("m.data").unlink()
    assert answer(session) == expected


def test_a_file_cut_off_after_the_copy(path: Path, expected: bytes) -> None:
    session = lucid_onnx.InferenceSession(path, table_memory="hugepage_copy")
    os.truncate(path.with_name("m.data"), 100)
    assert answer(session) == expected


def test_a_table_of_codes(table: np.ndarray, tmp_path: Path) -> None:
    codes = lucid_onnx.QuantizedTable.quantize(np.repeat(table, 4, axis=1), "uint8")
    model = lucid_onnx.build_quantized_model(codes, mode="sum")
    want = lucid_onnx.InferenceSession(model.SerializeToString()).run(None, FEED)[0]
    move_out(model, tmp_path, 13)
    onnx.save(model, tmp_path / "m.onnx")
    session = lucid_onnx.InferenceSession(tmp_path / "m.onnx", table_memory="hugepage_copy")
    assert count() == 1
    assert session.run(None, FEED)[0].tobytes() == want.tobytes()


@pytest.mark.parametrize("kind", ["int8", "uint8", "uint4"])
@pytest.mark.parametrize("rows", [1000, ROWS * 4])
def test_codes_and_their_numbers_lie_beside_each_other(kind: str, rows: int, tmp_path: Path) -> None:
    """Where a choice moves tables, and only there; the bits are the same."""
    weight = np.random.RandomState(1).standard_normal((rows, 75)).astype(np.float32)
    codes = lucid_onnx.QuantizedTable.quantize(weight, kind)
    indices = np.random.RandomState(2).randint(0, rows, 500)
    feed = {"indices": indices, "offsets": np.arange(0, 500, 20)}
    model = lucid_onnx.build_quantized_model(codes, mode="sum").SerializeToString()
    (tmp_path / "m.onnx").write_bytes(model)
    found = info.model(str(tmp_path / "m.onnx"))
    numbers = codes.scale.nbytes + (0 if codes.bias is None else codes.bias.nbytes)
    pages = -(-(codes.codes.nbytes + numbers) // 2**21)
    large = codes.codes.nbytes + numbers >= 8 << 20
    bits = set()
    for choice in CHOICES:
        session = lucid_onnx.InferenceSession(model, table_memory=choice)
        bits.add(session.run(None, feed)[0].tobytes())
        place = info.table_memory(found, choice).tables[0]  # type: ignore[union-attr]
        assert (place.plan == "joined") == (count() == 1 if large else choice in ("auto", "hugepage_copy"))
        if place.plan == "joined":
            expected = (pages * 2**21, pages) if large else (codes.codes.nbytes + numbers, 0)
            assert (place.copied_bytes, place.huge_pages) == expected
            assert not large or place.copied_bytes == count("copy_bytes")
        assert count() <= (large and choice in ("auto", "hugepage_copy"))
        del session
        gc.collect()
    assert len(bits) == 1
    want = lucid_onnx.quantized_embedding_bag(indices, codes, feed["offsets"], mode="sum")
    assert bits == {want.tobytes()}


@pytest.mark.parametrize(("dim", "joined"), [(1, True), (1024, True), (1025, False)])
def test_info_knows_which_rows_are_joined_with_float16_scales(dim: int, joined: bool, tmp_path: Path) -> None:
    """Up to 1024 bytes of quantized values; a copy holds the scale and the zero_point in float32."""
    half = np.ones(10, np.float16)
    quantized = lucid_onnx.QuantizedTable.of(np.ones((10, dim), np.int8), half, zero_point=half)
    model = lucid_onnx.build_quantized_model(quantized, mode="sum").SerializeToString()
    (tmp_path / "m.onnx").write_bytes(model)
    place = info.table_memory(info.model(str(tmp_path / "m.onnx"))).tables[0]  # type: ignore[union-attr]
    assert (place.plan, place.copied_bytes) == (("joined", 10 * (dim + 8)) if joined else ("stays", 0))


def copies_in_memory() -> list[int]:
    """Of each mapping that can be a copy of the table (anonymous, read only, five huge pages long): its huge KiB."""
    text = Path("/proc/self/smaps").read_text()
    mappings = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", text, flags=re.M)[1:]
    found = [m for m in mappings if re.match(r"\S+ r--p 00000000 00:00 0 *\nSize: +10240 kB\n", m)]
    return [int(re.search(r"^AnonHugePages: +(\d+) kB", m, re.M)[1]) for m in found]  # type: ignore[index]


@needs_huge_pages
def test_a_copy_lies_on_huge_pages(path: Path) -> None:
    assert copies_in_memory() == []
    session = lucid_onnx.InferenceSession(path, table_memory="hugepage_copy")
    (huge,) = copies_in_memory()
    if huge == 0:
        pytest.skip("the system has no memory to make huge pages of")
    assert huge >= 10240 // 2  # all of it, where the system has memory that is not in pieces
    del session
    gc.collect()
    assert copies_in_memory() == []


# ---- Refusals.


def test_an_unknown_choice(path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^table_memory = 'swap' is not one of 'auto', 'inplace', 'hugepage_copy', 'm"
    ):
        lucid_onnx.InferenceSession(path, table_memory="swap")
    with pytest.raises(ValueError, match=r"^table_memory = 'mmap', but native = False"):
        lucid_onnx.InferenceSession(path, table_memory="mmap", native=False)
    options = quiet()
    options.add_session_config_entry(ENTRY, "swap")
    text = f"{ENTRY} = 'swap' is not one of auto, inplace, hugepage_copy, mmap"
    with pytest.raises(RuntimeError, match=re.escape(text)) as caught:
        lucid_onnx.register(options)
    assert "INVALID_ARGUMENT" in str(caught.value)


@pytest.mark.skipif(not SEES_LATER_ENTRIES, reason="a kernel sees its session's entries from onnxruntime 1.24 on")
def test_an_entry_set_after_the_registration(path: Path, expected: bytes) -> None:
    for value in ("hugepage_copy", "swap"):
        options = quiet()
        lucid_onnx.register(options, table_memory="mmap")
        options.add_session_config_entry(ENTRY, value)
        if value == "swap":
            with pytest.raises(Exception, match=f"{ENTRY} = 'swap' is not one of auto, inplace, hugepage_copy, mmap"):
                ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        else:
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            assert count() == 1
            assert answer(session) == expected


def test_an_entry_set_by_hand_before_it(path: Path) -> None:
    options = quiet()
    options.add_session_config_entry(ENTRY, "hugepage_copy")
    session = lucid_onnx.InferenceSession(path, session_options=options)
    assert count() == 1
    del session


def test_no_memory_for_the_copy(tmp_path: Path) -> None:
    """Under a limit of the process's address space: "auto" does without, "hugepage_copy" says what it lacks."""
    model = lucid_onnx.build_model(np.ones((4, 256), np.float32), mode="sum")
    data = save_hollow(model, tmp_path / "m.onnx", 2**20)  # 1 GiB
    os.utime(data, (OLD, OLD))
    script = """
        import resource, sys
        import numpy as np, onnxruntime as ort
        import lucid_onnx
        ort.set_default_logger_severity(4)
        warm = lucid_onnx.embedding_bag([0], np.ones((1, 4), np.float32), [0])
        pages = int(open("/proc/self/statm").read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + (1536 << 20),) * 2)  # the mapping, and half of a copy
        try:
            lucid_onnx.InferenceSession(sys.argv[1], table_memory="mmap")
        except Exception as error:
            sys.exit(f"without a copy: {error}")
        session = lucid_onnx.InferenceSession(sys.argv[1], table_memory="auto")
        print(session.run(None, {"indices": np.array([5]), "offsets": np.array([0])})[0].sum())
        del session
        try:
            lucid_onnx.InferenceSession(sys.argv[1], table_memory="hugepage_copy")
        except Exception as error:
            print(error)
    """
    done = run_script(textwrap.dedent(script), tmp_path, str(tmp_path / "m.onnx"))
    if "without a copy: " in done.stderr and "bad_alloc" in done.stderr:
        pytest.skip(f"onnxruntime {ort.__version__} itself needs more than one mapping of the table")
    assert done.returncode == 0, done.stderr
    first, rest = done.stdout.split("\n", 1)
    assert float(first) == 0
    assert f"{ENTRY} = hugepage_copy needs {2**30} bytes for the copy of a table" in rest


# ---- What it costs.


def test_info_tells_what_would_happen(path: Path) -> None:
    found = info.model(str(path))
    size = ROWS * DIM * 4
    plans = {}
    for choice in CHOICES:
        memory = info.table_memory(found, choice)
        assert memory is not None
        assert memory.choice == choice
        assert memory.free_bytes is not None
        assert abs(memory.free_bytes - free_memory()) < 2**30 or memory.free_bytes < free_memory()  # a group's limit
        (place,) = memory.tables
        assert (place.name, place.bytes, place.external) == ("weight", size, True)
        plans[choice] = (place.plan, place.copied_bytes, place.huge_pages)
    assert plans["inplace"] == plans["mmap"] == ("stays", 0, 0)
    assert plans["hugepage_copy"] == ("copied", 5 * 2**21, 5)
    assert plans["auto"] in (plans["hugepage_copy"], plans["mmap"])
    with pytest.raises(
        ValueError, match=r"^table memory 'swap' is not one of 'auto', 'inplace', 'hugepage_copy', 'mmap'$"
    ):
        info.table_memory(found, "swap")


def _resident(kind: str) -> int:
    return int(re.search(rf"^{kind}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.M)[1]) * 1024  # type: ignore[index]


@pytest.mark.large
def test_a_table_of_6_gb(tmp_path: Path) -> None:
    """Sessions start and answer in seconds, and take the memory that they were told to."""
    model = lucid_onnx.build_model(np.ones((4, 64), np.float32), mode="sum")
    rows = 6 * 10**9 // 256
    if free_memory() < 16 * 10**9:
        pytest.skip(f"{free_memory() / 2**30:.1f} GiB of memory free, 15 GiB needed")
    if shutil.disk_usage(tmp_path).free < 2**30:
        pytest.skip("no room on the disk")
    data = save_hollow(model, tmp_path / "m.onnx", rows)
    size = data.stat().st_size
    marked = np.array([0, rows // 2, 2**23, rows - 1])
    with data.open("r+b") as file:
        for i, row in enumerate(marked.tolist()):
            file.seek(row * 256)
            file.write(np.full(64, 1 + i, np.float32).tobytes())
    os.utime(data, (OLD, OLD))
    feed = {"indices": marked, "offsets": np.array([0, 2])}
    for choice in ("mmap", "inplace", "hugepage_copy"):
        before = _resident("RssAnon"), _resident("RssFile")
        began = time.monotonic()
        sessions = [lucid_onnx.InferenceSession(tmp_path / "m.onnx", table_memory=choice)]
        got = sessions[0].run(None, feed)[0]
        seconds = time.monotonic() - began
        sessions.append(lucid_onnx.InferenceSession(tmp_path / "m.onnx", table_memory=choice))
        gained = _resident("RssAnon") - before[0], _resident("RssFile") - before[1]
        print(f"{choice}: answer in {seconds:.2f} s, {gained[0] >> 20} MiB anonymous, {gained[1] >> 20} MiB mapped")
        assert got.tolist() == [[3.0] * 64, [7.0] * 64]
        copied = choice == "hugepage_copy"
        assert count() == copied
        assert abs(gained[0] - size * copied) < 100 * 2**20
        assert gained[1] < 100 * 2**20
        assert seconds < (60 if copied else 5)  # 6 GB at 100 MB/s, the slowest disk that is worth a thought
        del sessions
        gc.collect()
