"""The name of a tensor inside a transformer in (ours, or another library's); the module and side that carry it, its width and every library's name out.

Definitions, the same in every family (x_L is the residual stream that enters block L, so x_{L+1} = resid_post.L = resid_pre.(L+1)):

    resid_mid.L = x_L + attn_out.L            attn_out, mlp_out: what is *added* to the stream (after Gemma-2/3's extra norms)
    mlp_in.L    = what the MLP reads          attn_z.L: heads side by side before the output projection, n_heads * d_head
    mlp_act.L   = what the MLP's last linear layer reads, d_mlp
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from saehub.api import ModelShape
from saehub.errors import UsageError, did_you_mean

KINDS = ("resid_pre", "resid_mid", "resid_post", "attn_z", "attn_out", "mlp_in", "mlp_act", "mlp_out", "embed")
"""Sites at a layer (`resid_post.6`), and `embed`, which has none."""


@dataclass(frozen=True)
class Tap:
    """Where a tensor can be read in a Hugging Face model."""

    module: str
    """Module path from the causal (or masked) language model, such as `model.layers.6`."""
    io: Literal["in", "out"]
    """Its first input, or its (first) output."""
    shared: bool = False
    """The block also adds this very tensor further on (resid_mid): an intervention must change it in place."""

    def __str__(self) -> str:
        return f"{self.module}:{self.io}"


# Per family: the prefix of the base model, and per kind the equal taps, canonical first. `{L}` is the layer, `{P}` the layer before.
# Checked numerically in tests/activations/test_sites_numeric.py; a kind that a family lacks has no module that sees the tensor.
_LLAMA = {
    "embed": ("embed_tokens:out",),
    "resid_pre": ("layers.{L}:in", "layers.{P}:out"),
    "attn_z": ("layers.{L}.self_attn.o_proj:in",),
    "attn_out": ("layers.{L}.self_attn:out", "layers.{L}.self_attn.o_proj:out"),
    "resid_mid": ("layers.{L}.post_attention_layernorm:in",),
    "mlp_in": ("layers.{L}.mlp:in", "layers.{L}.post_attention_layernorm:out"),
    "mlp_act": ("layers.{L}.mlp.down_proj:in",),
    "mlp_out": ("layers.{L}.mlp:out", "layers.{L}.mlp.down_proj:out"),
    "resid_post": ("layers.{L}:out",),
}
_GEMMA2 = _LLAMA | {  # Gemma 2 and 3 norm each branch before it is added: `post_attention_layernorm` belongs to attention there
    "attn_out": ("layers.{L}.post_attention_layernorm:out",),
    "resid_mid": ("layers.{L}.pre_feedforward_layernorm:in",),
    "mlp_in": ("layers.{L}.mlp:in", "layers.{L}.pre_feedforward_layernorm:out"),
    "mlp_out": ("layers.{L}.post_feedforward_layernorm:out",),
}
_GPT2 = {
    "embed": ("wte:out",),  # without positions
    "resid_pre": ("h.{L}:in", "h.{P}:out"),
    "attn_z": ("h.{L}.attn.c_proj:in",),
    "attn_out": ("h.{L}.attn:out", "h.{L}.attn.c_proj:out"),
    "resid_mid": ("h.{L}.ln_2:in",),
    "mlp_in": ("h.{L}.mlp:in", "h.{L}.ln_2:out"),
    "mlp_act": ("h.{L}.mlp.c_proj:in",),
    "mlp_out": ("h.{L}.mlp:out", "h.{L}.mlp.c_proj:out"),
    "resid_post": ("h.{L}:out",),
}
_NEOX = {  # attention and MLP run in parallel (Pythia): x + attn(ln1 x) + mlp(ln2 x), so there is no resid_mid
    "embed": ("embed_in:out",),
    "resid_pre": ("layers.{L}:in", "layers.{P}:out"),
    "attn_z": ("layers.{L}.attention.dense:in",),
    "attn_out": ("layers.{L}.attention:out", "layers.{L}.attention.dense:out"),
    "mlp_in": ("layers.{L}.mlp:in", "layers.{L}.post_attention_layernorm:out"),
    "mlp_act": ("layers.{L}.mlp.dense_4h_to_h:in",),
    "mlp_out": ("layers.{L}.mlp:out", "layers.{L}.mlp.dense_4h_to_h:out"),
    "resid_post": ("layers.{L}:out",),
}
_BERT = {  # norms stand after each addition, so resid_post is normed and resid_mid is the sum before the norm
    "embed": ("embeddings:out",),  # words, types and positions, normed
    "resid_pre": ("encoder.layer.{L}:in", "encoder.layer.{P}:out"),
    "attn_z": ("encoder.layer.{L}.attention.output.dense:in",),
    "attn_out": ("encoder.layer.{L}.attention.output.dense:out",),
    "resid_mid": ("encoder.layer.{L}.attention.output.LayerNorm:in",),
    "mlp_in": ("encoder.layer.{L}.intermediate:in", "encoder.layer.{L}.attention:out"),
    "mlp_act": ("encoder.layer.{L}.output.dense:in",),
    "mlp_out": ("encoder.layer.{L}.output.dense:out",),
    "resid_post": ("encoder.layer.{L}:out",),
}
_SEQUENTIAL_NEOX = _NEOX | {"resid_mid": ("layers.{L}.post_attention_layernorm:in",)}
FAMILIES: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "llama": ("model", _LLAMA),
    "gemma2": ("model", _GEMMA2),
    "gpt2": ("transformer", _GPT2),
    "gpt_neox": ("gpt_neox", _NEOX),
    "gpt_neox_sequential": ("gpt_neox", _SEQUENTIAL_NEOX),
    "bert": ("bert", _BERT),
    "roberta": ("roberta", _BERT),
}
"""family -> (attribute of the language model that holds the base model, kind -> equal taps relative to the base model)."""

_TRANSFORMER_LENS = {
    "resid_pre": "blocks.{L}.hook_resid_pre",
    "resid_mid": "blocks.{L}.hook_resid_mid",
    "resid_post": "blocks.{L}.hook_resid_post",
    "attn_z": "blocks.{L}.attn.hook_z",
    "attn_out": "blocks.{L}.hook_attn_out",
    "mlp_in": "blocks.{L}.mlp.hook_in",
    "mlp_act": "blocks.{L}.mlp.hook_post",
    "mlp_out": "blocks.{L}.hook_mlp_out",
    "embed": "hook_embed",
}
# TransformerBridge's own names for the same tensors.
_TRANSFORMER_LENS_ALIASES = {
    "resid_pre": "blocks.{L}.hook_in",
    "resid_mid": "blocks.{L}.ln2.hook_in",
    "resid_post": "blocks.{L}.hook_out",
    "attn_z": "blocks.{L}.attn.o.hook_in",
    "attn_out": "blocks.{L}.attn.hook_out",
    "mlp_in": "blocks.{L}.ln2.hook_out",
    "mlp_act": "blocks.{L}.mlp.out.hook_in",
    "mlp_out": "blocks.{L}.mlp.hook_out",
}
_NOT_THERE = {  # names whose tensor no Hugging Face module holds, and what is near
    "hook_mlp_in": "it is the stream before the norm; ours are resid_mid.{L} (before the norm) and mlp_in.{L} (after it)",
    "ln1.hook_normalized": "it is the normed stream before the gain; name the module instead, such as model.layers.{L}.input_layernorm:out",
    "ln2.hook_normalized": "it is the normed stream before the gain; mlp_in.{L} is the one after the gain",
    "hook_pos_embed": "name the module instead, such as transformer.wpe:out",
}
_KIND_NAME = re.compile(r"([a-z_]+)\.(\d+)")
_MODULE_NAME = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*):(in|out)")


@dataclass(frozen=True)
class Site:
    """One address for a tensor: a kind at a layer (`resid_post.6`, `embed`), or a module's side (`model.layers.6.mlp.down_proj:in`)."""

    kind: str | None = None
    layer: int | None = None
    module: str | None = None
    io: Literal["in", "out"] | None = None

    def __str__(self) -> str:
        if self.kind is None:
            return f"{self.module}:{self.io}"
        return self.kind if self.layer is None else f"{self.kind}.{self.layer}"

    @classmethod
    def parse(cls, text: str) -> Site:
        """The site that `text` names; UsageError with the grammar, a did-you-mean, and the translation of a TransformerLens name."""
        if isinstance(text, Site):
            return text
        text = str(text).strip()
        if text == "embed":
            return cls("embed")
        if (match := _KIND_NAME.fullmatch(text)) and match[1] in KINDS and match[1] != "embed":
            return cls(match[1], int(match[2]))
        if match := _MODULE_NAME.fullmatch(text):
            return cls(module=match[1], io=match[2])
        grammar = f"a site is one of {', '.join(KINDS[:-1])} with a layer (`resid_post.6`), `embed`, or a module with a side (`model.layers.6.mlp:out`)"
        if translated := _from_transformer_lens(text):
            raise UsageError(f"{text!r} is TransformerLens' name of a tensor, not a site", fix=f"write {str(translated)!r}")
        word = text.partition(".")[0]
        if word in KINDS:
            why = "`embed` has no layer" if word == "embed" else f"`{word}` needs a layer number, such as {word}.2"
            raise UsageError(f"{text!r} is not a site", why=why, fix=grammar)
        if "." in text and not did_you_mean(word, KINDS):
            raise UsageError(
                f"{text!r} is not a site",
                why="a module path needs `:in` or `:out`",
                fix=f"write '{text}:out' for the module's output; {grammar}",
            )
        raise UsageError(f"{text!r} is not a site{did_you_mean(word, KINDS)}", fix=grammar)

    @classmethod
    def from_foreign(cls, name: str, shape: ModelShape) -> Site:
        """The site for another library's name: TransformerLens, a Hugging Face module (`model.layers.6`, `:in` / `:out`), Sparsify, nnsight, or ours."""
        if "hook_" in name:
            if site := _from_transformer_lens(name):
                return site
            layer = (re.search(r"blocks\.(\d+)", name) or [None, "L"])[1]
            why = next((text.format(L=layer) for tail, text in _NOT_THERE.items() if name.endswith(tail)), None)
            raise UsageError(f"no site is TransformerLens' {name!r}", why=why or "the name is not in the table of saehub.sites")
        try:
            return cls.parse(name)._canonical(shape)
        except UsageError:
            pass
        path = re.sub(r"\[(\d+)\]", r".\1", name.strip())
        path, io = re.subn(r"\.(?:output|out)(?:\.0)?$", "", path)[0], "out"
        if path.endswith((".input", ".inputs", ".inputs.0.0", ".input.0")):
            path, io = re.sub(r"\.inputs?(?:\.0)*$", "", path), "in"
        if not re.fullmatch(r"[A-Za-z_]\w*(?:\.\w+)*", path):
            raise UsageError(
                f"{name!r} is not a name of a tensor",
                fix="write a site (`resid_post.6`), a module (`model.layers.6`) or a TransformerLens name",
            )
        return cls(module=path, io=io)._canonical(shape)

    def _canonical(self, shape: ModelShape) -> Site:
        """The kind that equals a module's side in this family, else the module with the base model's prefix."""
        if self.kind is not None or shape.family not in FAMILIES:
            return self
        prefix, table = FAMILIES[shape.family]
        relative = self.module.removeprefix(prefix + ".")
        for kind, taps in table.items():
            for tap in taps:
                pattern = re.escape(tap).replace(r"\{L\}", r"(\d+)")
                if r"\{P\}" not in pattern and (match := re.fullmatch(pattern, f"{relative}:{self.io}")):
                    return Site(kind, int(match[1]) if match.groups() else None)
        heads = {tap.partition(":")[0].partition(".")[0] for taps in table.values() for tap in taps}
        return Site(module=f"{prefix}.{relative}" if relative.partition(".")[0] in heads else self.module, io=self.io)

    def tap(self, shape: ModelShape) -> Tap:
        """The module and side to hook; UsageError where the model has no such layer or kind."""
        if self.kind is None:
            return Tap(self.module, self.io)
        taps = self._taps(shape)
        module, _, io = taps[0].partition(":")
        return Tap(module, io, shared=self.kind == "resid_mid")

    def _taps(self, shape: ModelShape) -> list[str]:
        """All equal taps, with the prefix of the base model."""
        if shape.family not in FAMILIES:
            raise UsageError(
                f"site {str(self)!r} has no address in this model",
                why=f"its family is {shape.family!r}; named sites exist for {', '.join(FAMILIES)}",
                fix="name the module and side instead, such as 'encoder.layers.6:out'",
            )
        prefix, table = FAMILIES[shape.family]
        if self.kind not in table:
            raise UsageError(
                f"site {str(self)!r} does not exist in the {shape.family} family",
                why="its blocks add attention and MLP in parallel" if self.kind == "resid_mid" else None,
                fix=f"sites of this family: {', '.join(kind for kind in KINDS if kind in table)}",
            )
        if self.layer is not None and not 0 <= self.layer < shape.n_layers:
            last = shape.n_layers - 1
            raise UsageError(
                f"site {str(self)!r}: the model has no layer {self.layer}",
                why=f"it has {shape.n_layers} layers, 0 to {last}",
                fix=f"write {self.kind}.0 to {self.kind}.{last}",
            )
        patterns = [tap for tap in table[self.kind] if self.layer or "{P}" not in tap]
        return [f"{prefix}." + tap.format(L=self.layer, P=(self.layer or 0) - 1) for tap in patterns]

    def width(self, shape: ModelShape) -> int | None:
        """Size of the last dimension; None for a module that the tables do not know (`activations.widths.site_width` finds it)."""
        site = self._canonical(shape)
        if site.kind is None:
            return None
        site._taps(shape)
        return {"attn_z": shape.n_heads * shape.d_head, "mlp_act": shape.d_mlp}.get(site.kind, shape.d_model)

    def names(self, shape: ModelShape) -> dict[str, str | None]:
        """Its name in `transformer_lens`, `hf` (module:side), `sparsify` (outputs, from the base model) and `nnsight`; None where it has none."""
        site = self._canonical(shape)
        if site.kind is None:
            taps, lens = [str(site)], None
        else:
            taps = site._taps(shape)
            lens = None if shape.family in ("bert", "roberta") else _TRANSFORMER_LENS[site.kind].format(L=site.layer)
        prefix = FAMILIES[shape.family][0] if shape.family in FAMILIES else ""
        outputs = [tap.removesuffix(":out") for tap in taps if tap.endswith(":out")]
        module, _, io = taps[0].partition(":")
        indexed = re.sub(r"\.(\d+)", r"[\1]", module)
        return {
            "transformer_lens": lens,
            "hf": taps[0],
            "sparsify": outputs[0].removeprefix(prefix + ".") if outputs else None,
            "nnsight": f"{indexed}.{io}put",
        }


def _from_transformer_lens(name: str) -> Site | None:
    for table in (_TRANSFORMER_LENS, _TRANSFORMER_LENS_ALIASES):
        for kind, pattern in table.items():
            if match := re.fullmatch(re.escape(pattern).replace(r"\{L\}", r"(\d+)"), name):
                return Site(kind, int(match[1]) if match.groups() else None)
    return None
