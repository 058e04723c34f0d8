"""Hooks of the user's on modules, tensors and parameters: the pair that they leave, or a word why not."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fop import FOP
from models import PLAIN, batch, check_step, conv_net, gradients, halves, kfac, loss_of, mlp
from reference import half_squared_error


def triple_output(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, output: 3 * output)


def overwrite_output(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, output: output.mul_(3))


def shift_input(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda module, args: (args[0] + 0.5,))


def shift_input_by_keyword(module: nn.Module) -> None:
    module.register_forward_pre_hook(
        lambda module, args, kwargs: ((), {"input": args[0] + 0.5}), with_kwargs=True
    )


def see_gradients(module: nn.Module) -> None:
    module.register_full_backward_hook(lambda module, grad_input, grad_output: None)


def scale_input_gradient(module: nn.Module) -> None:
    module.register_full_backward_hook(
        lambda module, grad_input, grad_output: tuple(g if g is None else 2 * g for g in grad_input)
    )


def scale_output_gradient(module: nn.Module) -> None:
    module.register_full_backward_pre_hook(lambda module, grad_output: (2 * grad_output[0],))


EXACT = [
    triple_output,
    overwrite_output,
    shift_input,
    shift_input_by_keyword,
    see_gradients,
    scale_input_gradient,
    scale_output_gradient,
]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients")
@pytest.mark.parametrize("first", ["hook", "optimizer"])
@pytest.mark.parametrize("hook", EXACT)
@pytest.mark.parametrize(("build", "shape"), [(mlp, (5,)), (conv_net, (2, 5, 6))])
def test_module_hooks(
    build: Callable[[], nn.Sequential],
    shape: tuple[int, ...],
    hook: Callable[[nn.Module], None],
    first: str,
) -> None:
    """The pair is that of two backward passes of a model with the same hooks."""
    model = build()
    # A full backward hook forbids overwriting what it wraps.
    for index, module in enumerate(model):
        if isinstance(module, nn.ReLU):
            model[index] = nn.ReLU()
    twin = copy.deepcopy(model)
    names = ["0", "2"]
    for name in names:
        hook(twin.get_submodule(name))
        if first == "hook":
            hook(model.get_submodule(name))
    optimizer = FOP(model, **PLAIN)
    if first == "optimizer":
        for name in names:
            hook(model.get_submodule(name))
    for seed in range(2):
        x, y = batch(7, seed, shape)
        twin.load_state_dict(model.state_dict())
        pairs = halves(twin, x, y)
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()
        check_step(model, twin, optimizer, pairs)


class Reversed(nn.Module):
    """A hook on a tensor between two layers, as gradient reversal is often written.

    Args:
        where: 0 for the output of the first layer, 1 for what comes of it.
    """

    def __init__(self, where: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3)
        self.where = where
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        out = torch.tanh(h)
        (h, out)[self.where].register_hook(lambda gradient: -0.5 * gradient)
        result: Tensor = self.second(out)
        return result


@pytest.mark.parametrize("where", [0, 1])
def test_tensor_hooks(where: int) -> None:
    model = Reversed(where)
    twin = copy.deepcopy(model)
    optimizer = FOP(model, **PLAIN)
    x, y = batch()
    pairs = halves(twin, x, y)
    loss_of(model, x, y).backward()
    optimizer.step()
    check_step(model, twin, optimizer, pairs)


def test_retained_gradients_are_there() -> None:
    model = mlp()
    optimizer = FOP(model, **PLAIN)
    x, y = batch()
    h = model[0](x)
    h.retain_grad()
    half_squared_error(model[2](torch.tanh(h)), y).backward()
    optimizer.step()
    assert h.grad is not None and h.grad.shape == h.shape
    assert [d.kfac_steps for d in optimizer.diagnostics().layers.values()] == [0, 0]


def doubled_in_a_hook(param: Tensor) -> None:
    param.register_hook(lambda gradient: 2 * gradient)


def clipped_in_a_hook(param: Tensor) -> None:
    param.register_hook(lambda gradient: gradient.clamp(-0.02, 0.02))


def doubled_afterwards(param: Tensor) -> None:
    def double(param: Tensor) -> None:
        assert param.grad is not None
        param.grad.mul_(2)

    param.register_post_accumulate_grad_hook(double)


def clipped_afterwards(param: Tensor) -> None:
    param.register_post_accumulate_grad_hook(
        lambda param: nn.utils.clip_grad_value_(param, 0.02)  # type: ignore[arg-type, return-value]
    )


@pytest.mark.parametrize("first", ["hook", "optimizer"])
@pytest.mark.parametrize(
    "hook", [doubled_in_a_hook, clipped_in_a_hook, doubled_afterwards, clipped_afterwards]
)
def test_hooks_on_parameters(hook: Callable[[Tensor], None], first: str) -> None:
    """The right pair, or K-FAC with a word; always from the gradient that the hook has left."""
    model = mlp()
    twin = copy.deepcopy(model)
    if first == "optimizer":
        optimizer = FOP(model, **PLAIN)
    for param in model.parameters():
        hook(param)
    if first == "hook":
        optimizer = FOP(model, **PLAIN)
    x, y = batch(7)
    pairs = halves(twin, x, y)
    loss_of(model, x, y).backward()
    left = {name: param.grad.clone() for name, param in model.named_parameters()}  # type: ignore[union-attr]
    optimizer.step()
    for name, (_, difference) in pairs.items():
        average = torch.cat([left[f"{name}.weight"], left[f"{name}.bias"][:, None]], dim=1)[None]
        told = optimizer.diagnostics().layers[name]
        if told.why_kfac:
            check_step(model, twin, optimizer, kfac({name: (average, difference)}))
        else:
            assert "doubled" in hook.__name__
            check_step(model, twin, optimizer, {name: (average, 2 * difference)})
        assert told.kfac_steps == bool(told.why_kfac)
    unclipped = gradients(twin, loss_of(twin, x, y))
    assert any(not torch.allclose(left[f"{name}.weight"], unclipped[name][0, :, :-1]) for name in pairs)
