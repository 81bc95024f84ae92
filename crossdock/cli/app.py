"""The `crossdock` program: its commands, its global options, and the one place where errors become exit codes.

An error of crossdock's own or of the options is one line `error: ...` on stderr, with exit code 1 or 2. Anything else
is a defect; it too is one line, and `--debug` shows the traceback. A rank that `--ranks` started hands its error to the
launcher, which prints it once for all ranks (see launch.py); ranks of mpiexec see to that themselves (mpi_side.py).
"""

import os
import sys
import traceback
from dataclasses import dataclass
from typing import Annotated

import typer

from crossdock.cli.audit import audit
from crossdock.cli.bench import bench
from crossdock.cli.doctor import doctor
from crossdock.cli.generate import generate
from crossdock.cli.launch import RankSide
from crossdock.cli.mpi_side import MpiSide
from crossdock.cli.plan import plan
from crossdock.cli.tune import tune
from crossdock.errors import CrossdockError

app = typer.Typer(
    name="crossdock",
    help="A Mixture-of-Experts expert-parallel runtime for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@dataclass
class Invocation:
    """What was typed, for a command that starts itself again on several ranks."""

    argv: list[str]
    is_rank: bool  # whether this process is a rank that such a command started
    debug: bool = False


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"crossdock {version('crossdock')}")
        except PackageNotFoundError:
            typer.echo("crossdock, not installed (running from its source folder)")
        raise typer.Exit


@app.callback()
def _globals(
    ctx: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show an error's traceback and every rank's log.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    ctx.obj.debug = debug
    if not debug:  # torch tells of a lost connection in 30 lines of C++ frames, beside the one line that we print
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")


app.command()(generate)
app.command()(doctor)
app.command()(audit)
app.command()(tune)
app.command()(plan)
app.add_typer(bench, name="bench")


def main(argv: list[str] | None = None) -> int:
    """Runs one command line (without the program's name; sys.argv's by default) and returns its exit code."""
    rank_side, mpi_side = RankSide.from_environment(), MpiSide.from_environment()
    if rank_side is not None:
        rank_side.watch_launcher()
    if mpi_side is not None:
        mpi_side.settle()
    is_rank = rank_side is not None or (mpi_side is not None and mpi_side.ours)
    invocation = Invocation(list(sys.argv[1:] if argv is None else argv), is_rank)
    command = typer.main.get_command(app)
    try:
        code = command.main(args=list(invocation.argv), prog_name="crossdock", standalone_mode=False, obj=invocation)
        return code if isinstance(code, int) else 0
    except Exception as error:
        return _fail(error, invocation, rank_side or mpi_side)
    except KeyboardInterrupt:
        return _leave(130, mpi_side)


def _fail(error: Exception, invocation: Invocation, side: RankSide | MpiSide | None) -> int:
    """Says what went wrong in one line and returns the exit code."""
    if isinstance(error, BrokenPipeError):  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return _leave(1, side)
    if type(error).__name__ == "NoArgsIsHelpError":  # a bare `crossdock` or `crossdock bench`: its message is the help
        print(error.format_message(), end="", file=sys.stderr)  # type: ignore[attr-defined]
        return 2
    if isinstance(error, typer.Abort):
        return _leave(130, side)
    code, kind = 1, type(error).__name__
    if hasattr(error, "format_message"):  # typer's own: an unknown option, a value out of range
        code, text = int(getattr(error, "exit_code", 2)), str(error.format_message())
    elif isinstance(error, CrossdockError | OSError):
        text = str(error)
    else:
        text = f"internal error: {kind}: {error} (crossdock --debug {' '.join(invocation.argv)} shows where)"
    text = " ".join(text.split())
    if invocation.debug:
        traceback.print_exception(error)
    if side is not None:
        side.report(kind, text, code)
    else:
        rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE", "1")
        named = rank is None or world == "1" or text.startswith("rank ")
        print(f"error: {text}" if named else f"error: rank {rank}: {text}", file=sys.stderr)
    return _leave(code, side)


def _leave(code: int, side: RankSide | MpiSide | None) -> int:
    """Returns `code`, or leaves at once while ranks are joined: taking the group apart could wait for them."""
    if isinstance(side, MpiSide):
        side.end_job(code)
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
