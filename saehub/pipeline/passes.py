"""Trainings and the memory at hand in; the passes over the stream that they are split into out: one where all jobs fit together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saehub.pipeline import estimate

if TYPE_CHECKING:
    from saehub.pipeline.plan import Plan, Stage

SHARE = 0.8
"""Of the free memory: the rest is left to other programs."""
GPU_SIGNS = ("/dev/nvidiactl", "/dev/kfd")


def split(stages: Sequence[Stage], budget: int | None) -> list[list[Stage]]:
    """The stages in their order, cut wherever the next one would exceed `budget` bytes (None: not known, one pass).

    Jobs of one pass share one extraction. Which jobs share a pass changes no result: each is a function of the stream and its own id.
    """
    passes: list[list[Stage]] = [[]]
    used = 0
    for stage in stages:
        need = stage.detail["memory"]
        if budget is not None and passes[-1] and used + need > budget:
            passes.append([])
            used = 0
        passes[-1].append(stage)
        used += need
    return [part for part in passes if part]


def budget(device: str, totals: dict[str, Any], *, planning: bool = False) -> int | None:
    """Bytes for the trainers of one pass on `device`: the free memory but for a fifth, the model and the blocks; at least 0.

    None while planning for a device whose memory only torch can ask for (a plan does not load torch).
    """
    if planning and (device not in ("cpu", "auto") or (device == "auto" and any(Path(sign).exists() for sign in GPU_SIGNS))):
        return None
    free = estimate.host_memory() if planning else estimate.available_memory(device)
    return max(0, int(SHARE * free) - totals.get("model_memory", 0) - totals.get("block_memory", 0))


def of_plan(plan: Plan, stages: Sequence[Stage]) -> list[list[Stage]]:
    """The passes of a run that begins now."""
    return split(stages, budget(plan.model.device if plan.model else "auto", plan.totals))


def totals(stages: Sequence[Stage], device: str, known: dict[str, Any]) -> dict[str, Any]:
    """What a plan says: `passes` (ids of the trainings still to do, pass by pass), the `train_memory` of the largest, and `train_budget`."""
    free = budget(device, known, planning=True)
    left = [stage for stage in stages if not stage.cached]
    parts = split([stage for stage in left if not stage.spec.get("own_loop")], free)
    alone = [[stage] for stage in left if stage.spec.get("own_loop")]  # one after another, without the stream
    largest = max((sum(stage.detail["memory"] for stage in part) for part in [*parts, *alone]), default=0)
    return {"passes": [[stage.id for stage in part] for part in parts], "train_memory": largest, "train_budget": free}


def warnings(stages: Sequence[Stage], found: dict[str, Any]) -> list[str]:
    """What does not fit, and what that means."""
    free = found["train_budget"]
    if free is None:
        return []
    large = [stage for stage in stages if not stage.cached and stage.detail["memory"] > free]
    said = [
        f"{stage.id} needs about {estimate.human(stage.detail['memory'])} of memory and about {estimate.human(free)} is free for training: "
        "it may not fit (a smaller width or batch needs less)"
        for stage in large
    ]
    if len(found["passes"]) > 1:
        said.append(
            f"the trainings do not fit into memory together: {len(found['passes'])} passes, and the activations are extracted for each "
            "(extract.store: disk keeps them instead)"
        )
    return said
