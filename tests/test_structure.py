"""What docs/architecture.md promises: who imports whom, who knows ranks, state keys and private names."""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import pkgutil
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fop
from fop import FOP, KFAC

SRC = Path(fop.__file__).parent.parent
LIBRARY = sorted((SRC / "fop").rglob("*.py"))
BENCH = sorted((SRC / "fop_bench").rglob("*.py"))
MAX_LINES = 500

# What each part may import of the library, itself included. Anything not named here is a new part that
# somebody must place.
LOW = {"torch_internals", "correction", "layers"}
CAPTURE = LOW | {"capture"}
CURVATURE = {"torch_internals", "transfer", "layers", "curvature"}
BINDING = CAPTURE | CURVATURE | {"layer_options", "discovery", "recognition", "step_size", "binding"}
TOP = BINDING | {"options", "report", "distributed"}
MAY_IMPORT: dict[str, set[str]] = {
    "torch_internals": set(),
    "transfer": set(),
    "graphs": set(),
    "correction": set(),
    "layers": {"layers"},
    "capture": CAPTURE,
    "curvature": CURVATURE,
    "step_size": {"correction", "curvature"},
    "layer_options": CURVATURE,
    "discovery": CAPTURE | {"layer_options"},
    "recognition": CAPTURE,
    "binding": BINDING,
    "options": {"torch_internals"},
    "report": BINDING | {"graphs"},
    "state": BINDING | {"options"},
    "adamw": {"capture", "step_size"},
    "amp": {"torch_internals"},
    "presets": set(),
    "distributed": TOP,
    "optimizer": TOP | {"state", "adamw", "amp", "graphs", "presets"},
    "__init__": {"optimizer", "presets"},
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


def part_of(path: Path) -> str:
    """`layers` for a file of fop/layers, `__init__` for fop/__init__.py."""
    relative = path.relative_to(SRC / "fop")
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported_parts(path: Path) -> set[str]:
    package = ".".join(path.relative_to(SRC).parent.parts)
    parts = {d.split(".")[1] for d in imports(path.read_text(), package) if d.startswith("fop.")}
    files = SRC / "fop"
    # Names of fop/__init__.py are no parts: importing those from inside is a cycle, reported as such.
    return {
        part if (files / part).exists() or (files / f"{part}.py").exists() else "__init__" for part in parts
    }


def code_of(path: Path) -> str:
    """A file without comments and strings, f-strings included."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        for field, value in ast.iter_fields(node):
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                setattr(node, field, ast.Constant(""))
            elif isinstance(value, list):
                value[:] = [
                    ast.Constant("") if isinstance(v, ast.Constant) and isinstance(v.value, str) else v
                    for v in value
                ]
    return ast.unparse(tree)


def strings_of(path: Path) -> set[str]:
    """The strings of a file, docstrings left out."""
    tree = ast.parse(path.read_text())
    return {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}


# --- imports ---------------------------------------------------------------------------------------


def test_import_parser() -> None:
    source = (
        "import torch.nn as nn\nfrom fop import layers\nfrom . import a\nfrom ..optimizer import FOP\n"
        "def f():\n    from fop.capture import x\n"
    )
    found = set(imports(source, "fop.curvature"))
    assert {"torch.nn", "fop.layers", "fop.curvature.a", "fop.optimizer.FOP", "fop.capture"} <= found


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_imports_go_one_way(path: Path) -> None:
    part = part_of(path)
    assert part in MAY_IMPORT, f"say in MAY_IMPORT and in docs/architecture.md what {part} may import"
    assert imported_parts(path) <= MAY_IMPORT[part] | {part}


def test_every_part_is_really_looked_at() -> None:
    assert {part_of(path) for path in LIBRARY} == set(MAY_IMPORT)
    # Had the parser missed the imports, the test above would hold of anything.
    parts = {part_of(path): imported_parts(path) for path in LIBRARY if path.parent == SRC / "fop"}
    assert {"binding", "capture", "correction", "curvature", "distributed", "step_size"} <= parts["optimizer"]


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_library_depends_on_torch_alone(path: Path) -> None:
    package = ".".join(path.relative_to(SRC).parent.parts)
    roots = {dotted.split(".")[0] for dotted in imports(path.read_text(), package)}
    assert roots <= {"torch", "fop"} | sys.stdlib_module_names


# --- who knows what --------------------------------------------------------------------------------

# Wrapped models are seen in torch_internals, and the option `distributed=` is passed on in optimizer.
KNOWS_RANKS = {"distributed", "torch_internals"}
OF_RANKS = re.compile(
    r"\b(world_size|get_rank|ProcessGroup|process_group|torch\.distributed|all_reduce)\b|\branks?\b"
)


@pytest.mark.parametrize("path", [path for path in LIBRARY if part_of(path) not in KNOWS_RANKS], ids=name)
def test_nobody_else_names_a_rank(path: Path) -> None:
    assert OF_RANKS.findall(code_of(path)) == []


def test_rank_finder() -> None:
    files = [path for path in LIBRARY if part_of(path) == "distributed"]
    found = {path.stem for path in files if OF_RANKS.search(code_of(path))}
    assert {"ranks", "distributor", "handshake", "buckets", "messages", "updates"} <= found


@pytest.mark.parametrize("path", [p for p in LIBRARY if part_of(p) != "curvature"], ids=name)
def test_nobody_else_knows_the_curvatures_state(path: Path) -> None:
    assert not strings_of(path) & {"A", "G", "A_inv", "G_inv"}


def test_key_finder() -> None:
    kronecker = SRC / "fop" / "curvature" / "kronecker.py"
    assert {"A", "G", "A_inv", "G_inv"} <= strings_of(kronecker)


PRIVATE = re.compile(
    r"torch\._C|\._base\b|_execution_engine|_active_ddp_module|_get_fsdp_state|_fsdp_param_group|_orig_mod"
    r"|_join_config|\._get_backend|\._timeout\b|_current_graph_task_id|scaler\._scale"
)


@pytest.mark.parametrize("path", [p for p in LIBRARY if part_of(p) != "torch_internals"], ids=name)
def test_what_torch_keeps_private_is_in_one_file(path: Path) -> None:
    assert PRIVATE.findall(path.read_text()) == []


def test_private_finder() -> None:
    assert len(set(PRIVATE.findall((SRC / "fop" / "torch_internals.py").read_text()))) > 6


WORDS = re.compile(
    r"\b(crew|solo|team|membership|mail|parcels?|outbox|sharing|settling|joining|rungs?|rescues?|apart|anew"
    r"|continues|elsewhere|torn)\b",
    re.IGNORECASE,
)


def prose_of(path: Path) -> str:
    """Names, comments and docstrings of a file."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    kinds = (tokenize.NAME, tokenize.COMMENT, tokenize.STRING)
    return "\n".join(token.string for token in tokens if token.type in kinds)


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_words_are_the_fields(path: Path) -> None:
    assert WORDS.findall(prose_of(path)) == []


@pytest.mark.parametrize("path", BENCH, ids=name)
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
    public = {f"fop.{name}" for name in fop.__all__}
    # Counts the bytes of what curvatures keep, and predicts them and what is sent.
    if path.name == "scale.py":
        names = ("LayerSize", "entry_names", "packed_shape")
        public |= {"fop.curvature", *(f"fop.curvature.{name}" for name in names)}
        public |= {"fop.distributed", "fop.distributed.SKETCH", "fop.distributed.make_plan"}
    assert others <= {"fop"} | public


# --- files and names -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", LIBRARY + BENCH, ids=name)
def test_long_files_say_why(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= MAX_LINES or f"over {MAX_LINES} lines" in lines[0]


def test_package_is_public_and_typed() -> None:
    assert set(fop.__all__) == {"FOP", "KFAC", "__version__", "presets"}
    assert all(hasattr(fop, public) for public in fop.__all__)
    assert (SRC / "fop" / "py.typed").is_file()
    assert issubclass(KFAC, FOP)
    assert issubclass(FOP, torch.optim.Optimizer)


@pytest.mark.parametrize("package", ["fop.layers", "fop.capture", "fop.curvature", "fop.distributed"])
def test_packages_say_what_is_public(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__doc__
    assert all(hasattr(module, public) for public in module.__all__)


def public_things(module_name: str) -> Iterator[tuple[str, Any]]:
    """Public classes, functions, and methods that a module, or a package's modules, define themselves."""
    module = importlib.import_module(module_name)
    if hasattr(module, "__path__"):
        for info in pkgutil.iter_modules(module.__path__, f"{module_name}."):
            yield from public_things(info.name)
        return
    for key, thing in vars(module).items():
        if key.startswith("_") or getattr(thing, "__module__", None) != module_name:
            continue
        if inspect.isclass(thing):
            yield f"{module_name}.{key}", thing
            for attribute, member in vars(thing).items():
                callable_ = inspect.isfunction(member) or isinstance(member, property)
                if callable_ and not attribute.startswith("_"):
                    yield f"{module_name}.{key}.{attribute}", getattr(thing, attribute)
        elif inspect.isfunction(thing):
            yield f"{module_name}.{key}", thing


@pytest.mark.parametrize(
    "module",
    ["fop.optimizer", "fop.correction", "fop.step_size", "fop.binding", "fop.curvature", "fop.distributed"],
)
def test_public_things_have_docstrings(module: str) -> None:
    things = dict(public_things(module))
    assert len(things) > 4
    # A dataclass without a docstring gets its signature for one; a method may have its base class'.
    bare = [
        key
        for key, thing in things.items()
        if not (inspect.getdoc(thing) or "").strip()
        or str(thing.__doc__).startswith(f"{key.split('.')[-1]}(")
    ]
    assert bare == []


# --- the device is not waited for ------------------------------------------------------------------

# Where a flag per factor is read on purpose, in steps with a curvature update only.
READERS = {"damped_inverses", "_fall_back"}
READS = {"item", "cpu", "tolist", "numpy", "nonzero", "equal", "allclose"}
EQUATIONS = ["correction.py", "step_size.py", "curvature/inversion.py"]


def host_reads(source: str) -> Iterator[str]:
    """Calls that would wait for the device, outside READERS."""

    def visit(node: ast.AST, function: str) -> Iterator[str]:
        if isinstance(node, ast.FunctionDef):
            function = node.name
        if isinstance(node, ast.Call) and function not in READERS:
            called = node.func
            if isinstance(called, ast.Attribute) and called.attr in READS:
                yield f"line {node.lineno}: .{called.attr}()"
            elif isinstance(called, ast.Name) and called.id in ("bool", "int"):
                yield f"line {node.lineno}: {called.id}()"
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function)

    yield from visit(ast.parse(source), "")


def test_host_read_finder() -> None:
    source = "def f(x):\n    return x.item(), bool(x), g(x)\ndef _fall_back(x):\n    return bool(x)\n"
    assert list(host_reads(source)) == ["line 2: .item()", "line 2: bool()"]


@pytest.mark.parametrize("file", EQUATIONS)
def test_equations_read_nothing_back(file: str) -> None:
    assert list(host_reads((SRC / "fop" / file).read_text())) == []


def test_the_page_names_what_there_is() -> None:
    page = (SRC.parent / "docs/architecture.md").read_text()
    table = page.partition("## Where to change what")[2].partition("\n## ")[0]
    named = [
        each for line in table.splitlines() for each in re.findall(r"`([^`]+)`", line.partition(" | ")[2])
    ]
    sources = "\n".join(file.read_text() for file in LIBRARY + BENCH)
    assert len(named) > 50
    for each in named:
        if re.search(r"\.(py|md)$|/", each):
            assert any((home / each).exists() for home in (SRC / "fop", SRC, SRC.parent)), each
        else:
            assert re.search(rf"\b{re.escape(each.rpartition('.')[2])}\b", sources), each
