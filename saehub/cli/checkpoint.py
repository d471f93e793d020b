"""`saehub convert`, `inspect`, `verify`: checkpoint folders in; facts, checks and certificates out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from saehub.cli.lazy import SETTINGS
from saehub.cli.options import json_option, not_yet
from saehub.cli.talk import out_json, plain, say

MODEL = click.option("--model", metavar="MODEL", help="builtin/tiny-llama, a Hugging Face id or a local folder.")


@click.command(context_settings=SETTINGS)
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST", type=click.Path(path_type=Path))
@click.option("--to", required=True, metavar="FORMAT", help="Format to write: an exporter, such as saelens.")
@click.option("--from", "from_", metavar="FORMAT", help="Format of SRC (default: recognised from its files).")
@MODEL
@click.option("--allow-lossy", is_flag=True, help="Write what the target can carry, and say by how much it differs.")
@click.option("--keep-original", is_flag=True, help="Store the source's tensors beside the target, for an exact way back.")
@click.option("--no-verify", is_flag=True, help="Skip the certificate; the result says `unverified`.")
@click.option("--push", metavar="hf://ORG/REPO", help="Upload the result (no component does this yet).")
@json_option()
def convert(source: str, destination: Path, to: str, from_: str | None, model: str | None, allow_lossy: bool, keep_original: bool, no_verify: bool, push: str | None, as_json: bool) -> int:
    """Write a checkpoint in another library's format, with a certificate.

    The certificate (DST/conversion.json) compares source and target, each run by its own library, on the same rows.
    """
    if push:
        raise not_yet("convert --push", f"convert without --push, then: huggingface-cli upload {push.removeprefix('hf://')} {destination}")
    from saehub.checkpoint.convert import convert as do

    certificate = do(source, destination, to, from_=from_, model=model, allow_lossy=allow_lossy, keep_original=keep_original, verify=not no_verify)
    data = _data(certificate)
    if as_json:
        out_json({"certificate": data})
    else:
        from saehub.cli import render

        render.facts(flat(data))
        say(f"\nwritten: {destination}")
    return _outcome_code(data)


@click.command(context_settings=SETTINGS)
@click.argument("path")
@json_option()
def inspect(path: str, as_json: bool) -> None:
    """Say what a checkpoint is: architecture, shapes, site, provenance, and what is missing."""
    from saehub.checkpoint.inspect import inspect as look

    data = look(path)
    if as_json:
        return out_json({"checkpoint": data})
    from saehub.cli import render

    render.facts(flat(plain(data)))


@click.command(context_settings=SETTINGS)
@click.argument("path")
@MODEL
@json_option()
def verify(path: str, model: str | None, as_json: bool) -> int:
    """Prove that a checkpoint still is what it says: tensor hashes and the golden probe; with --model also its site."""
    from saehub.checkpoint.verify import verify as prove
    from saehub.cli.failure import FAILED, OK

    report = prove(path, model=model)
    data = _data(report)
    failed = any(check.get("status") == "failed" for check in data.get("checks", []))
    if as_json:
        out_json({"path": path, "ok": not failed, **data})
        return FAILED if failed else OK
    from saehub.cli import render

    render.table(("check", "status", "detail"), [(item.get("name"), str(item.get("status")).replace("_", " "), item.get("detail")) for item in data.get("checks", [])])
    say()
    say(f"{path}: {'FAILED' if failed else 'verified'}")
    return FAILED if failed else OK


def _data(result: Any) -> dict:
    return plain(result.to_json() if hasattr(result, "to_json") else result)


def _outcome_code(data: Mapping[str, Any]) -> int:
    """1 where the certificate came out negative or could not decide."""
    from saehub.cli.failure import FAILED, OK

    return FAILED if str(data.get("outcome", "")).startswith(("inconclusive", "failed", "refused")) else OK


def flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """`a.b` -> text, in order: nested data as lines."""
    for name, value in data.items():
        label = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{label}.")
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            for i, item in enumerate(value):
                yield from flat(item, f"{label}[{i}].")
        else:
            yield label, _words(value)


def _words(value: Any) -> str:
    if value is None or value == {} or value == []:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
