"""The recipes that `fop-bench run` knows, one file each."""

from __future__ import annotations

from fop_bench.recipes import cifar10_small
from fop_bench.recipes.recipe import Recipe

RECIPES: dict[str, Recipe] = {module.RECIPE.name: module.RECIPE for module in (cifar10_small,)}


def recipe(name: str) -> Recipe:
    """Look a recipe up by its name; raises ValueError for an unknown one."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; known are {', '.join(RECIPES)}")
    return RECIPES[name]
