"""The recipes that `fop-bench run` knows, one file each."""

from __future__ import annotations

from fop_bench.recipes import (
    cifar10_resnet18,
    cifar10_small,
    cifar_lt_resnet32,
    digits,
    imagenet1k_resnet50,
    imagenet100_t2tvit,
)
from fop_bench.recipes.recipe import Recipe

_FILES = (
    digits,
    cifar10_small,
    cifar10_resnet18,
    cifar_lt_resnet32,
    imagenet100_t2tvit,
    imagenet1k_resnet50,
)
RECIPES: dict[str, Recipe] = {module.RECIPE.name: module.RECIPE for module in _FILES}


def recipe(name: str) -> Recipe:
    """Look a recipe up by its name; raises ValueError for an unknown one."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; known are {', '.join(RECIPES)}")
    return RECIPES[name]
