"""`crossdock audit`: compiles every Triton kernel for every target, with no device present, and reports resources.

The compiling happens in two worker processes (audit_worker.py) with TRITON_INTERPRET unset, as Triton decides at import
whether kernels are compiled or interpreted.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from enum import Enum
from typing import IO, Annotated, Any

import typer

from crossdock.errors import ConfigError, CrossdockError

WORKERS = 2


class Target(str, Enum):
    """What kernels are compiled for: Hopper, Blackwell, MI300."""

    sm_90 = "sm_90"
    sm_100 = "sm_100"
    gfx942 = "gfx942"


def audit(
    target: Annotated[list[Target] | None, typer.Option(help="Only this target (repeatable).")] = None,
    kernel: Annotated[
        list[str] | None, typer.Option(help="Only kernels with this in their name (repeatable).", metavar="NAME")
    ] = None,
    module: Annotated[
        list[str] | None,
        typer.Option(help="Audit this module's AUDIT list instead of crossdock's (repeatable).", metavar="MODULE"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")] = False,
) -> None:
    """Compiles every kernel for sm_90, sm_100 and gfx942 and reports resources; exit code 1 where one is not right."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    job = {"targets": [t.value for t in target or list(Target)], "kernels": kernel or [], "modules": module or []}
    results: list[dict[str, Any]] = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("compiling kernels", total=None)
        for message in compile_in_workers(job):
            if "total" in message:
                progress.update(bar, total=message["total"])
            else:
                results.append(message)
                progress.advance(bar)
    if not results:
        raise ConfigError(f"no kernel to audit: none of the AUDIT lists has a name with {' or '.join(kernel or ['*'])}")
    results.sort(key=lambda r: (r["kernel"], r["config"], r["target"]))
    ok = all(result["ok"] for result in results)
    if as_json:
        print(json.dumps({"ok": ok, "kernels": results}))
    else:
        _show(results)
    if not ok:
        raise typer.Exit(1)


def compile_in_workers(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields what the workers say of a job, as they say it. Raises CrossdockError where one dies."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    workers: list[subprocess.Popen[str]] = []
    with contextlib.ExitStack() as opened:
        logs: list[IO[bytes]] = [opened.enter_context(tempfile.TemporaryFile()) for _ in range(WORKERS)]
        try:
            for number, log in enumerate(logs):
                workers.append(_start(job | {"shard": number, "of": WORKERS}, log, lines))
            open_pipes = WORKERS
            while open_pipes:
                line = lines.get()
                if line:
                    yield json.loads(line)
                else:
                    open_pipes -= 1
            for worker, log in zip(workers, logs, strict=True):
                if worker.wait():
                    log.seek(0)
                    last = (log.read().decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
                    raise CrossdockError(f"a compile worker ended with exit code {worker.returncode}: {last}")
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()


def _start(share: dict[str, Any], log: IO[bytes], lines: "queue.SimpleQueue[str]") -> "subprocess.Popen[str]":
    """Starts a worker whose lines go to `lines`, an empty one when it has said all."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "crossdock.cli.audit_worker"]
    worker = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
    )
    pipe = worker.stdout
    assert pipe is not None and worker.stdin is not None
    with contextlib.suppress(BrokenPipeError), worker.stdin:  # one that has died is told of by its exit code
        worker.stdin.write(json.dumps(share))

    def read() -> None:
        for line in pipe:
            lines.put(line)
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    return worker


def _show(results: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("kernel", "config", "target", "registers", "spills", "shared", "matrix instructions", "ok")
    for r in results:
        mark = "[green]ok[/green]" if r["ok"] else f"[red]{escape(r['why'])}[/red]"
        shared = "" if r["shared_bytes"] is None else f"{r['shared_bytes'] / 1024:.1f} KB"
        numbers = ["" if r[name] is None else str(r[name]) for name in ("registers", "spills")]
        table.add_row(
            r["kernel"], r["config"], r["target"], *numbers, shared, ", ".join(r["matrix_instructions"]), mark
        )
    console = Console()
    if not console.is_terminal:  # a log has no width to keep to
        console.width = 200
    console.print(table)
    good = sum(result["ok"] for result in results)
    console.print(f"{good} of {len(results)} builds are as they should be")
