"""`saehub convert`, `inspect`, `verify`: checkpoint folders in; facts, checks and certificates out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from saehub.cli.lazy import SETTINGS
from saehub.cli.options import json_option
from saehub.cli.talk import clean, out, out_json, plain, say, style

LONGEST = 1000
"""Characters of one value that are printed: a checkpoint may carry a tensor as text."""
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
@click.option("--strict", is_flag=True, help="Refuse a SRC that was changed after its own certificate (else: a caution in the new one).")
@click.option("--push", metavar="hf://ORG/REPO", help="Upload the result with a model card (hf://ORG/REPO/FOLDER too).")
@json_option()
def convert(
    source: str,
    destination: Path,
    to: str,
    from_: str | None,
    model: str | None,
    allow_lossy: bool,
    keep_original: bool,
    no_verify: bool,
    strict: bool,
    push: str | None,
    as_json: bool,
) -> int:
    """Write a checkpoint in another library's format, with a certificate.

    The certificate (DST/conversion.json) compares source and target, each run by its own library, on the same rows.
    """
    if push:
        from saehub.checkpoint.push import check
        from saehub.checkpoint.push import push as upload

        check(push)  # a wrong id or a missing token is said before the work
    from saehub.checkpoint.certificate import FILE, INCONCLUSIVE, REFUSED
    from saehub.checkpoint.convert import convert as do
    from saehub.cli.failure import FAILED, OK

    certificate = do(
        source, destination, to, from_=from_, model=model, allow_lossy=allow_lossy, keep_original=keep_original, verify=not no_verify, strict=strict
    )
    failed = certificate.outcome in (INCONCLUSIVE, REFUSED)
    if not as_json:
        out(clean(certificate))
        say(f"\nwritten: {destination} (certificate: {destination / FILE})")
    pushed = upload(destination, push) if push and not failed else None
    if as_json:
        out_json({"certificate": certificate.to_json()} | ({"pushed": pushed} if push else {}))
    elif push:
        say(f"pushed: {pushed['id']} at {pushed['commit']}" if pushed else f"not pushed to {push}: {certificate.outcome}")
    # What was asked to be unproved (--no-verify, --allow-lossy) is no failure; what could not be proved is.
    return FAILED if failed else OK


@click.command(context_settings=SETTINGS)
@click.argument("path")
@json_option()
def inspect(path: str, as_json: bool) -> int:
    """Say what a checkpoint is: architecture, shapes, site, provenance.

    PATH is a folder in any known format, or hf://ORG/REPO/FOLDER. What the checkpoint does not say is listed as missing. Files that do not
    fit what it says are damaged (exit code 1).
    """
    from saehub.checkpoint.format import RESTORE
    from saehub.checkpoint.inspect import inspect as look
    from saehub.cli.failure import FAILED, OK

    data = look(path)
    code = FAILED if data["damaged"] else OK
    if as_json:
        out_json({"checkpoint": data})
        return code
    from saehub.cli import render

    data = plain(data)
    tensors, provenance, missing, damaged = (data.pop(name, None) for name in ("tensors", "provenance", "missing", "damaged"))
    render.facts((name, words(value)) for name, value in data.items())
    if tensors:
        render.facts(((name, f"{entry.get('dtype')} {entry.get('shape')}") for name, entry in tensors.items()), title="Tensors")
    if provenance:
        render.facts(((name, words(value)) for name, value in provenance.items()), title="Provenance")
    for item in missing or []:
        say(style("missing", fg="yellow") + f": {clean(item)}")
    for item in damaged or []:
        say(style("damaged", fg="red", bold=True) + f": {clean(item)}")
    if damaged:
        say(f"fix: {RESTORE}")
    return code


@click.command(context_settings=SETTINGS)
@click.argument("path")
@MODEL
@json_option()
def verify(path: str, model: str | None, as_json: bool) -> int:
    """Prove that a checkpoint still is what it says.

    Checks the tensors' hashes and the golden probe. Only with --model can it also prove the site.
    """
    from saehub.checkpoint.verify import verify as prove
    from saehub.cli.failure import FAILED, OK

    report = prove(path, model=model)
    if as_json:
        out_json({"report": report.to_json()})
        return OK if report.ok else FAILED
    from saehub.cli import render

    render.table(("check", "status", "detail"), [(check.name, check.status, check.detail) for check in report.checks])
    say()
    for check in report.checks:
        if check.fix:
            say(f"{check.name}: {check.fix}")
    say(style(report.verdict, fg="green") if report.ok else style(report.verdict, fg="red", bold=True))
    return OK if report.ok else FAILED


def words(value: Any) -> str:
    """Plain data as one line: `name builtin/tiny-llama, dtype float32`; what is empty is left out, or `-` by itself."""
    if value is None or value == {} or value == []:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(
            f"{name} {f'({words(item)})' if isinstance(item, (Mapping, list)) else words(item)}"
            for name, item in value.items()
            if item not in (None, {}, [])
        )
    if isinstance(value, list):
        return ", ".join(map(words, value))
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[:60]}… ({len(text)} characters; --json has all)"
