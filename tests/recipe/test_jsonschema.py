"""The JSON Schema against a small reading of the standard (the keywords that it uses), on recipes that are right and wrong."""

import json

import pytest

from saehub.recipe import builtin_dir, json_schema, load_text
from saehub.recipe.tree import plain

pytestmark = pytest.mark.quick
TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "number": (int, float), "integer": int}


def valid(value, schema, root):
    """Whether `value` fits, by draft 2020-12."""
    if schema is True or schema is False:
        return schema
    if "$ref" in schema and not valid(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root):
        return False
    if "type" in schema:
        kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        if not any(isinstance(value, TYPES[kind]) and not (kind in ("integer", "number") and isinstance(value, bool)) for kind in kinds):
            return False
    if "const" in schema and (value != schema["const"] or type(value) is not type(schema["const"])):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if isinstance(value, (int, float)):
        bounds = {"minimum": value >= schema.get("minimum", value), "exclusiveMinimum": "exclusiveMinimum" not in schema or value > schema["exclusiveMinimum"]}
        bounds["maximum"] = value <= schema.get("maximum", value)
        if not all(bounds.values()):
            return False
    if isinstance(value, dict):
        known = schema.get("properties", {})
        if any(key not in value for key in schema.get("required", ())) or len(value) > schema.get("maxProperties", len(value)):
            return False
        for key, item in value.items():
            if not valid(item, known[key] if key in known else schema.get("additionalProperties", True), root):
                return False
    if isinstance(value, list):
        first = schema.get("prefixItems", [])
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            return False
        if not all(valid(item, sub, root) for item, sub in zip(value, first)) or not all(valid(item, schema.get("items", True), root) for item in value[len(first) :]):
            return False
    if "anyOf" in schema and not any(valid(value, sub, root) for sub in schema["anyOf"]):
        return False
    if not all(valid(value, sub, root) for sub in schema.get("allOf", ())):
        return False
    if "if" in schema:
        return valid(value, schema.get("then", True) if valid(value, schema["if"], root) else schema.get("else", True), root)
    return True


def fits(text, schema):
    return valid(plain(load_text(text, "x").root), schema, schema)


def test_shipped_recipes_and_their_extensions_fit(catalog, good):
    for schema in (json_schema(), json_schema(catalog)):
        json.dumps(schema)
        assert fits(good, schema)
        assert fits("saehub: 1\nname: x\nextends: y\ntrain: [{id: a, remove: true}, {id: b, with: {expansion: 4}}]\ndata: {train: {split: all}, eval: {z: {remove: true}}}\n", schema)
        assert fits(good + "seed: 3\nsaes: [{id: x, load: y, site: null}]\n", schema)
    for path in sorted(builtin_dir().glob("*.yaml")):
        assert fits(path.read_text(encoding="utf-8"), json_schema()), path


@pytest.mark.parametrize(
    "old, new",
    [
        ("saehub: 1", "saehub: 2"), ("name: good\n", ""), ("name: good", "nmae: good"), ("tokens: 1000", "tokens: -1"), ("tokens: 1000", "tokens: many"),
        ("tokens: 1000", "tokens: 1000, contxt: 3"), ("{sites: [resid_post.2]}", "{sites: resid_post.2}"), ("{sites: [resid_post.2]}", "{normalize: yes}"), ("id: a", "id: 3"),
    ],
)  # fmt: skip
def test_what_the_checker_refuses_the_schema_refuses(catalog, good, old, new):
    assert old in good
    for schema in (json_schema(), json_schema(catalog)):
        assert not fits(good.replace(old, new), schema)


@pytest.mark.parametrize("old, new", [("{k: 32}", "{k: 0}"), ("{k: 32}", "{kk: 32}"), ("{k: 32}", "{k: 1, optimizer: {name: adamw}}"), ("native/topk", "native/tpok"), ("native/topk", "topk"), ("native/core}", "native/core, with: {x: 1}}")])  # fmt: skip
def test_with_a_catalogue_settings_follow_from_uses(catalog, good, old, new):
    assert fits(good.replace(old, new), json_schema()) and not fits(good.replace(old, new), json_schema(catalog))


def test_every_key_is_explained():
    schema = json_schema()
    for name, definition in {"Recipe": schema, **schema["$defs"]}.items():
        if name != "ModelShape":  # explained in saehub.api, whose classes carry no pydantic settings
            for key, item in definition["properties"].items():
                assert item.get("description") or "$ref" in item, f"{name}.{key}"
