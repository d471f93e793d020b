"""An SAE in; the five tensors of `f = [p > θ] max(p, 0), p = x W_enc + b_enc, x̂ = f W_dec + b_dec` out: what two layouts here can say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saehub.checkpoint.foreign import SIDE_CHANNEL, Foreign, Unsayable, beside, fold_b_dec, fold_decoder_norms

if TYPE_CHECKING:
    from saehub.checkpoint.sae import SAE

SAYABLE = ("relu", "jumprelu", "batchtopk", "matryoshka")


def fold_to_jumprelu(sae: SAE) -> Foreign:
    """Tensors in our names, θ for every latent (0 for a relu), nothing subtracted and nothing scaled; raises Unsayable with the reason.

        decoder_norm_scaling, n_i = ‖W_dec_i‖:   W_enc n, b_enc n, W_dec / n, θ as it is (it is compared with n p)
        subtract_b_dec:                          b_enc - b_dec W_enc

    The side channel says what the tensors cannot: architecture, parameters, kind, provenance.
    """
    import torch

    c = sae.config
    if c.architecture not in SAYABLE:
        raise Unsayable(f"its only activation is JumpReLU, this SAE's is {c.architecture}")
    if c.norm_in != "none":
        raise Unsayable(f"it has no word for the run-time norm {c.norm_in}")
    foreign = Foreign({}, sae.tensors())
    if c.decoder_norm_scaling:
        fold_decoder_norms(foreign)
    if c.subtract_b_dec:
        fold_b_dec(foreign, subtract=False)
    was, tensors = sae.tensors(), foreign.tensors
    tensors.pop("group_sizes", None)
    if c.architecture == "relu":
        tensors["threshold"] = torch.zeros(c.d_sae, dtype=tensors["b_enc"].dtype)
    elif c.architecture != "jumprelu":
        tensors["threshold"] = tensors["threshold"].expand(c.d_sae).contiguous()
    small = () if c.architecture in ("relu", "jumprelu") else ("threshold", "group_sizes")
    standing = c.replace(decoder_norm_scaling=False, subtract_b_dec=False)
    foreign.config[SIDE_CHANNEL] = beside(sae, standing, tensors=small)
    foreign.side_channel = [*(name for name in small if name in was), "params", "kind", "provenance"]
    same = [name for name in was if name in tensors and tensors[name].dtype == was[name].dtype and tensors[name].shape == was[name].shape]
    foreign.bit_exact = [name for name in was if name in small or (name in same and torch.equal(tensors[name], was[name]))]
    return foreign
