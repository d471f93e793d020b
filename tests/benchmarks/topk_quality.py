"""The same batches to native/topk and to dictionary_learning's TopKTrainer; a table of FVU, L0, dead latents and time per step out.

    python tests/benchmarks/topk_quality.py                      # both data sets, the table of results/topk_quality.json
    python tests/benchmarks/topk_quality.py --data planted --rows 200000 --only native

Systems share: the rows and their order, batch, steps, width and k, and rows that are normalised to a mean square of 1 per dimension. Peers
run their own code in a process of their own, at their own defaults and at the best learning rate of a sweep; their warm-up (1,000 steps by
default, more than the whole run) is set to 5 % of the steps, as ours is. FVU is computed here, in float64, for every system alike, on rows
that none has seen: Σ|x̂−x|² / Σ|x−x̄|². A latent is called dead when none of those rows makes it fire.
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
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
import numpy as np
import torch

RESULTS = Path(__file__).parent / "results"
HELDOUT = 65_536
CALIBRATION = 16_384


# ---------------------------------------------------------------------------------------------------------------- data
@dataclass
class Rows:
    """Training, held-out and calibration rows of one data set, memory-mapped float32."""

    folder: Path

    def __post_init__(self) -> None:
        self.train, self.heldout, self.calibration = (
            torch.from_numpy(np.load(self.folder / f"{part}.npy", mmap_mode="c")) for part in ("train", "heldout", "calibration")
        )


def planted(rows: int, *, d: int = 128, n_true: int = 1536, l0: int = 20, noise: float = 0.25, seed: int = 0):
    """x = Σ_i c_i D_i + noise + mean over `l0` draws of `n_true` unit directions with Zipf-like frequencies and coefficients 0.5 + Exp(1)."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(n_true, d, generator=g), dim=1)
    frequency = torch.arange(1, n_true + 1).float().pow(-0.7)
    mean = 0.5 * torch.randn(d, generator=g)
    for start in range(0, rows, 65_536):
        n = min(65_536, rows - start)
        picks = torch.multinomial(frequency, n * l0, replacement=True, generator=g).view(n, l0)
        sizes = 0.5 + torch.empty(n, l0).exponential_(1.0, generator=g)
        x = torch.nn.functional.embedding_bag(picks, directions, per_sample_weights=sizes, mode="sum")
        yield x + noise * torch.randn(n, d, generator=g) + mean


def tiny_llama(rows: int, split: str, layer: int = 2, context: int = 128):
    """Rows of builtin/tiny-llama after block `layer` on builtin/python-docs, by a plain hook; the first position of a sequence is left out."""
    from saehub.builtin import model_dir
    from saehub.builtin.text import documents
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_dir("builtin/tiny-llama")).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir("builtin/tiny-llama"))
    ids: list[int] = []
    for document in documents("python-docs", split):
        ids += [tokenizer.bos_token_id, *tokenizer.encode(document.text, add_special_tokens=False)]
    tokens = torch.tensor(ids[: len(ids) // context * context]).view(-1, context)
    kept: list[torch.Tensor] = []
    model.model.layers[layer].register_forward_hook(
        lambda module, inputs, output: kept.append(output[0] if isinstance(output, tuple) else output)
    )
    left = rows
    with torch.inference_mode():
        while left > 0:  # several epochs where the text is short, each in an order of its own
            for batch in tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(left))].split(32):
                kept.clear()
                model.model(batch)
                piece = kept[0][:, 1:].reshape(-1, kept[0].shape[-1])[:left]
                left -= len(piece)
                yield piece
                if left <= 0:
                    break


def prepare(name: str, rows: int, cache: Path) -> Rows:
    """Write the rows of one data set once, shuffled and scaled by the calibration rows."""
    folder = cache / f"{name}-{rows}"
    if not (folder / "train.npy").exists():
        folder.mkdir(parents=True, exist_ok=True)
        if name == "planted":
            whole = torch.cat(list(planted(rows + HELDOUT + CALIBRATION)))
            train, heldout = whole[: rows + CALIBRATION], whole[rows + CALIBRATION :]
        else:
            train = torch.cat(list(tiny_llama(rows + CALIBRATION, "train")))
            heldout = torch.cat(list(tiny_llama(HELDOUT, "heldout")))
            train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))]
        scale = float(train[:CALIBRATION].square().mean().sqrt())
        for part, tensor in (("calibration", train[:CALIBRATION]), ("heldout", heldout), ("train", train[CALIBRATION:])):
            np.save(folder / f"{part}.npy", (tensor / scale).numpy())
    return Rows(folder)


# ------------------------------------------------------------------------------------------------------------- systems
def run_native(rows: Rows, batch: int, width: int, k: int, seed: int, settings: dict) -> tuple[dict, dict]:
    """Train native/topk; its tensors in checkpoint format and what it says of itself."""
    from saehub.api import Job
    from saehub_native.config import TopKConfig
    from saehub_native.train import NativeTrainer

    n, d = rows.train.shape
    config = TopKConfig(k=k, width=width, batch=batch, **settings)
    job = Job("quality", "resid_post.2", None, d, d, n // batch, batch, n, seed)
    session = NativeTrainer(config).open(job, lambda count: (rows.calibration[:count].clone(), None))
    wall, cpu = time.perf_counter(), time.process_time()
    for step in range(job.steps):
        session.step(rows.train[step * batch : (step + 1) * batch])
    spent = {"ms_step": 1e3 * (time.perf_counter() - wall) / job.steps, "cpu_ms_step": 1e3 * (time.process_time() - cpu) / job.steps}
    tensors = session.architecture.export(session.params)[1]
    return tensors, spent | {"lr": config.peak_lr(job), "train_dead": session.metrics()["dead"]}


def run_dictionary_learning(rows: Rows, batch: int, width: int, k: int, seed: int, settings: dict) -> tuple[dict, dict]:
    """Train dictionary_learning's TopKTrainer through its own `update`; its tensors in checkpoint format."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    n, d = rows.train.shape
    steps = n // batch
    trainer = TopKTrainer(
        steps=steps,
        activation_dim=d,
        dict_size=width,
        k=k,
        layer=0,
        lm_name="none",
        device="cpu",
        seed=seed,
        lr=settings.get("lr"),
        warmup_steps=round(0.05 * steps),
        decay_start=round(0.8 * steps) if settings.get("decay") else None,
    )
    if "dead_after" in settings:
        trainer.dead_feature_threshold = settings["dead_after"]
    wall, cpu = time.perf_counter(), time.process_time()
    for step in range(steps):
        trainer.update(step, rows.train[step * batch : (step + 1) * batch].clone())
    spent = {"ms_step": 1e3 * (time.perf_counter() - wall) / steps, "cpu_ms_step": 1e3 * (time.process_time() - cpu) / steps}
    ae = trainer.ae
    tensors = {"W_enc": ae.encoder.weight.T, "b_enc": ae.encoder.bias, "W_dec": ae.decoder.weight.T, "b_dec": ae.b_dec}
    return {name: t.detach().contiguous() for name, t in tensors.items()}, spent | {"lr": trainer.lr}


SYSTEMS = {"native": run_native, "dictionary_learning": run_dictionary_learning}


@torch.no_grad()
def judge(tensors: dict, x_ND: torch.Tensor, k: int) -> dict:
    """FVU, L0 and the share of latents that never fire, in float64, the same code for every system."""
    W_enc, b_enc, W_dec, b_dec = (tensors[name].double() for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    mean, error, spread, l0 = x_ND.double().mean(0), 0.0, 0.0, 0.0
    fired = torch.zeros(len(b_enc), dtype=torch.bool)
    for x in x_ND.split(4096):
        x = x.double()
        top = ((x - b_dec) @ W_enc + b_enc).topk(k, dim=1)
        values = top.values.relu()
        x_hat = torch.nn.functional.embedding_bag(top.indices, W_dec, per_sample_weights=values, mode="sum") + b_dec
        error += float((x_hat - x).square().sum())
        spread += float((x - mean).square().sum())
        l0 += float((values > 0).sum())
        fired[top.indices[values > 0]] = True
    return {"fvu": error / spread, "l0": l0 / len(x_ND), "dead": 1 - float(fired.double().mean())}


def run_apart(system: str, rows: Rows, batch: int, width: int, k: int, seed: int, settings: dict, threads: int) -> dict:
    """One training in a process of its own; peers change global state, and times stay comparable."""
    order = dict(system=system, folder=str(rows.folder), batch=batch, width=width, k=k, seed=seed, settings=settings, threads=threads)
    done = subprocess.run([sys.executable, __file__, "--one", json.dumps(order)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{system} {settings} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def one(order: dict) -> None:
    """The child process of `run_apart`."""
    torch.set_num_threads(order["threads"])
    rows = Rows(Path(order["folder"]))
    tensors, own = SYSTEMS[order["system"]](rows, order["batch"], order["width"], order["k"], order["seed"], order["settings"])
    print(json.dumps(own | judge(tensors, rows.heldout, order["k"])))


# --------------------------------------------------------------------------------------------------------------- table
def plan(rows: int, width: int, batch: int) -> list[tuple[str, str, dict]]:
    """(system, label, settings) of the comparison: ours at its defaults and beside them, the peer at its own and at the best of a sweep."""
    from saehub.api import Job
    from saehub_native.config import TopKConfig

    config = TopKConfig(k=1, width=width, batch=batch)
    job = Job("quality", "resid_post.2", None, 1, 1, rows // batch, batch, rows, 0)
    ours, theirs = config.peak_lr(job), 2e-4 / (width / 2**14) ** 0.5
    native = [("native", "defaults", {})]
    native += [("native", f"lr x {m:g}", {"lr": ours * m}) for m in (0.5, 2)]
    native += [("native", "no AuxK", {"auxk_alpha": 0.0})]
    peer = [("dictionary_learning", "defaults", {})]
    peer += [("dictionary_learning", f"lr x {m:g}", {"lr": theirs * m}) for m in (4, 8, 16)]
    # Its own threshold of 10 million rows never calls a latent dead in a run of this length: AuxK at our threshold counts as tuned too.
    dead = {"dead_after": config.dead_rows(job), "decay": True}
    peer += [("dictionary_learning", f"lr x {m:g}, decay, AuxK at our threshold", {"lr": theirs * m} | dead) for m in (4, 8, 16)]
    return native + peer


def show(runs: list[dict]) -> str:
    """The table of one data set; FVU also relative to the peer's best."""
    best = min((run["fvu"] for run in runs if run["system"] != "native"), default=float("nan"))
    lines = [f"{'system':<20} {'settings':<44} {'lr':>8} {'FVU':>8} {'/ best peer':>11} {'L0':>6} {'dead':>7} {'ms/step':>8} {'cpu ms':>7}"]
    for run in runs:
        lines.append(
            f"{run['system']:<20} {run['label']:<44} {run['lr']:>8.1e} {run['fvu']:>8.4f} {run['fvu'] / best:>11.3f} {run['l0']:>6.2f} "
            f"{run['dead']:>7.2%} {run['ms_step']:>8.1f} {run['cpu_ms_step']:>7.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["planted", "tiny-llama"], choices=["planted", "tiny-llama"])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=None, help="default: native/topk's")
    parser.add_argument("--expansion", type=int, default=8)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="runs whose 'system label' contains this")
    parser.add_argument("--out", type=Path, default=RESULTS / "topk_quality.json")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "saehub-quality")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        return one(json.loads(arguments.one))

    from saehub_native.config import TopKConfig

    batch = arguments.batch or TopKConfig(k=arguments.k).batch
    report = {
        "command": "python " + " ".join(["tests/benchmarks/topk_quality.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": arguments.threads, "python": platform.python_version()},
        "versions": {name: metadata.version(name) for name in ("saehub", "torch", "dictionary-learning")},
        "rows": arguments.rows,
        "heldout_rows": HELDOUT,
        "batch": batch,
        "k": arguments.k,
        "seed": arguments.seed,
        "data": {},
    }
    for name in arguments.data:
        rows = prepare(name, arguments.rows, arguments.cache)
        width = arguments.expansion * rows.train.shape[1]
        runs = []
        for system, label, settings in plan(arguments.rows, width, batch):
            if arguments.only in f"{system} {label}":
                outcome = run_apart(system, rows, batch, width, arguments.k, arguments.seed, settings, arguments.threads)
                runs.append({"system": system, "label": label, "settings": settings} | outcome)
                print(f"{name}: {system} {label}: FVU {outcome['fvu']:.4f}", file=sys.stderr, flush=True)
        print(f"\n{name}: {arguments.rows:,} rows, batch {batch}, d {rows.train.shape[1]}, {width} latents, k {arguments.k}\n{show(runs)}", flush=True)
        report["data"][name] = {"d": rows.train.shape[1], "d_sae": width, "runs": runs}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
