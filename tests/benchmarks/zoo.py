"""A planted failure, a width, a seed in; an SAE of the embedded model trained with it, and what native/core and native/health measure of it, out.

The failures (`PLANTED`) are faults of plumbing and of capacity; each run is one ordinary training of `native/topk` with one thing wrong.
Measured twice: at 10 % of the training rows (the early look, on few rows) and at the end.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from saehub.activations import taps
from saehub.api import CalibrationRows, EvalContext, EvalDataset, Job, Measurement, ModelSpec, Rows, Subject
from saehub.checkpoint.sae import SAE
from saehub.data.model import ModelHandle
from saehub.data.tokens import TokenDataset, TokenPolicy, build
from saehub.recipe.schema import SourceEntry
from saehub.seeds import generator
from saehub.sites import Site
from saehub_native.config import TopKConfig
from saehub_native.evaluate.config import CoreConfig
from saehub_native.evaluate.core import CoreEvaluator
from saehub_native.health.config import HealthConfig
from saehub_native.health.evaluator import HealthEvaluator
from saehub_native.train import NativeTrainer

SITES = ("resid_post.2", "resid_post.4", "mlp_out.2")
CONTEXT, BATCH, EARLY = 128, 512, 0.1


@dataclass(frozen=True)
class Fault:
    """What is wrong with a run."""

    label: str
    """The verdict that it deserves."""
    settings: dict = field(default_factory=dict)
    """Of `native/topk`, over the healthy ones."""
    train_site: str | None = None
    """Rows come from here instead of the declared site: a wrong hook."""
    scale: float = 1.0
    """Its output stays so many times too large: the factor of a normalisation that nobody undid."""
    silent: float = 0.0
    """Share of latents whose encoder bias is pushed out of reach."""
    copies: float = 0.0
    """Share of latents that are copies of others."""
    text: str = "docs"
    """`docs`, or `template` (rows of one fixed form)."""
    nan: bool = False
    """A weight is NaN at the end."""


PLANTED = {
    "healthy": Fault("good"),
    "dead: bias out of reach": Fault("dead", {"auxk_alpha": 0.0, "revive": 0.0}, silent=0.96),
    "dead: the rate kills it": Fault("dead", {"auxk_alpha": 0.0, "revive": 0.0, "lr": 0.2, "clip": None, "k": 32}),
    "wasted: most of it dead, the rest excellent": Fault("deceptively good", {"auxk_alpha": 0.0, "revive": 0.0, "k": 32}, silent=0.6),
    "duplicated: every latent twice": Fault("duplicated", copies=0.5),
    "duplicated: a third": Fault("duplicated", copies=0.34),
    "template-overfit": Fault("deceptively good", text="template"),
    "collapsed: wrong hook": Fault("collapsed", train_site="mlp_out.2"),
    "collapsed: no update": Fault("collapsed", {"lr": 1e-12, "init_blend": 0.0}),
    "collapsed: wrong scale": Fault("collapsed", scale=0.25),
    "collapsed: NaN": Fault("collapsed", nan=True),
}


def template(path: Path, lines: int, seed: int) -> Path:
    """A text of one fixed form."""
    draw = random.Random(seed)
    words = "get put list open close read write send".split()
    rows = [f"INFO: request {draw.randrange(900):03d} to {draw.choice(words)} file took {draw.randrange(90):02d} ms and returned ok.\n" for _ in range(lines)]
    path.write_text("".join(rows))
    return path


class World:
    """The embedded model with texts: training rows in memory, evaluation rows for replay."""

    def __init__(self, folder: Path, rows: int = 60_000, eval_rows: int = 16_000, early_rows: int = 6_000, sites: tuple[str, ...] = SITES):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.rows, self.eval_rows, self.early_rows, self.sites = Path(folder).absolute(), rows, eval_rows, early_rows, sites
        self.spec = ModelSpec("builtin/tiny-llama", device="cpu")
        self.model = ModelHandle.load(self.spec)
        self.taps = {site: Site.parse(site).tap(self.model.shape) for site in sites}
        self._train: dict[str, tuple] = {}
        self._eval: dict[tuple, list[Rows]] = {}

    def tokens(self, name: str, source: str, split: str, rows: int, seed: int = 0) -> TokenDataset:
        """Packed text."""
        out = self.folder / f"{name}-{rows}"
        if not (out / "manifest.json").exists():
            entry = SourceEntry(source=source, split=split)
            build([(entry, 1.0)], self.spec, TokenPolicy(CONTEXT), out.absolute(), rows=rows, calibration=0, seed=seed, repeat=False)
        return TokenDataset.open(out)

    def _text(self, text: str, part: str, rows: int) -> TokenDataset:
        if text == "template":
            path = self.folder / f"template-{part}-{rows}.txt"
            if not path.exists():
                template(path, rows // 12, 1 if part == "train" else 2)
            return self.tokens(f"template-{part}", str(path), "all", rows)
        return self.tokens(f"{text}-{part}", f"builtin/python-{text}", part, rows)

    def _batches(self, tokens: TokenDataset) -> Iterator[Rows]:
        for i in range(0, tokens.n_sequences, 16):
            j = min(i + 16, tokens.n_sequences)
            read = taps.read(self.model.hf, tokens.tokens(i, j), self.taps)
            units_N = torch.arange(i, j).repeat_interleave(CONTEXT)
            acts = {site: x.flatten(0, 1) for site, x in read.items()}
            yield Rows(acts, tokens.keep(i, j).flatten(), tokens.tokens(i, j).flatten(), torch.arange(CONTEXT).repeat(j - i), units_N)

    def train_rows(self, text: str) -> dict[str, torch.Tensor]:
        """Shuffled rows at every site; the last 8,192 are for calibration."""
        if text not in self._train:
            tokens = self._text(text, "train", self.rows + 8192)
            found = [{site: x[rows.keep_N] for site, x in rows.acts.items()} for rows in self._batches(tokens)]
            n = sum(len(next(iter(part.values()))) for part in found)
            order = torch.randperm(n, generator=generator("zoo", text))
            self._train[text] = {site: torch.cat([part[site] for part in found])[order] for site in self.sites}
        return self._train[text]

    def datasets(self, text: str, early: bool) -> dict[str, EvalDataset]:
        """In-sample and out-of-sample texts; the early look reads fewer rows of them."""
        other = {"docs": "code", "template": "docs"}[text]
        rows = self.early_rows if early else self.eval_rows
        parts = {"in_sample": self._text(text, "heldout", rows), "out_of_sample": self._text(other, "heldout", rows)}
        return {name: EvalDataset(name, tokens, tokens.hash) for name, tokens in parts.items()}

    def replay(self, dataset: EvalDataset, sites) -> Iterator[Rows]:
        """`EvalContext.rows`, from memory after the first time."""
        if dataset.hash not in self._eval:
            self._eval[dataset.hash] = list(self._batches(dataset.tokens))
        yield from self._eval[dataset.hash]


def run(world: World, name: str, width: int, seed: int, site: str = "resid_post.2", k: int = 32, loss_sequences: int = 24) -> dict[str, list[Measurement]]:
    """{"early": rows, "final": rows} of one run with the fault `name`."""
    text = PLANTED[name].text
    saes = trained(world, name, width, seed, site, k)
    return {when: measure(world, {name: sae}, site, text, when == "early", loss_sequences)[name] for when, sae in saes.items()}


def trained(world: World, name: str, width: int, seed: int, site: str, k: int) -> dict[str, SAE]:
    """{"early": SAE, "final": SAE} of one training with the fault `name`."""
    fault = PLANTED[name]
    config = TopKConfig(**{"k": k, "width": width, "batch": BATCH, **fault.settings})
    rows = world.train_rows(fault.text)[fault.train_site or site]
    calibration_ND, train_ND = rows[-8192:], rows[: world.rows]
    scale = rows.shape[1] ** 0.5 / float(calibration_ND.norm(dim=1).mean())
    steps, d = world.rows // BATCH, rows.shape[1]
    job = Job(f"{name}-{width}-{seed}", site, None, d, d, steps, BATCH, world.rows, seed, 8192)
    session = NativeTrainer(config).open(job, CalibrationRows(calibration_ND * scale))
    plant(session.params, fault, generator("plant", name, width, seed))
    order = torch.randperm(len(train_ND), generator=generator("order", seed))
    stops = {max(1, round(EARLY * steps)): "early", steps: "final"}
    found = {}
    for step in range(steps):
        session.step(train_ND[order[step * BATCH : (step + 1) * BATCH]] * scale)
        tie(session.params, fault)
        if step + 1 in stops:
            found[stops[step + 1]] = finished(session.finish().scale_input(scale), fault)
    return found


def plant(params: dict[str, torch.Tensor], fault: Fault, draw: torch.Generator) -> None:
    """Change the freshly initialised parameters in place."""
    latents = len(params["b_enc"])
    if fault.silent:
        params["b_enc"][torch.randperm(latents, generator=draw)[: int(fault.silent * latents)]] = -1e3
    tie(params, fault)


def tie(params: dict[str, torch.Tensor], fault: Fault) -> None:
    """Make the last latents copies of the first ones: once is not enough, for training parts copies that are only born alike."""
    latents = len(params["b_enc"])
    n = int(fault.copies * latents)
    for name in ("W_enc", "W_dec", "b_enc") if n else ():
        params[name][latents - n :] = params[name][:n]


def finished(sae: SAE, fault: Fault) -> SAE:
    """The SAE as it is handed over."""
    if fault.scale != 1.0:
        tensors = sae.tensors()
        sae = type(sae)(sae.config, {**tensors, "W_dec": fault.scale * tensors["W_dec"], "b_dec": fault.scale * tensors["b_dec"]}, sae.provenance)
    if fault.nan:
        tensors = sae.tensors()
        tensors["W_enc"] = tensors["W_enc"].clone()
        tensors["W_enc"][0, 0] = float("nan")
        sae = type(sae)(sae.config, tensors, sae.provenance)
    return sae


def measure(world: World, saes: dict[str, SAE], site: str, text: str, early: bool, loss_sequences: int) -> dict[str, list[Measurement]]:
    """native/core (without losses in the early look) and native/health of several SAEs of one site and text: id -> rows."""
    datasets = world.datasets(text, early)
    subjects = [Subject(name, sae, Path("."), site, None, "zoo") for name, sae in saes.items()]
    context = EvalContext(subjects, world.model, datasets, 0, "cpu", world.folder, 16, rows=world.replay)
    core = CoreConfig(loss=not early and loss_sequences > 0, loss_sequences=loss_sequences or None)
    rows = [*CoreEvaluator(core).evaluate(context), *HealthEvaluator(HealthConfig()).evaluate(context)]
    return {name: [row for row in rows if row.subjects == (name,)] for name in saes}


ROWS = {"set": 60_000, "test": 24_000}
"""Training rows a run; evaluation rows are 16,000 and 8,000 a text (6,000 and 4,000 in the early look)."""
SETTING = ((320, 0, "resid_post.2", 16), (640, 1, "resid_post.2", 32), (1280, 2, "resid_post.2", 32), (640, 3, "resid_post.2", 16), (320, 4, "resid_post.2", 32))
"""(width, seed, site, k) of the runs that the rules were set on; the first for faults that collapse, the second for most others."""
TESTING = ((480, 10, "resid_post.4", 24), (960, 11, "resid_post.2", 32))
"""Of the runs that judge the rules: widths, seeds, a site, a k and a length that no rule was set on."""
MORE_HEALTHY = ((1280, 12, "resid_post.4", 32), (320, 13, "resid_post.2", 16))


def runs() -> list[dict]:
    """Every run of the zoo: fault, width, seed, site, k, and which half it is in."""
    found = []
    for name, fault in PLANTED.items():
        several = {"healthy": SETTING, "dead: bias out of reach": SETTING, "template-overfit": SETTING[:4]}
        at = several.get(name, SETTING[:1] if fault.label == "collapsed" else SETTING[1:2])
        found += [(name, "set", *where) for where in at]
        found += [(name, "test", *where) for where in (*TESTING, *(MORE_HEALTHY if name == "healthy" else ()))]
    return [dict(zip(("fault", "half", "width", "seed", "site", "k"), entry, strict=True)) for entry in found]


def world_of(half: str, folder: Path) -> World:
    """The texts of one half of the zoo."""
    return World(folder / half) if half == "set" else World(folder / half, rows=ROWS[half], eval_rows=8_000, early_rows=4_000)
