"""A recipe that extracts with TransformerLens from a model by its hub id, run by the command line as a user would, offline from the hub's cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from saehub.testing.toys import tiny_model, tiny_text

RECIPE = """
saehub: 1
name: bridged
model: {{name: someone/tiny, device: cpu, attention: eager}}
data:
  train: {{source: {text}, tokens: 2_000, context: 32}}
  eval: {{in_sample: {{source: {text}, split: all, tokens: 400}}}}
extract: {{uses: transformer_lens/bridge, sites: [resid_post.1, attn_z.0], lm_batch: 8, block: 1024, calibration: 256, dtype: float32}}
train: [{{id: small, uses: native/topk, site: resid_post.1, with: {{k: 4, width: 64, batch: 100}}}}]
evaluate: [{{uses: native/core, with: {{baselines: false, loss_sequences: 4}}}}]
"""


def test_a_hub_id_through_the_bridge(tmp_path):
    snapshot = tmp_path / "hf/hub/models--someone--tiny/snapshots/abc123"
    tiny_model(snapshot, "gpt2")
    (tmp_path / "hf/hub/models--someone--tiny/refs").mkdir()
    (tmp_path / "hf/hub/models--someone--tiny/refs/main").write_text("abc123")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in tiny_text(80)))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(text=tmp_path / "text.jsonl"))
    env = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "SAEHUB_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    env.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-m", "saehub.cli.main", "recipe", "run", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run"), "--json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "run/results.json").read_text())["measurements"]
    assert {"fvu", "l0"} <= {row["metric"] for row in rows if row["status"] == "ok"}
    header = json.loads((tmp_path / "run/checkpoints/small/saehub.json").read_text())
    assert header["provenance"]["model"]["fingerprint"] == "hub:someone/tiny@abc123"
