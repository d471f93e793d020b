"""The same batches to every native architecture and to the peers that have it; a table of FVU at equal rows and L0, dead latents and CPU time out.

    python tests/benchmarks/architectures_quality.py --threads 1         # both data sets, the table of results/architectures_quality.txt
    python tests/benchmarks/architectures_quality.py --data gpt2 --only batchtopk

Systems share: the rows and their order, batch, steps, width, the target L0, and rows that are normalised to a mean square of 1 per dimension.
Peers are the libraries' own training code, each library in a process of its own: at their own defaults, and at the best
learning rate of a small sweep with a decay over the last fifth and a dead-latent window that the run can reach. Warm-ups, which by default are
longer than the whole run, are 5 % of it for all. FVU is computed here for every system alike, from the finished SAE in float64, on rows that
none has seen: Σ|x̂−x|² / Σ|x−x̄|². A latent is dead when none of those rows makes it fire. Peers whose L0 is the outcome of a coefficient are tried
at several; ours is trained to the L0 that the best of them reached, so that the two are compared at equal L0.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
import numpy as np
import torch
from topk_quality import CALIBRATION, Rows, prepare

RESULTS = Path(__file__).parent / "results"
HELDOUT, K = 16_384, 32
NATIVE = ("topk", "batchtopk", "matryoshka_batchtopk", "abstopk", "groupmax", "jumprelu", "relu", "gated")


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


def children(orders: list[dict]) -> None:
    """The child process: train the components of one library on the rows, judge their SAEs, print one line of JSON each."""
    from saehub.pipeline.local import configured
    from saehub.plugins import catalog
    from saehub.recipe.check import make_config

    torch.set_num_threads(orders[0]["threads"])
    for order in orders:
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


def run_apart(orders: list[dict]) -> Iterator[dict]:
    """The outcomes of orders for one library, trained one after another in a process of their own."""
    with subprocess.Popen([sys.executable, __file__, "--children", json.dumps(orders)], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("RESULT "):
                yield json.loads(line.removeprefix("RESULT "))
    if process.returncode:
        raise RuntimeError(f"{orders[0]['component']} and others failed")


# ---------------------------------------------------------------------------------------------------------------- peers
def saelens(word: str, steps: int, extra: dict, lrs=(1e-3, 4e-3, 1.2e-2)) -> list[tuple[str, str, dict]]:
    """SAELens at its default learning rate (3e-4), and at others with a decay and a window that the run can reach."""
    base = {"lr_warm_up_steps": steps // 20, **extra}
    tuned = {"lr_decay_steps": steps // 5, "dead_feature_window": max(8, steps // 32)}
    l1 = f", l1 {extra['l1_coefficient']:g}" if "l1_coefficient" in extra else ""
    return [(f"saelens/{word}", f"defaults{l1}", base)] + [
        (f"saelens/{word}", f"lr {lr:g}, decay{l1}", {**base, **tuned, "lr": lr}) for lr in lrs
    ]


def dictionary_learning(word: str, steps: int, extra: dict, lrs=(4e-3, 1.2e-2)) -> list[tuple[str, str, dict]]:
    """dictionary_learning at its default learning rate, and at others with a decay."""
    base = {"warmup_steps": steps // 20, **extra}
    name, l1 = f"dictionary_learning/{word}", f", l1 {extra['l1_penalty']:g}" if "l1_penalty" in extra else ""
    return [(name, f"defaults{l1}", base)] + [(name, f"lr {lr:g}, decay{l1}", {**base, "lr": lr, "decay_start": steps * 4 // 5}) for lr in lrs]


def sparsify(word: str, steps: int, extra: dict, lrs=(2e-3, 8e-3, 1.6e-2)) -> list[tuple[str, str, dict]]:
    """Sparsify at its defaults (signum), and with Adam."""
    name = f"sparsify/{word}"
    adam = {"optimizer": "adam", "warmup": steps // 20}
    return [(name, "defaults", extra)] + [(name, f"Adam, lr {lr:g}", {**extra, **adam, "lr": lr}) for lr in lrs]


def peers(steps: int, fixed: dict) -> dict[str, list[tuple[str, str, dict]]]:
    """Native architecture -> runs (component, label, settings) of the libraries that have it."""
    k, groups = {"k": K, **fixed}, [1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2]
    late = {"threshold_start_step": steps // 2}  # by default its running threshold starts after the whole run
    warm = {"sparsity_warmup_steps": steps // 20}
    return {
        "topk": [*saelens("topk", steps, k), *dictionary_learning("topk", steps, k), *sparsify("topk", steps, k)],
        "batchtopk": [*saelens("batchtopk", steps, k), *dictionary_learning("batchtopk", steps, k | late)],
        "matryoshka_batchtopk": [
            *saelens("matryoshka_batchtopk", steps, k | {"matryoshka_widths": [round(fixed["width"] * s) for s in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)]}),
            *dictionary_learning("matryoshka_batchtopk", steps, k | late | {"group_fractions": groups}),
        ],
        "abstopk": saelens("abstopk", steps, k),
        "groupmax": sparsify("groupmax", steps, k),
        "jumprelu": [
            *saelens("jumprelu", steps, fixed | {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": K, "l0_warm_up_steps": steps // 20}),
            *dictionary_learning("jumprelu", steps, fixed | warm | {"target_l0": K}),
        ],
        "relu": [
            run
            for l1 in (2.0, 5.0)
            for run in saelens("standard", steps, fixed | {"l1_coefficient": l1, "l1_warm_up_steps": steps // 20}, lrs=(4e-3,))
        ]
        + [run for l1 in (0.05, 0.1) for run in dictionary_learning("standard_april", steps, fixed | warm | {"l1_penalty": l1}, lrs=(4e-3,))],
        "gated": [
            run
            for l1 in (1.0, 3.0)
            for run in saelens("gated", steps, fixed | {"l1_coefficient": l1, "l1_warm_up_steps": steps // 20}, lrs=(4e-3,))
        ]
        + [run for l1 in (0.03, 0.1) for run in dictionary_learning("gated", steps, fixed | warm | {"l1_penalty": l1}, lrs=(4e-3,))],
    }


def show(name: str, runs: list[dict]) -> str:
    """The table of one data set; FVU also relative to the best peer's of the architecture (at equal L0)."""
    lines = [f"{'architecture':<21} {'system':<40} {'settings':<34} {'L0':>7} {'FVU':>8} {'/ best peer':>11} {'dead':>7} {'cpu ms/step':>11}"]
    for run in runs:
        ratio = f"{run['ratio']:>11.3f}" if run.get("ratio") else " " * 11
        lines.append(
            f"{run['architecture']:<21} {run['component']:<40} {run['label']:<34} {run['l0']:>7.2f} {run['fvu']:>8.4f} {ratio} "
            f"{run['dead']:>7.2%} {run['cpu_ms_step']:>11.1f}"
        )
    return f"{name}\n" + "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["tiny-llama", "gpt2"], choices=["tiny-llama", "gpt2"])
    parser.add_argument("--rows", type=int, default=256_000)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--expansion", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=list(NATIVE), help="architectures")
    parser.add_argument("--native", action="store_true", help="without the peers")
    parser.add_argument("--with", dest="extra", type=json.loads, default={}, help="further settings of the native runs, as JSON")
    parser.add_argument("--out", type=Path, help="JSON of every run, written after each; runs that it holds are not repeated")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "saehub-quality")
    parser.add_argument("--known", action="store_true", help="train nothing: the table of what --out holds")
    parser.add_argument("--children", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.children:
        return children(json.loads(arguments.children))
    bench = Bench(arguments)
    for name in arguments.data:
        print("\n" + bench.table(name), flush=True)


class Bench:
    """Runs what is asked for and not known yet, and keeps it in the JSON."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.out = arguments, arguments.out
        done = json.loads(self.out.read_text())["runs"] if self.out and self.out.exists() else []
        self.known = {self.key(run): run for run in done}

    @staticmethod
    def key(run: dict) -> str:
        """What makes two runs the same."""
        return json.dumps([run["data"], run["component"], run["with"]], sort_keys=True)

    def do(self, rows: Rows, wanted: list[dict]) -> None:
        """Train what is not known, library by library."""
        left = [] if self.arguments.known else [run for run in wanted if self.key(run) not in self.known]
        for plugin in sorted({run["component"].partition("/")[0] for run in left}):
            mine = [run for run in left if run["component"].startswith(f"{plugin}/")]
            orders = [{**run, "folder": str(rows.folder), "threads": self.arguments.threads} for run in mine]
            for run, outcome in zip(mine, run_apart(orders), strict=True):
                self.known[self.key(run)] = run | outcome
                print(f"{run['data']} {run['component']} {run['label']}: {outcome}", file=sys.stderr, flush=True)
                self.write()

    def write(self) -> None:
        """The JSON of everything so far."""
        if not self.out:
            return
        facts = {
            "command": "python " + " ".join(["tests/benchmarks/architectures_quality.py", *sys.argv[1:]]),
            "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": self.arguments.threads},
            "versions": {name: metadata.version(name) for name in ("saehub", "torch", "sae-lens", "dictionary-learning", "eai-sparsify")},
            "rows": self.arguments.rows,
            "heldout_rows": HELDOUT,
            "runs": list(self.known.values()),
        }
        self.out.write_text(json.dumps(facts, indent=1) + "\n")

    def table(self, name: str) -> str:
        """Everything about one data set."""
        arguments = self.arguments
        if arguments.known and not any(run["data"] == name for run in self.known.values()):
            return f"{name}: nothing known"
        rows = (gpt2_rows if name == "gpt2" else partial(prepare, name))(arguments.rows, arguments.cache)
        d = rows.train.shape[1]
        fixed = {"batch": arguments.batch, "width": arguments.expansion * d}
        steps = arguments.rows // arguments.batch

        def run(architecture: str, component: str, label: str, with_: dict) -> dict:
            return {"data": name, "architecture": architecture, "component": component, "label": label, "with": with_}

        theirs = {a: [run(a, *entry) for entry in peers(steps, fixed)[a]] for a in arguments.only}
        if arguments.native:
            theirs = {a: [] for a in arguments.only}
        self.do(rows, [entry for entries in theirs.values() for entry in entries])
        theirs = {a: [dict(self.known[self.key(entry)]) for entry in entries if self.key(entry) in self.known] for a, entries in theirs.items()}
        best, ours = {}, {}
        for a in arguments.only:
            penalised = a in ("jumprelu", "relu", "gated")
            # The peer's best near the wanted L0; ours goes to where that one is.
            best[a] = min(theirs[a], key=lambda run: run["fvu"] * (1 + max(0, abs(run["l0"] / K - 1) - 0.5) * 10), default=None)
            target = round(best[a]["l0"], 1) if penalised and best[a] else K
            with_ = fixed | ({"target_l0": target} if penalised else {"k": K}) | arguments.extra
            ours[a] = run(a, f"native/{a}", f"defaults, L0 {target}" if penalised else "defaults", with_)
        self.do(rows, list(ours.values()))
        lines = []
        for a in arguments.only:
            mine = self.known.get(self.key(ours[a]))
            lines += [] if mine is None else [mine | {"ratio": mine["fvu"] / best[a]["fvu"] if best[a] else None}]
            lines += theirs[a]
        return show(f"{name}: {arguments.rows:,} rows, batch {arguments.batch}, {steps} steps, d {d}, {fixed['width']} latents, L0 {K}", lines)


if __name__ == "__main__":
    main()
