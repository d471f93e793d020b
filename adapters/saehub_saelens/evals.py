"""Any saehub SAE, a model and token datasets in; the metrics of `sae_lens.evals.run_evals`, by its own code, names and definitions, out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saehub.api import EvalContext, EvalDataset, Measurement, PlannedSAE, Subject
from saehub.errors import SaehubError
from saehub.sites import Site
from saehub_saelens import library
from saehub_saelens.evals_config import METRICS, PREFIX, ZEROED, EvalsConfig

if TYPE_CHECKING:
    from saehub.checkpoint.sae import SAE

# The bridge's own names: some aliases resolve in one of its methods only. attn_z must say hook_z, by which SAELens knows that heads are apart.
_HOOKS = {
    "embed": "embed.hook_out",
    "resid_pre": "blocks.{L}.hook_in",
    "resid_mid": "blocks.{L}.ln2.hook_in",
    "resid_post": "blocks.{L}.hook_out",
    "attn_z": "blocks.{L}.attn.hook_z",
    "attn_out": "blocks.{L}.attn.hook_out",
    "mlp_in": "blocks.{L}.mlp.hook_in",
    "mlp_act": "blocks.{L}.mlp.out.hook_in",
    "mlp_out": "blocks.{L}.mlp.hook_out",
}
NO_ERROR = "SAELens gives no standard error"
RESID_MID = (
    "a hook of TransformerBridge at resid_mid changes what the norm reads and not what the block adds again later, so its loss would not be that of "
    "the reconstruction; native/core changes both"
)


class StandIn:
    """What `run_evals` asks of a SAELens SAE, answered by a saehub SAE: norms, skip paths and thresholds are saehub's own."""

    hook_z_reshaping_mode = False

    def __init__(self, sae: SAE, hook_name: str):
        self.sae = sae
        self.device = next(iter(sae.tensors().values())).device
        self.cfg = SimpleNamespace(d_sae=sae.config.d_sae, metadata=SimpleNamespace(hook_name=hook_name, hook_head_index=None))
        self._x: Tensor | None = None
        stored = sae.tensors()
        self.W_enc, self.W_dec, self.b_enc = (stored.get(name) for name in ("W_enc", "W_dec", "b_enc"))

    def encode(self, x: Tensor) -> Tensor:
        """Dense features; the input is kept for a `decode` that needs it (run-time norms)."""
        self._x = x
        return self.sae.encode(x)

    def decode(self, features: Tensor) -> Tensor:
        """The reconstruction of the rows that were encoded last."""
        return self.sae.decode(features, like=self._x)

    def turn_off_forward_pass_hook_z_reshaping(self) -> None:
        """Rows come flat already."""

    turn_on_forward_pass_hook_z_reshaping = turn_off_forward_pass_hook_z_reshaping


class Batches:
    """What `run_evals` asks of an ActivationsStore: the same sequences for both halves of its metrics."""

    def __init__(self, dataset: EvalDataset, batch: int, device: str):
        self.tokens, self.store_batch_size_prompts, self.device = dataset.tokens, batch, device
        self.context_size = dataset.tokens.context
        self._next = 0

    def get_batch_tokens(self, batch_size: int) -> Tensor:
        """The next sequences, int64 [batch, context]; the last batch may be smaller."""
        first, self._next = self._next, min(self._next + batch_size, self.tokens.n_sequences)
        return self.tokens.tokens(first, self._next).to(self.device)

    def reset_input_dataset(self) -> None:
        """Begin again."""
        self._next = 0


class Evals:
    """The evaluator `saelens/evals`."""

    def __init__(self, config: EvalsConfig | None = None):
        self.config = config or EvalsConfig()

    def evaluate(self, context: EvalContext) -> Iterator[Measurement]:
        """Every metric of every SAE on every dataset; what cannot be measured comes back with its reason."""
        jobs = [(subject, dataset) for subject in context.subjects for dataset in context.datasets.values()]
        for number, (subject, dataset) in enumerate(jobs):
            context.emit({"progress": number / len(jobs), "text": f"{subject.id} on {dataset.name}"})
            yield from self._measure(subject, dataset, context)
        if self.config.compute_featurewise_weight_based_metrics:
            for subject in context.subjects:
                yield from self._weights(subject, context)

    # ------------------------------------------------------------------ one SAE on one dataset
    def _measure(self, subject: Subject, dataset: EvalDataset, context: EvalContext) -> Iterator[Measurement]:
        about = {"subject": subject, "dataset": dataset, "context": context}
        reason = self._reason(subject, context)
        if reason is None:
            try:
                yield from self._run(subject, dataset, context, about)
                return
            except SaehubError:
                raise
            except Exception as error:  # the library's own words; one SAE that it cannot do is no reason to lose the others
                reason = f"SAELens failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        for name in self._wanted("reconstruction", "activations", "density"):
            yield self._row(name, None, reason=reason, **about)

    def _reason(self, subject: Subject, context: EvalContext) -> str | None:
        config = subject.sae.config
        reason = self.config.refusal(PlannedSAE(subject.id, config.architecture, config.kind, subject.site, subject.target_site, config.d_in, config.d_out))
        if reason:
            return reason
        site = Site.parse(subject.site)
        try:
            if site.names(context.model.shape)["transformer_lens"] is None:
                return f"TransformerLens has no hook for {site} in a model of the {context.model.shape.family} family"
            width = site.width(context.model.shape)
        except SaehubError as error:
            return error.what
        if width != config.d_in:
            return f"the SAE reads {config.d_in} numbers a row, {site} has {width}"
        return None

    def _run(self, subject: Subject, dataset: EvalDataset, context: EvalContext, about: dict[str, Any]) -> Iterator[Measurement]:
        config, site = self.config, Site.parse(subject.site)
        evals = library.evaluation()
        batches = -(-dataset.tokens.n_sequences // config.batch_size_prompts)
        wanted = {"reconstruction": config.n_eval_reconstruction_batches, "activations": config.n_eval_sparsity_variance_batches}
        counts = {group: min(batches, number or batches) for group, number in wanted.items()}
        counts["density"] = counts["activations"]
        spliced = site.kind != "resid_mid"
        settings = evals.EvalConfig(
            batch_size_prompts=config.batch_size_prompts,
            n_eval_reconstruction_batches=counts["reconstruction"],
            n_eval_sparsity_variance_batches=counts["activations"],
            compute_kl=config.compute_kl and spliced,
            compute_ce_loss=config.compute_ce_loss and spliced,
            **{name: getattr(config, name) for name in ("compute_l2_norms", "compute_sparsity_metrics", "compute_variance_metrics", "compute_featurewise_density_statistics")},
            git_hash="",  # else SAELens asks git
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scalars, features = evals.run_evals(
                sae=StandIn(subject.sae, _HOOKS[site.kind].format(L=site.layer)),
                activation_store=Batches(dataset, config.batch_size_prompts, context.model.device),
                model=context.model.bridge(),
                activation_scaler=evals.ActivationScaler(),
                eval_config=settings,
                exclude_special_tokens=tuple(dataset.tokens.manifest["exclude_ids"]),
            )
        found = {name: value for group, values in scalars.items() if group != "token_stats" for name, value in values.items()}
        for name in self._wanted("reconstruction", "activations", "density"):
            group = METRICS[name].group
            n = min(counts[group] * config.batch_size_prompts, dataset.tokens.n_sequences)
            if name in features:
                yield self._latents(name, features[name], n, about)
            elif name in found:
                yield self._row(name, found[name], n=n, **about)
            else:
                yield self._row(name, None, reason=RESID_MID if group == "reconstruction" and not spliced else "SAELens gave no such number", **about)

    def _weights(self, subject: Subject, context: EvalContext) -> Iterator[Measurement]:
        about = {"subject": subject, "dataset": None, "context": context}
        stand_in = StandIn(subject.sae, "")
        if stand_in.W_enc is None or stand_in.W_dec is None:
            for name in self._wanted("weights"):
                yield self._row(name, None, reason=f"a {subject.sae.config.architecture} SAE has no encoder matrix of its own", **about)
            return
        if stand_in.W_enc.shape[0] != stand_in.W_dec.shape[1]:
            features = {}
        else:
            wide = SimpleNamespace(**{name: getattr(stand_in, name) if getattr(stand_in, name) is None else getattr(stand_in, name).float() for name in ("W_enc", "W_dec", "b_enc")})
            features = library.evaluation().get_featurewise_weight_based_metrics(wide)
        for name in self._wanted("weights"):
            if name in features:
                yield self._latents(name, features[name], None, about)
            else:
                reason = f"a {subject.sae.config.architecture} SAE has no b_enc" if name == "encoder_bias" and features else "encoder and decoder have other widths"
                yield self._row(name, None, reason=reason, **about)

    # ------------------------------------------------------------------ rows
    def _wanted(self, *groups: str) -> Iterator[str]:
        c = self.config
        switches = {
            "kl_div": c.compute_kl, "ce_loss": c.compute_ce_loss, "l2": c.compute_l2_norms, "relative": c.compute_l2_norms, "l0": c.compute_sparsity_metrics,
            "l1": c.compute_sparsity_metrics, "explained": c.compute_variance_metrics, "mse": c.compute_variance_metrics, "cossim": c.compute_variance_metrics,
            "feature_density": c.compute_featurewise_density_statistics, "consistent": c.compute_featurewise_density_statistics,
            "encoder": c.compute_featurewise_weight_based_metrics,
        }  # fmt: skip
        for name, definition in METRICS.items():
            if definition.group in groups and next(on for prefix, on in switches.items() if name.startswith(prefix)):
                yield name

    def _latents(self, name: str, values: list[float], sequences: int | None, about: dict[str, Any]) -> Measurement:
        """SAELens' list over latents: its mean (over the latents for which it is defined) as the value, the list in parts."""
        defined = [value for value in values if math.isfinite(value)]
        parts = {"per_latent": [value if math.isfinite(value) else None for value in values]}
        if not defined:
            return self._row(name, None, reason="no latent fired", **about)
        note = f"mean over {len(defined)} of {len(values)} latents; {NO_ERROR}"
        return self._row(name, sum(defined) / len(defined), n=sequences, note=note, parts=parts, **about)

    def _row(
        self, name: str, value: float | None, *, subject: Subject, dataset: EvalDataset | None, context: EvalContext,
        n: int | None = None, reason: str | None = None, note: str = NO_ERROR, parts: dict | None = None,
    ) -> Measurement:  # fmt: skip
        status = "ok" if value is not None else "not_measured"
        if value is not None and not math.isfinite(value):
            status, value, reason = "failed", None, f"SAELens' formula gives {value}: a norm that it divides by is zero"
        version = library.LIBRARY.installed
        same = version.split(".")[:2] == library.LIBRARY.written_for.split(".")[:2]
        # SAELens has changed formulas between versions under one name: another version's numbers get ids of their own
        definition = f"{PREFIX}.{name}/1" if same else f"{PREFIX}.{name}.v{version.replace('.', '_')}/1"
        return Measurement(
            metric=name,
            value=value,
            subjects=(subject.id,),
            subject_hashes=(subject.hash,),
            evaluator="saelens/evals",
            definition=definition,
            site=subject.site,
            dataset=dataset.name if dataset else None,
            dataset_hash=dataset.hash if dataset else None,
            n=n,
            better=METRICS[name].better,
            version=f"sae-lens {version}",
            seed=context.seed,
            status=status,
            reason=reason,
            note="; ".join([note, *([ZEROED] if ZEROED in METRICS[name].text else [])]) if status == "ok" else None,
            parts=parts or {},
        )
