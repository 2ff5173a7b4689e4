"""The command line: arguments in, one exit code out; results on stdout, all else on stderr.

No logic beyond argument -> function: the verbs live in the `cli_*` files, faults become exit codes
here. Importing this file imports neither torch nor pydantic: `dfqc --help` answers at once.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer

from dfqc.compiler import cli_build, cli_compare, cli_distill, cli_info, cli_package, machine
from dfqc.compiler.errors import DfqcError, Interrupted

app = typer.Typer(
    name="dfqc",
    help="Data-free quantization compiler: a trained model in, a verified low-bit package out.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verbs in (cli_build, cli_distill, cli_package, cli_compare, cli_info):
    verbs.register(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (the README lists them)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in words
    _send_logs_to_stderr()
    # Before torch is loaded: its threads otherwise spin while they wait, which on a machine with
    # other work (or beside the engine's own threads) made the same pass 5 to 15 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with contextlib.suppress(ValueError):  # not in the main thread: then nobody sends it either
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        # Not `app(words)`: it turns a closed pipe into exit code 1 and swallows interrupts.
        command = typer.main.get_command(app)
        with command.make_context("dfqc", words or ["--help"]) as context:
            command.invoke(context)
        return 0
    except typer.Exit as done:
        return int(done.exit_code)
    except DfqcError as error:
        return _fail(str(error), error.exit_code, as_json)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", Interrupted.exit_code, as_json)
    except BrokenPipeError:  # `dfqc inspect … | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        # A usage fault of the parser: typer carries its own click, so the class has no fixed home.
        if hasattr(error, "format_message"):
            return _fail_usage(error, as_json)
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}"
        return _fail(f"internal error, a bug of dfqc: {text}; please report it", 1, as_json)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"dfqc {machine.version('dfqc')}")
        raise typer.Exit


Version = typer.Option("--version", is_eager=True, callback=_print_version, help="Print it.")
Verbose = typer.Option("--verbose", "-v", help="Say what happens.")


@app.callback()
def _start(
    version: Annotated[bool, Version] = False, verbose: Annotated[bool, Verbose] = False
) -> None:
    del version  # acted upon before this
    if verbose:
        logging.getLogger("dfqc").setLevel(logging.INFO)


def _fail(message: str, code: int, as_json: bool) -> int:
    print(f"dfqc: {message}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": message, "exit_code": code}))
    return code


def _fail_usage(error: Any, as_json: bool) -> int:
    """Report what the parser refused; its suggestion is part of the message."""
    text = str(error.format_message())
    if known := getattr(error, "possibilities", None):  # sorted by name, not by likeness
        wrong = getattr(error, "option_name", "")
        near = difflib.get_close_matches(wrong, known, 1, 0.0)
        text = f"No such option: {wrong}. Did you mean {near[0]}?"
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "dfqc"
    return _fail(f"{text} See `{command} --help`", 2, as_json)


class _Stderr(logging.Handler):
    """Writes to whatever stderr is when it is needed: bars and tests replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"dfqc: {record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)


def _send_logs_to_stderr() -> None:
    root = logging.getLogger("dfqc")
    if not any(isinstance(handler, _Stderr) for handler in root.handlers):
        root.addHandler(_Stderr())
    root.setLevel(logging.WARNING)


def _interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt
