"""Two processes run the same recipe at the same time: one works, the other waits and finds everything done."""

import os
import subprocess
import sys

from saehub.testing.toys import tiny_model, tiny_text

RECIPE = """saehub: 1
name: {name}
model: {{name: {folder}/model, device: cpu}}
data:
  train: {{source: {folder}/text.txt, split: all, tokens: 6_000, context: 32, repeat: true}}
extract: {{sites: [resid_post.0], lm_batch: 8, block: 1_024, calibration: 512, store: none}}
train:
  - {{id: a, uses: native/topk, with: {{k: 4, width: 64, batch: 128}}}}
"""


def test_two_at_once(tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(tiny_text(200, words=60)))
    tiny_model(tmp_path / "model")
    environment = {**os.environ, "SAEHUB_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    names = ["same", "same", "other"]  # the third recipe has another run folder and shares every stage
    processes = []
    for index, name in enumerate(names):
        path = tmp_path / f"{index}.yaml"
        path.write_text(RECIPE.format(name=name, folder=tmp_path))
        command = [sys.executable, "-m", "saehub.cli.main", "recipe", "run", str(path)]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    told = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], "\n".join(told)
    logs = list((tmp_path / "home" / "runs").glob("*/events.jsonl"))
    finished = sum(log.read_text().count('"kind":"stage_finished","stage":"train/a"') for log in logs)
    assert len(logs) == 2 and finished == 1, "the SAE must be trained once"
    leftovers = [path for path in (tmp_path / "home" / "store").rglob(".*")]
    assert not leftovers, leftovers
