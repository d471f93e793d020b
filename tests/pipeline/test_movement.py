"""How far training moved an SAE from its initial state: the arithmetic, the record in the checkpoint, and what is said where nothing moved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from saehub.checkpoint.format import read_header
from saehub.errors import Interrupted
from saehub.pipeline.movement import SAMPLE, moved, read, sketch, write
from saehub.pipeline.plan import make_plan
from saehub.pipeline.run import run
from saehub.plugins import catalog
from saehub.recipe import check_text
from saehub.report.verdicts import verdicts
from saehub.testing.toys import tiny_model, tiny_text

RECIPE = """
saehub: 1
name: movement
model: {{name: {folder}/model, device: cpu}}
data:
  train: {{source: {folder}/text.txt, tokens: 6_000, context: 32}}
  eval: {{in_sample: {{source: {folder}/text.txt, split: all, tokens: 1_500}}}}
extract: {{sites: [resid_post.0], lm_batch: 8, block: 1_024, calibration: 512, store: none}}
train:
  - {{id: learns, uses: native/topk, with: {{k: 4, width: 64, batch: 100}}}}
  - {{id: stays, uses: native/topk, with: {{k: 4, width: 64, batch: 100, lr: 1e-12}}}}
evaluate: [{{uses: native/core, with: {{loss: false}}}}, {{uses: native/health}}, {{uses: native/verdict}}]
early: {{at: []}}
"""


@pytest.mark.quick
def test_the_share_is_the_largest_relative_change_of_a_matrix():
    start = {"W": torch.randn(7, 5), "V": torch.ones(2, 3), "b": torch.randn(5), "moment": torch.zeros(7, 5), "count": torch.ones(3, 3, dtype=torch.int64)}
    now = {"W": start["W"] + 0.1 * torch.randn(7, 5), "V": torch.ones(2, 3), "b": start["b"] + 9, "moment": torch.ones(7, 5), "count": 5 * torch.ones(3, 3)}
    wanted = np.linalg.norm((now["W"] - start["W"]).numpy()) / np.linalg.norm(start["W"].numpy())
    assert moved(sketch(start), sketch(now)) == pytest.approx(wanted, rel=5e-3)  # three digits are kept
    assert moved(sketch(start), sketch(start)) == 0.0
    assert moved({}, sketch(now)) is None


@pytest.mark.quick
def test_a_large_matrix_is_sampled_and_the_sample_survives_the_disk(tmp_path):
    W = torch.randn(2048, 256, generator=torch.Generator().manual_seed(0))
    first = sketch({"W": W})
    assert SAMPLE / 2 < len(first["W"]) <= 2 * SAMPLE
    assert moved(first, sketch({"W": W * 1.03})) == pytest.approx(0.03)
    write(first, tmp_path / "states")
    assert torch.equal(read(tmp_path / "states")["W"], first["W"]) and not list((tmp_path / "states").glob(".*"))
    assert read(tmp_path / "nothing") == {}


def planned(folder: Path, base: Path):
    recipe, problems = check_text(RECIPE.format(folder=folder), "movement.yaml")
    assert recipe is not None, "\n".join(map(str, problems))
    return make_plan(recipe, catalog(), base=base)


def recorded(result) -> dict[str, float]:
    return {name: read_header(path)["provenance"]["trainer"]["moved"] for name, path in result.checkpoints.items()}


def test_an_sae_that_did_not_move_is_called_so_whatever_it_reconstructs(tmp_path):
    torch.set_num_threads(1)
    (tmp_path / "text.txt").write_text("\n\n".join(tiny_text(260, words=60)))
    tiny_model(tmp_path / "model")
    events: list = []
    result = run(planned(tmp_path, tmp_path / "home"), [events.append])
    shares = recorded(result)
    assert shares["stays"] < 1e-5 and shares["learns"] > 0.05
    said = {verdict.sae: verdict for verdict in verdicts(result.measurements)}
    assert said["stays"].word == "collapsed" and "untrained" in said["stays"].reasons[0] and said["learns"].word != "collapsed"
    assert [event.stage for event in events if event.kind == "warning" and "still its initial state" in event.data["text"]] == ["train/stays"]
    # Interrupted on the way, the record is that of the whole training.
    def stop(event) -> None:
        if event.kind == "progress" and event.stage == "train/learns" and event.data["done"] > 5:
            import signal

            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        run(planned(tmp_path, tmp_path / "other"), [stop])
    assert recorded(run(planned(tmp_path, tmp_path / "other"))) == shares
