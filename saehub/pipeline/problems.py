"""A recipe's name and overrides in; every problem of the recipe and of its plan, at once and each at its place, out."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from saehub.errors import RecipeError, SaehubError
from saehub.pipeline.plan import make_plan
from saehub.recipe import locator
from saehub.recipe.check import check as check_recipe
from saehub.recipe.check import in_order
from saehub.recipe.salvage import concerns, salvage, shaky
from saehub.recipe.tree import Problem

if TYPE_CHECKING:
    from saehub.plugins import Catalog
    from saehub.recipe.check import Overrides
    from saehub.recipe.schema import Recipe


def check(path_or_name: str | os.PathLike[str], overrides: Overrides, catalog: Catalog) -> tuple[Recipe | None, list[Problem]]:
    """`saehub.recipe.check`, and what only a plan can say: a site that the model lacks, k above the width, no step of a batch.

    A faulty recipe is planned without its faulty parts (of model, text and extraction: with their defaults), and what could come from those is
    not told. Nothing is planned around a model that
    is not on this machine and declares no shape.
    """
    recipe, problems = check_recipe(path_or_name, overrides, catalog)
    errors = [problem for problem in problems if problem.severity == "error"]
    whole = recipe if recipe is not None else salvage(path_or_name, overrides, catalog)
    if whole is None or not _sizes_known(whole):
        return recipe, problems
    at = locator(path_or_name, overrides, catalog)
    found: list[Problem] = []
    try:
        make_plan(whole, catalog, locate=at, contents=False)
    except RecipeError as error:
        found = list(error.problems) or [at("", error.what, error.fix)]
    except SaehubError as error:
        found = [at("", error.what + (f" ({error.why})" if error.why else ""), error.fix)]
    new = [problem for problem in found if not any(concerns(known, problem.path, problem.message) for known in errors) and not shaky(errors, problem.path, problem.message)]
    return (None if new else recipe), in_order([*problems, *new], path_or_name, overrides)


def _sizes_known(recipe: Any) -> bool:
    from saehub.data.model import local_files

    model = recipe.model
    try:
        return model is None or model.shape is not None or local_files(model.name, model.revision) is not None
    except SaehubError:
        return False
