"""The walls between the rooms: who may import, include or say what. HACKING.md draws them; this holds them up."""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from onnx import TensorProto, helper

import lucid_onnx
from lucid_onnx.ops import OPERATORS
from lucid_onnx.ops.embedding_bag import spec
from lucid_testing.kernels import Args, GradArgs, library, needs_library

ROOT = Path(__file__).resolve().parent.parent
KERNELS = [
    ROOT / "cpp_ops" / name for name in ("base", "embedding_bag", "embedding_bag_collection", "embedding_bag_grad")
]
ADAPTERS = (
    "ort_cuda_node.cc",
    "ort_cuda_node.h",
    "ort_embedding_bag.cc",
    "ort_embedding_bag.h",
    "ort_embedding_bag_collection.cc",
    "ort_embedding_bag_collection.h",
    "ort_embedding_bag_collection_cuda.cc",
    "ort_embedding_bag_cuda.cc",
    "ort_embedding_bag_grad.cc",
    "ort_embedding_bag_grad.h",
    "ort_embedding_bag_grad_cuda.cc",
)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def files(folder: str, *suffixes: str) -> list[Path]:
    found = sorted(p for p in (ROOT / folder).rglob("*") if p.suffix in suffixes and "__pycache__" not in p.parts)
    assert found, f"{folder} has no {suffixes}"
    return found


# ---- Python: who imports whom.


@dataclasses.dataclass(frozen=True)
class Import:
    """One import of a module, with relative ones resolved as if the tree were installed."""

    file: str
    line: int
    module: str
    lazy: bool  # inside a function, or only for the type checker

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.module}"


def package_of(path: Path) -> list[str]:
    parts = list(path.relative_to(ROOT).parts)
    if parts[0] == "ops":  # installs under lucid_onnx
        parts.insert(0, "lucid_onnx")
    return parts[:-1]


def imports(path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text(), str(path))
    lazy = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = package_of(path)
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            # `from . import spec` imports a module as much as `from .spec import X` does.
            inside = bool(base) or stem == "lucid_onnx"
            modules = [f"{stem}.{alias.name}" for alias in node.names] if inside else [stem]
        else:
            continue
        for module in modules:
            yield Import(relative(path), node.lineno, module, id(node) in lazy)


def within(module: str, *packages: str) -> bool:
    return any(module == p or module.startswith(p + ".") for p in packages)


STANDARD_LIBRARY = frozenset(__import__("sys").stdlib_module_names)


def foreign(path: Path) -> list[Import]:
    """Imports of neither the standard library nor this package."""
    return [i for i in imports(path) if i.module.split(".")[0] not in {*STANDARD_LIBRARY, "lucid_onnx"}]


def test_the_meaning_knows_nothing_above_it() -> None:
    for path in files("ops", ".py"):
        for found in imports(path):
            assert not within(found.module, "lucid_onnx") or within(found.module, "lucid_onnx.ops"), str(found)
        for found in foreign(path):
            assert within(found.module, "numpy", "onnx", "ml_dtypes"), str(found)


def test_an_operators_parts_know_only_what_they_need() -> None:
    allowed = {
        "spec": {"numpy", "ml_dtypes", "attributes", "variants"},
        "reference": {"numpy", "spec", "attributes"},
        "lowering": {"numpy", "onnx", "spec", "emit", "attributes"},
        "cases": {"numpy", "ml_dtypes", "spec", "reference"},
    }
    for name, parts in allowed.items():
        for found in imports(ROOT / "ops" / "embedding_bag" / f"{name}.py"):
            first, *rest = found.module.split(".")
            if first in STANDARD_LIBRARY:
                continue
            if first == "lucid_onnx":
                known = set(rest) & {"spec", "reference", "lowering", "cases", "emit", "attributes", "variants"}
            else:
                known = {first}
            assert known, str(found)
            assert known <= parts, str(found)


#: Operators that are said in terms of another.
BUILT_ON = {
    "quantized_embedding_bag": {"embedding_bag"},
    "embedding_bag_grad": {"embedding_bag"},
    "embedding_bag_collection": {"embedding_bag"},
}


def test_no_operator_knows_another() -> None:
    operators = sorted(p.name for p in (ROOT / "ops").iterdir() if (p / "__init__.py").is_file())
    assert "embedding_bag" in operators
    for operator in operators:
        for path in files(f"ops/{operator}", ".py"):
            for found in imports(path):
                rest = found.module.removeprefix("lucid_onnx.ops.").split(".")[0]
                known = {operator, "emit", "attributes", "variants", *BUILT_ON.get(operator, ())}
                assert not found.module.startswith("lucid_onnx.ops.") or rest in known, str(found)


@dataclasses.dataclass(frozen=True)
class Room:
    """A row of HACKING's import map: a module or a folder of lucid_onnx/."""

    imports: frozenset[str]  # other rooms
    packages: frozenset[str]  # from outside, at import time
    lazy: frozenset[str]  # from outside, when a function that needs them runs
    inside: tuple[str, ...]  # the modules of a folder; one may import those before it


def import_map() -> dict[str, Room]:
    """The table in HACKING.md whose first column is `lucid_onnx/...`, by the name of the room."""
    rooms = {}
    for line in (ROOT / "HACKING.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        name = re.fullmatch(r"`lucid_onnx/(\w+)(?:/|\.py)`", cells[0])
        if name is not None and len(cells) == 5:
            imported, packages, lazy, inside = (re.findall(r"`([^`]+)`", cell) for cell in cells[1:])
            rooms[name[1]] = Room(frozenset(imported), frozenset(packages), frozenset(lazy), tuple(inside))
    return rooms


def tools() -> Iterator[tuple[str, str, Path]]:
    """The room, the name within it and the file of every module of lucid_onnx/ but those of ops/."""
    for path in files("lucid_onnx", ".py"):
        room, *rest = path.relative_to(ROOT / "lucid_onnx").with_suffix("").parts
        if room != "ops":
            yield room, "/".join(rest), path


def test_the_import_map_has_every_room_and_module() -> None:
    rooms = import_map()
    assert set(rooms) == {room for room, _, _ in tools()}
    for room, drawn in rooms.items():
        named = {name.rstrip("/") for name in drawn.inside}
        there = {name.split("/")[0] for found, name, _ in tools() if found == room} - {"__init__", "__main__", ""}
        assert named == there, room


def test_the_tools_import_each_other_as_drawn() -> None:
    rooms = import_map()
    for room, name, path in tools():
        drawn = rooms[room]
        order = [inner.rstrip("/") for inner in drawn.inside]
        own = name.split("/")[0]
        before = order if own == "__init__" or own not in order else order[: order.index(own)]
        for found in imports(path):
            if not within(found.module, "lucid_onnx"):
                continue
            other, *rest = found.module.split(".")[1:]
            if other == room:
                assert not rest or rest[0] == own or rest[0] in before or rest[0] not in order, str(found)
            else:  # from the package itself a tool takes its version
                assert other in drawn.imports or other == "__version__", str(found)


def test_what_the_tools_import_from_outside() -> None:
    rooms = import_map()
    for room, _, path in tools():
        eager = {"numpy", "onnx", "ml_dtypes", *rooms[room].packages}
        for found in foreign(path):
            top = found.module.split(".")[0]
            assert top in (eager | rooms[room].lazy if found.lazy else eager), str(found)


def test_an_adapter_knows_no_other() -> None:
    """Of the comparison, it knows what a runtime is, and nothing else."""
    adapters = files("lucid_onnx/parity/adapters", ".py")
    assert len(adapters) >= 8
    for path in adapters:
        allowed = {"runtime", "adapters"} if path.stem == "__init__" else {"runtime"}
        for found in imports(path):
            if within(found.module, "lucid_onnx.parity"):
                assert found.module.split(".")[2] in allowed, str(found)


def test_nobody_imports_a_top_level_ops() -> None:
    for folder in ("ops", "lucid_onnx", "tests", "models", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for found in imports(path):
                assert not within(found.module, "ops"), str(found)


def test_importing_the_package_needs_no_runtime(tmp_path: Path) -> None:
    import subprocess
    import sys

    script = (
        "import sys, lucid_onnx, lucid_onnx.pytest_plugin\n"
        "early = sorted({'numpy', 'onnx', 'ml_dtypes'} & set(sys.modules))\n"
        "assert not early, early\n"
        "model = lucid_onnx.build_model([[1.0]])\n"
        "lucid_onnx.reference.embedding_bag([0], __import__('numpy').ones((1, 1)), [0])\n"
        "late = {'onnxruntime', 'torch', 'typer', 'rich', 'safetensors', 'onnxscript', 'onnx_ir'}\n"
        "print(sorted(late & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_no_package_bears_the_name_of_a_root_folder() -> None:
    """In an editable install the root is on sys.path, and such a package would be another one there."""
    roots = {p.name for p in ROOT.iterdir() if p.is_dir()} - {"lucid_onnx", "ops"}
    names = {p.stem for p in (ROOT / "lucid_onnx").iterdir()}
    assert not names & roots


# ---- C++: who includes what.


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*([<"][^>"]+[>"])', path.read_text(), re.MULTILINE)


def kernel_sources() -> list[Path]:
    found = [p for folder in KERNELS for p in folder.rglob("*") if p.suffix in (".cc", ".h", ".inc", ".cu", ".cuh")]
    found = [p for p in found if p.name not in ADAPTERS]
    assert {"embedding_bag.cc", "embedding_bag.h", "pool_rows-inl.h", "isa.cc"} <= {p.name for p in found}
    return found


def code(path: Path) -> str:
    """A C++ file without its comments and strings."""
    text = re.sub(r'"(?:\\.|[^"\\\n])*"', '""', path.read_text())
    return re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL)


def test_kernels_know_no_runtime() -> None:
    for path in kernel_sources():
        for header in includes(path):
            assert not re.search(r"\bort[_/]|onnx", header), f"{relative(path)} includes {header}"
        assert not re.search(r"\b(Ort[A-Z]\w*|onnxruntime|lucid::ort|namespace ort)\b", code(path)), relative(path)


def test_sources_of_one_instruction_set_have_no_library_code() -> None:
    """An inline function of a header, compiled with -mavx512f, may be the copy that the linker keeps for everybody."""
    allowed = {
        "<stddef.h>",
        "<stdint.h>",
        "<string.h>",
        "<math.h>",
        "<float.h>",
        "<limits.h>",
        "<emmintrin.h>",
        "<immintrin.h>",
        "<intrin.h>",
        "<arm_neon.h>",
    }
    sources = sorted(p for folder in KERNELS for p in folder.glob("*_rows_*.cc"))
    isas = ("baseline", "avx2", "avx512", "neon")
    assert {p.stem for p in sources} >= {f"{loop}_rows_{isa}" for loop in ("pool", "grad") for isa in isas}
    waiting, seen = list(sources), set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        assert not re.search(r"\bstd::", code(path)), f"{relative(path)} uses std::"
        for header in includes(path):
            if header[0] == "<":
                assert header in allowed, f"{relative(path)} includes {header}"
            else:
                waiting.append(ROOT / "cpp_ops" / header.strip('"'))
    assert {"pool_rows-inl.h", "grad_rows-inl.h"} <= {p.name for p in seen}


_INTRINSICS = r"\b_mm\d*_\w+|\b__m(?:128|256|512)\w*|\bv(?:ld|st)1q?_\w+|\bfloat32x4_t\b|immintrin|arm_neon|vector_size"


def test_the_adapter_and_the_contract_have_no_intrinsics() -> None:
    folder = ROOT / "cpp_ops"
    paths = [*folder.glob("*.cc"), *folder.glob("*.h"), *(folder / "ort").glob("*.*")]
    contracts = ("args.h", "embedding_bag.cc", "embedding_bag.h", "embedding_bag_grad.cc", "embedding_bag_grad.h")
    paths += [path for name in (*ADAPTERS, *contracts) for path in folder.glob(f"*/{name}")]
    for path in paths:
        assert not re.search(_INTRINSICS, path.read_text()), relative(path)
    assert re.search(_INTRINSICS, (folder / "base" / "simd.h").read_text())  # or the pattern finds nothing


def test_machine_flags_stand_in_one_file() -> None:
    pattern = re.compile(
        r"(?<![\w-])-m(?:avx|sse|f16c|fma|arch|tune|cpu|fpu|bmi|xsave|64|32)\w*|/arch:|target_attribute|\btarget\(\""
    )
    paths = [
        *ROOT.glob("CMakeLists.txt"),
        *(ROOT / "cpp_ops").rglob("*"),
        ROOT / "pyproject.toml",
        *(ROOT / ".ci").glob("*"),
    ]
    found = set()
    for path in paths:
        if path.is_file() and path.suffix != ".o":
            text = re.sub(r"#[^\n]*|//[^\n]*", "", path.read_text()) if path.suffix != ".toml" else path.read_text()
            if pattern.search(text):
                found.add(relative(path))
    assert found == {"cpp_ops/isa_flags.cmake"}
    assert "-march=native" not in (ROOT / "cpp_ops" / "isa_flags.cmake").read_text()


def test_ci_installs_the_project_and_what_is_pinned_and_hashed() -> None:
    pinned = set()
    for script in ("run", "sanitize"):
        text = (ROOT / ".ci" / script).read_text()
        assert "hashed() {" in text or "hashed -r" not in text, "which is pip install --require-hashes"
        for line in re.findall(r'.*(?:\bpip"? install\b|^ *hashed |\|\| hashed ).*', text, re.MULTILINE):
            if line.startswith("hashed() {"):
                assert "--no-deps --require-hashes" in line
                continue
            found = re.findall(r"-r \.ci/(\w+)\.txt", line)
            pinned.update(found)
            assert line == "pip install -q '.[cpu,test]'" or found, line
            assert not found or "hashed" in line or "--no-deps --require-hashes" in line, line
    assert pinned == {path.stem for path in (ROOT / ".ci").glob("*.txt")} == {"tools", "torch", "openvino", "cmake"}
    for name in pinned:
        lines = re.sub(r"\\\n\s*", "", (ROOT / ".ci" / f"{name}.txt").read_text()).splitlines()
        requirements = [line for line in lines if line and not line.startswith("#")]
        assert requirements
        for line in requirements:
            assert re.fullmatch(r"[\w.-]+==[\w.+]+( ; [^-]+?)?( ?--hash=sha256:[0-9a-f]{64})+", line), line


def test_ci_has_the_tools_of_the_documentation() -> None:
    extra = re.search(r"^docs = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert extra is not None
    named = (ROOT / ".ci" / "tools.in").read_text().splitlines()
    assert set(json.loads(extra[1])) <= set(named)
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / ".ci" / "tools.txt").read_text(), re.MULTILINE)
    for line in named:
        assert line.startswith("#") or re.split(r"[><=]", line)[0] in pinned, line


def test_contraction_is_off() -> None:
    assert "-ffp-contract=off" in (ROOT / "CMakeLists.txt").read_text()
    for path in (
        ROOT / "CMakeLists.txt",
        *(ROOT / "cpp_ops").rglob("*.cmake"),
        *(ROOT / "cpp_ops").rglob("CMakeLists.txt"),
    ):
        assert not re.search(r"-ffast-math|-Ofast|/fp:fast|-funsafe|-fassociative", path.read_text()), relative(path)


# ---- One truth in two languages.


def _adapter_defaults() -> dict[str, str]:
    text = (ROOT / "cpp_ops" / "embedding_bag" / "ort_embedding_bag.cc").read_text()
    numbers = dict(re.findall(r'attributes(?:\.|->)(?:Int|Float)\("(\w+)",\s*([^;]+?)\)', text))
    for high, low, value in re.findall(r'attributes->Double\("(\w+)", "(\w+)",\s*([^;]+?)\);', text):
        numbers |= {high: value, low: "0"}
    return numbers


def test_the_adapters_defaults_are_the_specs() -> None:
    infinity = "std::numeric_limits<float>::infinity()"
    values: dict[str, Any] = {"kMean": 1, "kNoPadding": -(2**63), infinity: math.inf, "kRefuse": 0, "kNone": 0}
    quantized = {"codes_type", "embedding_dim"}  # which the builder asks for
    defaults = {k: v for k, v in _adapter_defaults().items() if k not in quantized}
    found = {k: float(values.get(v, v)) for k, v in defaults.items() if k != "stash_type"}
    expected = spec.Attributes().to_onnx(spec.VARIANTS["EmbeddingBag"], double=False)
    assert defaults.keys() == expected.keys()
    assert _adapter_defaults().keys() - defaults.keys() == quantized
    assert found == {k: float(v) for k, v in expected.items() if k != "stash_type"}
    header = (ROOT / "cpp_ops" / "embedding_bag" / "embedding_bag.h").read_text()
    assert "kNoPadding = INT64_MIN" in header
    assert re.search(r"kSum = 0, kMean = 1, kMax = 2, kSqrtn = 3 }", header)
    assert re.search(r"kRefuse = 0, kSkip = 1 }", header)
    assert re.search(r"kNone = 0, kCount = 1, kWeights = 2 }", header)
    assert spec.NO_PADDING == -(2**63)
    assert spec.MODES == (*spec.ATEN_MODES, "sqrtn") == ("sum", "mean", "max", "sqrtn")
    assert get_args(spec.Negative) == ("refuse", "skip")
    assert get_args(spec.Divisor) == ("count", "weights")


def test_the_adapters_names_are_the_specs() -> None:
    text = (ROOT / "cpp_ops" / "embedding_bag" / "ort_embedding_bag.cc").read_text()
    forms = re.findall(r'\{"(\w+)", Table::k(\w+), (true|false), (true|false)\}', text)
    gradient = OPERATORS["embedding_bag_grad"]
    seconds = {"Rows": None, "Scale": None, "ZeroPoint": "zero_point", "Bias": "bias"}
    assert {(name, seconds[table], flat == "true", weighted == "true") for name, table, flat, weighted in forms} == {
        (v.name, getattr(v, "second", None), not v.two_d, v.weighted)
        for operator in (OPERATORS["embedding_bag"], OPERATORS["quantized_embedding_bag"])
        for v in operator.spec.VARIANTS.values()
    }
    text = (ROOT / "cpp_ops" / "embedding_bag_grad" / "ort_embedding_bag_grad.cc").read_text()
    forms = re.findall(r'\{"(\w+)", (true|false), (true|false), (true|false)\}', text)
    assert {(name, sparse == "true", flat == "true", weighted == "true") for name, sparse, flat, weighted in forms} == {
        (v.name, v.sparse, not v.two_d, v.weighted) for v in gradient.spec.VARIANTS.values()
    }
    text = (ROOT / "cpp_ops" / "embedding_bag_collection" / "ort_embedding_bag_collection.cc").read_text()
    names = OPERATORS["embedding_bag_collection"].spec.VARIANTS
    assert re.findall(r'"(EmbeddingBagCollection\w*)"', text) == list(names)
    assert f'"{spec.DOMAIN}"' in (ROOT / "cpp_ops" / "ort" / "register.cc").read_text()


@needs_library
@pytest.mark.parametrize("name", spec.VARIANTS)
def test_a_node_without_attributes_has_the_specs_defaults(name: str) -> None:
    """By what the kernel does: a mean, nothing padded, nothing clipped, no last offset; weights need a sum."""
    pytest.importorskip("onnxruntime")
    op = spec.VARIANTS[name]
    kinds = {"weight": TensorProto.FLOAT, "per_sample_weights": TensorProto.FLOAT}
    attributes = {"mode": 0} if op.weighted else {}
    graph = helper.make_graph(
        [helper.make_node(name, list(op.inputs), ["y"], domain=spec.DOMAIN, **attributes)],
        "g",
        [helper.make_tensor_value_info(n, kinds.get(n, TensorProto.INT64), None) for n in op.inputs],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    imports_ = [helper.make_opsetid("", 18), helper.make_opsetid(spec.DOMAIN, 1)]
    session = lucid_onnx.InferenceSession(helper.make_model(graph, opset_imports=imports_, ir_version=8))
    weight = (np.arange(20, dtype=np.float32) * 1e4).reshape(5, 4)
    x = np.array([[0, 1, 4], [4, 3, 2]])
    feed = {"weight": weight, "indices": x if op.two_d else x.reshape(-1), "offsets": np.array([0, 3, 6])}
    feed["per_sample_weights"] = np.linspace(-1, 1, 6, dtype=np.float32).reshape(feed["indices"].shape)
    feed = {n: feed[n] for n in op.inputs}
    keywords = {} if not op.weighted else {"mode": "sum", "per_sample_weights": feed["per_sample_weights"]}
    expected = lucid_onnx.reference.embedding_bag(feed["indices"], weight, feed.get("offsets"), **keywords)
    np.testing.assert_allclose(session.run(None, feed)[0], expected, rtol=1e-6)  # a few float32 roundings


def test_the_table_of_offsets_in_c_api_h_is_the_mirrors() -> None:
    text = (ROOT / "cpp_ops" / "c_api.h").read_text()
    bags, gradients, _ = re.split(r"EmbeddingBag\w+Args, wh", text)
    for mirror, table in ((Args, bags), (GradArgs, gradients)):
        pattern = r"(\d+)  (?:const void\*|void\*|int64_t\*|\w+(?:\[2\])?) +(\w+)"
        found = {name: int(byte) for byte, name in re.findall(pattern, table)}
        assert found == {name: getattr(mirror, name).offset for name, _ in mirror._fields_}


def _project_version() -> str:
    found = re.search(r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found
    return found[1]


def test_one_version() -> None:
    version = _project_version()
    assert lucid_onnx.__version__ == version
    found = re.search(r"project\(lucid_onnx VERSION (\S+)", (ROOT / "CMakeLists.txt").read_text())
    assert found
    assert found[1] == version


@needs_library
def test_the_librarys_version() -> None:
    assert library().lucid_onnx_version().decode() == _project_version()


# ---- What is installed, and the map.


def test_what_the_wheel_brings() -> None:
    try:
        distribution = importlib.metadata.distribution("lucid-onnx")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("lucid-onnx is not installed as a distribution here")
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        pytest.skip("lucid-onnx is installed as editable here")
    listed = [f for f in distribution.files or [] if f.parts[0] != ".."]  # the script goes to bin
    tops = {f.parts[0] for f in listed}
    assert tops == {"lucid_onnx", f"lucid_onnx-{distribution.version}.dist-info"}
    names = {f.as_posix() for f in listed}
    for path in [*files("lucid_onnx", ".py"), *files("ops", ".py"), ROOT / "lucid_onnx" / "py.typed"]:
        installed = relative(path) if relative(path).startswith("lucid_onnx/") else f"lucid_onnx/{relative(path)}"
        assert installed in names, installed
    assert {f.parts[1] for f in listed if f.suffix in (".so", ".dylib", ".dll")} == {"lib"}
    assert not [n for n in names if n.endswith((".cc", ".onnx", ".pb"))]
    interface = {"c_api.h", "embedding_bag/args.h", "embedding_bag_grad/args.h", "quantize/args.h"}
    assert {n for n in names if n.endswith(".h")} == {f"lucid_onnx/include/lucid_onnx/{n}" for n in interface}
    assert {n.rpartition("/")[0] for n in names if n.endswith(".cmake")} == {"lucid_onnx/lib/cmake/lucid_onnx"}
    assert distribution.version == _project_version()


#: Files of others that the map may name.
ELSEWHERE = {"onnxruntime_c_api.h"}


def _paths_in(text: str) -> Iterator[str]:
    """Words in backticks that name a file or folder of the tree."""
    tops = {p.name for p in ROOT.iterdir()}
    for span in re.findall(r"`([^`\n]+)`", text):
        for word in span.split():
            word = word.rstrip(",.:;").removeprefix("./")
            known = word.split("/")[0] in tops and "::" not in word
            file = re.fullmatch(r"[\w<>*./+-]+\.(?:py|md|cc|h|inc|cmake|txt|toml|yml|yaml|onnx|typed|cu|sh)", word)
            if word in ELSEWHERE:
                continue
            if known or file or ("/" in word and re.fullmatch(r"[\w<>*./+-]+/", word)):
                yield word


def test_hacking_md_names_only_what_is_there() -> None:
    text = (ROOT / "HACKING.md").read_text()
    named = list(_paths_in(text))
    assert len(named) > 10, "a map that names next to nothing"
    missing = []
    for word in named:
        pattern = re.sub(r"<[^>]*>", "*", word.rstrip("/"))
        found = list(ROOT.glob(pattern))
        if not found and "/" not in pattern:  # a file's own name, in a section about its folder
            found = [
                p
                for folder in ("ops", "lucid_onnx", "cpp_ops", "models", "tests")
                for p in (ROOT / folder).rglob(pattern)
            ]
        if not found:
            missing.append(word)
    assert missing == []


def test_hacking_md_names_every_room() -> None:
    text = (ROOT / "HACKING.md").read_text()
    rooms = ("ops/", "lucid_onnx/", "cpp_ops/", "models/", "tests/", "benchmarks/")
    assert [room for room in rooms if room not in text] == []
