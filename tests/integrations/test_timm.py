"""FOP made by name by timm's optimizer factory, and stepped under timm's schedulers."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

from fop import FOP
from tiny import assert_same_weights, assert_trained, run_block, weights

if find_spec("timm") is None:
    pytest.skip("needs timm: pip install --no-deps timm, as `make test-all` does", allow_module_level=True)

# timm imports torchvision for readers of images and for tracing, of which nothing is used here; torchvision's
# builds do not import beside a torch for the CPU alone. Where it is missing, its modules are mocks.
TORCHVISION = "datasets models models.feature_extraction ops ops.misc transforms transforms.functional"
with pytest.MonkeyPatch.context() as patch:
    if find_spec("torchvision") is None:
        for name in ("torchvision", *(f"torchvision.{part}" for part in TORCHVISION.split())):
            patch.setitem(sys.modules, name, MagicMock())
    import timm
    from timm import optim, scheduler


def vit() -> Any:
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **sizes)


def train(model: nn.Module, optimizer: Any) -> None:
    images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    schedule = scheduler.CosineLRScheduler(
        optimizer, t_initial=6, warmup_t=2, warmup_lr_init=0.02, t_in_epochs=False
    )
    for step in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), torch.arange(16) % 3).backward()
        optimizer.step()
        schedule.step_update(step + 1)


def test_script_of_the_docs() -> None:
    """The script's optimizer takes the steps of FOP on timm's groups, with FOP's momentum and not timm's."""
    model, expected = vit(), vit()
    initial = weights(model)
    optimizer = run_block("timm", model=model)["optimizer"]
    assert isinstance(optimizer, FOP)
    train(model, optimizer)
    assert_trained(weights(model), initial)
    kept: Any = expected.no_weight_decay()
    train(expected, FOP(optim.param_groups_weight_decay(expected, 1e-3, no_weight_decay_list=kept), lr=0.2))
    assert_same_weights(weights(model), weights(expected))


@pytest.mark.parametrize("way", ["groups", "layer_decay", "module"])
def test_every_matrix_takes_the_fop_step(way: str) -> None:
    options: dict[str, Any] = {
        "groups": {},
        "layer_decay": {"layer_decay": 0.7},
        "module": {"param_group_fn": lambda model: model},
    }[way]
    model = vit()
    create = run_block("timm", model=model)["create_optimizer_v2"]
    optimizer = create(model, "fop", lr=0.2, weight_decay=1e-3, **options)
    train(model, optimizer)
    rows = optimizer.summary().rows
    assert {row.name for row in rows} == {name for name, _ in model.named_parameters()}
    left = {row.name for row in rows if row.name.endswith("weight") and row.path != "FOP"}
    assert left == {name for name, _ in model.named_parameters() if "norm" in name and "weight" in name}
    scales = {group["lr_scale"] for group in optimizer.param_groups if "lr_scale" in group}
    assert len(scales) == (3 if way == "layer_decay" else 0)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(optimizer.param_groups[-1]["lr"] * group.get("lr_scale", 1))
