"""FOP under Lightning: the same weights as a loop written by hand, and its checkpoints."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fop import FOP
from tiny import (
    EPOCHS,
    OPTIONS,
    STEPS_BETWEEN_UPDATES,
    assert_same_weights,
    assert_trained,
    by_hand,
    cosine,
    loader,
    loss_of,
    net,
    run_block,
    weights,
    windows,
)

lightning = pytest.importorskip("lightning")
callbacks = pytest.importorskip("lightning.pytorch.callbacks")
precision_plugins = pytest.importorskip("lightning.pytorch.plugins.precision")


class Automatic(lightning.LightningModule):
    """Automatic optimization: Lightning runs forward, zero_grad and backward inside step(closure)."""

    def __init__(self, way: str = "module", dropout: float = 0.0) -> None:
        super().__init__()
        self.net = net(dropout=dropout)
        self.way = way
        # Numbers of batches for which training_step returns None, which tells Lightning to leave them out.
        self.left_out: set[int] = set()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor | None:
        return None if index in self.left_out else loss_of(self.net, batch)

    def on_train_batch_start(self, *_: Any) -> None:
        # Lightning's checkpoints do not hold the state of the random numbers that dropout draws.
        torch.manual_seed(self.global_step)

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.log("loss", loss_of(self.net, batch))

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = FOP(self if self.way == "module" else self.parameters(), **OPTIONS)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": cosine(optimizer), "interval": "step"},
        }


class Manual(Automatic):
    """Manual optimization; ``halves`` accumulates two batches and says which half of the pair each one is."""

    def __init__(self, accumulate: int = 1, halves: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.accumulate = accumulate
        self.halves = halves

    def training_step(self, batch: list[Tensor], index: int) -> None:
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        place = index % self.accumulate
        with optimizer.sub_batch(place) if self.halves else contextlib.nullcontext():
            self.manual_backward(loss_of(self.net, batch) / self.accumulate)
        if place == self.accumulate - 1 or index == self.trainer.num_training_batches - 1:
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


class Gan(lightning.LightningModule):
    """Two optimizers on two nets of one module; backward passes of one run through the other."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
        self.critic = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

    def losses(self, x: Tensor, of: str) -> Tensor:
        fake = self.generator(x.flip(0))
        if of == "generator":
            return nn.functional.softplus(-self.critic(fake)).mean()
        return (
            nn.functional.softplus(self.critic(fake.detach())) + nn.functional.softplus(-self.critic(x))
        ).mean()

    def training_step(self, batch: list[Tensor], _: int) -> None:
        for optimizer, name in zip(self.optimizers(), ("generator", "critic"), strict=True):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.losses(batch[0], name))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> list[FOP]:
        return [FOP(self.generator, **OPTIONS), FOP(self.critic, **OPTIONS)]


def trainer(**options: Any) -> Any:
    return lightning.Trainer(
        **{
            "max_epochs": EPOCHS,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 1,
            **options,
        }
    )


@pytest.mark.parametrize("way", ["module", "parameters"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_same_weights_as_by_hand(way: str, precision: str, accumulate: int) -> None:
    """11 batches an epoch: windows of 2 leave one batch over, windows of 3 leave two. With validation."""
    model, expected = Automatic(way), net()
    initial = weights(model)
    run = trainer(
        precision=precision, accumulate_grad_batches=accumulate, gradient_clip_val=0.5, val_check_interval=5
    )
    run.fit(model, loader(), loader(22))
    assert_trained(weights(model), initial)
    by_hand(expected, FOP(expected, **OPTIONS), accumulate, bf16=precision == "bf16-mixed")
    assert_same_weights(weights(model.net), weights(expected))


def test_loss_scaling_with_clipping() -> None:
    """Lightning clips under a GradScaler only where the optimizer leaves unscaling to it when asked."""

    def scaler() -> torch.amp.GradScaler:
        # The first scale is too large for float16, so that the first steps are skipped.
        return torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=5)

    model, expected = Automatic(), net()
    plugin = precision_plugins.MixedPrecision("16-mixed", "cpu", scaler())
    trainer(plugins=plugin, gradient_clip_val=0.5).fit(model, loader())
    optimizer, by_us = FOP(expected, **OPTIONS), scaler()
    schedule = cosine(optimizer)
    scales = []
    for batch in list(loader()) * EPOCHS:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(expected, batch)
        by_us.scale(loss).backward()
        by_us.unscale_(optimizer)
        nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
        by_us.step(optimizer)
        by_us.update()
        schedule.step()
        scales.append(by_us.get_scale())
    # Steps were skipped at first; then enough were taken for the scale to grow.
    assert scales[0] > scales[1] > min(scales) < max(scales[scales.index(min(scales)) :])
    assert_same_weights(weights(model.net), weights(expected))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_manual_optimization_gives_the_same_weights(accumulate: int) -> None:
    model, expected = Manual(accumulate), net()
    trainer().fit(model, loader())
    by_hand(expected, FOP(expected, **OPTIONS), accumulate)
    assert_same_weights(weights(model.net), weights(expected))


def test_halves_named_through_lightnings_wrapper() -> None:
    """self.optimizers() gives a wrapper of the optimizer; sub_batch must reach what is inside."""
    model, expected = Manual(accumulate=2, halves=True), net()
    trainer(limit_train_batches=10).fit(model, loader())
    optimizer = FOP(expected, **OPTIONS)
    schedule = cosine(optimizer)
    for _ in range(EPOCHS):
        for window in windows(list(loader())[:10], 2):
            for half, batch in enumerate(window):
                with optimizer.sub_batch(half):
                    (loss_of(expected, batch) / 2).backward()
            nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    assert_same_weights(weights(model.net), weights(expected))


def test_reports_through_lightnings_wrapper() -> None:
    model = Automatic()
    trainer(max_epochs=1).fit(model, loader())
    assert len(loader()) == STEPS_BETWEEN_UPDATES
    wrapper = model.optimizers()
    assert wrapper is not wrapper.optimizer
    assert isinstance(wrapper, FOP)
    assert wrapper.diagnostics() == wrapper.optimizer.diagnostics()
    assert {row.name for row in wrapper.summary().rows if row.path == "FOP"} == {
        f"net.{layer}.{part}" for layer in (0, 4) for part in ("weight", "bias")
    }
    assert not wrapper.curvature_due
    wrapper.request_curvature()
    assert wrapper.optimizer.curvature_due


def test_two_optimizers() -> None:
    model, expected = Gan(), Gan()
    initial = weights(model)
    trainer().fit(model, loader())
    assert_trained(weights(model), initial)
    optimizers = expected.configure_optimizers()
    for _ in range(EPOCHS):
        for x, _y in loader():
            for optimizer, own in zip(optimizers, (expected.generator, expected.critic), strict=True):
                other = expected.critic if own is expected.generator else expected.generator
                other.requires_grad_(False)
                optimizer.zero_grad()
                expected.losses(x, "generator" if own is expected.generator else "critic").backward()
                optimizer.step()
                other.requires_grad_(True)
    assert_same_weights(weights(model), weights(expected))


def test_a_batch_left_out_changes_nothing() -> None:
    """For training_step's None Lightning calls step with a closure that makes no gradients."""
    model, expected = Automatic(), net()
    model.left_out = {0, 3}
    trainer(max_epochs=1, gradient_clip_val=0.5).fit(model, loader())
    by_hand(expected, FOP(expected, **OPTIONS), epochs=1, left_out=model.left_out)
    assert_same_weights(weights(model.net), weights(expected))


@pytest.mark.parametrize("way", ["module", "parameters"])
def test_resumed_run_equals_uninterrupted_one(way: str) -> None:
    """Saved after 11 steps, between two curvature updates; with dropout."""
    batches = loader()
    assert len(batches) == STEPS_BETWEEN_UPDATES
    saving = callbacks.ModelCheckpoint(dirpath="saved", filename="{epoch}", save_top_k=-1)
    whole, resumed = Automatic(way, dropout=0.2), Automatic(way, dropout=0.2)
    trainer(callbacks=saving, enable_checkpointing=True).fit(whole, batches)
    run = trainer()
    run.fit(resumed, batches, ckpt_path="saved/epoch=0.ckpt", weights_only=True)
    assert run.global_step == 2 * STEPS_BETWEEN_UPDATES
    assert_same_weights(weights(resumed), weights(whole))


class Average(callbacks.WeightAveraging):
    """Lightning's average of the weights, a deep copy of the module; here it has backward passes too."""

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        super().on_train_batch_end(*args, **kwargs)
        with torch.enable_grad():
            for x, y in loader():
                loss_of(self._average_model.module.net, (5 * x, y)).backward()


def test_averaged_copy_does_not_feed_the_optimizer() -> None:
    """At the end Lightning puts the average into the module."""
    model, expected = Automatic(), net()
    trainer(callbacks=Average(), gradient_clip_val=0.5).fit(model, loader())
    optimizer = FOP(expected, **OPTIONS)
    average = torch.optim.swa_utils.AveragedModel(expected)
    optimizer.register_step_post_hook(lambda *_: average.update_parameters(expected))
    by_hand(expected, optimizer)
    assert_same_weights(weights(model.net), weights(average.module))


def test_script_of_the_docs() -> None:
    names = run_block("Lightning", loader=loader(), net=net())
    model = names["model"]
    assert_trained(weights(model.net), weights(net()))
