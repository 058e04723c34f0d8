"""Several heads, losses and backward passes in a step: GAN, actor-critic, multi-task."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fop import FOP
from models import PLAIN, Pairs, check_kept_pair, check_lost_pair, check_step, gradients, kfac
from reference import split

Losses = Callable[[nn.Module, slice], Sequence[Tensor]]
EVERY = slice(None)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def pairs_of(twin: nn.Module, losses: Losses, n: int) -> Pairs:
    """(Ga, Gd) of the sum of all losses, split by sample; for losses that are means over samples."""
    whole, g1, g2 = (
        gradients(twin, torch.stack(list(losses(twin, part))).sum()) for part in (EVERY, *split(n))
    )
    return {name: (whole[name], g1[name] - g2[name]) for name in whole}


# --- heads and losses of one batch -------------------------------------------------------------------------


class ActorCritic(nn.Module):
    """Policy and value on one trunk."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = dense(5, 6)
        self.policy = nn.Linear(6, 3)
        self.value = nn.Linear(6, 1)
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.trunk(x))
        return self.policy(hidden), self.value(hidden)[..., 0]


def actor_critic_losses(model: nn.Module, part: slice, n: int = 6, steps: int = 1) -> list[Tensor]:
    """Policy gradient with entropy, and value error, over a roll-out: the trunk is called in every step."""
    policy: Tensor | Any = 0
    value: Tensor | Any = 0
    for step in range(steps):
        x, returns = normal(n, 5, seed=step)[part], normal(n, seed=step + 10)[part]
        action = torch.arange(n)[part] % 3
        logits, estimate = model(x)
        log = logits.log_softmax(-1)
        chosen = log.gather(1, action[:, None])[:, 0]
        entropy = -(log.exp() * log).sum(-1)
        policy = policy - (chosen * (returns - estimate.detach()) + 0.01 * entropy).mean() / steps
        value = value + 0.5 * (returns - estimate).square().mean() / steps
    return [policy, value]


@pytest.mark.parametrize("way", ["sum", "two-passes", "list"])
@pytest.mark.parametrize("n", [6, 7])
@pytest.mark.parametrize("steps", [1, 3])
def test_actor_critic(way: str, n: int, steps: int) -> None:
    """One backward pass over the sum, two over the same graph, or torch.autograd.backward of a list."""

    def losses(model: nn.Module, part: slice) -> list[Tensor]:
        return actor_critic_losses(model, part, n, steps)

    model = ActorCritic()
    optimizer = FOP(model, **PLAIN)
    for _ in range(2):
        twin = copy.deepcopy(model)
        optimizer.zero_grad()
        policy, value = losses(model, EVERY)
        if way == "sum":
            (policy + value).backward()
        elif way == "list":
            torch.autograd.backward([policy, value])
        else:
            policy.backward(retain_graph=True)
            value.backward()
        optimizer.step()
        check_step(model, twin, optimizer, pairs_of(twin, losses, n))
    check_kept_pair(optimizer)


def only(index: int, model: nn.Module, part: slice) -> list[Tensor]:
    """One of the two losses, in a graph that has both."""
    losses = actor_critic_losses(model, part)
    return [losses[index], 0 * losses[1 - index]]


def test_actor_and_critic_with_an_optimizer_each() -> None:
    """The trunk belongs to the actor's; the critic's pass goes through it and must not count there."""
    model = ActorCritic()
    actor = FOP([*model.trunk.parameters(), *model.policy.parameters()], **PLAIN)
    critic = FOP(model.value.parameters(), **PLAIN)
    for _ in range(3):
        twin = copy.deepcopy(model)
        policy, value = (pairs_of(twin, partial(only, index), 6) for index in (0, 1))
        losses = actor_critic_losses(model, EVERY)
        critic.zero_grad()
        losses[1].backward(retain_graph=True)
        critic.step()
        actor.zero_grad()
        losses[0].backward()
        actor.step()
        check_step(model, twin, critic, {"value": value["value"]})
        check_step(model, twin, actor, {name: policy[name] for name in ("trunk.0", "policy")})
    check_kept_pair(actor)
    check_kept_pair(critic)


def test_loss_that_leaves_samples_out() -> None:
    """Labels to ignore: the mean is over those that count in the whole batch, also in the sub-batches."""
    torch.manual_seed(0)
    model = dense(5, 6, 3).double()
    x, labels = normal(6, 5), torch.tensor([0, -100, 2, -100, -100, 1])
    twin = copy.deepcopy(model)
    optimizer = FOP(model, **PLAIN)
    F.cross_entropy(model(x), labels).backward()
    optimizer.step()
    each = F.cross_entropy(twin(x), labels, reduction="none") / 3
    whole, g1, g2 = (gradients(twin, part.sum()) for part in (each, *(2 * each[part] for part in split(6))))
    check_step(model, twin, optimizer, {name: (whole[name], g1[name] - g2[name]) for name in whole})
    check_kept_pair(optimizer)


class Tasks(nn.Module):
    """A trunk, and a head for the samples of each task."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 2), nn.Linear(6, 2)
        self.double()

    def losses(self, part: Any) -> list[Tensor]:
        """Sums over the samples of a task, divided by all samples of the batch."""
        task = torch.tensor([0, 1, 1, 0, 1, 1, 0, 1])[part]
        hidden = torch.tanh(self.trunk(normal(8, 5)[part]))
        a, b = self.a(hidden[task == 0]), self.b(hidden[task == 1])
        return [a.square().sum() / len(task), (b - 1).square().sum() / len(task)]


def test_head_on_some_samples_only() -> None:
    """It cannot know which they are; the trunk can."""
    model, twin = Tasks(), Tasks()
    optimizer = FOP(model, **PLAIN)
    pairs = pairs_of(twin, lambda net, part: net.losses(part), 8)  # type: ignore[operator]
    torch.autograd.backward(model.losses(EVERY))
    optimizer.step()
    check_kept_pair(optimizer, ["trunk"])
    check_lost_pair(optimizer, "ab", why="for a batch of 8")
    check_step(model, twin, optimizer, {**kfac(pairs), "trunk": pairs["trunk"]})


@pytest.mark.parametrize("sizes", [(6, 6), (6, 4), (6, 5)])
def test_tasks_with_batches_of_their_own(sizes: tuple[int, int]) -> None:
    """Two forward and backward passes: halves of both, or, where they split otherwise, one task a half."""
    torch.manual_seed(0)
    model = dense(5, 6, 3).double()
    twin = copy.deepcopy(model)

    def task(net: nn.Module, index: int, part: Any = EVERY) -> Tensor:
        x = normal(sizes[index], 5, seed=index)[part]
        return (net(x) - index).square().sum(-1).mean()

    optimizer = FOP(model, **PLAIN)
    for index in (0, 1):
        task(model, index).backward()
    optimizer.step()
    each = [gradients(twin, task(twin, index)) for index in (0, 1)]
    pairs = {name: (each[0][name] + each[1][name], 2 * (each[0][name] - each[1][name])) for name in each[0]}
    if sizes != (6, 5):
        g1, g2 = ([gradients(twin, task(twin, i, split(sizes[i])[half])) for i in (0, 1)] for half in (0, 1))
        pairs = {
            name: (pairs[name][0], g1[0][name] + g1[1][name] - g2[0][name] - g2[1][name]) for name in pairs
        }
    check_step(model, twin, optimizer, pairs)
    check_kept_pair(optimizer)


def test_batches_of_two_sizes_in_one_pass() -> None:
    """Nobody says how much each counts in the other's halves: K-FAC, with the reason."""
    torch.manual_seed(0)
    model = dense(5, 6, 3).double()
    twin = copy.deepcopy(model)

    def loss(net: nn.Module) -> Tensor:
        return net(normal(6, 5)).square().mean() + (net(normal(5, 5)) - 1).square().mean()

    optimizer = FOP(model, **PLAIN)
    loss(model).backward()
    optimizer.step()
    check_step(model, twin, optimizer, {k: (g, None) for k, g in gradients(twin, loss(twin)).items()})
    check_lost_pair(optimizer, why="batches of")


# --- GAN ---------------------------------------------------------------------------------------------------

N = 6


def gan() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return dense(3, 6, 5).double(), dense(5, 7, 1).double()


def logistic(logits: Tensor, real: bool) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))


def critic_losses(discriminator: nn.Module, fake: Tensor, part: slice, step: int) -> list[Tensor]:
    real = normal(N, 5, seed=100 + step)[part]
    return [logistic(discriminator(real), True), logistic(discriminator(fake[part]), False)]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("first", ["discriminator", "generator"])
def test_gan(first: str, passes: int, frozen: bool) -> None:
    """Two rounds; the generator's pass goes through the discriminator, which may be frozen in it."""
    generator, discriminator = gan()
    steps = {
        "generator": FOP(generator, **{**PLAIN, "lr": 0.1}),
        "discriminator": FOP(discriminator, **{**PLAIN, "lr": 0.1}),
    }

    def train_discriminator(round_: int) -> None:
        fake = generator(normal(N, 3, seed=round_)).detach()
        twin = copy.deepcopy(discriminator)
        optimizer = steps["discriminator"]
        optimizer.zero_grad()
        losses = critic_losses(discriminator, fake, EVERY, round_)
        if passes == 1:
            torch.stack(losses).sum().backward()
        else:
            for loss in losses:
                loss.backward()
        optimizer.step()
        pairs = pairs_of(twin, lambda net, part: critic_losses(net, fake, part, round_), N)
        check_step(discriminator, twin, optimizer, pairs)

    def train_generator(round_: int) -> None:
        noise, twin = normal(N, 3, seed=50 + round_), copy.deepcopy(generator)
        judge = copy.deepcopy(discriminator)
        optimizer = steps["generator"]
        optimizer.zero_grad()
        discriminator.requires_grad_(not frozen)
        logistic(discriminator(generator(noise)), True).backward()
        discriminator.requires_grad_(True)
        optimizer.step()
        pairs = pairs_of(twin, lambda net, part: [logistic(judge(net(noise[part])), True)], N)
        check_step(generator, twin, optimizer, pairs)

    turns = [train_discriminator, train_generator]
    for round_ in range(2):
        for turn in turns if first == "discriminator" else turns[::-1]:
            turn(round_)
    for optimizer in steps.values():
        check_kept_pair(optimizer)


def test_gradient_penalty_is_a_kfac_step_and_counted() -> None:
    """WGAN-GP: a gradient of a gradient is another path into p.grad."""
    _, discriminator = gan()
    twin = copy.deepcopy(discriminator)

    def loss(net: nn.Module) -> Tensor:
        x = normal(N, 5).requires_grad_()
        score = net(x)
        (slope,) = torch.autograd.grad(score.sum(), x, create_graph=True)
        penalty: Tensor = score.mean() + 10 * (slope.norm(dim=1) - 1).square().mean()
        return penalty

    optimizer = FOP(discriminator, **PLAIN)
    loss(discriminator).backward()
    optimizer.step()
    check_lost_pair(optimizer, ["0"])
    check_step(discriminator, twin, optimizer, {"0": (gradients(twin, loss(twin))["0"], None)})
