"""What holds for the repository as a whole: who imports whom, a quiet import, no need of Triton, true documents."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import crossdock
from crossdock.cli.audit_worker import find_specs

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "crossdock"
MODULES = sorted(path.relative_to(ROOT) for path in PACKAGE.rglob("*.py"))
DOCUMENTS = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")
LONGEST = 300  # lines of a module

IMPORT_ALL = """
import importlib, pkgutil, crossdock
names = [m.name for m in pkgutil.walk_packages(crossdock.__path__, "crossdock.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
assert len(names) > 70, names
"""
# Who reads the environment is the nearest caller that is no part of os itself.
RECORD_READS = """
import os, sys
reads = []
def recorded(method):
    def wrapper(self, *args):
        frame = sys._getframe(1)
        while frame.f_code.co_filename.startswith("<frozen") or frame.f_code.co_filename == os.__file__:
            frame = frame.f_back
        reads.append((frame.f_code.co_filename, frame.f_lineno))
        return method(self, *args)
    return wrapper
for name in ("__getitem__", "__iter__", "__contains__", "get", "pop", "copy", "items"):
    if hasattr(os._Environ, name):
        setattr(os._Environ, name, recorded(getattr(os._Environ, name)))
"""
NOTHING_STARTED = """
import torch
assert not torch.cuda.is_initialized()
assert not torch.distributed.is_initialized()
here = os.path.dirname(crossdock.__file__)
assert reads and not [read for read in reads if read[0].startswith(here)], reads
"""
NO_TRITON = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ImportError("no triton here")
sys.meta_path.insert(0, Blocker())
"""
A_LAYER = """
import torch
from crossdock import LocalWorld, MoEConfig, MoELayer
from crossdock.backend import resolve_backend
assert "triton" not in sys.modules
assert resolve_backend("auto", torch.device("cpu")) == "torch"
try:
    resolve_backend("triton", torch.device("cpu"))
    raise SystemExit("backend='triton' was accepted")
except crossdock.CrossdockError as error:
    assert "not installed" in str(error), error
layer = MoELayer(MoEConfig(16, 8, 4, 2, shared_size=8), LocalWorld(1).run(lambda t: t)[0], dtype=torch.float32)
for parameter in layer.parameters():
    torch.nn.init.normal_(parameter)
y_TD = layer(torch.ones(3, 16))
assert bool(y_TD.isfinite().all()) and bool((y_TD != 0).any())
y_TD.sum().backward()
"""


def python(code: str) -> str:
    """Runs code in a fresh interpreter."""
    return run("-c", code)


def run(*arguments: str) -> str:
    """stdout of a python command as a user would run it; fails with what it said."""
    kept = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    environment = kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=280,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_layers_import_only_downwards() -> None:
    tool = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([tool, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and "1 kept, 0 broken" in done.stdout, done.stdout + done.stderr


def test_import_is_quiet() -> None:
    python(RECORD_READS + IMPORT_ALL + NOTHING_STARTED)


def test_works_without_triton() -> None:
    python(NO_TRITON + IMPORT_ALL + A_LAYER)


def test_torch_is_not_imported_before_it_is_needed() -> None:
    python("import sys, crossdock, crossdock.cli; assert 'torch' not in sys.modules")


def test_only_init_and_the_command_line_read_the_environment() -> None:
    readers = set()
    for module in MODULES:
        for node in ast.walk(ast.parse((ROOT / module).read_text())):
            name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            if name in ("environ", "environb", "getenv", "getenvb", "putenv"):
                readers.add(module.as_posix())
    assert "crossdock/parallel/group.py" in readers
    assert all(reader == "crossdock/parallel/group.py" or reader.startswith("crossdock/cli/") for reader in readers)


def test_public_names_resolve_and_are_documented() -> None:
    assert sorted(crossdock.__all__) == crossdock.__all__
    for name in crossdock.__all__:
        value = getattr(crossdock, name)
        assert (value.__doc__ or "").strip(), name
        assert not (value.__doc__ or "").startswith(f"{name}("), f"{name} has only the docstring dataclass gave it"
        assert name in dir(crossdock)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = crossdock.nothing


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_module_is_short_and_says_why(module: Path) -> None:
    text = (ROOT / module).read_text()
    assert len(text.splitlines()) <= LONGEST
    assert re.search(r"\b(TODO|FIXME|XXX)\b", text) is None
    if text.strip():
        assert ast.get_docstring(ast.parse(text)), "no module docstring"


def test_every_kernel_compiles_for_every_target() -> None:
    """`crossdock audit` as it is: no device needed."""
    pytest.importorskip("triton")
    report = json.loads(run("-m", "crossdock", "audit", "--json"))
    assert report["ok"]
    built = {(build["kernel"], build["config"], build["target"]) for build in report["kernels"]}
    specs = find_specs([])
    assert built == {(s.name, s.config, target) for s in specs for target in s.targets}


def test_every_kernel_is_audited() -> None:
    pytest.importorskip("triton")
    kernel = re.compile(r"@triton\.jit(?:\(.*\))?\ndef (\w+_kernel)\(")
    written = {name for m in MODULES for name in kernel.findall((ROOT / m).read_text())}
    assert written and written == {spec.kernel.fn.__name__ for spec in find_specs([])}


def file_map() -> Iterator[str]:
    """The paths of README's file map: a tree drawn by indentation, folders ending in a slash."""
    (block,) = re.findall(r"## Files\n.*?```\n(crossdock/\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    folders: list[str] = []
    for line in block.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:depth], name]
        assert line.strip() != name or name == "crossdock/", f"{name} has no description"
        if not name.endswith("/"):
            yield "".join(folders)


def test_file_map_has_every_module_once() -> None:
    listed = list(file_map())
    assert len(listed) == len(set(listed))
    expected = {m.as_posix() for m in MODULES if m.name != "__init__.py"} | {"crossdock/__init__.py"}
    assert {path for path in listed if path.startswith("crossdock/")} == expected
    assert all((ROOT / path).exists() for path in listed)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_document_names_only_what_exists(document: str) -> None:
    text = (ROOT / document).read_text()
    for name in set(re.findall(r"[\w./-]+\.(?:py|md|toml|txt|yaml)\b", text)):
        near = (ROOT / name, PACKAGE / name)
        assert any(path.exists() for path in near) or any(PACKAGE.rglob(Path(name).name)), f"{document} names {name}"
    for path, test in re.findall(r"(tests/[\w/]+\.py)::(\w+)", text):
        assert f"def {test}(" in (ROOT / path).read_text(), f"{document} names {path}::{test}"
    for target in set(re.findall(r"make ([a-z]+)\b", text)) & set(re.findall(r"`make ([a-z]+)`", text)):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"make {target}"
    for command in re.findall(r"crossdock (generate|bench|audit|doctor|serve|plan|tune)\b", text):
        assert command != "serve", f"{document} names crossdock {command}"


def test_architecture_has_the_layers_that_are_enforced() -> None:
    layers = re.search(r"^layers = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    assert layers is not None
    enforced = [row.replace("crossdock.", "") for row in re.findall(r'"(.*)"', layers[1])]
    text = (ROOT / "ARCHITECTURE.md").read_text()
    assert "\n".join(f"    {row}" for row in enforced) in text


def test_readme_example_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        assert python(block).strip(), "it prints something"
