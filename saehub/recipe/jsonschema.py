"""The recipe's dataclasses and the installed components in; one JSON Schema out, for completion and checking in an editor.

Use it with a first line `# yaml-language-server: $schema=saehub.schema.json` in a recipe.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from saehub.errors import SaehubError
from saehub.recipe.components import config_class
from saehub.recipe.schema import FORMAT_VERSION, Recipe
from saehub.recipe.typed import adapter

if TYPE_CHECKING:
    from saehub.plugins import Catalog

_KIND_OF = {"Extract": "extractor", "TrainEntry": "trainer"}
_FLAT = ("TrainData", "EvalData")


def json_schema(catalog: Catalog | None = None) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe; with a catalogue, `uses` lists its components and `with` follows from `uses`.

    A recipe that extends another may leave out what the other brings, so nothing but `saehub` and `name` is required at the top."""
    schema = adapter(Recipe).json_schema(ref_template="#/$defs/{model}")
    definitions = schema["$defs"]
    whole = definitions.pop("Recipe") if "Recipe" in definitions else schema
    for name, definition in definitions.items():
        _close(definition)
        if name in _FLAT:
            _allow_flat_source(definition, definitions["SourceEntry"])
        if name not in ("ModelShape", "SourceEntry"):  # entries that change or drop an extended one
            definition["properties"]["remove"] = {"const": True, "description": "Drop what an extended recipe brings under this id or key."}
            definition.pop("required", None)
    whole["properties"]["saehub"] = {"const": FORMAT_VERSION, "description": "Version of the recipe format."}
    whole["properties"]["extends"] = {"type": "string", "description": "Name or path of a recipe to build on: maps merge, entries merge by id, other lists are replaced."}
    whole["properties"]["extract"] = {"$ref": "#/$defs/Extract"}
    whole["properties"]["data"] = {"$ref": "#/$defs/Data"}
    definitions["Extract"]["properties"]["store_limit"] = {"type": ["integer", "string"], "description": "Bytes that `store: auto` may keep; `2 GB` is understood."}
    whole["required"] = ["saehub", "name"]
    _close(whole)
    if catalog is not None:
        _components(whole, definitions, catalog)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "saehub recipe", **_without_titles(whole), "$defs": _without_titles(definitions)}


def _close(definition: dict[str, Any]) -> None:
    definition["additionalProperties"] = False


def _allow_flat_source(definition: dict[str, Any], source: dict[str, Any]) -> None:
    for key, value in source["properties"].items():
        definition["properties"].setdefault(key, value)


def _components(whole: dict[str, Any], definitions: dict[str, Any], catalog: Catalog) -> None:
    for name, kind in _KIND_OF.items():
        _choose(definitions[name], catalog, kind, definitions)
    shared = definitions.pop("UseEntry")
    for section, name, kind in (("evaluate", "EvaluateEntry", "evaluator"), ("export", "ExportEntry", "exporter")):
        definitions[name] = {**shared, "properties": dict(shared["properties"])}
        _choose(definitions[name], catalog, kind, definitions)
        whole["properties"][section] = {"type": "array", "items": {"$ref": f"#/$defs/{name}"}, "description": whole["properties"][section].get("description", "")}


def _choose(definition: dict[str, Any], catalog: Catalog, kind: str, definitions: dict[str, Any]) -> None:
    """`uses: native/topk` makes `with` the settings of native/topk; a bare name works where one plugin has it."""
    known, rules = [], []
    registered = catalog.components(kind)
    bare = [item.component.name for item in registered.values()]
    for address, item in registered.items():
        names = [address] + ([item.component.name] if bare.count(item.component.name) == 1 else [])
        known += names
        try:
            cls = config_class(item)
            settings = adapter(cls).json_schema(ref_template="#/$defs/{model}") if cls is not None else {"type": "object", "maxProperties": 0}
        except (SaehubError, Exception):  # a plugin's broken config is reported where it is used
            continue
        for name, nested in settings.pop("$defs", {}).items():
            _close(nested)
            definitions.setdefault(name, nested)
        if "properties" in settings:
            _close(settings)
            settings.pop("required", None)  # may come from an extended recipe or a sweep
        rules.append({"if": {"properties": {"uses": {"enum": names}}, "required": ["uses"]}, "then": {"properties": {"with": settings}}})
    definition["properties"]["uses"] = {**definition["properties"]["uses"], "enum": known}
    definition["allOf"] = rules


def _without_titles(value: Any) -> Any:
    """pydantic's generated titles say nothing that the keys do not."""
    if isinstance(value, dict):
        return {key: _without_titles(item) for key, item in value.items() if not (key == "title" and isinstance(item, str))}
    if isinstance(value, list):
        return [_without_titles(item) for item in value]
    return value
