"""The same batches to every native architecture and to the peers that have it; a table of FVU at equal rows and L0, dead latents and CPU time out.

    python tests/benchmarks/architectures_quality.py --out FILE         # both data sets: results/architectures_quality.txt
    python tests/benchmarks/architectures_quality.py --data gpt2 --only batchtopk

Systems share: the rows and their order, batch, steps, width, the target L0, and rows that are normalised to a mean square of 1 per dimension.
Peers are the libraries' own training code, each library in a process of its own: at their own defaults, and at the best settings of a search
(architectures_peers.py) over the learning rate and, where L0 is the outcome of a coefficient, over that. Warm-ups, which by default are
longer than the whole run, are 5 % of it for all. FVU is computed here for every system alike, from the finished SAE in float64, on rows that
none has seen: Σ|x̂−x|² / Σ|x−x̄|². A latent is dead when none of those rows makes it fire. Where L0 is an outcome, ours is trained to the L0
that the best peer reached, within 2 %. Beside our defaults stand half and twice their learning rate, which take no part in the comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
import numpy as np
import torch
from architectures_peers import Family, families, score
from topk_quality import CALIBRATION, Rows, prepare

HELDOUT, K = 16_384, 32
NATIVE = ("topk", "batchtopk", "matryoshka_batchtopk", "abstopk", "groupmax", "jumprelu", "relu", "gated")
PENALISED = ("jumprelu", "relu", "gated")


# ---------------------------------------------------------------------------------------------------------------- data
def gpt2_rows(rows: int, cache: Path) -> Rows:
    """Rows after the first block of a small GPT-2 with drawn weights (d = 96) on the bytes of the built-in text: another family, another width."""
    from saehub.builtin.text import documents
    from saehub.testing.toys import tiny_model
    from transformers import AutoModelForCausalLM

    folder = cache / f"gpt2-{rows}"
    if not (folder / "train.npy").exists():
        folder.mkdir(parents=True, exist_ok=True)
        model = AutoModelForCausalLM.from_pretrained(tiny_model(folder / "model", "gpt2", d_model=96)).eval()
        kept: list[torch.Tensor] = []
        model.transformer.h[0].register_forward_hook(lambda module, inputs, output: kept.append(output[0] if isinstance(output, tuple) else output))
        parts = {}
        for split, wanted in (("train", rows + CALIBRATION), ("heldout", HELDOUT)):
            data = b"\n".join(document.text.encode() for document in documents("python-docs", split))[: wanted * 64 // 63 + 64 * 64]
            ids = torch.tensor(list(data)[: len(data) // 64 * 64]).view(-1, 64)
            found = []
            with torch.inference_mode():
                for batch in ids.split(256):
                    kept.clear()
                    model.transformer(batch)
                    found.append(kept[0][:, 1:].reshape(-1, kept[0].shape[-1]))
            parts[split] = torch.cat(found)[:wanted]
        parts["train"] = parts["train"][torch.randperm(len(parts["train"]), generator=torch.Generator().manual_seed(0))]
        parts |= {"calibration": parts["train"][:CALIBRATION], "train": parts["train"][CALIBRATION:]}
        scale = float(parts["calibration"].square().mean().sqrt())
        for part, tensor in parts.items():
            np.save(folder / f"{part}.npy", (tensor / scale).numpy())
    return Rows(folder)


# ------------------------------------------------------------------------------------------------------------- systems
def make_job(rows: Rows, batch: int, seed: int = 0):
    """The job that every system gets."""
    from saehub.api import Job

    n, d = rows.train.shape
    return Job("quality", "resid_post.2", None, d, d, n // batch, batch, n, seed, calibration=8192)


class DictionaryLearning:
    """A trainer of dictionary_learning through its own `update`, on rows as its own loop normalises them; judged like a saehub SAE."""

    CLASSES = {
        "topk": "top_k:TopKTrainer",
        "batchtopk": "batch_top_k:BatchTopKTrainer",
        "matryoshka_batchtopk": "matryoshka_batch_top_k:MatryoshkaBatchTopKTrainer",
        "jumprelu": "jumprelu:JumpReluTrainer",
        "standard_april": "standard:StandardTrainerAprilUpdate",
        "gated": "gdm:GatedSAETrainer",
    }

    def __init__(self, word: str, job, with_: dict, calibration_ND: torch.Tensor):
        module, _, name = self.CLASSES[word].partition(":")
        make = getattr(import_module(f"dictionary_learning.trainers.{module}"), name)
        settings = {key: value for key, value in with_.items() if key not in ("batch", "width")}
        self.norm = float(calibration_ND.square().sum(1).mean().sqrt())
        self.trainer = make(
            steps=job.steps, activation_dim=job.d_in, dict_size=with_["width"], layer=0, lm_name="none", device="cpu", seed=0, **settings
        )
        self.config, self.steps_done = SimpleNamespace(d_sae=with_["width"]), 0

    def step(self, x_BD: torch.Tensor) -> None:
        """One update."""
        with torch.enable_grad():
            self.trainer.update(self.steps_done, x_BD / self.norm)
        self.steps_done += 1

    def finish(self) -> DictionaryLearning:
        """In float64, for `judge`."""
        self.ae = self.trainer.ae.double().eval()
        return self

    def encode(self, x_ND: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Features."""
        return self.ae.encode(x_ND.to(dtype) / self.norm)

    def decode(self, acts_NF: torch.Tensor, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The reconstruction in the units of the rows."""
        return self.ae.decode(acts_NF) * self.norm


def child() -> None:
    """The child process: for each order on stdin, train the component of one library on the rows, judge its SAE, print one line of JSON."""
    from saehub.pipeline.local import configured
    from saehub.plugins import catalog
    from saehub.recipe.check import make_config

    for line in sys.stdin:
        order = json.loads(line)
        torch.set_num_threads(order["threads"])
        rows = Rows(Path(order["folder"]))
        job = make_job(rows, order["with"]["batch"])
        plugin, _, word = order["component"].partition("/")
        if plugin == "dictionary_learning":
            session = DictionaryLearning(word, job, order["with"], rows.calibration)
        else:
            registered = catalog().find("trainer", order["component"])
            os.environ.update(dict(registered.component.env))
            config = configured(registered, make_config(registered, order["with"]))
            problems = list(config.check(job))
            assert not problems, (order["component"], problems)
            session = registered.load()(config).open(job, lambda n, rows=rows: (rows.calibration[:n].clone(), None))
        cpu = time.process_time()
        for step in range(job.steps):
            session.step(rows.train[step * job.batch : (step + 1) * job.batch].clone())
        spent = (time.process_time() - cpu) / job.steps
        print("RESULT " + json.dumps({"cpu_ms_step": 1e3 * spent, **judge(session.finish(), rows.heldout[:HELDOUT])}), flush=True)


@torch.no_grad()
def judge(sae, x_ND: torch.Tensor) -> dict:
    """FVU, L0 and the share of latents that never fire, in float64, the same code for every system."""
    mean, error, spread, active = x_ND.double().mean(0), 0.0, 0.0, 0
    fired = torch.zeros(sae.config.d_sae, dtype=torch.bool)
    for x in x_ND.split(2048):
        acts = sae.encode(x, dtype=torch.float64)
        error += float((sae.decode(acts, like=x, dtype=torch.float64) - x.double()).square().sum())
        spread += float((x.double() - mean).square().sum())
        active += int((acts != 0).sum())
        fired |= (acts != 0).any(0)
    return {"fvu": error / spread, "l0": active / len(x_ND), "dead": 1 - float(fired.double().mean())}


class Workers:
    """A child process for each library."""

    def __init__(self) -> None:
        self.processes: dict[str, subprocess.Popen] = {}

    def run(self, order: dict) -> dict:
        """What comes of one training."""
        plugin = order["component"].partition("/")[0]
        if plugin not in self.processes:
            command = [sys.executable, __file__, "--child"]
            self.processes[plugin] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        process = self.processes[plugin]
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        for line in process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        raise RuntimeError(f"{order['component']} {order['label']} failed")

    def close(self) -> None:
        """End them."""
        for process in self.processes.values():
            process.stdin.close()
            process.wait()


HEAD = f"{'architecture':<21} {'system':<37} {'settings':<36} {'L0':>7} {'FVU':>8} {'/ native':>8} {'dead':>7} {'cpu ms/step':>11}"


def row(run: dict, ours: dict | None = None) -> str:
    """One line of the table; `/ native`: FVU at the target L0 (`score`) relative to native's at its defaults."""
    ratio = f"{run['score'] / ours['score']:>8.3f}" if ours else " " * 8
    return (
        f"{run['architecture']:<21} {run['component']:<37} {run['label']:<36} {run['l0']:>7.2f} {run['fvu']:>8.4f} {ratio} "
        f"{run['dead']:>7.2%} {run['cpu_ms_step']:>11.1f}"
    )


def summary(architecture: str, ours: dict, best: dict) -> str:
    """One line: native against the best peer."""
    return (
        f"{architecture:<21} {ours['fvu'] / best['fvu']:>7.3f}  {ours['fvu']:>7.4f} {ours['l0']:>6.2f} {ours['dead']:>7.2%}   "
        f"{best['fvu']:>7.4f} {best['l0']:>6.2f} {best['dead']:>7.2%}   {best['component']} ({best['label']})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["tiny-llama", "gpt2"], choices=["tiny-llama", "gpt2"])
    parser.add_argument("--rows", type=int, default=256_000)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--expansion", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=list(NATIVE), help="architectures")
    parser.add_argument("--train", default="all", choices=["all", "native", "peers", "nothing"], help="take all others from --out")
    parser.add_argument("--renew", action="store_true", help="train ours again even where --out holds them")
    parser.add_argument("--out", type=Path, help="JSON lines of every run, added to after each; runs that it holds are not repeated")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "saehub-quality")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child()
    bench = Bench(arguments)
    for name in arguments.data:
        print("\n" + bench.table(name), flush=True)
    bench.workers.close()


class Unknown(Exception):
    """A run is asked for that may not be trained now."""


class Bench:
    """Runs what is asked for and not known yet, and keeps it."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.workers, self.renewed = arguments, Workers(), set()
        self.known: dict[str, dict] = {}
        if arguments.out and arguments.out.exists():
            for line in arguments.out.read_text().splitlines():
                run = json.loads(line)
                self.known[self.key(run)] = run

    @staticmethod
    def key(run: dict) -> str:
        """What makes two runs the same."""
        return json.dumps([run["data"], run["rows"], run["component"], run["with"]], sort_keys=True)

    def do(self, run: dict, folder: Path) -> dict:
        """Train it, unless it is known."""
        key, ours = self.key(run), run["component"].startswith("native/")
        stale = ours and self.arguments.renew and key not in self.renewed
        if key in self.known and not stale:
            return self.known[key] | run
        if self.arguments.train not in ("all", "native" if ours else "peers"):
            raise Unknown(key)
        outcome = self.workers.run({**run, "folder": str(folder), "threads": self.arguments.threads})
        self.renewed.add(key)
        self.known[key] = run | outcome
        print(f"{run['data']} {run['component']} {run['label']}: {outcome}", file=sys.stderr, flush=True)
        if self.arguments.out:
            with self.arguments.out.open("a") as stream:
                stream.write(json.dumps(self.known[key]) + "\n")
        return self.known[key]

    def theirs(self, family: Family, start: dict, folder: Path) -> list[dict]:
        """The runs of a search."""
        search, found, outcome = family.search(K), [], None
        try:
            while True:
                label, with_ = search.send(outcome)
                outcome = self.do({**start, "component": family.component, "label": label, "with": with_}, folder)
                found.append(outcome)
        except (StopIteration, Unknown):
            return found

    def ours(self, architecture: str, target: float, start: dict, fixed: dict, folder: Path, **extra) -> dict:
        """A native run at its defaults but for `extra`; where L0 is an outcome, within 2 % of the target, by a second run if the first is not."""
        goal = {"target_l0": round(target, 2)} if architecture in PENALISED else {"k": K}
        label = "".join(f", {name} {value:.3g}" for name, value in extra.items())
        run = {**start, "component": f"native/{architecture}", "label": f"defaults{label}", "with": {**fixed, **goal, **extra}}
        outcome = self.do(run, folder)
        if architecture in PENALISED and abs(outcome["l0"] / target - 1) > 0.02:
            again = {**run, "with": {**run["with"], "target_l0": round(target * target / outcome["l0"], 2)}}
            outcome = min(outcome, self.do(again, folder), key=lambda run: abs(run["l0"] / target - 1))
        return outcome

    def table(self, name: str) -> str:
        """Everything about one data set."""
        arguments = self.arguments
        rows = (gpt2_rows if name == "gpt2" else partial(prepare, name))(arguments.rows, arguments.cache)
        d, steps = rows.train.shape[1], arguments.rows // arguments.batch
        fixed = {"batch": arguments.batch, "width": arguments.expansion * d}
        lines, sums = [HEAD], []
        for architecture in arguments.only:
            start = {"data": name, "rows": arguments.rows, "architecture": architecture}
            peers = [run for family in families(steps, fixed, K)[architecture] for run in self.theirs(family, start, rows.folder)]
            peers = [run | {"score": score(run, K)} for run in peers]
            near = [run for run in peers if 0.8 < run["l0"] / K < 1.25]
            best = min(near, key=lambda run: run["score"], default=None)
            target, ours, beside = best["l0"] if best else K, None, []
            try:
                ours = self.ours(architecture, target, start, fixed, rows.folder)
                lr = lr_of(architecture, ours["with"], rows, arguments.batch)
                beside += [self.ours(architecture, target, start, fixed, rows.folder, lr=lr * factor) for factor in (0.5, 2.0)]
            except Unknown:
                pass
            mine = [run | {"score": score(run, K)} for run in ([ours] if ours else []) + beside]
            lines += [row(run, mine[0] if mine else None) for run in mine + peers]
            if ours and best:
                sums.append(summary(architecture, ours, best))
        title = f"{name}: {arguments.rows:,} rows, batch {arguments.batch}, {steps} steps, d {d}, {fixed['width']} latents, L0 {K}"
        head = f"{'architecture':<21} {'ratio':>7}  {'native':>7} {'L0':>6} {'dead':>7}   {'peer':>7} {'L0':>6} {'dead':>7}   best peer"
        return "\n".join([title, "", "FVU of native at its defaults, over that of the best peer at its best settings", head, *sums, "", *lines])


def lr_of(architecture: str, with_: dict, rows: Rows, batch: int) -> float:
    """What the rule for the learning rate gives."""
    from saehub.plugins import catalog
    from saehub.recipe.check import make_config

    return make_config(catalog().find("trainer", f"native/{architecture}"), with_).peak_lr(make_job(rows, batch))


if __name__ == "__main__":
    main()
