"""What every kind of layer does in every situation: the declarations that test and table are made from.

`test_compatibility.py` has a test for each cell; ``python tests/compatibility.py`` writes the table into
`docs/compatibility.md`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fop import FOP
from models import PLAIN
from reference import Case, double
from reference.cases import CONVOLUTIONS, EMBEDDINGS, LINEAR, SHARED, TRANSPOSED, single
from reference.cases.attention import SEPARATE, Attention, many, self_attention
from reference.cases.layers import tokens
from reference.cases.norms import norm, scrambled

DOC = Path(__file__).parents[1] / "docs" / "compatibility.md"
BEGIN, END = "<!-- begin: python tests/compatibility.py -->", "<!-- end -->"

PAIR, KFAC_STEP, ADAMW, NO_EFFECT = "✓", "K-FAC step", "AdamW", "–"

# With fixed β and η every part of a step counts; all of its history is in momentum and weight decay. A large
# eps keeps AdamW from blowing up the rounding of gradients that are nearly zero.
OPTIONS: dict[str, Any] = {
    **PLAIN, "lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, "adamw_lr": 0.02, "eps": 0.1,
}  # fmt: skip


def options_of(make: type[FOP], options: Mapping[str, Any]) -> dict[str, Any]:
    """Those that the class takes."""
    return {key: value for key, value in options.items() if make is FOP or key not in ("beta", "eta")}


# --- rows --------------------------------------------------------------------------------------------------


class Scale(nn.Module):
    """A bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(3, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)[0]
        return out


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Bilinear(3, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x, x)
        return out


def left(case: Case) -> Case:
    """A model of which nothing takes the FOP step."""
    return Case(case.build, case.inputs, set(), case.whole)


LAYER_NORM = norm(lambda: nn.LayerNorm(5), 3, 5)
BATCH_NORM = norm(lambda: nn.BatchNorm2d(3), 3, 2, 2, whole=True)

LAYERS: dict[str, Case] = {
    "Linear": single(lambda: nn.Linear(4, 3), 4),
    "Linear-sequences": single(lambda: nn.Linear(4, 3), 3, 4),
    "Conv1d": CONVOLUTIONS["conv1d"],
    "Conv2d": single(lambda: nn.Conv2d(2, 3, 2), 2, 3, 3),
    "Conv3d": CONVOLUTIONS["conv3d"],
    "Conv2d-grouped": single(lambda: nn.Conv2d(4, 4, 2, groups=2), 4, 3, 3),
    "Conv2d-depthwise": single(lambda: nn.Conv2d(3, 6, 2, groups=3), 3, 3, 3),
    "ConvTranspose1d": TRANSPOSED["transposed1d"],
    "ConvTranspose2d": TRANSPOSED["transposed2d"],
    "ConvTranspose3d": TRANSPOSED["transposed3d"],
    "Embedding": EMBEDDINGS["embedding-padding"],
    "Conv1D-HuggingFace": LINEAR["transformers-conv1d-sequence"],
    # Without the row of zeros the loss does not depend on a shift of all keys, and reduced rows are rounding.
    "MultiheadAttention": self_attention(add_zero_attn=True),
    "MultiheadAttention-kdim": Case(
        lambda: Attention(kdim=3, vdim=5, add_zero_attn=True), many((2, 4), (3, 3), (3, 5)), SEPARATE
    ),
    "Linear-called-often": SHARED["repeated"],
    "Linear-shared-weight": SHARED["twins"],
    "Embedding-tied-Linear": SHARED["tied"],
    "LayerNorm-fop": LAYER_NORM,
    "RMSNorm-fop": norm(lambda: nn.RMSNorm(5), 3, 5),
    "GroupNorm-fop": norm(lambda: nn.GroupNorm(2, 4), 4, 2, 3),
    "BatchNorm2d-fop": BATCH_NORM,
    "LayerNorm": left(LAYER_NORM),
    "BatchNorm2d": left(BATCH_NORM),
    "LSTM": Case(Recurrent, double(4, 3), set()),
    "Bilinear": Case(Bilinear, double(3), set()),
    "EmbeddingBag": Case(lambda: nn.Sequential(nn.EmbeddingBag(5, 3)), tokens(4, size=5), set()),
    "bare-parameter": Case(lambda: scrambled(nn.Sequential(Scale())), double(3), set()),
}
ATTENTIONS = ("MultiheadAttention", "MultiheadAttention-kdim")
NORMS = ("LayerNorm-fop", "RMSNorm-fop", "GroupNorm-fop", "BatchNorm2d-fop")


# --- columns -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Feature:
    """One column.

    Attributes:
        means: what the test of a cell checks.
        step: the step of layers that can have a pair.
        other: step of those that can not.
        but: marks of single layers.
        note: about the marks in ``but``.
    """

    means: str
    step: str = PAIR
    other: str = ADAMW
    but: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


FEATURES: dict[str, Feature] = {
    "pair": Feature("Steps in eager mode are those of the dense equations in float64."),
    "bf16": Feature(
        "Under `torch.autocast` in bfloat16 weights stay within 3 % of the way that they go in float32; "
        "factors are float32."
    ),
    "fp16": Feature(
        "Autocast in float16 (not of the LSTM, for which torch has none on a CPU) with `GradScaler`: within "
        "1 % of the way in float32; a step that overflows leaves weights and state as they are."
    ),
    "clip": Feature("After `clip_grad_norm_` the step is the unclipped one times the clip's factor."),
    "accumulate": Feature("Two backward passes before `step()` make the same step as both batches in one."),
    "sub_batch": Feature("The halves of a batch, each under `sub_batch(i)`, make the step of the batch."),
    "resume": Feature("Saved, loaded with `weights_only=True` into new objects, and on: bit for bit."),
    "deepcopy": Feature("A deep copy that runs and trains between the calls changes nothing, bit for bit."),
    "freeze": Feature(
        "Frozen weights do not move; thawed, they go on as if that step had never been, bit for bit."
    ),
    "compile": Feature(
        "`torch.compile` (`aot_eager`, in one graph but for the LSTM) makes the steps of eager mode.",
        but=dict.fromkeys(ATTENTIONS, ADAMW),
        note="The projections inside an attention cannot be seen in a graph; their weights take AdamW, and "
        "`summary()` says so.",
    ),
    "recompute": Feature(
        "Under `torch.utils.checkpoint` (`use_reentrant=False`) steps are the same, bit for bit."
    ),
    "float64": Feature(
        "`model.to(torch.float64)` in mid-training: on as a float64 run into which the state was loaded."
    ),
    "reduce": Feature(
        "`weight_sharing='reduce'`: steps are those of the dense equations with K-FAC-reduce's factors.",
        other=NO_EFFECT,
        but=dict.fromkeys(("Embedding", *NORMS), NO_EFFECT),
        note="Without effect, bit for bit: an embedding's rows are counted as they are, a norm's Fisher is "
        "by sample. Of a tied weight it is the `Linear`'s term that is reduced.",
    ),
    "max_factor_dim": Feature(
        "`max_factor_dim=2`: steps are those of the dense equations with larger factors' diagonals.",
        other=NO_EFFECT,
        but=dict.fromkeys(NORMS, NO_EFFECT),
        note="Without effect, bit for bit: the Fisher of a norm is diagonal as it is.",
    ),
    "kfac": Feature("`KFAC` in place of `FOP`: the dense equations with β = 0 and η = 1.", step=KFAC_STEP),
    "sum": Feature(
        "`loss_reduction='sum'` and a loss that sums over samples: the mean's steps (AdamW's of the sum)."
    ),
}


Batch = tuple[tuple[Tensor, ...], Tensor]


@dataclass(frozen=True)
class Cell:
    """A layer in a situation, and which step it is declared to take."""

    layer: str
    feature: str

    @property
    def case(self) -> Case:
        return LAYERS[self.layer]

    @property
    def mark(self) -> str:
        feature = FEATURES[self.feature]
        return feature.but.get(self.layer, feature.step if self.case.blocks else feature.other)

    def batches(self, steps: int = 2) -> list[Batch]:
        """Batches of 4 samples."""
        return [self.case.batch(4, seed + 1) for seed in range(steps)]

    def optimizer(self, model: nn.Module, make: type[FOP] = FOP, **options: Any) -> FOP:
        """An optimizer with the case's options and these."""
        layer_options = {**self.case.options.get("layer_options", {}), **options.pop("layer_options", {})}
        return make(model, **{**options_of(make, OPTIONS), **options}, layer_options=layer_options)


def adamw_of(model: nn.Module, weight_decay: float = OPTIONS["weight_decay"]) -> torch.optim.AdamW:
    """What the AdamW path is to do, by torch itself."""
    lr, eps = OPTIONS["adamw_lr"], OPTIONS["eps"]
    return torch.optim.AdamW(model.parameters(), lr, eps=eps, weight_decay=weight_decay)


# --- the table ---------------------------------------------------------------------------------------------


def table() -> str:
    """The part of the document that follows from the declarations."""
    notes = {name: str(i) for i, name in enumerate([n for n, f in FEATURES.items() if f.note], start=1)}
    head = ["layer", *(f"`{name}`" for name in FEATURES)]
    body = [[f"`{layer}`", *(_cell(layer, name, notes) for name in FEATURES)] for layer in LAYERS]
    rows = [head, ["---"] * len(head), *body]
    return "\n".join(
        [
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
            *(f"{number}. {FEATURES[name].note}" for name, number in notes.items()),
            "",
            *(f"- `test_{name}`: {feature.means}" for name, feature in FEATURES.items()),
        ]
    )


def _cell(layer: str, feature: str, notes: Mapping[str, str]) -> str:
    mark = Cell(layer, feature).mark
    return f"{mark} ({notes[feature]})" if layer in FEATURES[feature].but else mark


def written() -> str:
    """The part of the document that should be the table."""
    return DOC.read_text().partition(BEGIN)[2].partition(END)[0].strip()


if __name__ == "__main__":
    before, begin, rest = DOC.read_text().partition(BEGIN)
    DOC.write_text("\n".join([before + begin, table(), END + rest.partition(END)[2]]))
