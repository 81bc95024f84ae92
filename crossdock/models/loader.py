"""Reading a Hugging Face directory: each rank takes the bytes it needs out of the safetensors shards, and no others.

Legend: N, K a weight's sizes, b blocks of 128.

A model says where each of its tensors comes from (`Target`), this file reads it: BF16, FP16 and FP32 are converted to
the tensor's dtype; FP8 e4m3 tensors stand beside `<name>_scale_inv` [ceil(N / 128), ceil(K / 128)], the factor that
makes them whole (the name notwithstanding), and are multiplied out, or kept with their scales where asked.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from crossdock.errors import CheckpointError
from crossdock.gemm import BLOCK, dequantize_blocks

REOPEN_BYTES = 256 * 2**20  # a shard is mapped anew after this much, so that its pages do not stay resident
PIECE_VALUES = 16 * 2**20  # a larger tensor is read in runs of rows: converting takes up to three float32 copies
READABLE = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1}  # bytes a value


@dataclass(frozen=True)
class Source:
    """A tensor of the checkpoint, or the part of it at `index` (an int or a slice for each leading dimension)."""

    name: str
    index: tuple[int | slice, ...] = ()


@dataclass(frozen=True)
class Target:
    """A tensor of the model and the sources it may come from; the first that exists is taken.

    scale_into: where an FP8 tensor's scales go, if `into` is to keep it in FP8.
    """

    into: Tensor
    sources: tuple[Source, ...]
    scale_into: Tensor | None = None


@dataclass(frozen=True)
class LoadReport:
    """What loading read on this rank; `unused` are tensors no target names (routed experts of other ranks left out)."""

    tensors: int
    bytes_read: int
    seconds: float
    unused: tuple[str, ...]


def read_config(directory: str | Path) -> dict[str, Any]:
    """`config.json` of a checkpoint directory. Raises CheckpointError where it is missing or is not a JSON object."""
    if not Path(directory).is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    return _read_json(Path(directory) / "config.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


class Checkpoint:
    """The shards of a directory and which tensor stands in which. Raises CheckpointError naming the file at fault."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._open: Path | None = None
        self._handle: Any = None
        self._read = 0
        self.file_of = self._index()

    def _index(self) -> dict[str, Path]:
        index = self.directory / "model.safetensors.index.json"
        if index.exists():
            weight_map = _read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise CheckpointError(f"{index}: has no weight_map")
            return {name: self.directory / str(file) for name, file in weight_map.items()}
        shards = sorted(self.directory.glob("*.safetensors"))
        if not shards:
            raise CheckpointError(f"{self.directory}: holds no *.safetensors file")
        return {name: shard for shard in shards for name in self._shard(shard).keys()}  # noqa: SIM118

    def _shard(self, path: Path) -> Any:
        if path != self._open or self._read > REOPEN_BYTES:
            self._handle, self._open, self._read = None, None, 0
            try:
                self._handle = safe_open(path, framework="pt")
            except FileNotFoundError:
                raise CheckpointError(f"{path}: no such file, but the index names it") from None
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path}: truncated or corrupt: {error}") from error
            self._open = path
        return self._handle

    def _slice(self, name: str) -> Any:
        path = self.file_of[name]
        try:
            return self._shard(path).get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: tensor {name} is not in it: {error}") from error

    def form(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Safetensors dtype name and shape, without reading the tensor."""
        found = self._slice(name)
        return found.get_dtype(), tuple(found.get_shape())

    def read(self, source: Source) -> Tensor:
        """The tensor, or the part of it at the source's index; only those bytes are touched."""
        found = self._slice(source.name)
        ranges = tuple(slice(i, i + 1) if isinstance(i, int) else i for i in source.index)
        tensor: Tensor = found[ranges] if ranges else found[:]
        self._read += tensor.nbytes
        for _ in [i for i in source.index if isinstance(i, int)]:
            tensor = tensor[0]
        return tensor


def load_into(
    checkpoint: Checkpoint, targets: Iterable[Target], progress: Callable[[int, int], None] | None = None
) -> LoadReport:
    """Fills every target. `progress(done, total)` counts bytes. Raises CheckpointError naming the tensor at fault."""
    began = time.perf_counter()
    chosen = list(_choose(checkpoint, targets))
    chosen.sort(key=lambda item: checkpoint.file_of[item[1].name])  # stable: model order inside a shard
    total, done = sum(size for _, _, size in chosen), 0
    for target, source, size in chosen:
        for piece, part in _pieces(target, source):
            _fill(checkpoint, piece, part)
        done += size
        if progress is not None:
            progress(done, total)
    used = {source.name for _, source, _ in chosen}
    unused = (n for n in checkpoint.file_of if n not in used and n.removesuffix("_scale_inv") not in used)
    left = tuple(name for name in unused if ".experts." not in name)
    return LoadReport(len(chosen), done, time.perf_counter() - began, left)


def _choose(checkpoint: Checkpoint, targets: Iterable[Target]) -> Iterator[tuple[Target, Source, int]]:
    """Each target with its source and the bytes that will be read; every shape and dtype is checked before any data."""
    for target in targets:
        source = next((s for s in target.sources if s.name in checkpoint.file_of), None)
        if source is None:
            names = " or ".join(s.name for s in target.sources)
            raise CheckpointError(f"{checkpoint.directory}: tensor {names} is missing")
        dtype, shape = checkpoint.form(source.name)
        where = f"{checkpoint.file_of[source.name]}: tensor {source.name}"
        if dtype not in READABLE:
            raise CheckpointError(f"{where} has dtype {dtype}, expected one of {', '.join(READABLE)}")
        if target.scale_into is not None and dtype != "F8_E4M3":
            raise CheckpointError(f"{where} has dtype {dtype}, expected F8_E4M3 as quantization_config says")
        found = _shape_at(shape, source.index)
        if found != tuple(target.into.shape):
            part = "" if found == shape else f", of which {list(found or ())} would be read"
            raise CheckpointError(f"{where} has shape {list(shape)}{part}, expected {list(target.into.shape)}")
        if dtype == "F8_E4M3":
            _check_scale(checkpoint, source.name, shape, where)
        yield target, source, target.into.numel() * READABLE[dtype]


def _shape_at(shape: tuple[int, ...], index: tuple[int | slice, ...]) -> tuple[int, ...] | None:
    """The shape of tensor[index], None where the index does not fit."""
    if len(index) > len(shape):
        return None
    kept: list[int] = []
    for size, part in zip(shape, index, strict=False):
        if isinstance(part, slice):
            kept.append(len(range(*part.indices(size))))
        elif part >= size:
            return None
    return (*kept, *shape[len(index) :])


def _check_scale(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], where: str) -> None:
    scale = f"{name}_scale_inv"
    if scale not in checkpoint.file_of:
        raise CheckpointError(f"{where} is FP8, but its {scale} is missing")
    if len(shape) < 2:
        raise CheckpointError(f"{where} is FP8 and has shape {list(shape)}, expected at least two dimensions")
    dtype, found = checkpoint.form(scale)
    expected = (*shape[:-2], -(-shape[-2] // BLOCK), -(-shape[-1] // BLOCK))
    if found != expected or dtype not in ("F32", "BF16"):
        raise CheckpointError(f"{where}: {scale} is {dtype} {list(found)}, expected F32 {list(expected)}")


def _pieces(target: Target, source: Source) -> Iterator[tuple[Target, Source]]:
    """A whole tensor of many rows as runs of rows, each of whole blocks; what is an expert's stays in one."""
    rows = target.into.shape[0] if target.into.dim() == 2 and not source.index and target.scale_into is None else 0
    step = max(1, PIECE_VALUES // (BLOCK * target.into.shape[-1])) * BLOCK if rows else 0
    if rows <= step:
        yield target, source
        return
    for first in range(0, rows, step):
        run = slice(first, min(first + step, rows))
        yield Target(target.into[run], (source,)), Source(source.name, (run,))


def _fill(checkpoint: Checkpoint, target: Target, source: Source) -> None:
    try:
        tensor = checkpoint.read(source)
        if tensor.dtype != torch.float8_e4m3fn:
            target.into.copy_(tensor)
            return
        whole = tuple(part for part in source.index if isinstance(part, int))  # scales of a row range: cut below
        scale = checkpoint.read(Source(f"{source.name}_scale_inv", whole)).float()
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{checkpoint.file_of[source.name]}: tensor {source.name}: {error}") from error
    if not bool(torch.isfinite(scale).all()):
        raise CheckpointError(f"{checkpoint.directory}: {source.name}_scale_inv holds a scale that is NaN or infinite")
    rows = next((part for part in source.index if isinstance(part, slice)), slice(0, None))
    first = rows.start or 0
    if target.scale_into is None:
        if first % BLOCK:  # blocks are counted from the whole tensor's first row
            scale_NK = scale.repeat_interleave(BLOCK, 0)[first : first + tensor.shape[0]].repeat_interleave(BLOCK, 1)
            target.into.copy_(tensor.float() * scale_NK[:, : tensor.shape[1]])
        else:
            target.into.copy_(dequantize_blocks(tensor, scale[first // BLOCK :][: -(-tensor.shape[0] // BLOCK)]))
        return
    if first % BLOCK:
        raise CheckpointError(
            f"{source.name}: row {first} of a fused FP8 tensor is not at the edge of a block of {BLOCK}"
        )
    target.into.copy_(tensor)
    target.scale_into.copy_(scale[first // BLOCK :][: target.scale_into.shape[0]])
