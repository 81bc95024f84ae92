"""Tables of tuned tiles: small JSON files, of the package or of the user, and what they hold for.

    {"format": 1,
     "devices": {"NVIDIA H200": {"triton 3.7.1, kernels 5b0c8d7e": {
         "bf16 N=4096 K=7168 L=32 R/L=8": {"block_m": 64, "block_n": 128, "block_k": 64, "num_warps": 4,
                                           "num_stages": 4, "us": 41.2, "formula_us": 44.0}}}}}

A tile holds for the Triton that compiled it and for the kernels it was measured with. Their hash is over the kernels'
own text without comments: a new docstring or wrapper must not throw a measurement away. Versions stand side by side, so
that going back to an older Triton finds its tiles again. What a key means is configs.py's affair.
"""

import ast
import hashlib
import json
import math
import os
import re
import tempfile
from functools import lru_cache
from pathlib import Path

from crossdock._triton import triton
from crossdock.errors import ConfigError

FORMAT = 1
Entry = dict[str, float]  # a tile's five sizes, and what was measured with it
Table = dict[str, dict[str, dict[str, Entry]]]  # device, version, key


def user_path() -> Path | None:
    """Where `crossdock tune` writes and every launch looks; None where the user has no home."""
    try:
        return Path.home() / ".cache" / "crossdock" / "tuned.json"
    except RuntimeError:
        return None


@lru_cache(maxsize=1)
def version() -> str:
    """Names what tiles hold for: Triton, and the text of this folder's kernels."""
    text = "\n".join(kernel_text(path.read_text("utf-8")) for path in sorted(Path(__file__).parent.glob("*.py")))
    return f"triton {triton.__version__}, kernels {hashlib.sha256(text.encode()).hexdigest()[:8]}"


def kernel_text(source: str) -> str:
    """The functions under a `jit` decorator of a module, without their comments and docstrings."""
    lines, kept = source.splitlines(), []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and any(ast.unparse(d).endswith(".jit") for d in node.decorator_list):
            first = node.body[0]
            documented = ast.get_docstring(node) is not None
            skipped = range(first.lineno, (first.end_lineno or first.lineno) + 1) if documented else ()
            numbers = (n for n in range(node.lineno, (node.end_lineno or node.lineno) + 1) if n not in skipped)
            kept += [re.sub(r"\s*#.*", "", lines[n - 1]) for n in numbers]
    return "\n".join(line for line in kept if line.strip())


def read(path: Path) -> Table:
    """A file's whole content. Raises ConfigError where it cannot be read or has another form."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as a table of tiles: {error}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ConfigError(f"{path} must be a table of tiles of format {FORMAT}, written by crossdock tune")
    table = found.get("devices")
    if not isinstance(table, dict) or not all(_is_entry(entry) for entry in _entries(table)):
        raise ConfigError(f"{path}: devices must hold a tile's sizes by device, version and shape")
    return table


def holding(path: Path, device_name: str) -> dict[str, Entry]:
    """The entries of a file that hold for this device, Triton and source. Raises ConfigError as `read` does."""
    return read(path).get(device_name, {}).get(version(), {})


def store(path: Path, device_name: str, entries: dict[str, Entry]) -> None:
    """Adds entries to a file, or replaces those of the same keys; the file is never seen half written.

    Raises ConfigError where the file there is no table, or where it cannot be written.
    """
    table = read(path) if path.exists() else {}
    table.setdefault(device_name, {}).setdefault(version(), {}).update(entries)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as file:
            json.dump({"format": FORMAT, "devices": table}, file, indent=1, sort_keys=True)
        os.replace(file.name, path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}") from None


def _entries(table: dict[str, object]) -> list[object]:
    """Everything three levels down; what is no dictionary on the way counts as an entry, and a wrong one."""
    found: list[object] = [table]
    for _ in range(3):
        found = [inner for outer in found for inner in (outer.values() if isinstance(outer, dict) else (None,))]
    return found


def _is_entry(entry: object) -> bool:
    return isinstance(entry, dict) and all(isinstance(v, int | float) and math.isfinite(v) for v in entry.values())
