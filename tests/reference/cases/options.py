"""Models of the other files with K-FAC-reduce or diagonal factors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from reference.cases.attention import ATTENTION, TRANSFORMERS
from reference.cases.layers import LAYERS, Conv1D, single
from reference.steps import Case, double


def reduced(case: Case) -> Case:
    return with_options(case, {"weight_sharing": "reduce"}, reduce=True)


def diagonal(case: Case, max_factor_dim: int) -> Case:
    return with_options(case, {"max_factor_dim": max_factor_dim}, max_factor_dim=max_factor_dim)


def in_blocks(case: Case, block_dim: int) -> Case:
    return with_options(case, {"block_dim": block_dim}, block_dim=block_dim)


def with_options(case: Case, layer_options: dict[str, Any], **estimates: Any) -> Case:
    """The same model with these options for all of its layers."""
    given = case.options.get("layer_options", {})
    options = {"layer_options": {**given, "*": {**given.get("*", {}), **layer_options}}}
    return replace(
        case,
        estimates={"": {**case.estimates.get("", {}), **estimates}},
        options={**case.options, **options},
    )


LINEAR = single(lambda: nn.Linear(4, 3), 2, 4)
CONV = single(lambda: nn.Conv2d(2, 3, 2), 2, 3, 3)
SEQUENCE = Case(
    lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), double(3, 4), {"0.weight", "2.weight"}
)

REDUCE: dict[str, Case] = {
    "linear": reduced(LINEAR),
    "linear-no-bias": reduced(single(lambda: nn.Linear(4, 3, bias=False), 3, 4)),
    "linear-grid": reduced(single(lambda: nn.Linear(4, 3), 2, 3, 4)),
    "linear-one-row": reduced(single(lambda: nn.Linear(4, 3), 4)),
    "linear-batch-in-dim-1": reduced(LAYERS["batch-in-dim-1"]),
    "repeated": reduced(LAYERS["repeated"]),
    "transformers-conv1d": reduced(single(lambda: Conv1D(3, 4), 2, 4)),
    "conv": reduced(CONV),
    "conv1d": reduced(LAYERS["conv1d-geometry"]),
    "conv2d-groups": reduced(single(lambda: nn.Conv2d(4, 2, 2, groups=2, bias=False), 4, 3, 3)),
    "conv3d": reduced(LAYERS["conv3d-geometry"]),
    "transposed": reduced(LAYERS["transposed2d-geometry"]),
    "attention": reduced(ATTENTION["cross"]),
    "encoder": reduced(TRANSFORMERS["encoder"]),
    "by-name": replace(
        SEQUENCE,
        estimates={"2.weight": {"reduce": True}},
        options={"layer_options": {"2": {"weight_sharing": "reduce"}}},
    ),
    "all-but-one": replace(
        SEQUENCE,
        estimates={"2.weight": {"reduce": True}},
        options={
            "layer_options": {
                nn.Linear: {"weight_sharing": "reduce"},
                "0": {"weight_sharing": "expand"},
            }
        },
    ),
}
DIAGONAL: dict[str, Case] = {
    "linear-A": diagonal(LINEAR, 3),
    "linear-G": diagonal(single(lambda: nn.Linear(3, 4), 2, 3), 3),
    "linear-both": diagonal(LINEAR, 2),
    "linear-no-bias": diagonal(single(lambda: nn.Linear(4, 3, bias=False), 4), 1),
    # The bias column does not count.
    "linear-just-fits": diagonal(LINEAR, 4),
    "transformers-conv1d": diagonal(single(lambda: Conv1D(3, 4), 2, 4), 3),
    "conv-A": diagonal(CONV, 7),
    "conv-groups": diagonal(LAYERS["conv1d-groups"], 2),
    "conv-groups-just-fits": diagonal(LAYERS["conv1d-groups"], 4),
    "transposed": diagonal(LAYERS["transposed2d-geometry"], 3),
    "embedding-G": diagonal(LAYERS["embedding-padding"], 2),
    "repeated": diagonal(LAYERS["repeated"], 3),
    "tied-vocabulary": diagonal(LAYERS["tied"], 4),
    "tied-both": diagonal(LAYERS["tied-padding"], 2),
    "attention": diagonal(ATTENTION["cross"], 3),
    "separate-attention": diagonal(ATTENTION["separate"], 4),
    "reduced": diagonal(reduced(LINEAR), 3),
    "reduced-conv": diagonal(reduced(CONV), 2),
    "by-name": replace(
        SEQUENCE,
        estimates={"2.weight": {"max_factor_dim": 4}},
        options={
            "layer_options": {
                "*": {"max_factor_dim": 2},
                "0": {"max_factor_dim": 5},
                "2": {"max_factor_dim": 4},
            }
        },
    ),
}
BLOCKS: dict[str, Case] = {
    "linear-A": in_blocks(single(lambda: nn.Linear(7, 3), 2, 7), 3),
    "linear-G": in_blocks(single(lambda: nn.Linear(3, 5), 2, 3), 3),
    "linear-both": in_blocks(single(lambda: nn.Linear(7, 5), 7), 2),
    "linear-no-bias": in_blocks(single(lambda: nn.Linear(6, 4, bias=False), 6), 3),
    # The bias column does not count.
    "linear-just-fits": in_blocks(LINEAR, 4),
    "transformers-conv1d": in_blocks(single(lambda: Conv1D(3, 4), 2, 4), 2),
    "conv": in_blocks(CONV, 5),
    "conv-groups": in_blocks(LAYERS["conv1d-groups"], 3),
    "transposed": in_blocks(LAYERS["transposed2d-geometry"], 2),
    "embedding-G": in_blocks(LAYERS["embedding-padding"], 2),
    "repeated": in_blocks(LAYERS["repeated"], 3),
    "tied": in_blocks(LAYERS["tied"], 3),
    "tied-padding": in_blocks(LAYERS["tied-padding"], 2),
    "tied, vocabulary diagonal": with_options(
        LAYERS["tied"], {"block_dim": 2, "max_factor_dim": 4}, block_dim=2, max_factor_dim=4
    ),
    "attention": in_blocks(ATTENTION["cross"], 3),
    "separate-attention": in_blocks(ATTENTION["separate"], 3),
    "encoder": in_blocks(TRANSFORMERS["encoder"], 4),
    "reduced": in_blocks(reduced(LINEAR), 2),
    "diagonal": with_options(LINEAR, {"block_dim": 2, "max_factor_dim": 3}, block_dim=2, max_factor_dim=3),
}
