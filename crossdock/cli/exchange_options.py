"""The options of a command that say how rows travel."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from crossdock.errors import ConfigError


class Hierarchy(str, Enum):
    """Whether a token crosses to a node once for each of its experts there, or once."""

    flat = "flat"
    node = "node"


class Wire(str, Enum):
    """What dispatched rows travel as."""

    native = "native"
    fp8 = "fp8"


class Mode(str, Enum):
    """Whether counts are exchanged first, or buffers are bounded."""

    throughput = "throughput"
    latency = "latency"


HierarchyOption = Annotated[
    Hierarchy, typer.Option(help="node: a token crosses to a node once; fewer bytes there, other last bits.")
]
WireOption = Annotated[Wire, typer.Option(help="fp8: dispatched rows travel as FP8 with their scales.")]
ModeOption = Annotated[
    Mode, typer.Option(help="latency: bounded buffers and no counts first, for decoding over symmetric memory.")
]
Chunks = Annotated[
    int, typer.Option(min=0, help="Parts of a layer's tokens, one travelling while another computes; 0: as fits.")
]
TwoBatch = Annotated[
    bool, typer.Option("--two-batch", help="Attention of one half of a batch runs while the other's rows travel.")
]
Trace = Annotated[
    Path | None, typer.Option(help="Write a timeline of every rank for Perfetto or chrome://tracing.", metavar="FILE")
]


def check_trace(path: Path | None) -> None:
    """Raises ConfigError, before anything has started, where a timeline could not be written."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise ConfigError(f"--trace must name a file in a directory that exists, found {path}")
