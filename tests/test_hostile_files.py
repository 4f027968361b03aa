"""Small files that ask for much, and broken ones: every command answers in time and in one line, or works."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import lucid_onnx
from lucid_onnx.ops.embedding_bag import spec
from lucid_testing import scripts
from lucid_testing.fasttext_files import SlowFastText, Table

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")
pytest.importorskip("typer", reason="typer is not installed")
ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="no /proc/self/statm to limit the memory by"),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    """fuzz/models.py, which is not installed."""
    return scripts.load(ROOT / "fuzz" / "models.py")


def check(fuzz: ModuleType, contents: Sequence[tuple[str, bytes, str]]) -> None:
    """Run every command of its kind over each (name, content, suffix)."""
    cases = [
        (name, fuzz.Case(content, suffix, command))
        for name, content, suffix in contents
        for command in fuzz.COMMANDS[suffix]
    ]
    found = list(fuzz.search(range(len(cases)), lambda k: cases[k][1]))
    assert len(found) == len(cases)
    wrong = [(cases[f.number], f.what) for f in found if isinstance(f, fuzz.Finding)]
    assert not wrong, "\n".join(f"{name}, {case.command}: {what}" for (name, case), what in wrong[:5])


# ---- Little that asks for much.


def collection(num_tables: int) -> onnx.ModelProto:
    table = np.eye(3, dtype=np.float32)
    model = lucid_onnx.build_collection_model([table, table], form="native")
    next(a for a in model.graph.node[0].attribute if a.name == "num_tables").i = num_tables
    return model


def graph(nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], output: str) -> onnx.ModelProto:
    return helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.INT64, ["n"])],
            [helper.make_tensor_value_info(output, TensorProto.INT64, None)],
            [numpy_helper.from_array(a, n) for n, a in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,
    )


def greedy() -> Iterator[tuple[str, bytes, str]]:
    for num_tables in (2**62, 2**63 - 1, 10**7):
        yield f"num_tables = {num_tables}", collection(num_tables).SerializeToString(), ".onnx"
    many = [2**62] * 100_000
    model = lucid_onnx.build_model(np.eye(3, dtype=np.float32), form="native")
    model.graph.initializer.append(TensorProto(name="much", data_type=TensorProto.FLOAT, dims=many))
    yield "an initializer of 100,000 dimensions", model.SerializeToString(), ".onnx"
    model = lucid_onnx.build_model(np.eye(3, dtype=np.float32), form="native")
    model.graph.value_info.append(helper.make_tensor_value_info("much", TensorProto.FLOAT, many))
    yield "a value of 100,000 dimensions", model.SerializeToString(), ".onnx"
    column, row = np.zeros((2**16, 1), np.int64), np.zeros((1, 2**16), np.int64)
    add = [helper.make_node("Add", ["column", "row"], ["c"]), helper.make_node("Add", ["c", "x"], ["y"])]
    yield "a sum of 32 GiB", graph(add, {"column": column, "row": row}, "y").SerializeToString(), ".onnx"
    gather = [helper.make_node("Gather", ["row", "i"], ["c"], axis=0), helper.make_node("Add", ["c", "x"], ["y"])]
    constants = {"row": row, "i": np.zeros(2**16, np.int64)}
    yield "a Gather of 32 GiB", graph(gather, constants, "y").SerializeToString(), ".onnx"
    concat = [helper.make_node("Concat", ["r"] * 50_000, ["c"], axis=0), helper.make_node("Add", ["c", "x"], ["y"])]
    yield "a Concat of 24 GiB", graph(concat, {"r": row[0]}, "y").SerializeToString(), ".onnx"

    for shape in ([2**62] * 500_000, [9] * 1_000_000, [1] * 1_000_000, [10**4000], [0, *[2**62] * 100_000]):
        header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 48]}}).encode()
        yield f"a shape of {len(shape)} numbers", safetensors(header), ".safetensors"
    names = {f"tensor {k}": {} for k in range(200_000)}
    yield "200,000 names", safetensors(json.dumps(names).encode()), ".safetensors"
    yield "a long name", safetensors(json.dumps({"w" * 2_000_000: {}}).encode()), ".safetensors"


def safetensors(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + bytes(48)


def test_little_that_asks_for_much(fuzz: ModuleType) -> None:
    check(fuzz, list(greedy()))


def test_counts_are_compared_before_names_are_made() -> None:
    text = "EmbeddingBagCollection takes 13835058055282163712 inputs; it was given ['weight_0', 'weight_1', "
    with pytest.raises(ValueError, match=text.replace("[", r"\[")):
        lucid_onnx.to_form(collection(2**62), "standard")
    with pytest.raises(ValueError, match="EmbeddingBagCollection takes weight_0, weight_1, weight_2, indices_0, "):
        lucid_onnx.to_form(collection(3), "standard")


# ---- Broken files.


def npy(shape: str, dtype: str = "'<f4'") -> bytes:
    header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x02\x00" + len(header).to_bytes(4, "little") + header + bytes(48)


def broken() -> Iterator[tuple[str, bytes, str]]:
    yield "a sum of ones", npy("(" + "1+" * 4000 + "1, 4)"), ".npy"
    yield "signs", npy("(" + "-" * 8000 + "1, 4)"), ".npy"
    yield "brackets", npy("(" * 4000), ".npy"
    for shape in ([True, 16], [False], [1.5, 2], [None], [[4], 3], {"4": 3}, ["4", "3"]):
        header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 48]}}).encode()
        yield f"shape {shape}", safetensors(header), ".safetensors"
    header = json.dumps({"w": {"dtype": "F32", "shape": [12], "data_offsets": [False, 48]}}).encode()
    yield "offsets of a bool", safetensors(header), ".safetensors"
    for name, change in CHANGES.items():
        model = lucid_onnx.build_model(np.eye(3, dtype=np.float32), form="standard")
        change(model)
        yield name, model.SerializeToString(), ".onnx"


def _tensor(**fields: Any) -> Any:
    return lambda m: m.graph.initializer.append(TensorProto(name="t", **fields))


def _retyped(kind: int, **value: Any) -> Any:
    """Every integer attribute becomes one of another type."""

    def change(m: onnx.ModelProto) -> None:
        for node in m.graph.node:
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.INT:
                    attribute.CopyFrom(onnx.AttributeProto(name=attribute.name, type=kind, **value))

    return change


CHANGES: dict[str, Any] = {
    "texts for integers": _retyped(onnx.AttributeProto.STRING, s=b"0"),
    "lists for integers": _retyped(onnx.AttributeProto.FLOATS, floats=[0.5]),
    "an unknown element type": _tensor(data_type=99, dims=[1]),
    "no element type": _tensor(dims=[1]),
    "too little data": _tensor(data_type=TensorProto.INT64, dims=[3], raw_data=bytes(16)),
    "too few numbers": _tensor(data_type=TensorProto.INT64, dims=[3], int64_data=[1]),
    "no data": _tensor(data_type=TensorProto.INT64, dims=[3]),
    "a negative dimension": _tensor(data_type=TensorProto.INT64, dims=[-1]),
    "strings as raw data": _tensor(data_type=TensorProto.STRING, dims=[1], raw_data=b"s"),
    "an attribute without a type": lambda m: m.graph.node[0].attribute.add(name="a"),
    "a graph that is not there": lambda m: m.graph.node[0].attribute.add(name="a", type=5),
    "an unknown type of an input": lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 99),
    "no outputs": lambda m: m.graph.node[0].ClearField("output"),
    "no inputs": lambda m: m.graph.node[0].ClearField("input"),
    "an unknown name": lambda m: m.graph.node[0].input.insert(0, "nowhere"),
    "two of one name": lambda m: m.graph.node.append(m.graph.node[0]),
    "no opset": lambda m: setattr(m.opset_import[0], "domain", "elsewhere"),
    "an old opset": lambda m: setattr(m.opset_import[0], "version", 1),
    "no opset at all": lambda m: setattr(m.opset_import[0], "version", -1),
}


def test_small_nodes_do_not_ask_for_much_memory() -> None:
    """Each Add of two constants is a constant of 65536 elements, and all of them would be 500 MiB."""
    model = lucid_onnx.build_model(np.eye(3, dtype=np.float32), mode="sum", form="standard")
    count = 2000
    for name, shape in (("row", (1, 256)), ("column", (256, 1))):
        model.graph.initializer.append(numpy_helper.from_array(np.ones(shape, np.float32), name))
    for k in range(count):
        model.graph.node.append(helper.make_node("Add", [f"sum_{k - 1}" if k else "column", "row"], [f"sum_{k}"]))
    output = f"sum_{count - 1}"
    model.graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, [256, 256]))
    tracemalloc.start()
    try:
        report = lucid_onnx.fuse(model)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(report.fused) == 1
    assert peak < 128 * 2**20


def test_broken_files(fuzz: ModuleType) -> None:
    check(fuzz, list(broken()))


def test_numbers_of_fasttext_files(fuzz: ModuleType) -> None:
    """Every number of the head and of the tables' beginnings, as others."""
    random = np.random.RandomState(0)
    rows = Table.quantized(14, 5, 2, True, random)
    model = SlowFastText({b"w": 2, b"</s>": 1}, {b"l": 1}, rows, rows, minn=1, maxn=2, bucket=12, loss="hs")
    model.output = Table(np.zeros((1, 5), np.float32))
    content = model.content()
    tables = content.index(b"w\0") + 11 + 14 + 11
    begins = [*range(0, 92, 4), tables, *range(tables + 1, tables + 22, 4)]
    broken = []
    for place in begins:
        for value in (-1, 0, 2**31 - 1):
            changed = content[:place] + value.to_bytes(4, "little", signed=True) + content[place + 4 :]
            broken.append((f"{value} at {place}", changed, ".ftz"))
    check(fuzz, broken)


def test_text_that_is_not_utf8(fuzz: ModuleType) -> None:
    model = lucid_onnx.build_model(np.eye(3, dtype=np.float32))
    content = model.SerializeToString().replace(spec.DOMAIN.encode(), b"ai.luci\xff")
    check(fuzz, [("a domain", content, ".onnx")])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("too little data", r"initializer 't' has 16 bytes of data, and its shape \[3\] takes 24"),
        ("too few numbers", r"initializer 't' has 1 entries of int64_data, and its shape \[3\] takes 3"),
        ("an unknown element type", r"initializer 't' has element type 99, which is unknown"),
        ("a negative dimension", r"initializer 't' has shape \[-1\], with a negative dimension"),
        ("an attribute without a type", r"node .*: attribute 'a' has no type"),
        ("a graph that is not there", r"node .*: attribute 'a' has no value"),
        ("an unknown type of an input", r"value 'indices' has element type 99, which is unknown"),
    ],
)
def test_the_message_says_what_and_where(change: str, text: str) -> None:
    model = lucid_onnx.build_model(np.eye(3, dtype=np.float32), form="standard")
    CHANGES[change](model)
    for call in (lucid_onnx.fuse, lucid_onnx.lower, lucid_onnx.quantize):
        with pytest.raises(ValueError, match=f"the model: {text}"):
            call(model)


# ---- The fuzzer.


def test_the_fuzzers_corpus(fuzz: ModuleType) -> None:
    """What it found once."""
    files = [p for p in sorted((ROOT / "fuzz" / "corpus").iterdir()) if p.suffix in fuzz.COMMANDS]
    assert files
    check(fuzz, [(p.name, p.read_bytes(), p.suffix) for p in files])


def test_the_fuzzer_runs(fuzz: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert fuzz.main(["--cases", "150", "--seconds", "300"]) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ["traceback", "hang", "crash", "memory"])
def test_the_fuzzer_finds_a_planted_fault(
    fault: str, fuzz: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A reader that does not look at the size of a tensor's data, or has a defect where it finds a wrong one."""
    from lucid_onnx.builder import loading

    def faulty(found: str) -> None:
        if fault == "traceback":
            raise IndexError(found)
        if fault == "hang":
            while True:
                pass
        if fault == "crash":
            import ctypes

            ctypes.string_at(0)
        bytes(2**40)

    original = loading._check_tensor

    def check_tensor(tensor: onnx.TensorProto, at: str) -> None:
        try:
            original(tensor, at)
        except ValueError as error:
            faulty(str(error))

    monkeypatch.setattr(loading, "_check_tensor", check_tensor)
    monkeypatch.setattr(fuzz, "SECONDS", 2)
    monkeypatch.chdir(tmp_path)
    results = fuzz.search(range(3000), fuzz.Mutator().case)
    found = next(f for f in results if isinstance(f, fuzz.Finding))
    results.close()
    words = {"traceback": "IndexError", "hang": "took longer", "crash": "status -11", "memory": "out of memory"}
    assert words[fault] in found.what
    assert fuzz.main(["--first", str(found.number), "--cases", "1"]) == 1
    assert words[fault] in capsys.readouterr().out
    (file,) = (tmp_path / "fuzz-findings").iterdir()
    assert (file.name, file.read_bytes()) == (f"{found.number}{found.case.suffix}", found.case.content)
