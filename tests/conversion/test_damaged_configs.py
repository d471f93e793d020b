"""Every value of every format's JSON, replaced by values of other types: it is read, or a FormatError says what is wrong; never another exception."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from saehub.checkpoint import format as v1
from saehub.checkpoint.inspect import inspect
from saehub.checkpoint.load import NATIVE, codec, exporters, load
from saehub.checkpoint.verify import verify
from saehub.errors import FormatError, SaehubError
from saehub.testing.saes import random_sae

VALUES = [None, True, -1, 10**30, 1.5, float("nan"), "x", [], [1, "a"], {}, {"a": [1]}]
"""And `DELETED`: the key is not there."""
DELETED = object()
READERS = (load, inspect, verify)


def places(node: Any, at: tuple = ()) -> Iterator[tuple]:
    """Paths of all values inside a JSON document."""
    for key in list(node) if isinstance(node, dict) else range(min(len(node), 2)) if isinstance(node, list) else ():
        yield (*at, key)
        yield from places(node[key], (*at, key))


def changed(document: dict, at: tuple, value: Any) -> dict:
    """A copy with `value` at that place."""
    copy = json.loads(json.dumps(document))
    node = copy
    for key in at[:-1]:
        node = node[key]
    if value is DELETED:
        del node[at[-1]]
    else:
        node[at[-1]] = value
    return copy


def written(address: str, folder: Path) -> Path | None:
    """A small SAE of the first architecture that the format can say, or None."""
    for architecture in ("topk", "jumprelu", "relu"):
        for more in ({}, {"kind": "transcoder", "subtract_b_dec": False}, {"subtract_b_dec": False}):
            sae = random_sae(architecture, **more)
            sae.provenance |= {"site": "mlp_in.1", "target_site": "mlp_out.1"} if more.get("kind") else {"site": "resid_post.1"}
            sae.provenance |= {"model": {"name": "m"}, "tokens": {"context": 64, "bos": "sequence"}}
            try:
                codec(address)[1].write(sae, folder)
                return folder
            except SaehubError:
                continue
    return None


@pytest.mark.parametrize("address", [NATIVE, *exporters()])
def test_no_value_of_a_config_is_an_exception(address, tmp_path):
    folder = written(address, tmp_path / "sae")
    if folder is None:
        assert codec(address)[1].refusal(random_sae("topk")).endswith("does not write it")
        return
    surprises = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for file in sorted(folder.rglob("*.json")):
            document = json.loads(file.read_text())
            for at in list(places(document)) if isinstance(document, dict) else ():
                for value in (*VALUES, DELETED):
                    other = changed(document, at, value)
                    if file.name == v1.HEADER and at[0] != "hash" and value == value:  # as if written so, else every change is the same one
                        other["hash"] = v1.header_hash(other)
                    file.write_text(json.dumps(other))
                    for reader in READERS:
                        try:
                            reader(folder)
                        except FormatError as error:
                            assert error.what and error.exit_code == 1
                        except Exception as error:
                            surprises.append(f"{reader.__name__} of {file.name} with {'.'.join(map(str, at))} = {value!r}: {type(error).__name__}: {error}")
            file.write_text(json.dumps(document))
    assert not surprises, "\n".join(surprises)
