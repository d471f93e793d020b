"""A trainer's settings and session in; the sentences that their user should know out: each once a run, with the jobs it is about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from saehub.api import Job


OWN_LOOP = (
    "it runs the model in a loop of its own: it shares no stream with other jobs, extract.normalize does not apply, and a stopped run goes on from "
    "its last state without the promise to end bit-identical"
)


def cautions_of(config: Any, job: Job) -> tuple[str, ...]:
    """What a trainer's config says about a job before it starts (`config.cautions`, `config.inexact_resume`; both optional)."""
    found = list(config.cautions(job)) if hasattr(config, "cautions") else []
    inexact = inexact_resume(config, job)
    return tuple([*found, f"a resumed run is not bit-identical: {inexact}"] if inexact else found)


def inexact_resume(config: Any, job: Job) -> str | None:
    """What a resumed run promises instead of bit-identity; None: bit-identity."""
    return config.inexact_resume(job) if hasattr(config, "inexact_resume") else None


def grouped(cautions: Mapping[str, Iterable[str]]) -> list[str]:
    """Job id -> sentences, as one line a sentence: `a, b: the sentence`."""
    about: dict[str, list[str]] = {}
    for job_id, sentences in cautions.items():
        for sentence in dict.fromkeys(sentences):
            about.setdefault(sentence, []).append(job_id)
    return [f"{', '.join(ids)}: {sentence}" for sentence, ids in about.items()]
