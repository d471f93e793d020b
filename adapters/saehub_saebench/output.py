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


def provenance(sae: Any) -> dict[str, Any]:
    """The fields of every result that say of what and by what."""
    import time

    from sae_bench.sae_bench_utils import get_eval_uuid, get_sae_lens_version

    return {
        "eval_id": get_eval_uuid(),
        "datetime_epoch_millis": int(time.time() * 1000),
        "sae_bench_commit_hash": f"sae-bench {library_version()}",
        "sae_lens_id": "custom_sae",
        "sae_lens_release_id": "saehub",
        "sae_lens_version": get_sae_lens_version(),
        "sae_cfg_dict": sae.cfg.to_dict(),
    }
