"""A layer's own node in the graph, which computes its gradient sub-batch by sub-batch, against autograd's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from fop import FOP, KFAC
from models import check_kept_pair
from reference.cases import Conv1D

IMAGES = (6, 4, 7, 5)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (6, 4)),
    "linear no bias": (lambda: nn.Linear(4, 3, bias=False), (6, 4)),
    "linear tokens": (lambda: nn.Linear(4, 3), (6, 5, 4)),
    "transformers conv1d": (lambda: Conv1D(3, 4), (6, 5, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2, padding=2, dilation=2), (6, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 3, (3, 2), stride=2, padding=1), IMAGES),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), IMAGES),
    "conv2d same": (lambda: nn.Conv2d(4, 3, (2, 4), padding="same"), IMAGES),
    "conv2d reflect": (lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"), IMAGES),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (4, 2, 3, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1), IMAGES),
}  # fmt: skip


def pair_of(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """The layer with an optimizer, the same without, and an input that asks for a gradient."""
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    own, plain = make().double(), make().double()
    plain.load_state_dict(own.state_dict())
    return own, plain, torch.randn(shape, dtype=torch.float64)


def node_of(output: Tensor) -> str:
    return type(output.grad_fn).__name__


def gradients(module: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Of the input and of all parameters."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    loss(module(x)).backward()
    assert x.grad is not None
    return [x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_autograds(name: str) -> None:
    own, plain, x = pair_of(name)
    optimizer = FOP(own)
    expected = "_LayerFunction" if name not in ("conv2d reflect", "conv2d same") else ""
    assert expected in node_of(own(x))
    for loss in (lambda out: out.square().mean(), lambda out: out[0].sum()):
        for mine, right in zip(gradients(own, x, loss), gradients(plain, x, loss), strict=True):
            assert mine.stride() == right.stride()
            torch.testing.assert_close(mine, right, rtol=1e-13, atol=1e-15)
    optimizer.step()
    check_kept_pair(optimizer)


@pytest.mark.parametrize("name", LAYERS)
def test_sums_that_do_not_round_are_equal_to_the_last_bit(name: str) -> None:
    own, plain, x = pair_of(name)
    for module in (own, plain):
        for param in module.parameters():
            param.data.copy_((8 * param.data).round())
    optimizer = FOP(own)
    x = (4 * x).round()
    for mine, right in zip(
        gradients(own, x, lambda out: out.square().sum()),
        gradients(plain, x, lambda out: out.square().sum()),
        strict=True,
    ):
        assert torch.equal(mine, right)
    del optimizer


@pytest.mark.parametrize("name", ["linear", "linear tokens", "conv2d", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_second_derivatives(name: str, dtype: torch.dtype) -> None:
    """A penalty on the input's gradient, in float64 and under autocast: the gradients that it gives."""
    own, plain, x = pair_of(name)
    if dtype is torch.bfloat16:
        own, plain, x = own.float(), plain.float(), x.float()
    optimizer = FOP(own)
    found = []
    for module in (own, plain):
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            out = module(given)
        (gradient,) = torch.autograd.grad(out.float().pow(3).sum(), given, create_graph=True)
        (out.float().sum() + gradient.square().sum()).backward()
        assert given.grad is not None
        found.append([given.grad, *(p.grad for p in module.parameters() if p.grad is not None)])
    tolerance = 1e-5 if dtype is torch.float64 else 2e-2
    for mine, right in zip(*found, strict=True):
        assert (mine - right).norm() <= tolerance * right.norm()
    optimizer.step()


def test_frozen_parameters_and_inputs_that_ask_for_nothing() -> None:
    for frozen in ("weight", "bias"):
        own, plain, x = pair_of("linear")
        optimizer = FOP(own)
        for module in (own, plain):
            getattr(module, frozen).requires_grad_(False)
            module(x).square().sum().backward()
            assert getattr(module, frozen).grad is None
        for mine, right in zip(own.parameters(), plain.parameters(), strict=True):
            if right.grad is not None:
                torch.testing.assert_close(mine.grad, right.grad)
        optimizer.step()


def test_changes_in_place() -> None:
    """Of the output, as with an activation in place; of the input autograd complains, as without us."""
    own, plain, x = pair_of("conv2d")
    optimizer = FOP(own)
    loss = lambda out: out.mul_(2).relu_().sum()  # noqa: E731
    for mine, right in zip(gradients(own, x, loss), gradients(plain, x, loss), strict=True):
        torch.testing.assert_close(mine, right)
    out = own(x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    optimizer.zero_grad()


def test_transformations_and_forward_derivatives_see_the_layer_itself() -> None:
    own, plain, x = pair_of("linear")
    optimizer = FOP(own)
    direction = torch.ones_like(x)
    with forward_ad.dual_level():
        tangents = [
            forward_ad.unpack_dual(module(forward_ad.make_dual(x, direction))).tangent
            for module in (own, plain)
        ]
    assert torch.equal(*tangents)
    parameters = dict(own.named_parameters())
    of_func = torch.func.grad(lambda p: torch.func.functional_call(own, p, x).square().sum())(parameters)
    plain(x).square().sum().backward()
    for name, param in plain.named_parameters():
        torch.testing.assert_close(of_func[name], param.grad)
    for vectorize in (False, True):
        jacobians = [
            torch.autograd.functional.jacobian(module, x[:2], vectorize=vectorize) for module in (own, plain)
        ]
        torch.testing.assert_close(*jacobians)
    del optimizer


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    own, plain, x = pair_of("conv2d")
    optimizer = FOP(own)

    def loss(module: nn.Module) -> list[Tensor]:
        given = x.clone().requires_grad_()
        module.zero_grad()
        checkpoint(lambda t: module(t).tanh(), given, use_reentrant=reentrant).square().mean().backward()
        return [given.grad, *(p.grad for p in module.parameters())]  # type: ignore[list-item]

    for mine, right in zip(loss(own), loss(plain), strict=True):
        torch.testing.assert_close(mine, right)
    optimizer.step()
    check_kept_pair(optimizer)


def test_hooks_of_the_user_on_the_output_and_on_parameters() -> None:
    """A hook that triples the output's gradient is part of what p.grad and the sub-batches see."""
    own, plain, x = pair_of("linear")
    optimizer = FOP(own)
    seen: list[str] = []
    for module in (own, plain):
        module.register_forward_hook(lambda _, __, out: out.register_hook(lambda b: 3 * b) and None)
        module.weight.register_hook(lambda g: seen.append("weight"))
        module(x).square().mean().backward()
    torch.testing.assert_close(own.weight.grad, plain.weight.grad)
    assert seen == ["weight", "weight"]
    optimizer.step()
    check_kept_pair(optimizer)


def test_an_unbatched_input_and_gradients_for_inputs_alone() -> None:
    own, plain, x = pair_of("conv2d")
    optimizer = FOP(own)
    for mine, right in zip(
        gradients(own, x[0], lambda out: out.square().mean()),
        gradients(plain, x[0], lambda out: out.square().mean()),
        strict=True,
    ):
        torch.testing.assert_close(mine, right)
    optimizer.zero_grad()
    given = x.clone().requires_grad_()
    (mine,) = torch.autograd.grad(own(given).sum(), given)
    (right,) = torch.autograd.grad(plain(given).sum(), given)
    torch.testing.assert_close(mine, right)
    assert all(p.grad is None for p in own.parameters())


def test_retained_graphs_and_a_dead_optimizer() -> None:
    own, plain, x = pair_of("linear")
    optimizer: Any = FOP(own)
    outs = [module(x).square().mean() for module in (own, plain)]
    for _ in range(2):
        for out in outs:
            out.backward(retain_graph=True)
    torch.testing.assert_close(own.weight.grad, plain.weight.grad)
    # The graph outlives the optimizer.
    del optimizer
    for out in outs:
        out.backward()
    torch.testing.assert_close(own.weight.grad, plain.weight.grad)
    assert "_LayerFunction" not in node_of(own(x))


def test_kfac_leaves_the_graph_alone() -> None:
    own, _, x = pair_of("linear")
    optimizer = KFAC(own)
    assert "_LayerFunction" not in node_of(own(x))
    del optimizer


@pytest.mark.parametrize("name", ["linear tokens", "conv2d"])
def test_under_autocast_the_sum_rounds_once(name: str) -> None:
    own, plain, x = pair_of(name)
    own, plain, x = own.float(), plain.float(), x.float()
    optimizer = FOP(own)
    found = []
    for module in (own, plain):
        with torch.autocast("cpu", torch.bfloat16):
            out = module(x)
        assert out.dtype == torch.bfloat16
        out.float().square().mean().backward()
        found.append([p.grad for p in module.parameters()])
    for mine, right in zip(*found, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - right).norm() <= 1e-2 * right.norm()
    optimizer.step()
    check_kept_pair(optimizer)
