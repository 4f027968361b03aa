"""The documentation: its code runs, it is complete where a test can tell, its pictures are current, and it builds."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import lucid_onnx
from lucid_testing import pages, scripts

ROOT = pages.ROOT
DOCS = ROOT / "docs"
#: Pages whose blocks run elsewhere: tests/test_parity.py runs those of authors.md, which are a project of its own.
ELSEWHERE = {"authors.md"}
PAGES = sorted(
    p.relative_to(DOCS).as_posix()
    for p in DOCS.rglob("*.md")
    if p.name not in ELSEWHERE and any(b.language in ("python", "bash") for b in pages.blocks(p))
)


# ---- The code on the pages.


def op_types(path: str) -> list[str]:
    return [n.op_type for n in onnx.load(path, load_external_data=False).graph.node]


def after_build(names: Mapping[str, Any]) -> None:
    assert op_types("bag.onnx") == ["EmbeddingBag"]
    assert op_types("ranker.onnx") == ["EmbeddingBag", "Relu"]
    feed = {"words": np.array([3, 1, 4]), "starts": np.array([0, 2])}
    wanted = lucid_onnx.reference.embedding_bag(feed["words"], names["table"], feed["starts"], max_norm=1.0)
    got = lucid_onnx.InferenceSession("ranker.onnx").run(None, feed)[0]
    np.testing.assert_allclose(got, np.maximum(wanted, 0), rtol=1e-5)
    scripted = {"table": names["table"], **feed}
    wanted = lucid_onnx.reference.embedding_bag(feed["words"], names["table"], feed["starts"])
    got = lucid_onnx.InferenceSession(names["scripted"]).run(None, scripted)[0]
    np.testing.assert_allclose(got, np.maximum(wanted, 0), rtol=1e-5)


def after_export(names: Mapping[str, Any]) -> None:
    torch = names["torch"]
    assert op_types("module.onnx") == op_types("translated.onnx") == ["EmbeddingBag"]
    words, starts = np.array([7, 0, 999, 0]), np.array([0, 0, 3])  # an empty bag, and one of padding alone
    expected = names["module"](torch.from_numpy(words), torch.from_numpy(starts)).detach().numpy()
    got = lucid_onnx.InferenceSession("module.onnx").run(None, {"input": words, "offsets": starts})[0]
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    example = {"input": names["words"].numpy(), "offsets": names["starts"].numpy()}
    got = lucid_onnx.InferenceSession("translated.onnx").run(None, example)[0]
    expected = names["module"](names["words"], names["starts"]).detach().numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    rows = names["trained"].weight
    assert onnx.load("trained.onnx") == lucid_onnx.build_model(rows, mode="sum")
    assert onnx.load("checkpoint.onnx") == lucid_onnx.build_model(rows, mode="mean", padding_idx=0)


def after_fuse(names: Mapping[str, Any]) -> None:
    assert op_types("fast.onnx") == ["EmbeddingBag"]
    assert op_types("merged.onnx") == ["EmbeddingBagCollection"]
    assert op_types("native.onnx") == ["EmbeddingBag", "EmbeddingBag", "Concat"]
    assert Path("exported.svg").stat().st_size > 0
    bags = {"ids": np.array([2, 0, 2]), "starts": np.array([0, 3])}
    feed = {f"{name}_{k}": value for name, value in bags.items() for k in range(2)}
    rows = names["table"][[2, 0, 2]].sum(0)
    wanted = [np.tile(rows, 2), np.zeros(128)]
    for lowered in ("anywhere.onnx", "padded.onnx", "loop.onnx"):
        assert b"ai.lucid" not in Path(lowered).read_bytes()
        got = lucid_onnx.InferenceSession(lowered, native=False).run(None, feed)[0]
        np.testing.assert_allclose(got, wanted, rtol=1e-6)


def after_forms(names: Mapping[str, Any]) -> None:
    assert [n.op_type for n in names["native"].graph.node] == ["EmbeddingBag"]
    assert "Loop" in op_types("loop.onnx")
    assert "Loop" not in op_types("padded.onnx")
    feed = {"indices": np.zeros(65, np.int64), "offsets": np.zeros(1, np.int64)}
    with pytest.raises(Exception, match="no_bag_is_longer_than_64"):
        lucid_onnx.InferenceSession("padded.onnx", native=False).run(None, feed)


def after_quantize(names: Mapping[str, Any]) -> None:
    assert op_types("small.onnx")[0] == "QuantizedEmbeddingBagBias"
    assert Path("small.onnx").stat().st_size < Path("large.onnx").stat().st_size / 4
    table = names["table"]
    means = [table[[3, 1]].mean(0), table[[4, 1, 5]].mean(0)]
    # Half a step of 4 bits over [0, 1), and a float's rounding.
    np.testing.assert_allclose(names["pooled"], means, atol=0.5 / 15 + 1e-6)


def after_collections(names: Mapping[str, Any]) -> None:
    table = names["table"]
    sums = np.concatenate([[table[[3, 1]].sum(0), table[4]], table[[1, 5], :32]], axis=1)
    np.testing.assert_allclose(names["output"], sums, rtol=1e-6)
    assert [n.op_type for n in names["model"].graph.node] == ["EmbeddingBagCollection"]


def after_training(names: Mapping[str, Any]) -> None:
    assert names["loss"] < 0.2
    assert names["grad"][[1, 3, 4, 5]].sum() == pytest.approx(128)  # two bags of 64 ones, shared out and none lost
    rows = names["parameter"].detach()
    mean = rows[[3, 1]].mean(0)
    grad = names["parameter"].grad.to_dense()
    names["torch"].testing.assert_close(grad[[3, 1, 4]], names["torch"].stack([mean, mean, 2 * rows[4]]))


#: What must be so after a page has run, beyond its own assertions.
AFTER: dict[str, Callable[[Mapping[str, Any]], None]] = {
    "build.md": after_build,
    "export.md": after_export,
    "fuse.md": after_fuse,
    "forms.md": after_forms,
    "quantize.md": after_quantize,
    "collections.md": after_collections,
    "training.md": after_training,
}


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if importlib.util.find_spec("torch") and "torch.onnx" in (DOCS / page).read_text(encoding="utf-8"):
        request.getfixturevalue("translations")
    names, left_out = pages.run(DOCS / page, tmp_path, monkeypatch)
    if left_out:
        pytest.skip(f"an optional package is not installed: {page} has run but for its blocks at {left_out}")
    if page in AFTER:
        AFTER[page](names)


def test_every_check_has_its_page() -> None:
    assert set(AFTER) <= set(PAGES)


def test_blocks_that_are_not_run_only_install() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")):
        for block in pages.blocks(page):
            if block.language == "console":
                first = next(word for word in block.code.split() if not re.fullmatch(r"[A-Z_]+=\S*", word))
                assert first in pages.INSTALLERS, f"{page.name}:{block.line}: {first} could run in a test"
            else:
                assert block.language, f"{page.name}:{block.line} has no language"


def test_the_c_program_runs(native: None, tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler")
    (program,) = (b.code for b in pages.blocks(DOCS / "serving.md") if b.language == "c" and "main" in b.code)
    (tmp_path / "pool.c").write_text(program)
    library = Path(lucid_onnx.get_library_path())
    (tmp_path / "lucid_onnx").symlink_to(ROOT / "cpp_ops")  # as the headers are installed
    flags = ["-std=c11", "-Wall", "-Werror", "-I", tmp_path, f"-Wl,-rpath,{library.parent}", "-o", "pool"]
    subprocess.run([compiler, "pool.c", library, *flags], cwd=tmp_path, check=True, timeout=120)
    done = subprocess.run([tmp_path / "pool"], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "11 22, 100 200\n"


# ---- What must be complete.


def templates(path: Path) -> Iterator[str]:
    """The messages that a file raises, with … where a value goes, but for those that only hand on another's."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            text = template(node.exc.args[0])
            if text is not None and sum(map(str.isalpha, text)) >= len("isnot") and text != "table …: …":
                yield text


def template(node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)
    return None


def listed() -> list[str]:
    """The messages that docs/errors.md lists: the first cell of every row of a table of messages."""
    text = (DOCS / "errors.md").read_text(encoding="utf-8")
    tables = text.split("| message | cause | what to do |")[1:]
    return [m[1].replace("\\|", "|") for t in tables for m in re.finditer(r"^\| `(.*?)` \| ", t, flags=re.MULTILINE)]


def raised_as(text: str, message: str) -> bool:
    """Whether a message of docs/errors.md is one of those that the template makes: its … may stand for any text."""
    return re.fullmatch(".+".join(map(re.escape, text.split("…"))), message, flags=re.DOTALL) is not None


def test_every_error_of_a_specification_is_explained() -> None:
    known = listed()
    paths = sorted((ROOT / "ops").glob("*/spec.py")) + sorted((ROOT / "ops").glob("*.py"))
    texts = {f"{p.relative_to(ROOT)}: {text}": text for p in paths for text in templates(p)}
    texts = {where: text for where, text in texts.items() if "unexpected keyword argument" not in text}  # Python's own
    assert len(texts) > 20
    missing = [where for where, text in texts.items() if not any(raised_as(text, message) for message in known)]
    assert not missing, "docs/errors.md lacks these"


def test_every_error_that_is_explained_exists() -> None:
    raised = {
        text for folder in ("ops", "lucid_onnx") for path in (ROOT / folder).rglob("*.py") for text in templates(path)
    }
    native = re.sub(
        r'"\s*\n?\s*"',
        "",
        "".join(p.read_text(encoding="utf-8") for p in sorted((ROOT / "cpp_ops").rglob("*.cc"))),
    )
    native = re.sub(r"%[.\d]*(?:lld|llu|zu|d|s|g)", "…", native)
    texts = listed()
    assert len(texts) > 60
    assert len(texts) == len(set(texts))
    gone = [t for t in texts if t not in native and not any(raised_as(text, t) for text in raised)]
    assert not gone, "docs/errors.md explains these, and nothing raises them"


def test_the_python_reference_has_every_public_name() -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    entries = re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE)
    assert len(entries) == len(set(entries))
    public = {f"lucid_onnx.{name}" for name in lucid_onnx.__all__} - {"lucid_onnx.reference"}
    assert public <= set(entries)
    assert any(entry.startswith("lucid_onnx.reference.") for entry in entries)


def test_there_is_a_page_for_every_operator_and_command(tmp_path: Path) -> None:
    from lucid_onnx.ops import OPERATORS

    assert {p.stem for p in (DOCS / "operators").glob("*.md")} == set(OPERATORS)
    for name in OPERATORS:
        assert f"<!-- operator: {name} -->" in (DOCS / "operators" / f"{name}.md").read_text(encoding="utf-8")
    (commands,) = re.findall(r"<!-- commands: (.*) -->", (DOCS / "cli.md").read_text(encoding="utf-8"))
    done = subprocess.run(
        [sys.executable, "-c", "from lucid_onnx.cli import main; main(['--help'])"], cwd=tmp_path,
        env={**os.environ, "TYPER_USE_RICH": "0", "COLUMNS": "200", "NO_COLOR": "1"},
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    listing = done.stdout[done.stdout.index("Commands") :]
    assert set(commands.split()) == set(re.findall(r"^[\s│]+([a-z]+)  ", listing, flags=re.MULTILINE))


def test_links_lead_somewhere() -> None:
    for page in (*ROOT.glob("*.md"), *DOCS.rglob("*.md")):
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


# ---- Pictures.


def tool(name: str) -> Any:
    """A module of docs/tools."""
    return scripts.load(DOCS / "tools" / f"{name}.py")


def test_the_picture_of_a_bag_is_current(native: None) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    if not torch.__version__.startswith("2.13."):
        pytest.skip(f"the picture is of torch 2.13's export, this is {torch.__version__}")
    draw = tool("draw")
    kept, drawn = (DOCS / "before-after.svg").read_text(encoding="utf-8"), draw.before_after()
    assert "EmbeddingBag" in draw.boxes(kept)
    assert {"Loop", "SequenceInsert"} <= set(operators(draw.boxes(kept)))
    assert operators(draw.boxes(kept)) == operators(draw.boxes(drawn)), "python docs/tools/draw.py draws it anew"


def operators(names: Iterable[str]) -> list[str]:
    """The names that are those of standard operators."""
    return [name for name in names if onnx.defs.has(name)]


def test_pictures_are_current_and_small() -> None:
    for name, picture in tool("draw").pictures().items():
        assert (DOCS / name).read_text(encoding="utf-8") == picture, f"python docs/tools/draw.py writes {name} anew"
    sizes = [p.stat().st_size for p in DOCS.rglob("*") if p.suffix in (".png", ".svg", ".jpg", ".gif")]
    assert sum(sizes) < 300_000


# ---- The wording. Each pattern is a wording that readers stumbled over, and beside it what to write.

WORDINGS = {
    r"speed of memory|memory speed": "at memory bandwidth",
    r"tested emulated|were tested, emulated": "tested in CPU emulation only",
    r"table that changes is": "models that modify the table at run time are rejected",
    r"translations alone do": "pass our translation table",
    r"seen to have large ones": "already uses large pages",
    r"left as it is says why": "skipped tables are reported with the reason",
    r"of which alone|alone is read": "reads only that tensor",
    r"\bgo(es)? with every": "work with every",
    r"\blay(s|ing)? (them |\w+ )?(beside each other|side by side)": "concatenated by a Concat",
    r"none of codes|bags? over codes|table of codes|codes of (8|4) bits|rows of codes": "quantized values",
    r"takes each way back": "recognizes all three",
    r"everything empty": "all empty inputs",
    r"\b(that|which) (is|are) here\b": "installed",
    r"nobody knows why|not known why": "unexplained",
    r"looks (new|other) rows up": "fresh indices in every call",
    r"\bon our pages": "with the same huge pages",
    r"\b[Bb]ut for (that|those|what|norms)\b": "except for",
    r"\bmay know\b": "may import",
    r"does not say twice": "design decisions",
    r"\brooms?\b": "layers, modules",
    r"\b[Rr]efus(e|es|ed|al|als|ing)\b": "reject, invalid argument, raises",
    r"(?<![Tt]here )\bis no (?!longer|more|less|slower|faster)[a-zA-Z]": "is not a",
    r"not the library of this": "library version mismatch",
    r"forms move no table": "table_memory needs the native kernels",
    r"known did not show|did not show": "known differences that did not occur",
    r"\bwhat is so now\b": "document X after Y",
}


def prose() -> dict[str, str]:
    """The pages that are written by hand, without their code; docs/parity.md is what a command wrote on a day."""
    written = [*ROOT.glob("*.md"), *(p for p in DOCS.rglob("*.md") if p.name != "parity.md")]
    return {p.relative_to(ROOT).as_posix(): _without_code(p.read_text(encoding="utf-8")) for p in written}


def _without_code(text: str) -> str:
    return re.sub(r"`[^`\n]+`", "`code`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def help_text() -> str:
    """The help of all commands, in plain text."""
    (names,) = re.findall(r"<!-- commands: (.*) -->", (DOCS / "cli.md").read_text(encoding="utf-8"))
    return str(tool("site_text").commands(names.split()))


def messages(folder: str) -> str:
    """What the Python in a folder raises."""
    return "\n".join(text for path in sorted((ROOT / folder).rglob("*.py")) for text in templates(path))


def native_messages() -> str:
    """The string literals of the C++ sources."""
    found = []
    for path in sorted((ROOT / "cpp_ops").rglob("*.cc")):
        text = re.sub(r"//[^\n]*", "", path.read_text(encoding="utf-8"))
        found += re.findall(r'"((?:[^"\\\n]|\\.)*)"', re.sub(r'"\s*\n\s*"', "", text))
    return "\n".join(found)


#: How texts have the value "refuse" of the attribute `negative`, which is no wording.
VALUE = re.compile(r'refuse or skip|default: refuse|0 \(refuse\)|"refuse"')


def assert_plain(where: str, text: str) -> None:
    text = VALUE.sub("", " ".join(text.split()))
    found = [
        f"{where}: {m[0]!r} in {text[max(0, m.start() - 40) : m.end() + 40]!r}; write: {better}"
        for pattern, better in WORDINGS.items()
        for m in re.finditer(pattern, text)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("page", sorted(prose()))
def test_pages_use_the_words_of_the_field(page: str) -> None:
    assert_plain(page, prose()[page])


def test_help_uses_the_words_of_the_field() -> None:
    pytest.importorskip("typer", reason="the command line is not installed")
    assert_plain("help", help_text())


@pytest.mark.parametrize("folder", ["ops", "lucid_onnx"])
def test_messages_use_the_words_of_the_field(folder: str) -> None:
    assert_plain(folder, messages(folder))


def test_native_messages_use_the_words_of_the_field() -> None:
    assert_plain("cpp_ops", native_messages())


# ---- The site.


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for module in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(module, reason=f"{module} is not installed: pip install '.[docs]'")
    script = shutil.which("mkdocs", path=os.path.dirname(sys.executable)) or shutil.which("mkdocs")
    assert script
    done = subprocess.run(
        [script, "build", "--strict", "--quiet", "--config-file", ROOT / "mkdocs.yml", "--site-dir", tmp_path / "site"],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, cwd=tmp_path, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    built = {p.relative_to(tmp_path / "site").as_posix() for p in (tmp_path / "site").rglob("*.html")}
    for page in DOCS.rglob("*.md"):
        name = page.relative_to(DOCS).with_suffix("").as_posix()
        assert ("index.html" if name == "index" else f"{name}/index.html") in built
    for path in (tmp_path / "site").rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert "The site's build" not in text, f"{path}: a place was not filled"
        assert not re.search(r'(?:src|href)="https?://fonts\.', text), f"{path} loads fonts from elsewhere"
    operator = (tmp_path / "site" / "operators" / "embedding_bag" / "index.html").read_text(encoding="utf-8")
    assert "EmbeddingBag2DWeighted" in operator
    assert "padding_idx" in operator
