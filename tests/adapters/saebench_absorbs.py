"""A folder in; what `saebench/absorption` says of two SAEs of a model that can spell, as JSON, out. Run as a script: in a process of its own."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

spec = spec_from_file_location("saebench_toys", Path(__file__).with_name("saebench_toys.py"))
toys = module_from_spec(spec)
spec.loader.exec_module(toys)
SITE = "resid_post.0"


def measured(folder: Path) -> list[list]:
    """[metric, SAE, value] of each row. The value of the second SAE's fraction moves with the draw of words, not only with an SAE."""
    from saehub_saebench.absorption import Absorption
    from saehub_saebench.config import AbsorptionConfig

    from saehub.checkpoint.format import save
    from saehub.pipeline.evaluation import open_context
    from saehub.testing.saes import fit_to

    stage, settings = toys.prepared("absorption", folder)
    x_ND = stage.reference(SITE, stage.tokens().tokens(0, 28)).float()
    paths = {f"sae-{seed}": save(fit_to(x_ND, seed=seed), folder / "saes" / str(seed), site=SITE) for seed in range(2)}
    given = {
        "subjects": [{"id": name, "path": str(path), "site": SITE, "target_site": None} for name, path in paths.items()],
        "model": asdict(stage.spec), "datasets": {}, "extractor": {"address": "native/hf", "config": {}}, "seed": 0, "device": "cpu",
        "work_dir": str(folder / "work"), "lm_batch": 4,
    }  # fmt: skip
    rows = Absorption(AbsorptionConfig(**settings)).evaluate(open_context(given, model=stage.model))
    return [[row.metric, row.subjects[0], row.value] for row in rows]


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    found = measured(Path(sys.argv[1]))
    (Path(sys.argv[1]) / "measured.json").write_text(json.dumps(found))
