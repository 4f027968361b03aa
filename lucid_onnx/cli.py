"""The command ``lucid-onnx``: demo, build, run, info, inspect, fuse, lower, quantize, parity.

What a user can get wrong ends as one line on stderr, ``lucid-onnx: error: ...``, and exit code 2. Anything else
that goes wrong is a defect, and shows its traceback.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import sys
import time
import tokenize
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, cast

import numpy as np
import onnx

from . import checkpoint, demo, info
from .builder import Replacing, build_model, save
from .ops.embedding_bag import spec

_MISSING: ImportError | None = None
try:  # the extras bring them; annotations that name them are never evaluated before `main` looked
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table
    from rich.text import Text
except ImportError as error:
    _MISSING = error

if TYPE_CHECKING:
    import onnxruntime

    from .parity.matrix import Report
    from .rewrite import FuseReport, QuantizeReport

EXIT_DIFFERS, EXIT_ERROR, EXIT_INTERRUPTED = 1, 2, 130
_EXTRAS = "pip install 'lucid-onnx[cpu]' (or 'lucid-onnx[gpu]')"
_PROVIDERS = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"]}
#: onnxruntime's names of the element types that a .npy file can hold, and bfloat16.
_DTYPES = {
    f"tensor({name})": np.dtype(dtype)
    for name, dtype in {
        "float": np.float32,
        "double": np.float64,
        "float16": np.float16,
        "bfloat16": spec.BFLOAT16,
        "bool": np.bool_,
        **{f"{sign}int{bits}": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
    }.items()
}
_SHOWN_FAILURES = 20
#: What numpy.save makes of an array of ml_dtypes.bfloat16: items of two bytes.
_RAW_BFLOAT16 = np.dtype("V2")


class UserError(Exception):
    """A mistake of the user's, told in one line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, by default the process's own.

    Returns:
        The exit code: 0; 1 where the demo's forms or parity's runtimes differ; 2 after an error, which is on stderr;
        130 if interrupted.
    """
    if _MISSING is not None:
        return _fail(f"{str(_MISSING.name).partition('.')[0]} is not installed: {_EXTRAS}")
    for stream in (sys.stdout, sys.stderr):  # a terminal may lack a character of the text that is shown
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        result = _app()(args=None if argv is None else list(argv), prog_name="lucid-onnx", standalone_mode=False)
    except UserError as error:
        return _fail(str(error))
    except MemoryError:
        return _fail("out of memory")
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except _usage_error() as error:
        return _fail(error.format_message())
    return result if isinstance(result, int) else 0


def _fail(message: str) -> int:
    print(f"lucid-onnx: error: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_ERROR


def _usage_error() -> type[typer.BadParameter]:
    """The base of what Typer raises over a command line. It is click's UsageError, or Typer's own copy of it."""
    return cast("type[typer.BadParameter]", typer.BadParameter.__mro__[1])


def _app() -> typer.Typer:
    app = typer.Typer(
        help="embedding_bag for ONNX: build models, run them, and see what runs.",
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
    )
    app.callback(invoke_without_command=True)(_main)
    app.command("demo")(_demo)
    app.command("build")(_build)
    app.command("run")(_run)
    app.command("info")(_info)
    app.command("inspect")(_inspect)
    app.command("fuse")(_fuse)
    app.command("lower")(_lower)
    app.command("quantize")(_quantize)
    app.command("parity")(_parity)
    return app


def _real(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is no number") from error


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is no integer") from error


def _version(asked: bool) -> None:
    if asked:
        print(f"lucid-onnx {info.version()}")
        raise typer.Exit()


def _main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        text = context.get_help()  # empty where rich has printed it already
        if text:
            print(text)


def _demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The model to write; a file of that name is replaced.")
    ] = Path(demo.DEFAULT_OUTPUT),
    query: Annotated[
        list[str] | None, typer.Option("--query", "-q", help="What to look for, instead of three examples. Repeatable.")
    ] = None,
) -> int:
    """Search Python's documentation with one model, in all of its forms.

    Pools the documentation that comes with Python by one model: by the native kernel, by the same file without the
    library, by its standard form and by NumPy. Prints the hits, the times, what ran, and how far the results are
    apart. The exit code is 1 if that is too far. Nothing is downloaded; the model (64 MiB) is written to the current
    directory unless --output says otherwise.

    Example: `lucid-onnx demo --query "how do I leave a loop early"`
    """
    _need_onnxruntime()
    _check_output(output)
    _isa()
    with _refused(demo.DemoError), _refused_by_runtime(f"{output}: "), _writing(output):
        result = demo.run(output, query or demo.QUERIES)
    demo.show(result, _console())
    return 0 if result.agrees else EXIT_DIFFERS


def _build(
    table: Annotated[
        str, typer.Argument(metavar="TABLE", help="The rows: TABLE.npy, TABLE.safetensors or TABLE.safetensors:KEY.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The model to write; a file of that name is replaced.")
    ],
    mode: Annotated[str, typer.Option(help="sum, mean or max.")] = "mean",
    max_norm: Annotated[
        float | None, typer.Option(parser=_real, metavar="NUMBER", help="Scale rows with a larger norm down to it.")
    ] = None,
    norm_type: Annotated[
        float, typer.Option(parser=_real, metavar="NUMBER", help="The p of that norm; inf for the largest magnitude.")
    ] = 2.0,
    padding_idx: Annotated[
        int | None, typer.Option(parser=_integer, metavar="INTEGER", help="A row to skip; negative from the end.")
    ] = None,
    include_last_offset: Annotated[
        bool, typer.Option("--include-last-offset", help="The last offset ends the last bag.")
    ] = False,
    two_d: Annotated[bool, typer.Option("--two-d", help="Indices are [B, L], a bag per row; no offsets.")] = False,
    per_sample_weights: Annotated[
        bool, typer.Option("--per-sample-weights", help="The model takes a weight per index; mode sum only.")
    ] = False,
    index_dtype: Annotated[str, typer.Option(help="int32 or int64, of indices and offsets.")] = "int64",
    form: Annotated[
        str, typer.Option(help="portable (runs everywhere), standard (no custom domain) or native (needs the library).")
    ] = "portable",
    opset: Annotated[
        int,
        typer.Option(
            parser=_integer, metavar="INTEGER", help=f"Of the standard operators, {spec.MIN_OPSET} to {spec.MAX_OPSET}."
        ),
    ] = spec.DEFAULT_OPSET,
    external_data: Annotated[
        bool | None,
        typer.Option(
            "--external-data/--no-external-data",
            help="Put the table beside the model, in OUTPUT.data. By default only if it exceeds 2 GiB.",
        ),
    ] = None,
) -> None:
    """Make a model of one bag from a table of rows.

    The table is float32, float16, bfloat16 or float64, [V, D]. A .npy file has no bfloat16: raw items of two bytes,
    which numpy.save makes of ml_dtypes.bfloat16, are taken for it.

    Example: `lucid-onnx build users.npy -o users.onnx --mode sum --per-sample-weights`
    """
    rows = _read_table(table)
    _check_output(output)
    if output.exists() and output.samefile(_split_key(table)[0]):
        raise UserError(f"--output {output}: is the table itself")
    with _refused(TypeError, ValueError):
        model = build_model(
            rows,
            mode=mode,
            max_norm=max_norm,
            norm_type=norm_type,
            padding_idx=padding_idx,
            include_last_offset=include_last_offset,
            two_d=two_d,
            per_sample_weights=per_sample_weights,
            index_dtype=index_dtype,
            form=form,  # type: ignore[arg-type]  # build_model refuses what is none
            opset=opset,
        )
    with _refused(ValueError), _writing(output), _progress() as progress:
        save(model, output, external_data=external_data, progress=progress)
    _show_built(output, rows, model, form)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None] | None]:
    """A bar on the terminal, to be told the bytes written and the bytes to write; None where there is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("writing"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("")
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _run(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The .onnx file.")],
    inputs: Annotated[
        list[str] | None, typer.Option("--input", "-i", metavar="NAME=FILE.npy", help="An input. Repeatable.")
    ] = None,
    native: Annotated[
        bool | None,
        typer.Option("--native/--no-native", help="Register the native kernels; by default if they are installed."),
    ] = None,
    provider: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the outputs: a folder, or FILE.npy for a single output."),
    ] = None,
) -> None:
    """Run a model over .npy files.

    A .npy file has no bfloat16. Outputs of that type are written as float32, which loses nothing. Inputs are read
    from float32 if every value in it is a bfloat16, or from raw items of two bytes, as numpy.save writes
    ml_dtypes.bfloat16.

    Example: `lucid-onnx run users.onnx --input indices=ids.npy --input offsets=starts.npy -o pooled.npy`
    """
    files = _named_files(inputs or [])
    ort = _need_onnxruntime()
    isa = _isa() if native is not False else None
    if native and isa is None:
        raise UserError("--native: this installation of lucid-onnx has no native library")
    session = _session(ort, model, isa is not None, provider)
    feeds = _feeds(session, model, files)
    names = [o.name for o in session.get_outputs()]
    targets = None if output is None else _targets(output, names)
    options = ort.RunOptions()
    options.log_severity_level = 4
    with _refused_by_runtime(f"{model}: "):
        begin = time.perf_counter()
        results = session.run(None, feeds, options)
        seconds = time.perf_counter() - begin
    arrays = dict(zip(names, results, strict=True))
    table = _table("output", "dtype", "shape", "values")
    for name, result in arrays.items():
        dtype = str(result.dtype) if isinstance(result, np.ndarray) else type(result).__name__
        table.add_row(Text(name), dtype, _shape(np.shape(result)), Text(_preview(result)))
    if output is not None and targets is not None:
        _write_arrays(output, {targets[name]: (name, array) for name, array in arrays.items()})
    console = _console()
    console.print(table)
    kernels = f"registered ({isa})" if isa else "not registered"
    _say(console, f"{seconds * 1e3:.3g} ms on {provider}; native kernels: {kernels}")
    for name, path in (targets or {}).items():
        as_float32 = " (bfloat16 as float32)" if arrays[name].dtype == spec.BFLOAT16 else ""
        _say(console, f"wrote {path}{as_float32}")


def _info(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="An .onnx file to look into.")] = None,
    table_memory: Annotated[
        str, typer.Option(help="What to show of the model's tables: auto, inplace, hugepage_copy or mmap.")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Show versions, instruction sets and providers, the bags of a model, and where a session would keep its tables.

    Example: `lucid-onnx info users.onnx --json`
    """
    with _refused(OSError, ValueError):
        installed = info.installation()
    found = None
    if model is not None:
        _check_file(model)
        with _refused(ValueError), _reading(model):
            found = info.model(model)
    with _refused(OSError, ValueError):
        places = None if found is None else info.table_memory(found, table_memory)
    if as_json:
        data = dataclasses.asdict(installed)
        if found is not None:
            data["model"] = dataclasses.asdict(found)
            data["table_memory"] = None if places is None else dataclasses.asdict(places)
        print(json.dumps(_finite(data), indent=2, allow_nan=False))
        return
    console = _console()
    _show_installation(console, installed)
    if found is not None:
        _show_model(console, found)
    if places is not None and places.tables:
        _show_table_memory(console, places)


def _inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The .onnx file.")],
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
    svg: Annotated[
        Path | None, typer.Option("--svg", help="Draw the nodes that would be fused, before and after.")
    ] = None,
) -> None:
    """Show the bags of a model, and what `fuse` would make one, or why it would not.

    Example: `lucid-onnx inspect ranker.onnx --svg ranker.svg`
    """
    fuse = _rewriting("fuse")
    _check_file(model)
    if svg is not None:
        _check_output(svg, "--svg")
        if svg.exists() and svg.samefile(model):
            raise UserError(f"--svg {svg}: is the model itself")
    with _refused(ValueError), _reading(model):
        found = info.model(model)
    with _refused_model(model), _reading(model):
        report = fuse(model)
    if svg is not None:
        drawn = _rewriting("picture").draw(onnx.load(model, load_external_data=False), report, Path(model).name)
        with _writing(svg), Replacing(svg) as files:
            files.open(svg.name).write(drawn.encode())
    if as_json:
        print(json.dumps(_finite({**dataclasses.asdict(found), **report.as_dict()}), indent=2, allow_nan=False))
        return
    console = _console()
    _show_model(console, found)
    _show_fused(console, report, "would fuse")
    if svg is not None:
        _say(console, f"wrote {svg}")


def _fuse(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The .onnx file.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The model to write; a file of that name is replaced.")
    ],
    form: Annotated[
        str, typer.Option(help="portable (runs everywhere), standard (no custom domain) or native (needs the library).")
    ] = "portable",
    assume_nonempty: Annotated[
        bool,
        typer.Option("--assume-nonempty", help="Indices [B, L] under a mean or maximum have L > 0, though unsaid."),
    ] = False,
    merge_tables: Annotated[
        bool,
        typer.Option("--merge-tables", help="One node for bags of equal attributes that a Concat lays side by side."),
    ] = False,
    report: Annotated[
        Path | None, typer.Option("--report", help="Write what was fused, and what was not and why, as JSON.")
    ] = None,
) -> None:
    """Put one node in the place of each bag that a model has written out.

    Finds nn.EmbeddingBag as torch exports it, with dynamo and without, ATen nodes, a Gather with a reduction, and the
    standard form. External data stays where it is, or is copied beside OUTPUT if that is in another folder.

    Example: `lucid-onnx fuse ranker.onnx -o fast.onnx`
    """
    fuse = _rewriting("fuse")
    _check_file(model)
    _check_output(output)
    _check_report(report, output)
    with _refused_model(model), _rewriting_files(model, output):
        found = fuse(model, output, form=form, assume_nonempty=assume_nonempty, merge_tables=merge_tables)
    if report is not None:
        _write_report(report, found)
    console = _console()
    _say(console, f"wrote {output} ({_bytes(output.stat().st_size)})")
    if report is not None:
        _say(console, f"wrote {report}")
    _show_fused(console, found, "fused")


def _lower(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The .onnx file.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The model to write; a file of that name is replaced.")
    ],
    form: Annotated[
        str, typer.Option(help="standard (no custom domain), portable (runs everywhere) or native (needs the library).")
    ] = "standard",
    ragged: Annotated[
        str,
        typer.Option(help="blocks (all bags at once, in bounded memory), loop (small, slow) or padded (one matrix)."),
    ] = "blocks",
    longest_bag: Annotated[
        int | None,
        typer.Option(parser=_integer, metavar="INTEGER", help="The most positions of a bag, for --ragged padded."),
    ] = None,
) -> None:
    """Turn the bags of a model into standard operators, or into another form.

    External data stays where it is, or is copied beside OUTPUT if that is in another folder.

    Example: `lucid-onnx lower fast.onnx -o anywhere.onnx`
    """
    lower = _rewriting("lower")
    _check_file(model)
    _check_output(output)
    with _refused_model(model), _rewriting_files(model, output):
        lower(model, output, form=form, ragged=ragged, longest_bag=longest_bag)
    console = _console()
    _say(console, f"wrote {output} ({_bytes(output.stat().st_size)}), {form} form")


def _quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The .onnx file.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The model to write; a file of that name is replaced.")
    ],
    dtype: Annotated[
        str, typer.Option(help="int8 or int4 (symmetric), uint8 or uint4 (with a bias), float16 or bfloat16.")
    ] = "int8",
    min_bytes: Annotated[
        int, typer.Option(parser=_integer, metavar="INTEGER", help="Leave tables with fewer bytes as they are.")
    ] = 0,
    form: Annotated[
        str | None, typer.Option(help="portable, standard or native; by default that of the model.")
    ] = None,
    report: Annotated[Path | None, typer.Option("--report", help="Write what became of each table, as JSON.")] = None,
) -> None:
    """Make the tables of a model's bags smaller: codes of 8 or 4 bits with a scale per row, or 16-bit floats.

    The error of a row is the length of what it lost, relative to its own. Bags that are written out as standard
    operators are no bags yet: `lucid-onnx fuse` first. External tables are written to OUTPUT.data part by part.

    Example: `lucid-onnx quantize fast.onnx -o small.onnx --dtype uint4`
    """
    quantize = _rewriting("quantize")
    _check_file(model)
    _check_output(output)
    _check_report(report, output)
    with _refused_model(model), _rewriting_files(model, output), _progress() as progress:
        found = quantize(model, output, dtype=dtype, min_bytes=min_bytes, form=form, progress=progress)
    if report is not None:
        _write_report(report, found)
    console = _console()
    _say(console, f"wrote {output} ({_bytes(output.stat().st_size)})")
    if report is not None:
        _say(console, f"wrote {report}")
    _show_quantized(console, found)


def _check_report(report: Path | None, output: Path) -> None:
    if report is not None:
        _check_output(report, "--report")
        if report.absolute() == output.absolute():
            raise UserError(f"--report {report}: is the model to write")


def _write_report(path: Path, report: FuseReport | QuantizeReport) -> None:
    with _writing(path), Replacing(path) as files:
        files.open(path.name).write(json.dumps(_finite(report.as_dict()), indent=2, allow_nan=False).encode())


def _parity(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="An .onnx file; without one, the conformance suite.")
    ] = None,
    runtimes: Annotated[
        str, typer.Option(metavar="NAME,NAME", help="Which runtimes; --list shows their names.")
    ] = "all",
    cases: Annotated[
        str | None,
        typer.Option(
            metavar="PATTERN",
            help="Of the suite, the cases with such names: 'max_*'. Without it, slow runtimes are given some of all.",
        ),
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input", "-i", metavar="NAME=FILE.npy", help="An input of MODEL; others are made up. Repeatable."
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            parser=_real,
            metavar="NUMBER",
            help="Of MODEL's outputs, as a part of the largest magnitude; by default 2e-5.",
        ),
    ] = None,
    bad_input: Annotated[bool, typer.Option("--bad-input/--no-bad-input", help="Try bad input as well.")] = True,
    strict: Annotated[bool, typer.Option("--strict", help="Known differences fail as well.")] = False,
    runs: Annotated[
        int, typer.Option(parser=_integer, metavar="INTEGER", help="Of each case; bits must be equal.")
    ] = 20,
    budget: Annotated[
        float, typer.Option(parser=_real, metavar="SECONDS", help="For each runtime; what is left is not run.")
    ] = 240.0,
    at_once: Annotated[
        int, typer.Option("--at-once", parser=_integer, metavar="INTEGER", help="Runtimes beside each other.")
    ] = 2,
    html: Annotated[Path | None, typer.Option("--html", help="Write the report as one HTML file.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write everything that was found as JSON.")] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="Write a small table of it.")] = None,
    names: Annotated[bool, typer.Option("--list", help="Show the runtimes, and which are here, and stop.")] = False,
) -> int:
    """Compare runtimes: where the numbers are the same, where they differ and by how much.

    Runs the conformance suite, cases of a larger size and some standard operators and functions, or MODEL in all of
    its forms, on every runtime that is here, each in a process of its own. A runtime that crashes or hangs is a
    result. The exit code is 1 if a runtime that runs something gives numbers beyond the tolerance, other bits in some
    run, or no answer, and it is not known why.

    Example: `lucid-onnx parity ranker.onnx --runtimes onnxruntime,web-webgpu --html report.html`
    """
    from .parity import html as as_html
    from .parity import markdown as as_markdown
    from .parity import matrix, work

    chosen = _chosen_runtimes(runtimes)
    if names:
        return _show_runtimes(chosen)
    for option, path in (("--html", html), ("--json", as_json), ("--markdown", markdown)):
        if path is not None:
            _check_output(path, option)
    for option, value in (("--runs", runs), ("--budget", budget), ("--at-once", at_once)):
        if not value >= 1:
            raise UserError(f"{option} {value}: must be at least 1")
    if model is None:
        if inputs or tolerance is not None:
            raise UserError("--input and --tolerance are MODEL's, and no MODEL is given")
        pattern = "*" if cases is None else cases
        jobs = [*work.conformance(pattern), *work.scale(pattern), *work.operators(pattern)]
        if not jobs:
            raise UserError(f"--cases {cases}: no case has such a name")
    else:
        if cases is not None:
            raise UserError(f"--cases {cases}: is the suite's, and MODEL {model} is given")
        _check_file(model)
        given = {name: _read_npy(path) for name, path in _named_files(inputs or []).items()}
        limit = work.MODEL_TOLERANCE if tolerance is None else tolerance
        with _refused(work.CannotRunError), _reading(model):
            jobs = work.model(Path(model), given, tolerance=limit)
    limits = matrix.Limits(runs=runs, budget=budget, at_once=at_once, every_case=cases is not None)
    with _bars() as progress:
        report = matrix.run(chosen, jobs, bad_input=bad_input, limits=limits, progress=progress)
    texts = {
        html: lambda: as_html.page(report),
        as_json: lambda: json.dumps(report.as_dict(), indent=1, allow_nan=False),
        markdown: lambda: as_markdown.page(report),
    }
    for path, text in texts.items():
        if path is not None:
            with _writing(path), Replacing(path) as files:
                files.open(path.name).write(text().encode())
    console = _console()
    failures = _show_parity(console, report, strict)
    for path in texts:
        if path is not None:
            _say(console, f"wrote {path} ({_bytes(path.stat().st_size)})")
    return EXIT_DIFFERS if failures else 0


def _chosen_runtimes(text: str) -> list[Any]:
    from .parity.adapters import ENTRIES

    if text == "all":
        return list(ENTRIES.values())
    chosen = []
    for name in dict.fromkeys(part.strip() for part in text.split(",")):
        if name not in ENTRIES:
            raise UserError(f"--runtimes {name}: is not one of {', '.join(ENTRIES)}")
        chosen.append(ENTRIES[name])
    return chosen


def _show_runtimes(chosen: Sequence[Any]) -> int:
    from .parity import matrix

    table = _table("name", "runtime", "here")
    for column in matrix.run(chosen, [], bad_input=False).columns:
        table.add_row(column.runtime, column.title, Text(column.version or f"no: {column.missing}"))
    _console().print(table)
    return 0


@contextlib.contextmanager
def _bars() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each runtime on the terminal, to be told its name, the pieces done and the pieces to do."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda runtime, done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f} of {task.total:.0f}"))
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def progress(runtime: str, done: int, total: int) -> None:
            if runtime not in tasks:
                tasks[runtime] = bars.add_task(runtime, total=total)
            bars.update(tasks[runtime], completed=done, total=total)

        yield progress


def _show_parity(console: Console, report: Report, strict: bool) -> int:
    """The table, the failures, and how many there are."""
    from .parity import matrix

    statuses = [s for s in matrix.STATUSES if any(c.status == s for c in report.cells) and s != matrix.ABSENT]
    table = _table("runtime", "form", *statuses, "worst error")
    for column in report.columns:
        if column.missing is not None:
            continue
        for form in column.forms:
            cells = [c for c in report.cells if (c.runtime, c.form) == (column.runtime, form)]
            if not cells:
                continue
            margins = [c.difference.margin for c in cells if c.difference is not None]
            worst = f"{max(margins):.3g} tolerances" if margins else "-"
            counts = [str(sum(c.status == s for c in cells) or "-") for s in statuses]
            table.add_row(column.runtime, form, *counts, worst)
    console.print(table)
    for column in report.columns:
        if column.missing is not None:
            _say(console, f"not here: {column.runtime}: {column.missing}")
    known = [c for c in report.cells if c.status in matrix.FAILURES and c.why]
    failures = report.failures + (known if strict else [])
    if known and not strict:
        _say(console, f"{len(known)} differences are known; the reports and --strict have them")
    if report.unseen:
        _say(console, f"{len(report.unseen)} that are known did not show; the reports have them")
    for cell in failures[:_SHOWN_FAILURES]:
        _say(console, f"{cell.runtime}, {cell.form}, {cell.job}: {cell.status}: {cell.note}")
    if len(failures) > _SHOWN_FAILURES:
        _say(console, f"and {len(failures) - _SHOWN_FAILURES} more")
    return len(failures)


def _rewriting(name: str) -> Any:
    """A function of `lucid_onnx.rewrite`, which needs onnx-ir."""
    try:
        from . import rewrite
    except ImportError as error:
        raise UserError(str(error)) from error
    return getattr(rewrite, name)


@contextlib.contextmanager
def _refused_model(model: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        named = str(error).startswith((f"{model}: ", "form = ", "dtype = ", "min_bytes = "))
        raise UserError(str(error) if named else f"{model}: {error}") from error


@contextlib.contextmanager
def _rewriting_files(model: str, output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        beside = error.filename is not None and Path(os.fspath(error.filename)).parent == Path(model).parent
        if error.filename == model or (beside and isinstance(error, FileNotFoundError)):  # read, not written
            raise UserError(f"{error.filename}: {error.strerror}") from error
        raise UserError(f"{output}: cannot be written: {error.strerror or error}") from error


def _finite(data: Any) -> Any:
    """JSON has no infinity: it becomes the string "inf"."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return str(data) if isinstance(data, float) and not math.isfinite(data) else data


# What can go wrong, each with the exceptions that mean it.


@contextlib.contextmanager
def _refused(*errors: type[Exception], prefix: str = "") -> Iterator[None]:
    try:
        yield
    except errors as error:
        raise UserError(f"{prefix}{error}") from error


@contextlib.contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{os.fspath(path)}: {error.strerror or error}") from error


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def _refused_by_runtime(prefix: str) -> Iterator[None]:
    """onnxruntime's own exceptions, which have no common base, and plain RuntimeErrors."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    classes = tuple(c for c in vars(state).values() if isinstance(c, type) and issubclass(c, Exception))
    try:
        yield
    except Exception as error:
        if not isinstance(error, classes) and type(error) is not RuntimeError:
            raise
        raise UserError(prefix + _condensed(str(error)).removeprefix(prefix)) from error


def _condensed(message: str) -> str:
    """What an onnxruntime error says, without colours, codes, and where in its sources it was raised."""
    message = re.sub(r"\x1b\[[0-9;]*m", "", message)
    message = message.split("\nStacktrace:")[0]
    message = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", message)
    message = re.sub(r"Load model from .*? failed:\s*", "", message)
    message = re.sub(r"Non-zero status code returned while running (\S+) node\. Name:", r"\1 ", message)
    message = re.sub(r"^(\w+) ('.*?') Status Message: (?:\1: )?", r"\1 \2: ", message).replace(" '': ", ": ", 1)
    source = r"\S*\b[\w-]+\.(?:cc|cpp|cu|cuh|h|hpp):\d+\s+"
    signature = r"(?:(?:[\w:<>~*&]+\s+)*[\w:<>~]+(?:\(\))?\([^()]*\)\s*(?:const\s+)?|\w+\s+(?=[A-Z]))?"
    return re.sub(source + signature, "", message).strip()


def _need_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"onnxruntime is not installed: {_EXTRAS}") from error
    onnxruntime.set_default_logger_severity(4)
    return onnxruntime


def _isa() -> str | None:
    """The instruction set of the native kernels; None if they are not installed."""
    with _refused(OSError, ValueError):
        library = info.library()
    return None if library is None else library.active


def _check_file(path: str) -> None:
    if os.path.isdir(path):
        raise UserError(f"{path}: is a directory")
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file")
    if not os.path.isfile(path):
        raise UserError(f"{path}: is no regular file")


def _check_output(path: Path, option: str = "--output") -> None:
    if path.is_dir():
        raise UserError(f"{option} {path}: is a directory")
    if not path.parent.is_dir():
        raise UserError(f"{option} {path}: there is no directory {path.parent}")


# Reading.


def _read_npy(path: str) -> np.ndarray:
    """The array of a .npy file, mapped and in native byte order; raw items of two bytes are bfloat16."""
    _check_file(path)
    with _reading(path), open(path, "rb") as file:
        if file.read(6) != b"\x93NUMPY":
            raise UserError(f"{path}: not a .npy file")
    try:
        with _reading(path), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old headers, and of sizes that overflow, which is an error anyway
            array = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (ValueError, TypeError, OverflowError, EOFError, SyntaxError, tokenize.TokenError) as error:
        raise UserError(f"{path}: cannot be read as an array of numbers: {error}") from error
    if array.dtype == _RAW_BFLOAT16:
        array = array.view(spec.BFLOAT16)
    return _native_order(array)


def _native_order(array: np.ndarray) -> np.ndarray:
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _split_key(table: str) -> tuple[str, str | None]:
    """``file.safetensors:key`` in its parts."""
    path, found, key = table.rpartition(":")
    return (path, key) if found and path.endswith(".safetensors") else (table, None)


def _read_table(table: str) -> np.ndarray:
    path, key = _split_key(table)
    _check_file(path)
    rows = _read_safetensors(path, key) if path.endswith(".safetensors") else _read_npy(path)
    with _refused(TypeError, ValueError, prefix=f"{table}: "):
        spec.check_table(rows)
    return rows


def _read_safetensors(path: str, key: str | None) -> np.ndarray:
    """One tensor of a file, mapped."""
    with _refused(ValueError), _reading(path):
        if key is None:
            names = checkpoint.names(path)
            if len(names) != 1:
                raise UserError(
                    f"{path}: which tensor? add :KEY to the file's name; it has: {', '.join(names) or 'none'}"
                )
            (key,) = names
        return checkpoint.read(path, key)


def _named_files(inputs: Iterable[str]) -> dict[str, str]:
    files: dict[str, str] = {}
    for given in inputs:
        name, found, path = given.partition("=")
        if not (name and found and path):
            raise UserError(f"--input {given}: expected NAME=FILE.npy")
        if name in files:
            raise UserError(f"--input {name}: given twice, {files[name]} and {path}")
        files[name] = path
    return files


# Running.


def _session(ort: Any, model: str, native: bool, provider: str) -> onnxruntime.InferenceSession:
    from .session import InferenceSession

    if provider not in _PROVIDERS:
        raise UserError(f"--provider {provider}: is not one of cpu, cuda")
    wanted = _PROVIDERS[provider]
    if wanted[0] not in ort.get_available_providers():
        raise UserError(f"--provider {provider}: this onnxruntime has no {wanted[0]}: pip install 'lucid-onnx[gpu]'")
    _check_file(model)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        with _refused_by_runtime(f"{model}: "):
            session = InferenceSession(model, native=native, providers=wanted, session_options=options)
    except UserError as error:
        if native or f"{spec.DOMAIN}:" not in str(error):
            raise
        raise UserError(f"{error} (a model in the native form needs the native library)") from error
    if wanted[0] not in session.get_providers():
        raise UserError(f"--provider {provider}: {wanted[0]} did not start here; is its CUDA installed?")
    return session


def _feeds(session: onnxruntime.InferenceSession, model: str, files: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The inputs, checked against what the model takes."""

    wanted = {i.name: i for i in session.get_inputs()}
    for name in files:
        if name not in wanted:
            raise UserError(f"--input {name}: {model} has no such input; it has: {', '.join(wanted) or 'none'}")
    for name, value in wanted.items():
        if name not in files:
            raise UserError(f"--input {name}: missing; {model} takes {value.type} {_shape(value.shape)}")
    feeds = {}
    for name, value in wanted.items():
        if value.type not in _DTYPES:
            raise UserError(f"--input {name}: {model} takes {value.type} there, which no .npy file can hold")
        dtype = _DTYPES[value.type]
        feeds[name] = _feed(name, files[name], model, dtype, value.shape)
    return feeds


def _feed(name: str, path: str, model: str, dtype: np.dtype, shape: Sequence[int | str | None]) -> np.ndarray:
    array = _read_npy(path)
    if dtype == spec.BFLOAT16 and array.dtype == np.float32:
        array = _exact_bfloat16(name, path, array)
    if array.dtype != dtype:
        raise UserError(f"--input {name}: {path} has dtype {array.dtype}, {model} takes {dtype}")
    # onnxruntime gives [] both for a scalar and for an unknown rank.
    expected = [d if isinstance(d, int) else None for d in shape]
    fits = len(expected) == array.ndim and all(e in (None, d) for e, d in zip(expected, array.shape, strict=True))
    if shape and not fits:
        raise UserError(f"--input {name}: {path} has shape {_shape(array.shape)}, {model} takes {_shape(shape)}")
    return array


def _exact_bfloat16(name: str, path: str, array: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        rounded = array.astype(spec.BFLOAT16)
    lost = (rounded.astype(np.float32) != array) & ~np.isnan(array)
    if lost.any():
        where = np.unravel_index(int(lost.argmax()), lost.shape)
        position = ", ".join(str(int(i)) for i in where)
        raise UserError(f"--input {name}: {path} has {array[where]:.9g} at [{position}], which is no bfloat16")
    return rounded


def _targets(output: Path, names: Sequence[str]) -> dict[str, Path]:
    """Which file each output goes to."""
    if output.suffix == ".npy":
        _check_output(output)
        if len(names) != 1:
            raise UserError(f"--output {output}: one file, but the model has {len(names)} outputs; name a folder")
        return {names[0]: output}
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: is neither a folder nor FILE.npy")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no directory {output.parent}")
    targets = {name: output / (re.sub(r"[^\w.-]", "_", name) + ".npy") for name in names}
    if len(set(targets.values())) != len(targets):
        raise UserError(f"--output {output}: outputs {', '.join(names)} would share a file name")
    return targets


def _write_arrays(output: Path, arrays: Mapping[Path, tuple[str, Any]]) -> None:
    """Write all of them or none; bfloat16 as float32."""
    for name, array in arrays.values():
        if not isinstance(array, np.ndarray) or array.dtype.hasobject:
            raise UserError(f"--output {output}: output {name!r} is no array of numbers, which a .npy file could hold")
    folder = next(iter(arrays)).parent
    made = not folder.exists()
    with _writing(output):
        folder.mkdir(exist_ok=True)
        try:
            with Replacing(next(iter(arrays))) as files:
                for path, (_, array) in arrays.items():
                    _write_npy(files.open(path.name), array)
        except BaseException:
            if made:
                folder.rmdir()
            raise


def _write_npy(file: BinaryIO, array: np.ndarray) -> None:
    plain = array.astype(np.float32) if array.dtype == spec.BFLOAT16 else array
    np.lib.format.write_array(file, np.ascontiguousarray(plain), allow_pickle=False)


# Showing.


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 160)


def _say(console: Console, line: str) -> None:
    console.print(Text(line), soft_wrap=True)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _shape(shape: Sequence[int | str | None] | None) -> str:
    return "?" if shape is None else f"[{', '.join('?' if d is None else str(d) for d in shape)}]"


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _preview(result: Any) -> str:
    if not isinstance(result, np.ndarray):
        return str(result)[:60]
    numbers = result.dtype.kind in "fV" or result.dtype == spec.BFLOAT16
    first = [f"{float(v):.6g}" if numbers else str(v) for v in result.flat[:4]]
    return ", ".join(first) + (", ..." if result.size > 4 else "")


def _values(values: Iterable[info.Value]) -> str:
    return ", ".join(f"{v.name} {v.dtype} {_shape(v.shape)}" for v in values) or "none"


def _show_built(output: Path, rows: np.ndarray, model: onnx.ModelProto, form: str) -> None:
    console = _console()
    _say(console, f"wrote {output} ({_bytes(output.stat().st_size)})")
    if output.stat().st_size < rows.nbytes:
        data = output.with_name(output.name + ".data")
        _say(console, f"wrote {data} ({_bytes(data.stat().st_size)})")
    opset = info.opset(model)
    _say(console, f"table {rows.dtype} {_shape(rows.shape)}, {_bytes(rows.nbytes)}; {form} form, opset {opset}")
    _say(console, f"inputs: {_values(info.inputs(model))}")
    _say(console, f"outputs: {_values(info.outputs(model))}")


def _show_installation(console: Console, found: info.Installation) -> None:
    for name in ("lucid_onnx", "python", "numpy", "onnx", "onnxruntime"):
        _say(console, f"{name.replace('_', '-'):<12} {getattr(found, name) or f'not installed: {_EXTRAS}'}")
    if found.onnxruntime is not None:
        _say(console, f"{'providers':<12} {', '.join(found.providers)}")
    library = found.library
    if library is None:
        _say(console, f"{'library':<12} not installed: bags run as standard operators")
        return
    _say(console, f"{'library':<12} {library.path}")
    _say(console, f"{'':<12} version {library.version}")
    isas = ", ".join(isa.name + ("" if isa.supported else " (not on this machine)") for isa in library.isas)
    _say(console, f"{'has':<12} {isas}")
    _say(console, f"{'runs':<12} {library.active}{f', forced by {info.FORCE_ISA}' if library.forced else ''}")


def _show_model(console: Console, found: info.Model) -> None:
    _say(console, "")
    _say(console, f"{found.path} ({_bytes(found.file_bytes)}), opset {found.opset}, {found.form} form")
    _say(console, f"inputs: {_values(found.inputs)}")
    _say(console, f"outputs: {_values(found.outputs)}")
    if not found.nodes:
        _say(console, f"no {spec.DOMAIN} nodes")
        return
    table = _table("node", "operator", "form", "mode", "table", "dtype", "shape", "bytes", "padding_idx", "max_norm")
    for node in found.nodes:
        table.add_row(
            Text(node.name),
            node.op,
            node.form,
            node.mode,
            Text(node.table.name),
            node.table.dtype,
            _shape(node.table.shape),
            "-" if node.table_bytes is None else _bytes(node.table_bytes),
            "-" if node.padding_idx is None else str(node.padding_idx),
            "-" if node.max_norm is None else f"{node.max_norm:.9g} (p = {node.norm_type:.9g})",
        )
    console.print(table)


def _show_table_memory(console: Console, found: info.TableMemory) -> None:
    free = "unknown" if found.free_bytes is None else _bytes(found.free_bytes)
    _say(console, f"table memory {found.choice!r}, {free} free:")
    table = _table("table", "lies in", "bytes", "at session start", "copied", "huge pages")
    for t in found.tables:
        where = "a file" if t.external else "the model"
        copied = _bytes(t.copied_bytes) if t.copied_bytes else "-"
        table.add_row(Text(t.name), where, _bytes(t.bytes), t.plan, copied, str(t.huge_pages or "-"))
    console.print(table)


def _show_fused(console: Console, report: FuseReport, verb: str) -> None:
    if not (report.fused or report.unfused or report.merged or report.unmerged):
        _say(console, "nothing to fuse")
        return
    if report.fused:
        columns = ("from", "operator", "mode", "table", "dtype", "shape", "bytes", "padding_idx", "max_norm")
        table = _table(verb, *columns)
        for f in report.fused:
            table.add_row(
                Text(f.where),
                f.pattern,
                f.op,
                f.mode,
                Text(f.table),
                f.table_dtype,
                _shape(f.table_shape),
                "-" if f.table_bytes is None else _bytes(f.table_bytes),
                "-" if f.padding_idx is None else str(f.padding_idx),
                "-" if f.max_norm is None else f"{f.max_norm:.9g} (p = {f.norm_type:.9g})",
            )
        console.print(table)
    if report.unfused:
        table = _table("left as it is", "looks like", "why")
        for u in report.unfused:
            table.add_row(Text(u.where), u.pattern, Text(u.reason))
        console.print(table)
    if report.merged:
        table = _table("merged", "operator", "mode", "tables")
        for m in report.merged:
            table.add_row(Text(m.where), m.op, m.mode, Text(f"{len(m.tables)}: {', '.join(m.tables)}"))
        console.print(table)
    if report.unmerged:
        table = _table("not merged", "beside others in", "why")
        for bag in report.unmerged:
            table.add_row(Text(bag.bag), Text(bag.where), Text(bag.reason))
        console.print(table)


def _show_quantized(console: Console, report: QuantizeReport) -> None:
    if report.quantized:
        columns = ("from", "to", "shape", "bytes before", "after", "largest row error", "of row", "mean row error")
        table = _table("table", *columns, "bags")
        for q in report.quantized:
            table.add_row(
                Text(q.table),
                q.dtype_before,
                q.dtype,
                _shape(q.shape),
                _bytes(q.bytes_before),
                f"{_bytes(q.bytes_after)} ({q.bytes_before / q.bytes_after:.2f}x smaller)",
                f"{q.largest_row_error:.3g}",
                "-" if q.worst_row is None else str(q.worst_row),
                f"{q.mean_row_error:.3g}",
                Text(", ".join(q.bags)),
            )
        console.print(table)
    if report.unquantized:
        table = _table("left as it is", "why", "bags")
        for u in report.unquantized:
            table.add_row(Text(u.table), Text(u.reason), Text(", ".join(u.bags)))
        console.print(table)


if __name__ == "__main__":
    sys.exit(main())
