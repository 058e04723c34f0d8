"""The layout that docs/architecture.md promises: who imports whom, what the algebra may read, file sizes."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fop
import fop.distributed
from fop import FOP, KFAC

SRC = Path(fop.__file__).parent.parent
LIBRARY = sorted((SRC / "fop").rglob("*.py"))
ALL = sorted(path for package in ("fop", "fop_bench") for path in (SRC / package).rglob("*.py"))
MAX_LINES = 400

# What each part may import of the library, itself included. Anything not named here is a new part that
# somebody must place.
MAY_IMPORT: dict[str, set[str]] = {
    "algebra": {"algebra"},
    "layers": {"algebra", "layers"},
    "capture": {"layers", "capture"},
    "distributed": {"algebra", "distributed"},
    "optim": {"algebra", "layers", "capture", "distributed", "optim"},
    "__init__": {"optim"},
}


def name(path: Path) -> str:
    return str(path.relative_to(SRC))


def imports(source: str, package: str) -> Iterator[str]:
    """Dotted names of everything that a module of ``package`` imports, at any depth of the code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join(parents[: len(parents) - node.level + 1] + ([base] if base else []))
            # `from fop import layers` imports fop.layers, if that is a module; a name is harmless here.
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def library_part(path: Path) -> str:
    """`algebra` for a file of fop/algebra, `__init__` for fop/__init__.py."""
    relative = path.relative_to(SRC / "fop")
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported_parts(path: Path) -> set[str]:
    package = ".".join(path.relative_to(SRC).parent.parts)
    parts = {d.split(".")[1] for d in imports(path.read_text(), package) if d.startswith("fop.")}
    # Names of fop/__init__.py are no parts: importing those from inside is a cycle, reported as such.
    return {part if (SRC / "fop" / part).exists() else "__init__" for part in parts}


# --- imports ---------------------------------------------------------------------------------------


def test_import_parser() -> None:
    source = (
        "import torch.nn as nn\nfrom fop import layers\nfrom . import a\nfrom ..optim.fop import FOP\n"
        "def f():\n    from fop.capture import x\n"
    )
    found = set(imports(source, "fop.algebra"))
    assert {"torch.nn", "fop.layers", "fop.algebra.a", "fop.optim.fop", "fop.capture"} <= found


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_imports_go_one_way(path: Path) -> None:
    part = library_part(path)
    assert part in MAY_IMPORT, f"say in MAY_IMPORT and in docs/architecture.md what {part} may import"
    assert imported_parts(path) <= MAY_IMPORT[part]


def test_every_part_is_really_looked_at() -> None:
    parts = {library_part(path) for path in LIBRARY}
    assert parts == set(MAY_IMPORT)
    # Had the parser missed the imports, the test above would hold of anything.
    optim = set().union(*(imported_parts(path) for path in LIBRARY if library_part(path) == "optim"))
    assert {"algebra", "layers", "capture", "distributed"} <= optim


def test_layers_and_distributed_never_meet() -> None:
    assert "distributed" not in MAY_IMPORT["layers"] | MAY_IMPORT["capture"]
    assert not {"layers", "capture"} & MAY_IMPORT["distributed"]
    for path in (path for path in LIBRARY if library_part(path) != "optim"):
        assert not {"layers", "distributed"} <= imported_parts(path) | {library_part(path)}


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_library_depends_on_torch_alone(path: Path) -> None:
    package = ".".join(path.relative_to(SRC).parent.parts)
    roots = {dotted.split(".")[0] for dotted in imports(path.read_text(), package)}
    assert roots <= {"torch", "fop"} | sys.stdlib_module_names
    if library_part(path) == "algebra":
        # Equations know of no modules, ranks or optimizers.
        torch_modules = {d for d in imports(path.read_text(), package) if d.startswith("torch.")}
        assert torch_modules <= {"torch.Tensor"}


@pytest.mark.parametrize("path", [p for p in ALL if "fop_bench" in p.parts], ids=name)
def test_bench_uses_the_public_library(path: Path) -> None:
    package = ".".join(path.relative_to(SRC).parent.parts)
    source = path.read_text()
    used = {d for d in imports(source, package) if d.split(".")[0] == "fop"}
    # `import fop` gives fop.anything too; where it is not imported, the name is a variable.
    for node in ast.walk(ast.parse(source)) if "fop" in used else ():
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "fop":
            used.add(f"fop.{node.attr}")
    # __file__ and the like are of any module.
    others = {dotted for dotted in used if not dotted.endswith("__")}
    # Who plans a cluster asks `fop.distributed`, without an optimizer.
    public = {f"fop.{name}" for name in fop.__all__}
    public |= {"fop.distributed"} | {f"fop.distributed.{name}" for name in fop.distributed.__all__}
    # Measures what the paper's equations leave open, by replacing one; an option it must not be.
    if path.name == "formulas.py":
        public |= {"fop.algebra", "fop.algebra.KroneckerBlock"}
    assert others <= {"fop"} | public


# --- files and names -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ALL, ids=name)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_package_is_public_and_typed() -> None:
    assert set(fop.__all__) == {"FOP", "KFAC", "__version__"}
    assert all(hasattr(fop, public) for public in fop.__all__)
    assert (SRC / "fop" / "py.typed").is_file()
    assert issubclass(KFAC, FOP)
    assert issubclass(FOP, torch.optim.Optimizer)


@pytest.mark.parametrize(
    "package", ["fop.algebra", "fop.layers", "fop.capture", "fop.distributed", "fop.optim"]
)
def test_packages_say_what_is_public(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__doc__
    # Constants, classes, functions.
    order = sorted(module.__all__, key=lambda name: (not name.isupper(), name.islower(), name))
    assert list(module.__all__) == order
    assert all(hasattr(module, public) for public in module.__all__)


def public_things(package: str) -> Iterator[tuple[str, Any]]:
    """Public classes, functions, and methods that a package's modules define themselves."""
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
        module = importlib.import_module(info.name)
        for key, thing in vars(module).items():
            if key.startswith("_") or getattr(thing, "__module__", None) != info.name:
                continue
            if inspect.isclass(thing):
                yield f"{info.name}.{key}", thing
                for attribute, member in vars(thing).items():
                    callable_ = inspect.isfunction(member) or isinstance(member, property)
                    if callable_ and not attribute.startswith("_"):
                        yield f"{info.name}.{key}.{attribute}", member
            elif inspect.isfunction(thing):
                yield f"{info.name}.{key}", thing


@pytest.mark.parametrize("package", ["fop.algebra", "fop.distributed", "fop.optim"])
def test_public_things_have_docstrings(package: str) -> None:
    things = dict(public_things(package))
    assert len(things) > 10
    # A dataclass without a docstring gets its signature for one.
    bare = [
        key
        for key, thing in things.items()
        if not (thing.__doc__ or "").strip() or thing.__doc__.startswith(f"{key.split('.')[-1]}(")
    ]
    assert bare == []


# --- the device is not waited for ------------------------------------------------------------------

# Where a flag per factor is read on purpose, in steps with a curvature update only.
READERS = {"damped_inverses", "_rescue"}
READS = {"item", "cpu", "tolist", "numpy", "nonzero", "equal", "allclose"}


def host_reads(source: str) -> Iterator[str]:
    """Calls that would wait for the device, outside READERS."""

    def visit(node: ast.AST, function: str) -> Iterator[str]:
        if isinstance(node, ast.FunctionDef):
            function = node.name
        if isinstance(node, ast.Call) and function not in READERS:
            called = node.func
            if isinstance(called, ast.Attribute) and called.attr in READS:
                yield f"line {node.lineno}: .{called.attr}()"
            elif isinstance(called, ast.Name) and called.id in ("bool", "float", "int"):
                yield f"line {node.lineno}: {called.id}()"
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function)

    yield from visit(ast.parse(source), "")


def test_host_read_finder() -> None:
    source = "def f(x):\n    return x.item(), bool(x), g(x)\ndef _rescue(x):\n    return bool(x)\n"
    assert list(host_reads(source)) == ["line 2: .item()", "line 2: bool()"]


@pytest.mark.parametrize("path", [p for p in LIBRARY if library_part(p) == "algebra"], ids=name)
def test_algebra_reads_nothing_back(path: Path) -> None:
    assert list(host_reads(path.read_text())) == []
