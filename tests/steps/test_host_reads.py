"""No step waits for the device: what it must know of the device it reads a curvature update later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fop import FOP, KFAC
from internals import Refusals, Transfer, refresh
from models import Attentive, late, sentences


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
    "paper": {"step_length": "paper"},
    "no clip": {"step_length": "paper", "kl_clip": None},
    "everything": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
    "fixed": {"beta": 0.1, "eta": 0.5},
    "no momentum": {"momentum": 0.0, "weight_decay": 0.01},
    "sum": {"loss_reduction": "sum"},
    "functions": {"damping": lambda step: 1e-3 / (1 + step), "curvature_interval": lambda step: 100},
}


def backward(model: nn.Module, x: Tensor, sizes: tuple[int, ...] = (6,)) -> None:
    for size in sizes:
        (model(x[:size]).square().mean() / len(sizes)).backward()


def until_no_curvature_is_due(model: nn.Module, optimizer: FOP, x: Tensor) -> None:
    def step() -> None:
        optimizer.zero_grad()
        backward(model, x)
        optimizer.step()

    late(optimizer, step)
    assert not optimizer.curvature_due


@pytest.mark.parametrize(
    ("options", "library", "sizes"),
    [
        *((options, FOP, (6,)) for options in OPTIONS),
        *(("defaults", FOP, sizes) for sizes in ((6, 6), (6, 1, 6))),
        ("everything", FOP, (6, 1, 6)),
        ("sum", FOP, (6, 1, 6)),
        ("defaults", KFAC, (6, 1, 6)),
        ("everything", KFAC, (6,)),
    ],
)
def test_a_step_without_curvature_reads_nothing(
    options: str, library: type[FOP], sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, x = mixed_model(), torch.randn(6, 2, 5, 5)
    chosen = {"curvature_interval": 100} | OPTIONS[options]
    check_reads_nothing(model, library(model.parameters(), **chosen), x, sizes, monkeypatch)


@pytest.mark.parametrize(("sizes", "max_factor_dim"), [((6,), 3), ((6, 1, 6), 8192)])
def test_further_kinds_of_layer_read_nothing(
    sizes: tuple[int, ...], max_factor_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (ids, _) = Attentive(), sentences()
    choice = {
        "*": {"max_factor_dim": max_factor_dim},
        nn.LayerNorm: {"path": "fop"},
        nn.GroupNorm: {"path": "fop"},
    }
    optimizer = FOP(model.parameters(), curvature_interval=100, layer_options=choice)
    check_reads_nothing(model, optimizer, ids, sizes, monkeypatch)
    assert {row.path for row in optimizer.summary().rows} == {"FOP"}


def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU there is nothing to wait for, so refusals are read and reported at once; elsewhere later."""
    monkeypatch.setattr(torch.Tensor, "is_cpu", False, raising=False)
    monkeypatch.setattr(Refusals, "report", lambda self, wait=True: None)


def check_reads_nothing(
    model: nn.Module, optimizer: FOP, x: Tensor, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    until_no_curvature_is_due(model, optimizer, x)
    as_on_a_device(monkeypatch)
    before = [p.detach().clone() for p in model.parameters()]
    with NoMethodReads(), NoOperatorReads():
        # zero_grad with zeros makes the capture ask whether the gradient is zero.
        optimizer.zero_grad(set_to_none=False)
        backward(model, x, sizes)
        # A gradient changed as a whole, as by clipping: its scale has to be found out.
        torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None], 0.5)
        optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_a_refusal_reads_nothing_either(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = mixed_model(), torch.randn(6, 2, 5, 5)
    optimizer = FOP(model, weight_decay=0.1, curvature_interval=100)
    until_no_curvature_is_due(model, optimizer, x)
    as_on_a_device(monkeypatch)
    before = [p.detach().clone() for p in model.parameters()]
    model.eval()  # a NaN would stay in the running statistics of BatchNorm, which are not ours
    with NoMethodReads(), NoOperatorReads():
        optimizer.zero_grad()
        backward(model, x * float("nan"))
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("options", OPTIONS)
def test_a_curvature_step_reads_nothing_either(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU; what a transfer brings, an update later, is there by then."""
    torch.manual_seed(0)
    model, x = mixed_model(), torch.randn(6, 2, 5, 5)
    optimizer = FOP(model, **{**OPTIONS[options], "curvature_interval": 1})
    monkeypatch.setattr(refresh, "may_run_ahead", lambda device: True)

    def read(transfer: Transfer) -> Any:
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            return transferred(transfer)

    transferred = Transfer.read
    monkeypatch.setattr(Transfer, "read", read)
    for _ in range(2):  # where state is made
        optimizer.zero_grad()
        backward(model, x)
        optimizer.step()
    as_on_a_device(monkeypatch)
    for _ in range(2):
        assert optimizer.curvature_due
        with NoMethodReads(), NoOperatorReads():
            optimizer.zero_grad()
            backward(model, x)
            optimizer.step()


def test_a_curvature_step_that_waits_does_read() -> None:
    """The counterpart: the modes see the step of the optimizer, not only calls made in this file."""
    torch.manual_seed(0)
    model, x = mixed_model(), torch.randn(6, 2, 5, 5)
    optimizer = FOP(model)
    backward(model, x)
    with pytest.raises(HostReadError), NoMethodReads(), NoOperatorReads():
        optimizer.step()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("interval", [1, 100])
@pytest.mark.parametrize("options", OPTIONS)
def test_no_step_syncs_cuda(options: str, interval: int) -> None:
    torch.manual_seed(0)
    model, x = mixed_model().cuda(), torch.randn(6, 2, 5, 5, device="cuda")
    optimizer = FOP(model, **{**OPTIONS[options], "curvature_interval": interval})
    if interval > 1:
        until_no_curvature_is_due(model, optimizer, x)
    for _ in range(2):
        backward(model, x)
        optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.zero_grad()
            backward(model, x)
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_plain_steps_in_a_cuda_graph_are_the_same() -> None:
    """Forward and backward pass and step, captured once and replayed, against steps as they come."""

    def run(graph: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model, x = mixed_model().cuda(), torch.randn(6, 2, 5, 5, device="cuda")
        optimizer = FOP(model, curvature_interval=4, capturable=True)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=30)
        stream, recorded = torch.cuda.Stream(), None

        def step() -> None:
            optimizer.zero_grad()
            backward(model, x)
            optimizer.step()

        for n in range(30):
            if n < 20:
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    step()
                torch.cuda.current_stream().wait_stream(stream)
            elif optimizer.curvature_due or not graph:
                step()
            else:
                if recorded is None:
                    recorded = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(recorded):
                        step()
                optimizer.replay(recorded)
            schedule.step()
        return [p.detach().clone() for p in model.parameters()]

    for one, two in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
