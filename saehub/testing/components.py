"""The smallest honest component of each kind: settings in, an instance that keeps every promise of `saehub.api` out; for tests of saehub itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saehub.api import Calibration, EvalContext, Job, Measurement, Rows
from saehub.errors import FormatError, UsageError, did_you_mean
from saehub.seeds import generator
from saehub.testing.settings import ToyExtract, ToyTrain

if TYPE_CHECKING:
    from torch import Tensor

    from saehub.checkpoint.sae import SAE

PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")


class ToyTrainer:
    """TopK with dense autograd and Adam: 40 lines that a real trainer can be held against."""

    def __init__(self, config: ToyTrain):
        self.config = config

    def open(self, job: Job, calibration: Calibration) -> ToyTraining:
        """One SAE from random decoder rows; b_dec starts at the calibration mean."""
        problems = list(self.config.check(job))
        if problems:
            raise UsageError(f"{job.id} cannot be trained: {'; '.join(problems)}")
        return ToyTraining(self.config, job, calibration)


class ToyTraining:
    """Loss: mean over rows of ‖x̂ - x‖²."""

    def __init__(self, config: ToyTrain, job: Job, calibration: Calibration):
        import torch

        self.config, self.job, self.loss = config, job, float("nan")
        x_ND, _ = calibration(64)
        draw = generator("toy trainer", job.id, job.seed)
        W_dec_FD = torch.nn.functional.normalize(torch.randn(config.latents, job.d_in, generator=draw), dim=1)
        start = {"W_enc": W_dec_FD.T.clone(), "b_enc": torch.zeros(config.latents), "W_dec": W_dec_FD, "b_dec": x_ND.mean(0).cpu()}
        if job.init_from:
            from saehub.checkpoint.load import load

            start = load(job.init_from).tensors()
        self.parameters = [start[name].float().clone().to(job.device).requires_grad_() for name in PARAMETERS]
        self.optimizer = torch.optim.Adam(self.parameters, lr=config.lr)

    def step(self, x_BD: Tensor, y_BD: Tensor | None = None) -> None:
        import torch

        with torch.enable_grad():
            W_enc_DF, b_enc_F, W_dec_FD, b_dec_D = self.parameters
            p_BF = (x_BD - b_dec_D) @ W_enc_DF + b_enc_F
            values_BK, indices_BK = p_BF.relu().topk(self.config.k, dim=1)
            f_BF = torch.zeros_like(p_BF).scatter(1, indices_BK, values_BK)
            loss = (f_BF @ W_dec_FD + b_dec_D - x_BD).square().sum(1).mean()
            self.optimizer.zero_grad()
            loss.backward()
        self.optimizer.step()
        self.loss = float(loss.detach())

    def metrics(self) -> dict[str, float]:
        return {"loss": self.loss}

    def state(self) -> tuple[dict[str, Tensor], dict]:
        tensors = dict(zip(PARAMETERS, (p.detach().clone() for p in self.parameters), strict=True))
        for name, parameter in zip(PARAMETERS, self.parameters, strict=True):
            tensors |= {f"{key}.{name}": value.detach().clone() for key, value in self.optimizer.state.get(parameter, {}).items()}
        return tensors, {"loss": self.loss if self.loss == self.loss else None}

    def load_state(self, tensors: dict[str, Tensor], data: dict) -> None:
        for name, parameter in zip(PARAMETERS, self.parameters, strict=True):
            parameter.data.copy_(tensors[name])
            moments = {key.removesuffix(f".{name}"): value.clone() for key, value in tensors.items() if key.endswith(f".{name}")}
            self.optimizer.state[parameter] = moments
        self.loss = float("nan") if data["loss"] is None else data["loss"]

    def finish(self) -> SAE:
        from saehub.checkpoint.config import SAEConfig
        from saehub.checkpoint.sae import SAE

        tensors = dict(zip(PARAMETERS, (p.detach().cpu().clone() for p in self.parameters), strict=True))
        return SAE.build(SAEConfig("topk", self.job.d_in, self.config.latents, params={"k": self.config.k}), tensors)


class ToyExtractor:
    """Rows of planted features instead of a model's: `signal.0` and `signal.1`, the second a fixed rotation of the first."""

    SITES = ("signal.0", "signal.1")

    def __init__(self, config: ToyExtract):
        self.config = config

    def open(self, model: Any, tokens: Any, sites: Sequence[str], *, lm_batch: int) -> ToyExtraction:
        """Sequences of 8 rows; the first row of each is excluded, as a BOS row would be."""
        for site in sites:
            if site not in self.SITES:
                raise UsageError(f"there is no site {site!r}{did_you_mean(site, self.SITES)}", fix=f"one of {', '.join(self.SITES)}")
        return ToyExtraction(self.config, sites, lm_batch)


class ToyExtraction:
    """Batch `i` is drawn from a generator seeded with `i`."""

    LENGTH = 8

    def __init__(self, config: ToyExtract, sites: Sequence[str], lm_batch: int):
        self.config, self.sites, self.lm_batch = config, tuple(sites), lm_batch
        self.widths = {site: config.width for site in sites}
        self.n_batches = -(-config.sequences // lm_batch)

    def _sequences(self, batch: int) -> range:
        if not 0 <= batch < self.n_batches:
            raise UsageError(f"there is no batch {batch}", why=f"{self.n_batches} batches exist")
        return range(batch * self.lm_batch, min((batch + 1) * self.lm_batch, self.config.sequences))

    def rows(self, batch: int) -> Rows:
        import torch

        sequences, d = self._sequences(batch), self.config.width
        draws = [torch.randn(self.LENGTH, d, generator=generator("toy extractor", self.config.seed, sequence)) for sequence in sequences]
        base_ND = torch.cat(draws)
        rotation = torch.linalg.qr(torch.randn(d, d, generator=generator("toy rotation", d)))[0]
        made = {"signal.0": base_ND, "signal.1": base_ND @ rotation}
        position_N = torch.arange(self.LENGTH).repeat(len(sequences))
        return Rows(
            acts={site: made[site] for site in self.sites},
            keep_N=position_N != 0,
            positions_N=position_N,
            sequences_N=torch.tensor(sequences).repeat_interleave(self.LENGTH),
        )

    def kept(self, batch: int) -> int:
        return len(self._sequences(batch)) * (self.LENGTH - 1)

    def close(self) -> None:
        """Nothing is held."""


class ToyEvaluator:
    """Mean L0 over a dataset's kept rows, with its standard error over sequences."""

    def __init__(self, config: None):
        pass

    def evaluate(self, context: EvalContext) -> Iterable[Measurement]:
        """`l0` a subject and dataset; `not_measured` where the SAE does not fit the site."""
        for subject in context.subjects:
            for dataset in context.datasets.values():
                yield self._measure(subject, dataset, context)

    def _measure(self, subject: Any, dataset: Any, context: EvalContext) -> Measurement:
        import torch

        known = dict(
            metric="l0", subjects=(subject.id,), subject_hashes=(subject.hash,), evaluator="toy/l0", definition="toy.l0/1",
            site=subject.site, dataset=dataset.name, dataset_hash=dataset.hash, better="none", seed=context.seed,
        )  # fmt: skip
        totals: dict[int, list[float]] = {}
        for rows in context.rows(dataset, [subject.site]):
            x_ND = rows.acts[subject.site]
            if x_ND.shape[1] != subject.sae.config.d_in:
                reason = f"the SAE reads {subject.sae.config.d_in} numbers a row, {subject.site} has {x_ND.shape[1]}"
                return Measurement(value=None, status="not_measured", reason=reason, **known)
            with torch.no_grad():
                active_N = torch.cat([(subject.sae.encode(part) != 0).sum(1) for part in x_ND.split(16)])
            for sequence, keep, active in zip(rows.sequences_N.tolist(), rows.keep_N.tolist(), active_N.tolist(), strict=True):
                if keep:
                    totals.setdefault(sequence, []).append(active)
        means = torch.tensor([sum(values) / len(values) for values in totals.values()], dtype=torch.float64)
        error = float(means.std() / len(means) ** 0.5)
        return Measurement(value=float(means.mean()), stderr=error, n=len(means), **known)


class ToyExporter:
    """A folder with `toy.safetensors` (sklearn's names: components, intercept) and `toy.json`; TopK autoencoders only."""

    FORMAT = "saehub-toy/1"

    def __init__(self, config: None):
        pass

    def sniff(self, path: Path) -> bool:
        """Whether toy.json says so."""
        import json

        try:
            return json.loads((Path(path) / "toy.json").read_text())["format"] == self.FORMAT
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def read(self, path: Path) -> SAE:
        from saehub.checkpoint.config import SAEConfig
        from saehub.checkpoint.sae import SAE
        from saehub.jsonio import read_json

        tensors, about = self._tensors(path), read_json(Path(path) / "toy.json")
        W_dec_FD = tensors["components"]
        config = SAEConfig("topk", tensors["encoder"].shape[1], W_dec_FD.shape[0], params={"k": about["k"]})
        stored = {"W_enc": tensors["encoder"].T.contiguous(), "b_enc": tensors["offset"], "W_dec": W_dec_FD, "b_dec": tensors["intercept"]}
        return SAE.build(config, stored)

    @staticmethod
    def _tensors(path: Path) -> dict[str, Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(Path(path) / "toy.safetensors")
        except (OSError, SafetensorError) as error:
            raise FormatError(f"{path} cannot be read", why=str(error)) from error

    def write(self, sae: SAE, path: Path) -> Mapping[str, Any]:
        from safetensors.torch import save_file

        from saehub.jsonio import write_json_atomic

        config = sae.config
        plain = (config.kind, config.norm_in, config.subtract_b_dec, config.decoder_norm_scaling) == ("autoencoder", "none", True, False)
        if config.architecture != "topk" or not plain:
            raise UsageError(f"the toy format cannot say {config.architecture} {config.kind} with these norms", fix="choose another format")
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        t = sae.tensors()
        save_file(
            {"encoder": t["W_enc"].T.contiguous(), "offset": t["b_enc"], "components": t["W_dec"], "intercept": t["b_dec"]},
            path / "toy.safetensors",
        )
        write_json_atomic(path / "toy.json", {"format": self.FORMAT, "k": config.params["k"]})
        return {"bit_exact": list(PARAMETERS), "folded": [], "dropped": []}

    def run(self, path: Path, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """The published equation, computed from the file by itself."""
        import torch

        from saehub.jsonio import read_json

        t, k = self._tensors(path), int(read_json(Path(path) / "toy.json")["k"])
        p_NF = (x_ND - t["intercept"]) @ t["encoder"].T + t["offset"]
        values_NK, indices_NK = p_NF.topk(k, dim=1)
        f_NF = torch.zeros_like(p_NF).scatter(1, indices_NK, values_NK.relu())
        return f_NF, f_NF @ t["components"] + t["intercept"]
