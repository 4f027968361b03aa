"""The command ``lucid-onnx``: demo, build, import, run, info, inspect, fuse, lower, quantize, parity.

A mistake of the user ends as one line on stderr, ``lucid-onnx: error: ...``, and exit code 2. Any other error is a
defect, and shows its traceback.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated, cast

from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.runtime import info
from lucid_onnx.runtime.installation import missing_package
from lucid_onnx.runtime.library import get_cmake_dir

from .files import EXIT_BROKEN_PIPE, EXIT_DIFFERS, EXIT_ERROR, EXIT_INTERRUPTED, UserError

_MISSING: ImportError | None = None
try:  # typer and rich come with the extras cpu, gpu and cli
    import typer

    from . import commands_import, commands_info, commands_parity, commands_rewrite, commands_run
    from .options import with_options
except ImportError as error:
    if str(error.name).partition(".")[0] == "lucid_onnx":
        raise
    _MISSING = error

# Without any handler Python prints warnings: of a broken model onnx_ir would have lines above our one.
logging.getLogger("onnx_ir").addHandler(logging.NullHandler())

__all__ = ["EXIT_BROKEN_PIPE", "EXIT_DIFFERS", "EXIT_ERROR", "EXIT_INTERRUPTED", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, by default the process's own.

    Returns:
        The exit code: 0; 1 if the demo's forms or parity's runtimes differ; 2 after an error, which is on stderr;
        130 if interrupted; 141 if nobody reads the output to its end, as after ``| head``.
    """
    try:
        code = _main_of(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        pass
    except SystemExit as error:  # rich raises it where it finds the pipe broken
        if not isinstance(error.__context__, BrokenPipeError):
            raise
    else:
        return code
    # What is left in the stream has nowhere to go, and the interpreter would complain of it at its end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_BROKEN_PIPE


def _main_of(argv: Sequence[str] | None) -> int:
    if _MISSING is not None:
        package = missing_package(_MISSING, ("typer", "rich"))
        if package is not None:
            return _fail(f"{package} is not installed: pip install 'lucid-onnx[cli]'")
        return _fail(f"a package of the command line does not load: {_MISSING}")
    for stream in (sys.stdout, sys.stderr):  # a terminal may lack a character of the text
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


#: A message may quote a file, and a file may hold anything.
_LONGEST_MESSAGE = 4000


def _fail(message: str) -> int:
    text = " ".join(message.split())
    text = text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]}..."
    print(f"lucid-onnx: error: {text}", file=sys.stderr)
    return EXIT_ERROR


def _usage_error() -> type[typer.BadParameter]:
    """The base class of Typer's errors over a command line: click's UsageError, or Typer's own copy of it."""
    return cast("type[typer.BadParameter]", typer.BadParameter.__mro__[1])


def _app() -> typer.Typer:
    app = typer.Typer(
        help="embedding_bag for ONNX: build models, run them, and see what runs.",
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        context_settings={"help_option_names": ["--help", "-h"]},
    )
    app.callback(invoke_without_command=True)(_main)
    app.command("demo")(commands_run.demo)
    app.command("build")(with_options(commands_run.build, spec.Attributes))
    app.command("import")(commands_import.import_)
    app.command("run")(commands_run.run)
    app.command("info")(commands_info.info)
    app.command("inspect")(commands_info.inspect)
    app.command("fuse")(commands_rewrite.fuse)
    app.command("lower")(commands_rewrite.lower)
    app.command("quantize")(commands_rewrite.quantize)
    app.command("parity")(commands_parity.parity)
    return app


def _version(asked: bool) -> None:
    if asked:
        print(f"lucid-onnx {info.version()}")
        raise typer.Exit()


def _cmake_dir(asked: bool) -> None:
    if asked:
        try:
            print(get_cmake_dir())
        except FileNotFoundError as error:
            raise UserError(str(error)) from None
        raise typer.Exit()


def _main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    cmake_dir: Annotated[
        bool,
        typer.Option(
            "--cmake-dir", callback=_cmake_dir, is_eager=True, help="Print the folder of the CMake package and exit."
        ),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        text = context.get_help()  # empty where rich has printed it already
        if text:
            print(text)
