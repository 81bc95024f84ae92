"""`crossdock bench`: one file a question; each measures crossdock, its peers and the machine's ceilings in one run."""

import typer

from crossdock.cli.bench.exchange import exchange
from crossdock.cli.bench.gemm import gemm
from crossdock.cli.bench.generate import generate
from crossdock.cli.bench.layer import layer
from crossdock.cli.bench.router import router

bench = typer.Typer(help="Measures, beside the torch built-in and the ceiling.", no_args_is_help=True)
for command in (router, gemm, layer, exchange, generate):
    bench.command()(command)

__all__ = ["bench"]
