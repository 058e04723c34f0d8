"""The table of optimizers: each trains a network, and one that is missing says what installs it."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR

from fop_bench.models import GPT, ViT, mlp
from fop_bench.optimizers import PEERS, Joined, MissingPeerError, Peer, gradients, make_peer
from fop_bench.recipes import CIFAR10_SMALL

LIBRARIES = {"kfac-pytorch": "kfac", "singd": "singd", "asdl": "asdl"}
IMAGES = torch.randn(8, 3, 32, 32), torch.arange(8)


def made(name: str, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    if name in LIBRARIES:
        pytest.importorskip(LIBRARIES[name])
    return make_peer(name, model, 0.01, **options)


@pytest.mark.filterwarnings("ignore")  # of the libraries
@pytest.mark.parametrize("interval", [None, 1, 10**9])
@pytest.mark.parametrize("name", PEERS)
def test_every_optimizer_steps_a_convolution_network(name: str, interval: int | None) -> None:
    torch.manual_seed(0)
    model = CIFAR10_SMALL.model(10)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = made(name, model, interval=interval)
    for _ in range(2):
        assert gradients(optimizer, model, *IMAGES).isfinite()
        optimizer.step()
    moved = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    assert all(moved)


@pytest.mark.parametrize("name", PEERS)
def test_an_interval_is_an_option_of_those_with_curvature(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}

    def build(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
        told.update(options)
        return SGD(model.parameters())

    peer = PEERS[name]
    monkeypatch.setitem(PEERS, name, Peer(peer.label, build, peer.interval))
    make_peer(name, mlp((2, 2)), 0.5, interval=7, momentum=0.1)
    expected = {"lr": 0.5, "momentum": 0.1}
    assert told == (expected if peer.interval is None else {**expected, peer.interval: 7})


def test_an_unknown_name_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match=r"unknown optimizer 'adam'; known are sgd, adamw"):
        make_peer("adam", mlp((2, 2)), 0.1)


@pytest.mark.parametrize(
    ("name", "library", "command"),
    [
        ("singd", "singd", r"pip install 'fop-optim\[peers\]'"),
        ("asdl", "asdl", r"pip install 'fop-optim\[peers\]'"),
        ("soap", "pytorch_optimizer", r"pip install 'fop-optim\[bench\]'"),
        ("kfac-pytorch", "kfac", r"pip install git\+https://github.com/gpauloski/kfac-pytorch"),
    ],
)
def test_a_missing_library_says_what_installs_it(
    name: str, library: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [key for key in sys.modules if key.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(
        MissingPeerError, match=rf"^{PEERS[name].label} cannot be imported \(.*\): {command}$"
    ):
        make_peer(name, mlp((2, 2)), 0.1)


def test_the_example_of_the_documentation_adds_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    text = Path(__file__).parents[2].joinpath("docs", "reproduction.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert sum(bool(line) for line in example.splitlines()) <= 10
    monkeypatch.setitem(PEERS, "lion", PEERS["sgd"])  # so that it goes again
    exec(example, {"__name__": "example"})
    model = mlp((3, 2))
    before, optimizer = model[1].weight.detach().clone(), make_peer("lion", model, 0.1)
    gradients(optimizer, model, torch.randn(4, 3), torch.arange(4) % 2)
    optimizer.step()
    assert type(optimizer).__name__ == "Lion"
    assert not torch.equal(model[1].weight, before)


# --- Muon


def groups_of(model: nn.Module) -> tuple[Sequence[set[str]], list[float]]:
    groups = make_peer("muon", model, 0.02, adamw_lr=0.003).param_groups
    names = {p: name for name, p in model.named_parameters()}
    return [{names[p] for p in group["params"]} for group in groups], [group["lr"] for group in groups]


def test_muon_leaves_the_last_layer_and_vectors_to_adamw() -> None:
    model = CIFAR10_SMALL.model(10)
    (hidden, others), rates = groups_of(model)
    assert hidden == {name for name, p in model.named_parameters() if p.ndim == 4}
    assert others == {name for name, _ in model.named_parameters()} - hidden
    assert rates == [0.02, 0.003]


def test_muon_leaves_embeddings_and_positions_to_adamw() -> None:
    for model in (GPT(8, 1, 2, 4), ViT(8, 1, 2)):
        (hidden, others), _ = groups_of(model)
        blocks = {f"blocks.0.{name}.weight" for name in ("qkv", "proj", "mlp.0", "mlp.2")}
        assert hidden == blocks | ({"embed.weight"} if isinstance(model, ViT) else set())
        assert {"position", "head.weight", "norm.weight"} <= others


def test_muon_iterates_in_float32_on_a_cpu() -> None:
    """In bfloat16 the update would be off by 1e-3 and more."""
    model = mlp((6, 6, 2))
    weight = model[1].weight
    before, optimizer = weight.detach().clone(), make_peer("muon", model, 1.0, momentum=0.0, nesterov=False)
    gradients(optimizer, model, torch.randn(8, 6), torch.arange(8) % 2)
    assert weight.grad is not None
    x = weight.grad.double() / weight.grad.double().norm()
    optimizer.step()
    for _ in range(5):
        product = x @ x.T
        x = 3.4445 * x + (-4.7750 * product + 2.0315 * product @ product) @ x
    torch.testing.assert_close((before - weight).double(), x, rtol=1e-4, atol=1e-4)


# --- Parts


def test_a_schedule_and_a_state_reach_the_joined_parts() -> None:
    def joined(model: nn.Sequential) -> Joined:
        return Joined(SGD([model[1].weight], lr=0.1, momentum=0.9), AdamW([model[1].bias], lr=0.2))

    batch, model = (torch.randn(4, 3), torch.arange(4) % 2), mlp((3, 2))
    optimizer = joined(model)
    LambdaLR(optimizer, lambda step: 0.5)
    assert [group["lr"] for part in optimizer.parts for group in part.param_groups] == [0.05, 0.1]

    def step(model: nn.Module, optimizer: Joined) -> None:
        gradients(optimizer, model, *batch)
        optimizer.step()

    step(model, optimizer)
    other = deepcopy(model)
    resumed = joined(other)
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    assert [group["lr"] for group in resumed.param_groups] == [0.05, 0.1]
    step(model, optimizer)
    step(other, resumed)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_an_optimizer_may_make_the_gradients_itself() -> None:
    class Doubling(SGD):
        def gradients(self, model: nn.Module, inputs: Tensor, targets: Tensor, loss: Any) -> Tensor:
            value: Tensor = 2 * loss(model(inputs), targets)
            value.backward()
            return value

    model, batch = mlp((3, 2)), (torch.randn(4, 3), torch.arange(4) % 2)
    plain = cross_entropy(model(batch[0]), batch[1])
    once = gradients(SGD(model.parameters()), model, *batch)
    expected = model[1].weight.grad
    twice = gradients(Doubling(model.parameters()), model, *batch)
    assert expected is not None
    torch.testing.assert_close(model[1].weight.grad, 2 * expected)
    torch.testing.assert_close([once, twice], [plain.detach(), 2 * plain.detach()])


@pytest.mark.parametrize(("loss", "classes"), [(cross_entropy, 10), (mse_loss, 64)])
def test_labels_are_sampled_where_the_fisher_is_the_models(loss: Any, classes: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 64)
    y = torch.arange(16) % 10 if loss is cross_entropy else x
    factors = []
    for fisher in ("empirical", "model"):
        torch.manual_seed(1)
        model = mlp((64, 8, classes))
        optimizer = make_peer("fop", model, 0.1, step_length="weight", fisher=fisher)
        gradients(optimizer, model, x, y, loss)
        optimizer.step()
        factors.append(optimizer.state[model[3].weight]["G"])
    assert factors[0].shape == factors[1].shape and not torch.allclose(*factors)
