"""`init_from` under the hub's normalisation: a start that is hardly moved gives the checkpoint back, in the model's units."""

from __future__ import annotations

import torch

from saehub.checkpoint.load import load
from saehub.pipeline.plan import make_plan
from saehub.pipeline.run import run
from saehub.plugins import catalog
from saehub.recipe import check_text
from saehub.testing.toys import tiny_model, tiny_text

RECIPE = """
saehub: 1
name: warm
model: {{name: {folder}/model, device: cpu}}
data: {{train: {{source: {folder}/text.txt, tokens: 1_000, context: 32}}}}
extract: {{sites: [resid_post.0, mlp_out.1], lm_batch: 8, block: 512, calibration: 256, normalize: sqrt_d}}
train:
  - {{id: same, uses: native/topk, site: resid_post.0{same}, with: {{k: 4, width: 64, batch: 100, lr: {lr}}}}}
  - {{id: across, uses: native/topk, site: resid_post.0, target_site: mlp_out.1{across}, with: {{k: 4, width: 64, batch: 100, lr: {lr}}}}}
"""


def test_a_start_is_brought_into_the_units_of_the_rows(tmp_path):
    torch.set_num_threads(1)
    (tmp_path / "text.txt").write_text("\n\n".join(tiny_text(60)))
    tiny_model(tmp_path / "model")

    def trained(lr: float, **start: str) -> dict:
        starts = {name: f", init_from: {start[name]}" if name in start else "" for name in ("same", "across")}
        recipe, problems = check_text(RECIPE.format(folder=tmp_path, lr=lr, **starts), "warm.yaml")
        assert not [problem for problem in problems if problem.severity == "error"]
        done = run(make_plan(recipe, catalog(), base=tmp_path / "home"))
        return {name: done.checkpoints[name] for name in ("same", "across")}

    first = trained(3e-3)
    again = trained(1e-12, **{name: str(path) for name, path in first.items()})
    for name in first:
        was, now = load(first[name]), load(again[name])
        assert was.provenance["trainer"]["scale"] != 1
        for tensor, value in was.tensors().items():
            torch.testing.assert_close(now.tensors()[tensor], value, rtol=1e-5, atol=1e-6)
