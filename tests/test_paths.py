"""Which parameters take the FOP step and which take AdamW, where that is not plain."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fop import FOP
from models import batch, mlp, train_step, weights
from reference import half_squared_error


def paths(optimizer: FOP) -> dict[str, str]:
    return {row.name: row.path for row in optimizer.summary().rows}


class Conv1D(nn.Module):
    """As in `transformers.pytorch_utils`: a linear layer with its weight as (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Tied(nn.Module):
    """One weight in two modules; the second is a layer that takes the FOP step, or one that does not."""

    def __init__(self, second: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(5, 5), second(), nn.Linear(5, 3)
        self.b.weight = self.a.weight
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.a(x))
        if isinstance(self.b, nn.EmbeddingBag):
            return self.head(hidden + self.b(x.argmax(1, keepdim=True)))  # type: ignore[no-any-return]
        return self.head(torch.tanh(self.b(hidden)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("bare", [False, True])
def test_tied_weights_are_one_block_visibly(bare: bool) -> None:
    model = Tied(lambda: nn.Linear(5, 5))
    before = weights(model)
    optimizer = FOP(model.parameters() if bare else model, weight_decay=0.0, adamw_lr=1e-3)
    train_step(model, optimizer, *batch())
    rows = {row.name: row for row in optimizer.summary().rows}
    assert (rows["a.weight"].path, rows["a.weight"].reason) == ("FOP", "Linear, shared by a, b")
    assert (rows["head.weight"].path, rows["head.weight"].reason) == ("FOP", "Linear")
    assert optimizer.diagnostics().layers.keys() == {"a", "head"}
    for name in ("a.bias", "b.bias"):
        assert (rows[name].path, rows[name].reason) == ("AdamW", "its weight is shared, with other biases")
        step = (dict(model.named_parameters())[name] - before[name]).abs()
        torch.testing.assert_close(step, torch.full_like(step, 1e-3), rtol=1e-4, atol=0)


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("case", ["option", "kind", "layout"])
def test_tied_weights_that_fit_no_block_take_adamw_visibly(case: str, bare: bool) -> None:
    seconds: dict[str, tuple[Callable[[], nn.Module], str]] = {
        "option": (lambda: nn.Linear(5, 5), "shared with b.weight, which takes no FOP step"),
        "kind": (lambda: nn.EmbeddingBag(5, 5), "shared with b.weight, which takes no FOP step"),
        "layout": (lambda: Conv1D(5, 5), "shared by a, b, whose curvatures do not fit together"),
    }
    second, reason = seconds[case]
    model = Tied(second)
    before = weights(model)
    choice = {"b": {"path": "adamw"}} if case == "option" else None
    optimizer = FOP(
        model.parameters() if bare else model, weight_decay=0.0, adamw_lr=1e-3, layer_options=choice
    )
    train_step(model, optimizer, *batch())
    rows = {row.name: row for row in optimizer.summary().rows}
    assert (rows["a.weight"].path, rows["a.weight"].reason) == ("AdamW", reason)
    assert rows["head.weight"].path == "FOP"
    assert all(row.path == "FOP" or row.reason for row in rows.values())
    step = (model.a.weight - before["a.weight"]).abs()
    torch.testing.assert_close(step, torch.full_like(step, 1e-3), rtol=1e-4, atol=0)
    assert rows["a.bias"].path == "AdamW"


@pytest.mark.parametrize("bare", [False, True])
def test_attention_takes_the_fop_step(bare: bool) -> None:
    """Its output projection is a Linear whose forward nobody calls."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    optimizer = FOP(model.parameters() if bare else model)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8)).square().mean().backward()
        optimizer.step()
    adamw = {name for name, path in paths(optimizer).items() if path == "AdamW"}
    assert adamw == {f"norm{i}.{part}" for i in (1, 2) for part in ("weight", "bias")}
    assert set(paths(optimizer).values()) == {"FOP", "AdamW"}
    layers = optimizer.diagnostics().layers
    assert layers.keys() == {"self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2"}
    assert {layer.kfac_steps for layer in layers.values()} == {0}


def test_weight_that_no_module_call_reaches_takes_adamw_visibly() -> None:
    model = mlp()
    optimizer = FOP(model)
    for seed in range(2):
        x, y = batch(6, seed)
        optimizer.zero_grad()
        hidden = nn.functional.linear(x, model[0].weight, model[0].bias)
        half_squared_error(model[2](hidden), y).backward()
        optimizer.step()
    assert paths(optimizer)["2.weight"] == "FOP"
    row = optimizer.summary().rows[0]
    assert (row.name, row.path) == ("0.weight", "AdamW")
