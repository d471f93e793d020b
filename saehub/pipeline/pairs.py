"""Planned SAEs and an evaluator's settings in; which pairs it refuses and why, out: asked before work, torch-free."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saehub.api import PlannedSAE
from saehub.errors import SaehubError

if TYPE_CHECKING:
    from saehub.pipeline.plan import Stage

NOT_ROW_WISE = "its features depend on the rows before (row_wise: false), and the evaluator is given rows alone"


def planned(stage: Stage) -> PlannedSAE:
    """What the plan knows of the SAE that a `train` or `load` stage will give; of one to load, what its header says, if it is here."""
    name = stage.id.partition("/")[2]
    if stage.kind == "train":
        job, config = stage.spec["job"], stage.spec["config"]
        kind = "autoencoder" if job.target_site is None else "skip_transcoder" if getattr(config, "skip", False) else "transcoder"
        word = config.architecture() if hasattr(config, "architecture") else None
        return PlannedSAE(name, word, kind, job.site, job.target_site, job.d_in, job.d_out)
    header = _header(stage)
    provenance = header.get("provenance") or {}
    site = stage.spec["site"] or provenance.get("site")
    known = {key: header.get(key) for key in ("architecture", "kind", "d_in", "d_out")}
    return PlannedSAE(name, site=site, target_site=provenance.get("target_site"), row_wise=header.get("row_wise", True), **known)


def _header(stage: Stage) -> dict[str, Any]:
    """saehub.json of a finished load, or of the folder that will be loaded; empty for another library's folder and one on the hub."""
    from saehub.jsonio import read_json

    places = [stage.where / "checkpoint", *([] if str(stage.spec["load"]).startswith("hf://") else [Path(stage.spec["load"])])]
    for place in places:
        try:
            found = read_json(place / "saehub.json")
            return found if isinstance(found, dict) else {}
        except (OSError, ValueError, SaehubError):
            continue
    return {}


def refusals(address: str, needs: Iterable[str], config: Any, stages: Iterable[Stage]) -> list[str]:
    """One line for each reason with the SAEs that it is about: `evaluator will not measure a, b: reason`."""
    about: dict[str, list[str]] = {}
    for stage in stages:
        sae = planned(stage)
        reason = config.refusal(sae) if hasattr(config, "refusal") else None
        if reason is None and not sae.row_wise and "activations" in set(needs):
            reason = NOT_ROW_WISE
        if reason:
            about.setdefault(reason, []).append(sae.id)
    return [f"{address} will not measure {', '.join(ids)}: {reason}" for reason, ids in about.items()]
