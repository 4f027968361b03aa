"""Static text models: model2vec, StaticEmbedding of sentence-transformers, wordllama, and their like.

Each is a table in a .safetensors file and a tokenizer.json. What their own libraries compute was read in model2vec
0.10, sentence-transformers 6.2 and wordllama 0.4.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import arrays, checkpoint
from .graphs import Static, imported
from .imported import Imported, Options
from .tokenizer import Tokenizer, parse

_TABLE, _TOKENIZER, _CONFIG = "model.safetensors", "tokenizer.json", "config.json"
_PROMPTS, _MODULES = "config_sentence_transformers.json", "modules.json"
#: The key of the table, as model2vec writes it and as torch names the weight of a StaticEmbedding.
_MODEL2VEC_KEY, _TORCH_KEY = "embeddings", "embedding.weight"
#: What vectors are divided by at least: F.normalize's, and what model2vec adds.
_TORCH_SMALLEST, _MODEL2VEC_SMALLEST = 1e-12, 1e-32
_MODEL2VEC_LENGTH = 512
#: The dtypes of a model2vec table.
_STORED = {**checkpoint.FLOATS, "I8": checkpoint.INTEGERS["I8"]}
_LARGEST_TEXT = 2**20  # bytes of a configuration or the beginning of a README
_FLOAT32 = np.dtype(np.float32)


class _Table(NamedTuple):
    """What a model2vec or StaticEmbedding file holds."""

    rows: np.ndarray
    mapping: np.ndarray | None
    weights: np.ndarray | None


class Model2Vec:
    """A folder that ``model2vec.StaticModel.save_pretrained`` writes."""

    name = "model2vec"
    files = f"a folder with {_TABLE} ({_MODEL2VEC_KEY!r}), {_TOKENIZER} and {_CONFIG}"

    def recognises(self, path: Path) -> bool:
        return _has(path, _TABLE, _TOKENIZER, _CONFIG) and _MODEL2VEC_KEY in checkpoint.names(path / _TABLE)

    def load(self, path: Path, options: Options) -> Imported:
        options.check_only(self.name, "tokenizer")
        _need(path, _TABLE, _TOKENIZER, _CONFIG)
        for head in ("head.safetensors", "pipeline.skops"):
            if (path / head).exists():
                raise ValueError(f"{path / head}: is a classifier behind the model, which is not imported: remove it")
        config = _json(path / _CONFIG)
        table = _table(path / _TABLE, _MODEL2VEC_KEY)
        tokenizer = _tokenizer(options, path / _TOKENIZER)
        length = config.get("max_length", _MODEL2VEC_LENGTH)
        if not (length is None or (isinstance(length, int) and length > 0)):
            raise ValueError(f"{path / _CONFIG}: max_length is {length!r}, expected a number of tokens or null")
        characters = None
        if length is not None:
            characters = length * int(statistics.median(map(len, tokenizer.vocabulary)))
        static = Static(
            table=table.rows,
            output=_FLOAT32 if table.rows.dtype == np.int8 else table.rows.dtype,
            mapping=table.mapping,
            weights=table.weights,
            skipped=tokenizer.unknown,
            smallest_norm=_smallest(options, bool(config.get("normalize", False)), _MODEL2VEC_SMALLEST),
        )
        _check_tokens(path, tokenizer, static.num_tokens)
        text = tokenizer.with_settings(max_length=length, max_characters=characters)
        return imported(static, text, _found(self.name, path, folder=path), options)


class StaticEmbedding:
    """A folder of sentence-transformers whose first module is a StaticEmbedding."""

    name = "static-embedding"
    files = f"a folder of sentence-transformers, with {_MODULES}, that begins with a StaticEmbedding"

    def recognises(self, path: Path) -> bool:
        if not (path / _MODULES).is_file():
            return False
        modules = _modules(path)
        return bool(modules) and modules[0][0] == "StaticEmbedding"

    def load(self, path: Path, options: Options) -> Imported:
        options.check_only(self.name, "tokenizer")
        _need(path, _MODULES)
        modules = _modules(path)
        kinds = [kind for kind, _ in modules]
        if kinds not in (["StaticEmbedding"], ["StaticEmbedding", "Normalize"]):
            raise ValueError(
                f"{path / _MODULES}: has the modules {', '.join(kinds) or 'none'}, expected StaticEmbedding alone or "
                "with Normalize"
            )
        folder = path / modules[0][1]
        _need(folder, _TABLE, _TOKENIZER)
        names = checkpoint.names(folder / _TABLE)
        table = _table(folder / _TABLE, _TORCH_KEY if _TORCH_KEY in names else _MODEL2VEC_KEY)
        static = Static(
            table=table.rows,
            output=_FLOAT32 if table.rows.dtype == np.int8 or table.weights is not None else table.rows.dtype,
            mapping=table.mapping,
            weights=table.weights,
            smallest_norm=_smallest(options, len(modules) > 1, _TORCH_SMALLEST),
        )
        found = _found(self.name, path, folder=path)
        prefix = ""
        if (path / _PROMPTS).is_file():
            config = _json(path / _PROMPTS)
            prefix = _prompt(path / _PROMPTS, config)
            versions = config.get("__version__")
            if isinstance(versions, dict) and isinstance(versions.get("sentence_transformers"), str):
                found["version"] = f"sentence-transformers {versions['sentence_transformers'][:40]}"
        if prefix:
            found["prompt"] = prefix
        tokenizer = _tokenizer(options, folder / _TOKENIZER).with_settings(keeps_truncation=True).with_prefix(prefix)
        _check_tokens(path, tokenizer, static.num_tokens)
        return imported(static, tokenizer, found, options)


class WordLlama:
    """The weights of wordllama: ``weights/<name>_<D>.safetensors``, with the tokenizer in ``tokenizers``."""

    name = "wordllama"
    files = "<name>_<D>.safetensors in a folder weights, beside tokenizers/<name>_tokenizer_config.json"

    def recognises(self, path: Path) -> bool:
        return _wordllama_tokenizer(path) is not None and _TORCH_KEY in checkpoint.names(path)

    def load(self, path: Path, options: Options) -> Imported:
        options.check_only(self.name, "tokenizer")
        beside = _wordllama_tokenizer(path)
        if beside is None and options.tokenizer is None:
            raise ValueError(f"{path}: is not {self.files}")
        rows = arrays.checked(checkpoint.read(path, _TORCH_KEY), f"{path}: tensor {_TORCH_KEY!r}")
        tokenizer = _tokenizer(options, beside or path).with_settings()
        found = _found(self.name, path, folder=path.parent)
        mapping, num_tokens = None, max(tokenizer.vocabulary.values(), default=-1) + 1
        if num_tokens > len(rows) > 0:  # wordllama clips ids to the table
            mapping = np.minimum(np.arange(num_tokens), len(rows) - 1)
            found["without rows"] = f"{num_tokens - len(rows):,} tokens, for which wordllama takes the last row"
        smallest = _smallest(options, False, _TORCH_SMALLEST)
        static = Static(table=rows, output=_FLOAT32, mapping=mapping, smallest_norm=smallest)
        _check_tokens(path, tokenizer, static.num_tokens)
        return imported(static, tokenizer, found, options)


class SafeTensors:
    """Any .safetensors file with a table and a tokenizer.json beside it: plain means."""

    name = "safetensors"
    files = f"a .safetensors file with one table [V, D], or --key NAME, and {_TOKENIZER} beside it"

    def recognises(self, path: Path) -> bool:
        return path.suffix == ".safetensors" and path.is_file()

    def load(self, path: Path, options: Options) -> Imported:
        options.check_only(self.name, "key", "tokenizer")
        beside = path.with_name(_TOKENIZER)
        if options.tokenizer is None and not beside.is_file():
            raise ValueError(f"{path}: there is no {_TOKENIZER} beside it: give the tokenizer's file")
        names = checkpoint.names(path)
        if options.key is None and len(names) != 1:
            raise ValueError(f"{path}: which tensor is the table? give its key; it has: {checkpoint.named(names)}")
        key = names[0] if options.key is None else options.key
        rows = arrays.checked(checkpoint.read(path, key), f"{path}: tensor {key!r}")
        static = Static(table=rows, output=rows.dtype, smallest_norm=_smallest(options, False, _TORCH_SMALLEST))
        tokenizer = _tokenizer(options, beside).with_settings(keeps_truncation=True)
        _check_tokens(path, tokenizer, static.num_tokens)
        found = _found(self.name, path, folder=path.parent)
        return imported(static, tokenizer, {**found, "tensor": key[:100]}, options)


FORMATS = (Model2Vec(), StaticEmbedding(), WordLlama(), SafeTensors())


def _has(folder: Path, *names: str) -> bool:
    return folder.is_dir() and all((folder / name).is_file() for name in names)


def _need(folder: Path, *names: str) -> None:
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: has no file {name}")


def _json(path: Path) -> dict[str, Any]:
    """A small file of JSON."""
    return parse(_beginning(path), str(path))


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_LARGEST_TEXT)


def _table(path: Path, key: str) -> _Table:
    """A table with the tensors that model2vec may have beside it."""
    names = checkpoint.names(path)
    rows = checkpoint.read(path, key, _STORED)
    mapping = checkpoint.read(path, "mapping", checkpoint.INTEGERS) if "mapping" in names else None
    weights = checkpoint.read(path, "weights").astype(np.float32) if "weights" in names else None
    for name, array in (("mapping", mapping), ("weights", weights)):
        if array is not None and array.ndim != 1:
            raise ValueError(f"{path}: tensor {name!r} has shape {list(array.shape)}, expected [num_tokens]")
    if rows.dtype != np.int8:
        arrays.checked(rows, f"{path}: tensor {key!r}")
    return _Table(rows, mapping, weights)


def _tokenizer(options: Options, path: Path) -> Tokenizer:
    """The tokenizer that the options name, or the one at ``path``."""
    path = path if options.tokenizer is None else Path(options.tokenizer)
    return Tokenizer(parse(path.read_bytes(), str(path)), str(path))


def _check_tokens(path: Path, tokenizer: Tokenizer, num_tokens: int) -> None:
    """Every id that a tokenizer gives must have a row."""
    largest = max(tokenizer.vocabulary.values(), default=-1)
    if largest >= num_tokens:
        raise ValueError(f"{path}: its tokenizer has token {largest}, and its table rows for {num_tokens} tokens")


def _smallest(options: Options, normalized: bool, smallest: float) -> float | None:
    """`Static.smallest_norm`, as the options have it or as the model has it."""
    return smallest if (normalized if options.normalize is None else options.normalize) else None


def _modules(path: Path) -> list[tuple[str, str]]:
    """The last word of the type, and the folder, of each module of sentence-transformers."""
    found = parse(b'{"modules": ' + _beginning(path / _MODULES) + b"}", str(path / _MODULES))["modules"]
    modules = []
    for module in found if isinstance(found, list) else [None]:
        match module:
            case {"type": str(kind), "path": str(folder)} if not Path(folder).is_absolute() and ".." not in folder:
                modules.append((kind.rpartition(".")[2][:40], "" if folder == "." else folder))
            case _:
                raise ValueError(f"{path / _MODULES}: is not a list of modules, each with a type and a path")
    return modules


def _prompt(path: Path, config: Mapping[str, Any]) -> str:
    """The prompt that sentence-transformers puts before every text by default."""
    name = config.get("default_prompt_name")
    if name is None:
        return ""
    prompts = config.get("prompts")
    prompt = prompts.get(name) if isinstance(prompts, dict) and isinstance(name, str) else None
    if not isinstance(prompt, str):
        raise ValueError(f"{path}: has no prompt {str(name)[:40]!r}, which it names as the default")
    return prompt


def _wordllama_tokenizer(path: Path) -> Path | None:
    """The tokenizer of wordllama's weights at ``path``, where it is; None if these are not its weights."""
    found = re.fullmatch(r"(.+)_\d+\.safetensors", path.name)
    if found is None or path.parent.name != "weights" or not path.is_file():
        return None
    beside = path.parent.parent / "tokenizers" / f"{found[1]}_tokenizer_config.json"
    return beside if beside.is_file() else None


def _found(name: str, path: Path, *, folder: Path) -> dict[str, str]:
    """What is said of every source first."""
    found = {"format": name, "source": path.name}
    licence = _licence(folder / "README.md")
    return found if licence is None else {**found, "licence": licence}


def _licence(readme: Path) -> str | None:
    """The licence that the front matter of a model card states."""
    if not readme.is_file():
        return None
    lines: Iterable[str] = _beginning(readme).decode("utf-8", "replace").splitlines()
    inside = False
    for line in lines:
        if line.strip() == "---":
            if inside:
                return None
            inside = True
        elif not inside:
            return None
        elif found := re.fullmatch(r"license:\s*(\S.*?)\s*", line):
            return found[1].strip("\"'")[:100]
    return None
