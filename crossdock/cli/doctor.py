"""`crossdock doctor`: what is here, what would be used, and why."""

import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Annotated, Any

import typer

from crossdock.cli.launch import cores
from crossdock.cli.mpi_side import find_mpiexec
from crossdock.cli.request import example_directory

PACKAGES = (
    "crossdock",
    "torch",
    "triton",
    "numpy",
    "einops",
    "safetensors",
    "tokenizers",
    "transformers",
    "mpi4py",
    "mpich",
)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")] = False,
) -> None:
    """What is here, what would be used, and why."""
    report = examine()
    if as_json:
        print(json.dumps(report))
    else:
        _show(report)


def examine() -> dict[str, Any]:
    """The object `--json` prints."""
    import torch

    from crossdock._triton import HAS_TRITON, interpreting
    from crossdock.backend import resolve_backend
    from crossdock.cli.runtime import choose_device

    device, why_device = choose_device(None, 1)
    backend = resolve_backend("auto", torch.device(device))
    if backend == "triton":
        why_backend = "Triton kernels are the fast path on GPUs"
    else:
        why_backend = "the fast path on CPUs" if device == "cpu" else "triton is not installed"
    triton_cpu = "in Triton's interpreter" if interpreting() else "not on CPU tensors (needs TRITON_INTERPRET=1)"
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "devices": _devices(torch),
        "device": device,
        "device_why": why_device,
        "transports": _transports(torch),
        "backend": backend,
        "backend_why": why_backend,
        "triton_on_cpu": triton_cpu if HAS_TRITON else "not installed",
        "example": _example(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices(torch: Any) -> list[dict[str, Any]]:
    devices: list[dict[str, Any]] = [
        {"device": "cpu", "name": platform.machine(), "cores": cores(), "threads": torch.get_num_threads()}
    ]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "capability": list(torch.cuda.get_device_capability(index)),
            }
        )
    return devices


def _transports(torch: Any) -> dict[str, dict[str, Any]]:
    """Each transport with whether it can be used here, and why."""
    distributed = torch.distributed
    found = [
        name
        for name, present in (("gloo", "is_gloo_available"), ("nccl", "is_nccl_available"))
        if distributed.is_available() and getattr(distributed, present)()
    ]
    why = f"torch.distributed with {' and '.join(found)}" if found else "this torch is built without torch.distributed"
    return {
        "local": {"available": True, "why": "virtual ranks inside one process need nothing"},
        "torch": {"available": bool(found), "why": why},
        "mpi": _mpi(),
        "symmetric": _symmetric(torch),
    }


def _mpi() -> dict[str, Any]:
    from crossdock.errors import ConfigError
    from crossdock.parallel.mpi_launch import library_name, load_mpi

    try:
        library = library_name(load_mpi())
    except ConfigError as error:
        return {"available": False, "why": str(error).removeprefix("transport 'mpi' ")}
    mpiexec = find_mpiexec()
    started = f"ranks started by {mpiexec}" if mpiexec else "no mpiexec is found to start ranks with"
    return {"available": True, "why": f"{library}; {started}"}


def _symmetric(torch: Any) -> dict[str, Any]:
    from crossdock._triton import HAS_TRITON

    if not HAS_TRITON:
        return {"available": False, "why": "triton is not installed"}
    if torch.cuda.is_available():
        found = find_spec("torch.distributed._symmetric_memory") is not None
        why = "torch's symmetric memory, between GPUs of one NVLink domain" if found else "this torch has none of it"
        return {"available": found, "why": why}
    if sys.platform != "linux":
        return {"available": False, "why": "between processes on CPUs it needs Linux"}
    return {"available": True, "why": "memory that this machine's processes share, kernels in Triton's interpreter"}


def _example() -> dict[str, Any]:
    directory = example_directory()
    files = [path for path in directory.rglob("*") if path.is_file()] if directory.is_dir() else []
    present = (directory / "config.json").is_file()
    return {"available": present, "path": str(directory), "bytes": sum(path.stat().st_size for path in files)}


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, found in report["versions"].items():
        table.add_row(name, found or "[dim]not installed[/dim]")
    for device in report["devices"]:
        more = f"{device['cores']} cores, {device['threads']} threads" if "cores" in device else device["name"]
        table.add_row(device["device"], more)
    table.add_row("would use", f"{report['device']} [dim]({report['device_why']})[/dim]")
    table.add_row("backend", f"{report['backend']} [dim]({report['backend_why']})[/dim]")
    table.add_row("Triton on CPU", report["triton_on_cpu"])
    for name, transport in report["transports"].items():
        mark = "[green]yes[/green]" if transport["available"] else "[red]no[/red]"
        table.add_row(f"transport {name}", f"{mark} [dim]({transport['why']})[/dim]")
    example = report["example"]
    size = f"{example['bytes'] / 1e6:.1f} MB" if example["available"] else "[red]missing[/red]"
    table.add_row("example checkpoint", f"{size} [dim]({example['path']})[/dim]")
    Console().print(table)
