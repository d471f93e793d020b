"""Recipes: YAML in, a checked `Recipe` or every problem with its place out. Imports no torch, and pydantic only when it checks."""

from saehub.recipe.check import check, check_text, locator, resolve
from saehub.recipe.components import make_config
from saehub.recipe.expand import expand_sweeps
from saehub.recipe.library import builtin_dir, find, listing
from saehub.recipe.load import Document, load_text
from saehub.recipe.plain import dump, to_plain
from saehub.recipe.schema import (
    Data,
    EvalData,
    Extract,
    ModelEntry,
    Recipe,
    SaeEntry,
    SourceEntry,
    TrainData,
    TrainEntry,
    UseEntry,
)
from saehub.recipe.tree import Problem


def json_schema(catalog=None) -> dict:
    """JSON Schema of a recipe, for editors (see `saehub.recipe.jsonschema`)."""
    from saehub.recipe.jsonschema import json_schema as build

    return build(catalog)


__all__ = [
    "Data",
    "Document",
    "EvalData",
    "Extract",
    "ModelEntry",
    "Problem",
    "Recipe",
    "SaeEntry",
    "SourceEntry",
    "TrainData",
    "TrainEntry",
    "UseEntry",
    "builtin_dir",
    "check",
    "check_text",
    "dump",
    "expand_sweeps",
    "find",
    "json_schema",
    "listing",
    "load_text",
    "locator",
    "make_config",
    "resolve",
    "to_plain",
]
