"""The layout that docs/architecture.md promises: who imports whom, what stays on the device, file sizes."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fop
from fop import FOP, KFAC
from fop.optim.report import Refusals

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
    assert {"algebra", "layers", "capture", "optim", "__init__"} <= parts
    # Had the parser missed the imports, the test above would hold of anything.
    optim = set().union(*(imported_parts(path) for path in LIBRARY if library_part(path) == "optim"))
    assert {"algebra", "layers", "capture"} <= optim


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
    # `import fop` gives fop.anything too.
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "fop":
            used.add(f"fop.{node.attr}")
    # __file__ and the like are of any module.
    others = {dotted for dotted in used if not dotted.endswith("__")}
    assert others <= {"fop"} | {f"fop.{public}" for public in fop.__all__}


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


@pytest.mark.parametrize("package", ["fop.algebra", "fop.layers", "fop.capture", "fop.optim"])
def test_packages_say_what_is_public(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__doc__
    assert list(module.__all__) == sorted(module.__all__)
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


@pytest.mark.parametrize("package", ["fop.algebra", "fop.optim"])
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


class HostReadError(Exception):
    """Something would have waited for the device."""


# Read a value, or have an output size that depends on values. lift_fresh is torch.tensor or new_tensor of
# Python numbers: a copy from pageable memory, for which the host waits as well.
FORBIDDEN = {
    "_local_scalar_dense",
    "item",
    "equal",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "lift_fresh",
}
# These read CPU memory without any operator being called.
FORBIDDEN_METHODS = {
    "tolist",
    "item",
    "cpu",
    "numpy",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
    "__array__",
}


class NoOperatorReads(TorchDispatchMode):
    """Fails on operators that a GPU could not run without the host waiting for it."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        operator = func.overloadpacket.__name__
        masks = operator in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype is torch.bool for index in args[1]
        )
        if operator in FORBIDDEN or masks:
            raise HostReadError(str(func))
        return func(*args, **(kwargs or {}))


class NoMethodReads(TorchFunctionMode):
    """Fails on methods that would copy a GPU tensor to the host."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in FORBIDDEN_METHODS:
            raise HostReadError(func.__name__)
        return func(*args, **(kwargs or {}))


READERS_OF_A_TENSOR: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda t: t.sum().item(),
    "bool": lambda t: bool(t.any()),
    "float": lambda t: float(t.sum()),
    "tolist": lambda t: t.tolist(),
    "numpy": lambda t: t.numpy(),
    "equal": lambda t: torch.equal(t, t + 1),
    "if": lambda t: 1 if t.sum() > 0 else 0,
    "mask": lambda t: t[t > 0],
    "nonzero": lambda t: t.nonzero(),
    "new_tensor": lambda t: t * t.new_tensor(2.0),
}


@pytest.mark.parametrize("reader", READERS_OF_A_TENSOR.values(), ids=READERS_OF_A_TENSOR.keys())
def test_modes_notice(reader: Callable[[Tensor], Any]) -> None:
    with pytest.raises(HostReadError), NoMethodReads(), NoOperatorReads():
        reader(torch.ones(3))


def mixed_model() -> nn.Sequential:
    """Both kinds of layer, and parameters on the AdamW path."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.LayerNorm(4 * 9),
        nn.Linear(4 * 9, 3),
    )


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no clip": {"kl_clip": None},
    "everything": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True, "kl_clip": 1e-9},
    "fixed": {"beta": 0.1, "eta": 0.5},
    "no momentum": {"momentum": 0.0, "weight_decay": 0.01},
}


def backward(model: nn.Module, x: Tensor, accumulate: int = 1) -> None:
    for _ in range(accumulate):
        (model(x).square().mean() / accumulate).backward()


def until_no_curvature_is_due(model: nn.Module, optimizer: FOP, x: Tensor) -> None:
    for _ in range(30):
        optimizer.zero_grad()
        backward(model, x)
        optimizer.step()
    while optimizer.curvature_due:
        optimizer.zero_grad()
        backward(model, x)
        optimizer.step()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("library", [FOP, KFAC])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_step_without_curvature_reads_nothing(
    options: dict[str, Any], library: type[FOP], accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if library is KFAC:
        options = {key: value for key, value in options.items() if key not in ("beta", "eta")}
    torch.manual_seed(0)
    model, x = mixed_model(), torch.randn(6, 2, 5, 5)
    optimizer = library(model.parameters(), **options)
    until_no_curvature_is_due(model, optimizer, x)
    # On the CPU there is nothing to wait for, so refusals are read and reported at once; elsewhere later.
    monkeypatch.setattr(Refusals, "report", lambda self: None)
    before = [p.detach().clone() for p in model.parameters()]
    with NoMethodReads(), NoOperatorReads():
        # zero_grad with zeros makes the capture ask whether the gradient is zero.
        optimizer.zero_grad(set_to_none=False)
        backward(model, x, accumulate)
        # A gradient changed as a whole, as by clipping: its scale has to be found out.
        torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None], 0.5)
        optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_a_refusal_reads_nothing_either(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = mixed_model(), torch.randn(6, 2, 5, 5)
    optimizer = FOP(model, weight_decay=0.1)
    until_no_curvature_is_due(model, optimizer, x)
    monkeypatch.setattr(Refusals, "report", lambda self: None)
    before = [p.detach().clone() for p in model.parameters()]
    model.eval()  # a NaN would stay in the running statistics of BatchNorm, which are not ours
    with NoMethodReads(), NoOperatorReads():
        optimizer.zero_grad()
        backward(model, x * float("nan"))
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_a_curvature_step_does_read() -> None:
    """The counterpart: the modes see the step of the optimizer, not only calls made in this file."""
    torch.manual_seed(0)
    model, x = mixed_model(), torch.randn(6, 2, 5, 5)
    optimizer = FOP(model)
    backward(model, x)
    with pytest.raises(HostReadError), NoMethodReads(), NoOperatorReads():
        optimizer.step()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_step_without_curvature_never_syncs_cuda(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, x = mixed_model().cuda(), torch.randn(6, 2, 5, 5, device="cuda")
    optimizer = FOP(model, **options)
    until_no_curvature_is_due(model, optimizer, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.zero_grad()
        backward(model, x)
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
