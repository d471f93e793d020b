"""A trained SAE's provenance and some rows in; the SAE that its trainer began with out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saehub.api import CalibrationRows, Job, Subject
from saehub.errors import SaehubError, StageFailed

if TYPE_CHECKING:
    from torch import Tensor

    from saehub.checkpoint.sae import SAE


def before_training(subject: Subject, x_ND: Tensor, y_ND: Tensor | None) -> SAE:
    """What the recorded trainer, settings, seed and job give after no step, with `x_ND` (and targets `y_ND`) as calibration rows.

    Raises:
        SaehubError: the checkpoint does not name its trainer, or that trainer cannot say what it began with.
    """
    from saehub.pipeline.components import Components
    from saehub.plugins import catalog

    known = subject.sae.provenance
    made = known.get("trainer") or {}
    if not made.get("component") or made.get("job") is None:
        raise StageFailed("the checkpoint does not say how its training began", fix="SAEs that saehub trained")
    config, scale = subject.sae.config, float(made.get("scale") or 1.0)
    settings = dict(made.get("config") or {})
    batch, rows = int(settings.get("batch") or 1), int((known.get("data") or {}).get("tokens_trained") or 0)
    job = Job(
        made["job"], subject.site, subject.target_site, config.d_in, config.d_out, max(1, rows // batch), batch, max(rows, batch), int(made.get("seed") or 0), len(x_ND)
    )  # fmt: skip
    calibration = CalibrationRows(x_ND.float().cpu() * scale, None if y_ND is None else y_ND.float().cpu() * scale)
    try:
        with Components() as components:
            return components.make(catalog().find("trainer", made["component"]), settings).open(job, calibration).finish()
    except SaehubError:
        raise
    except Exception as error:
        raise StageFailed(f"{made['component']} did not say what it began with", why=f"{type(error).__name__}: {error}") from error
