"""SAEBench's result objects and folders in; plain JSON data, validated by its own classes, out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from saehub.errors import StageFailed
from saehub_saebench.rows import library_version


def plain(result: Any) -> dict[str, Any]:
    """A result object as SAEBench would write it; the commit hash names the library instead of whatever repository the folder lies in."""
    from pydantic import TypeAdapter

    return stamped(json.loads(TypeAdapter(type(result)).dump_json(result)))


def read(folder: Path, returned: Any) -> dict[str, Any]:
    """The one result file that SAEBench left in `folder`; StageFailed where it left none, which it often does without a word."""
    files = sorted(folder.rglob("*_eval_results.json"))
    if len(files) != 1:
        raise StageFailed(
            f"SAEBench left {len(files)} result files", why="it ends so when it gives up on an SAE", said=str(returned)[:2000] or None
        )
    return stamped(json.loads(files[0].read_text(encoding="utf-8")))


def stamped(data: dict[str, Any]) -> dict[str, Any]:
    """With the version of SAEBench where it writes the hash of the repository around the working folder."""
    return {**data, "sae_bench_commit_hash": f"sae-bench {library_version()}"}
