"""The command ``lucid-onnx``: demo, build, run, info, inspect, fuse, lower, quantize, parity.

What a user can get wrong ends as one line on stderr, ``lucid-onnx: error: ...``, and exit code 2. Anything else
that goes wrong is a defect, and shows its traceback.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_type_hints

import numpy as np
import onnx

from lucid_onnx.builder import Replacing, build_model, save
from lucid_onnx.ops.attributes import Attribute, BaseAttributes, Choice, Flag, Real, takes
from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.runtime import info
from lucid_onnx.runtime.library import PROVIDERS

from . import demo
from . import files as cli_files
from .files import UserError

_MISSING: ImportError | None = None
try:  # the extras bring them; annotations that name them are never evaluated before `main` looked
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.text import Text

    from . import show as cli_show
except ImportError as error:
    _MISSING = error

if TYPE_CHECKING:
    import onnxruntime

    from lucid_onnx.parity.report import Report

EXIT_DIFFERS, EXIT_ERROR, EXIT_INTERRUPTED = 1, 2, 130
_SHOWN_FAILURES = 20


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, by default the process's own.

    Returns:
        The exit code: 0; 1 where the demo's forms or parity's runtimes differ; 2 after an error, which is on stderr;
        130 if interrupted.
    """
    if _MISSING is not None:
        return _fail(f"{str(_MISSING.name).partition('.')[0]} is not installed: {cli_files.EXTRAS}")
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
    app.command("build")(_with_options(_build, spec.Attributes))
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


def _with_options(function: Callable[..., int | None], attributes: type[BaseAttributes]) -> Callable[..., int | None]:
    """A command that takes the attributes of an operator as ``**attributes``, with an option for each of them."""
    command: Any = takes(attributes)(function)
    types = get_type_hints(function, include_extras=True) | {a.name: _option(a) for a in attributes.keyword_table()}
    signature = inspect.signature(command)
    parameters = [p.replace(annotation=types[p.name]) for p in signature.parameters.values()]
    command.__signature__ = signature.replace(parameters=parameters)
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return cast("Callable[..., int | None]", command)


def _option(attribute: Attribute) -> Any:
    """An attribute of an operator as an option, in Typer's form."""
    text = attribute.meaning + (f": {attribute.kind.words}." if attribute.kind.words else ".")
    text = text[0].upper() + text[1:].replace('"', "")
    if isinstance(attribute.kind, Flag):
        return Annotated[bool, typer.Option(f"--{attribute.name.replace('_', '-')}", help=text)]
    if isinstance(attribute.kind, Choice):
        return Annotated[str, typer.Option(help=text)]
    if isinstance(attribute.kind, Real):
        return Annotated[float | None, typer.Option(parser=_real, metavar="NUMBER", help=text)]
    return Annotated[int | None, typer.Option(parser=_integer, metavar="INTEGER", help=text)]


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
    cli_files.check_output(output)
    _isa()
    with cli_files.refused(demo.DemoError), cli_files.refused_by_runtime(f"{output}: "), cli_files.writing(output):
        result = demo.run(output, query or demo.QUERIES)
    demo.show(result, cli_show.new_console())
    return 0 if result.agrees else EXIT_DIFFERS


def _build(
    table: Annotated[
        str, typer.Argument(metavar="TABLE", help="The rows: TABLE.npy, TABLE.safetensors or TABLE.safetensors:KEY.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The model to write; a file of that name is replaced.")
    ],
    *,
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
    **attributes: Any,
) -> None:
    """Make a model of one bag from a table of rows.

    The table is [V, D], of any dtype that `lucid_onnx.embedding_bag` takes. A .npy file has no bfloat16: raw items
    of two bytes, which numpy.save makes of ml_dtypes.bfloat16, are taken for it.

    Example: `lucid-onnx build users.npy -o users.onnx --mode sum --per-sample-weights`
    """
    rows = cli_files.read_table(table)
    cli_files.check_output(output)
    if output.exists() and output.samefile(cli_files.split_key(table)[0]):
        raise UserError(f"--output {output}: is the table itself")
    with cli_files.refused(TypeError, ValueError):
        model = build_model(
            rows,
            two_d=two_d,
            per_sample_weights=per_sample_weights,
            index_dtype=index_dtype,
            form=form,  # type: ignore[arg-type]  # build_model refuses what is none
            opset=opset,
            **attributes,
        )
    with cli_files.refused(ValueError), cli_files.writing(output), _progress() as progress:
        save(model, output, external_data=external_data, progress=progress)
    cli_show.show_built(output, rows, model, form)


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
    files = cli_files.named_files(inputs or [])
    ort = _need_onnxruntime()
    isa = _isa() if native is not False else None
    if native and isa is None:
        raise UserError("--native: this installation of lucid-onnx has no native library")
    session = _session(ort, model, isa is not None, provider)
    feeds = cli_files.read_feeds(session, model, files)
    names = [o.name for o in session.get_outputs()]
    targets = None if output is None else cli_files.targets_of(output, names)
    options = ort.RunOptions()
    options.log_severity_level = 4
    with cli_files.refused_by_runtime(f"{model}: "):
        begin = time.perf_counter()
        results = session.run(None, feeds, options)
        seconds = time.perf_counter() - begin
    arrays = dict(zip(names, results, strict=True))
    table = cli_show.new_table("output", "dtype", "shape", "values")
    for name, result in arrays.items():
        dtype = str(result.dtype) if isinstance(result, np.ndarray) else type(result).__name__
        table.add_row(Text(name), dtype, cli_files.shape_text(np.shape(result)), Text(cli_show.preview(result)))
    if output is not None and targets is not None:
        cli_files.write_arrays(output, {targets[name]: (name, array) for name, array in arrays.items()})
    console = cli_show.new_console()
    console.print(table)
    kernels = f"registered ({isa})" if isa else "not registered"
    cli_show.say(console, f"{seconds * 1e3:.3g} ms on {provider}; native kernels: {kernels}")
    for name, path in (targets or {}).items():
        as_float32 = " (bfloat16 as float32)" if arrays[name].dtype == spec.BFLOAT16 else ""
        cli_show.say(console, f"wrote {path}{as_float32}")


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
    with cli_files.refused(OSError, ValueError):
        installed = info.installation()
    found = None
    if model is not None:
        cli_files.check_file(model)
        with cli_files.refused(ValueError), cli_files.reading(model):
            found = info.model(model)
    with cli_files.refused(OSError, ValueError):
        places = None if found is None else info.table_memory(found, table_memory)
    if as_json:
        data = dataclasses.asdict(installed)
        if found is not None:
            data["model"] = dataclasses.asdict(found)
            data["table_memory"] = None if places is None else dataclasses.asdict(places)
        print(json.dumps(cli_files.finite(data), indent=2, allow_nan=False))
        return
    console = cli_show.new_console()
    cli_show.show_installation(console, installed)
    if found is not None:
        cli_show.show_model(console, found)
    if places is not None and places.tables:
        cli_show.show_table_memory(console, places)


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
    cli_files.check_file(model)
    if svg is not None:
        cli_files.check_output(svg, "--svg")
        if svg.exists() and svg.samefile(model):
            raise UserError(f"--svg {svg}: is the model itself")
    with cli_files.refused(ValueError), cli_files.reading(model):
        found = info.model(model)
    with cli_files.refused_model(model), cli_files.reading(model):
        report = fuse(model)
    if svg is not None:
        drawn = _rewriting("picture").draw(onnx.load(model, load_external_data=False), report, Path(model).name)
        with cli_files.writing(svg), Replacing(svg) as files:
            files.open(svg.name).write(drawn.encode())
    if as_json:
        print(
            json.dumps(cli_files.finite({**dataclasses.asdict(found), **report.as_dict()}), indent=2, allow_nan=False)
        )
        return
    console = cli_show.new_console()
    cli_show.show_model(console, found)
    cli_show.show_fused(console, report, "would fuse")
    if svg is not None:
        cli_show.say(console, f"wrote {svg}")


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
    cli_files.check_file(model)
    cli_files.check_output(output)
    cli_files.check_report(report, output)
    with cli_files.refused_model(model), cli_files.rewriting_files(model, output):
        found = fuse(model, output, form=form, assume_nonempty=assume_nonempty, merge_tables=merge_tables)
    if report is not None:
        cli_files.write_report(report, found)
    console = cli_show.new_console()
    cli_show.say(console, f"wrote {output} ({cli_show.bytes_text(output.stat().st_size)})")
    if report is not None:
        cli_show.say(console, f"wrote {report}")
    cli_show.show_fused(console, found, "fused")


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
    cli_files.check_file(model)
    cli_files.check_output(output)
    with cli_files.refused_model(model), cli_files.rewriting_files(model, output):
        lower(model, output, form=form, ragged=ragged, longest_bag=longest_bag)
    console = cli_show.new_console()
    cli_show.say(console, f"wrote {output} ({cli_show.bytes_text(output.stat().st_size)}), {form} form")


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
    cli_files.check_file(model)
    cli_files.check_output(output)
    cli_files.check_report(report, output)
    with cli_files.refused_model(model), cli_files.rewriting_files(model, output), _progress() as progress:
        found = quantize(model, output, dtype=dtype, min_bytes=min_bytes, form=form, progress=progress)
    if report is not None:
        cli_files.write_report(report, found)
    console = cli_show.new_console()
    cli_show.say(console, f"wrote {output} ({cli_show.bytes_text(output.stat().st_size)})")
    if report is not None:
        cli_show.say(console, f"wrote {report}")
    cli_show.show_quantized(console, found)


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
    from lucid_onnx.parity import html as as_html
    from lucid_onnx.parity import markdown as as_markdown
    from lucid_onnx.parity import matrix, work

    chosen = _chosen_runtimes(runtimes)
    if names:
        return _show_runtimes(chosen)
    for option, path in (("--html", html), ("--json", as_json), ("--markdown", markdown)):
        if path is not None:
            cli_files.check_output(path, option)
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
        cli_files.check_file(model)
        given = {name: cli_files.read_npy(path) for name, path in cli_files.named_files(inputs or []).items()}
        limit = work.MODEL_TOLERANCE if tolerance is None else tolerance
        with cli_files.refused(work.CannotRunError), cli_files.reading(model):
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
            with cli_files.writing(path), Replacing(path) as files:
                files.open(path.name).write(text().encode())
    console = cli_show.new_console()
    failures = _show_parity(console, report, strict)
    for path in texts:
        if path is not None:
            cli_show.say(console, f"wrote {path} ({cli_show.bytes_text(path.stat().st_size)})")
    return EXIT_DIFFERS if failures else 0


def _chosen_runtimes(text: str) -> list[Any]:
    from lucid_onnx.parity.adapters import ENTRIES

    if text == "all":
        return list(ENTRIES.values())
    chosen = []
    for name in dict.fromkeys(part.strip() for part in text.split(",")):
        if name not in ENTRIES:
            raise UserError(f"--runtimes {name}: is not one of {', '.join(ENTRIES)}")
        chosen.append(ENTRIES[name])
    return chosen


def _show_runtimes(chosen: Sequence[Any]) -> int:
    from lucid_onnx.parity import matrix

    table = cli_show.new_table("name", "runtime", "here")
    for column in matrix.run(chosen, [], bad_input=False).columns:
        table.add_row(column.runtime, column.title, Text(column.version or f"no: {column.missing}"))
    cli_show.new_console().print(table)
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
    from lucid_onnx.parity.report import ABSENT, FAILURES, STATUSES

    statuses = [s for s in STATUSES if any(c.status == s for c in report.cells) and s != ABSENT]
    table = cli_show.new_table("runtime", "form", *statuses, "worst error")
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
            cli_show.say(console, f"not here: {column.runtime}: {column.missing}")
    known = [c for c in report.cells if c.status in FAILURES and c.why]
    failures = report.failures + (known if strict else [])
    if known and not strict:
        cli_show.say(console, f"{len(known)} differences are known; the reports and --strict have them")
    if report.unseen:
        cli_show.say(console, f"{len(report.unseen)} that are known did not show; the reports have them")
    for cell in failures[:_SHOWN_FAILURES]:
        cli_show.say(console, f"{cell.runtime}, {cell.form}, {cell.job}: {cell.status}: {cell.note}")
    if len(failures) > _SHOWN_FAILURES:
        cli_show.say(console, f"and {len(failures) - _SHOWN_FAILURES} more")
    return len(failures)


def _rewriting(name: str) -> Any:
    """A function of `lucid_onnx.rewrite`, which needs onnx-ir."""
    try:
        from lucid_onnx import rewrite
    except ImportError as error:
        raise UserError(str(error)) from error
    return getattr(rewrite, name)


def _need_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"onnxruntime is not installed: {cli_files.EXTRAS}") from error
    onnxruntime.set_default_logger_severity(4)
    return onnxruntime


def _isa() -> str | None:
    """The instruction set of the native kernels; None if they are not installed."""
    with cli_files.refused(OSError, ValueError):
        library = info.library()
    return None if library is None else library.active


def _session(ort: Any, model: str, native: bool, provider: str) -> onnxruntime.InferenceSession:
    from lucid_onnx.runtime.session import InferenceSession

    if provider not in PROVIDERS:
        raise UserError(f"--provider {provider}: is not one of {', '.join(PROVIDERS)}")
    wanted = PROVIDERS[provider]
    if wanted[0] not in ort.get_available_providers():
        raise UserError(f"--provider {provider}: this onnxruntime has no {wanted[0]}: pip install 'lucid-onnx[gpu]'")
    cli_files.check_file(model)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        with cli_files.refused_by_runtime(f"{model}: "):
            session = InferenceSession(model, native=native, providers=wanted, session_options=options)
    except UserError as error:
        if native or f"{spec.DOMAIN}:" not in str(error):
            raise
        raise UserError(f"{error} (a model in the native form needs the native library)") from error
    if wanted[0] not in session.get_providers():
        raise UserError(f"--provider {provider}: {wanted[0]} did not start here; is its CUDA installed?")
    return session


if __name__ == "__main__":
    sys.exit(main())
