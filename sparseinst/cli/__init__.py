"""The command line, with one thin command for each verb. Imports no torch before a command needs it."""

from __future__ import annotations

import logging
import signal
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sparseinst import __version__
from sparseinst.cli import bench, cluster, data, exchange, models, pictures, results, retire, settings, tables
from sparseinst.cli.problems import check_arguments, explain
from sparseinst.inference.memory import keep_freed_memory
from sparseinst.machine import limit_threads, wait_passively

STOPPED = "stopped; every file that was written is whole, and the same command does the rest"
"""The line of a command that Ctrl-C or SIGTERM ended. A training's own line names the step of its checkpoint."""


class _Commands(TyperGroup):
    """The commands; one that is interrupted ends with one line."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise SystemExit(STOPPED) from None


app = typer.Typer(
    cls=_Commands,
    name="sparseinst",
    help="A reproducible research and ablation workbench for SparseInst.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(tables.app)
app.add_typer(retire.app)
app.add_typer(results.app)
app.add_typer(cluster.app)
app.add_typer(models.app)
app.add_typer(settings.app)
app.add_typer(pictures.app)
app.add_typer(exchange.app)
app.add_typer(bench.app)
app.add_typer(data.app, name="data", help="Make, convert, split, check and look at data sets.")


@app.callback(invoke_without_command=True)
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """A reproducible research and ablation workbench for SparseInst."""
    # A terminal shows the progress bar; a log file needs the messages of the steps.
    quiet = sys.stderr.isatty() and not debug
    console = logging.StreamHandler()
    console.setLevel(logging.WARNING if quiet else logging.INFO)
    logging.basicConfig(format="%(levelname)s: %(message)s", handlers=[console])
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line and exit: code 0 for success, 1 for a failed or interrupted run, 2 for bad input."""
    end_in_order_when_terminated()
    try:
        wait_passively()
        if warning := limit_threads():
            print(f"warning: {warning}", file=sys.stderr)
        keep_freed_memory()  # safe here, because the process runs nothing else
        code = run_cli(sys.argv[1:])
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        code = 1
    sys.exit(code)


def end_in_order_when_terminated() -> None:
    """Let SIGTERM end the process as Ctrl-C does: with an exception, so that temporary files are removed."""
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def run_cli(arguments: list[str]) -> int:
    """Run one command line and return the exit code."""
    try:
        command = typer.main.get_command(app)
        check_arguments(arguments)
        command.main(arguments, prog_name="sparseinst")
    except KeyboardInterrupt:  # before the command began
        print(STOPPED, file=sys.stderr)
        return 1
    except Exception as error:
        known = explain(error)
        if known is None or "--debug" in arguments:
            raise
        print(f"error: {known[0]}", file=sys.stderr)
        return known[1]
    except SystemExit as ended:  # typer raises this after success and after its own one-line errors
        if isinstance(ended.code, str):  # a command that was asked to stop
            print(ended.code, file=sys.stderr)
        return ended.code if isinstance(ended.code, int) else 1
    return 0
