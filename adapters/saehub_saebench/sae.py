"""A saehub SAE and where it belongs in; the object with the attributes that SAEBench's evals touch out, its decoder rows scaled to norm 1."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from saehub.api import ModelHandle, Subject
    from saehub.checkpoint.sae import SAE

# Our word -> the word by which SAEBench's plots group SAEs; others keep ours.
ARCHITECTURES = {
    "relu": "standard_april_update",
    "batchtopk": "batch_topk",
    "matryoshka": "matryoshka_batch_topk",
}
FOLDED = "decoder rows were scaled to norm 1 and features by those norms first, as SAEBench's own loader does"


@dataclass
class BenchConfig:
    """`sae.cfg` as SAEBench reads it; SAEBench itself adds further attributes to it."""

    d_in: int
    d_sae: int
    architecture: str
    hook_name: str
    """TransformerLens' name of the site."""
    hook_layer: int
    model_name: str
    """Only a label here: the model is handed over as an object."""
    dtype: str = "float32"
    context_size: int = 128
    training_tokens: int = -1
    """-1, as SAEBench writes it, where the checkpoint does not say."""
    hook_head_index: int | None = None
    prepend_bos: bool = True
    normalize_activations: str = "none"
    seqpos_slice: tuple[int | None, ...] = (None,)
    dataset_trust_remote_code: bool = False
    model_from_pretrained_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.model_from_pretrained_kwargs = self.model_from_pretrained_kwargs or {}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for SAEBench's result files."""
        return asdict(self)


class BenchSAE:
    """Encoder and decoder of one saehub SAE, in the convention of SAEBench: unit decoder rows.

        n_i = ‖W_dec_i‖ (1 for a zero row)     f'_i = n_i f_i     W_dec'_i = W_dec_i / n_i     x̂ = decode(f' / n)

    The reconstruction is the SAE's own, whatever its architecture: features are rescaled after the activation function, never before.
    Rows that are 0 have no features under a norm that divides by their length. Shapes: x [..., d_in], features [..., d_sae]. An SAE whose decoder needs its input (a run-time norm) gets the rows that were encoded last.
    """

    hook_z_reshaping_mode = False

    def __init__(self, sae: SAE, cfg: BenchConfig):
        self.cfg = cfg
        self._original = self._sae = sae
        self._last: Tensor | None = None
        self.watch: Any = None
        """Called as `watch(x, features, reconstruction)` after each decode, where set."""
        self._fold()

    def _fold(self) -> None:
        W_dec_FD = self._sae.W_dec.detach()
        norms_F = torch.linalg.vector_norm(W_dec_FD, dim=1)
        self.norms_F = torch.where(norms_F > 0, norms_F, torch.ones_like(norms_F))
        self.W_dec = W_dec_FD / self.norms_F[:, None]
        tensors = self._sae.tensors()
        W_enc = tensors.get("W_enc")
        self.W_enc = self.W_dec.T if W_enc is None else W_enc * self.norms_F  # matching pursuit encodes with its decoder
        for name in ("b_enc", "b_mag", "b_gate", "b_dec", "threshold"):
            if name in tensors:
                scaled = name != "b_dec" and tensors[name].shape == self.norms_F.shape
                setattr(self, name, tensors[name] * self.norms_F if scaled else tensors[name])

    @property
    def largest_norm_error(self) -> float:
        """max_i |‖W_dec_i‖ - 1| before folding."""
        return float((torch.linalg.vector_norm(self._original.W_dec.detach().float(), dim=1) - 1).abs().max())

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensors."""
        return self.W_dec.dtype

    def encode(self, x: Tensor) -> Tensor:
        """[..., d_in] -> [..., d_sae]."""
        self._last = x
        features = self._sae.encode(x) * self.norms_F
        if self._original.config.norm_in == "constant_norm_rescale":  # x √d/‖x‖ has no value at 0, which is what SAEBench makes of padding
            features = torch.where((x == 0).all(-1, keepdim=True), torch.zeros((), dtype=features.dtype, device=features.device), features)
        return features

    def decode(self, features: Tensor) -> Tensor:
        """[..., d_sae] -> [..., d_in]."""
        like = self._last if self._sae.needs_input_to_decode else None
        y = self._sae.decode(features / self.norms_F, like=like)
        if self.watch is not None:
            self.watch(self._last, features, y)
        return y

    def __call__(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))

    forward = __call__

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> BenchSAE:
        """Itself, on `device` and in `dtype`: SAEBench casts an SAE to the model's dtype; the saehub SAE stays as it is."""
        if dtype is not None and dtype != self.dtype:
            self._sae = self._original.astype(dtype)
            self.cfg.dtype = str(dtype).removeprefix("torch.")
        if device is not None and torch.device(device).type != self.device.type:
            self._sae = self._sae.astype(self.dtype).to(device)
        self._fold()
        return self

    def eval(self) -> BenchSAE:
        """Nothing depends on a mode."""
        return self

    def turn_off_forward_pass_hook_z_reshaping(self) -> None:
        """Rows are flat already: heads are joined."""

    turn_on_forward_pass_hook_z_reshaping = turn_off_forward_pass_hook_z_reshaping


def bench_sae(subject: Subject, model: ModelHandle | None, context_size: int = 128) -> BenchSAE:
    """The SAE of `subject` for SAEBench (refusals are `admission.refusal`'s)."""
    from saehub.sites import Site

    config, hook, layer = subject.sae.config, "", 0
    if model is not None:
        hook = Site.parse(subject.site).names(model.shape)["transformer_lens"] or ""
        layer = Site.parse(subject.site).layer or 0
    known = subject.sae.provenance
    rows = (known.get("data") or {}).get("rows") or (known.get("data") or {}).get("tokens")
    cfg = BenchConfig(
        d_in=config.d_in,
        d_sae=config.d_sae,
        architecture=ARCHITECTURES.get(config.architecture, config.architecture),
        hook_name=hook,
        hook_layer=layer,
        model_name=label(model.spec.name) if model is not None else "none",
        context_size=context_size,
        training_tokens=int(rows) if isinstance(rows, int) else -1,
    )
    return BenchSAE(subject.sae, cfg)


def label(name: str) -> str:
    """A model's name as a relative path component: SAEBench joins it into folder names."""
    return "".join(c if c.isalnum() or c in "-." else "_" for c in name.strip("/").rpartition("/")[2]) or "model"
