"""A recipe that extracts with TransformerLens from a model by its hub id, run by the command line as a user would, offline from the hub's cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from saehub.testing.toys import tiny_model, tiny_text

RECIPE = """
saehub: 1
name: bridged
model: {{name: someone/tiny, device: cpu, attention: eager}}
data:
  train: {{source: {text}, tokens: 2_000, context: 32}}
  eval: {{in_sample: {{source: {text}, tokens: 400}}}}
extract: {{uses: {extractor}, sites: [{sites}], lm_batch: 8, block: 1024, calibration: 256, dtype: float32}}
train: [{{id: small, uses: native/topk, site: resid_post.1, with: {{k: 4, width: 64, batch: 100}}}}]
evaluate: [{{uses: native/core, with: {{baselines: false, loss_sequences: 4}}}}]
"""


def saehub(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "SAEHUB_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    env.pop("HF_HUB_CACHE", None)
    return subprocess.run([sys.executable, "-m", "saehub.cli.main", *arguments], env=env, capture_output=True, text=True, check=False)


def recipe(folder: Path, extractor: str, sites: str = "resid_post.1, attn_z.0") -> str:
    path = folder / f"{extractor.replace('/', '-')}.yaml"
    path.write_text(RECIPE.format(text=folder / "text.txt", extractor=extractor, sites=sites))
    return str(path)


def test_a_hub_id_through_the_bridge(tmp_path):
    snapshot = tmp_path / "hf/hub/models--someone--tiny/snapshots/abc123"
    tiny_model(snapshot, "gpt2")
    (tmp_path / "hf/hub/models--someone--tiny/refs").mkdir()
    (tmp_path / "hf/hub/models--someone--tiny/refs/main").write_text("abc123")
    (tmp_path / "text.txt").write_text("\n\n".join(tiny_text(80)))

    refused = saehub(tmp_path, "recipe", "plan", recipe(tmp_path, "transformer_lens/bridge", "resid_post.1, 'transformer.h.0.ln_1:out'"))
    assert refused.returncode == 2 and "TransformerLens has no hook for transformer.h.0.ln_1:out" in refused.stderr, refused.stderr

    values = {}
    for extractor in ("transformer_lens/bridge", "native/hf"):
        done = saehub(tmp_path, "recipe", "run", recipe(tmp_path, extractor), "--out", str(tmp_path / extractor), "--json")
        assert done.returncode == 0, done.stderr
        rows = json.loads((tmp_path / extractor / "results.json").read_text())["measurements"]
        values[extractor] = {row["metric"]: row["value"] for row in rows if row["dataset"] == "in_sample" and row["status"] == "ok"}
    bridge, native = values.values()
    assert bridge.keys() == native.keys() and {"fvu", "l0"} <= bridge.keys()
    assert abs(bridge["fvu"] - native["fvu"]) < 1e-3 * native["fvu"]  # the same rows but for the last bits, so the same SAE but for few steps
    card = json.loads((tmp_path / "transformer_lens/bridge/run_card.json").read_text())
    assert "transformer" in json.dumps(card)
