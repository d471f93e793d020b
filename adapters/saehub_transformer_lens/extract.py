"""A Hugging Face model, packed tokens and sites in; activation rows from one forward pass of its TransformerBridge out."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from saehub.api import Rows
from saehub.capabilities import Library
from saehub.data.model import model_dir_or_id, torch_dtype
from saehub.errors import MissingDependency, StageFailed, UsageError
from saehub_transformer_lens.config import BridgeConfig, hook_name, layer

if TYPE_CHECKING:
    from saehub.data.model import ModelHandle
    from saehub.data.tokens import TokenDataset

LIBRARY = Library("transformer_lens", "transformer-lens", "3.9.0")
BRIDGE = "transformer_lens.model_bridge:TransformerBridge"


class BridgeExtractor:
    """`transformer_lens/bridge`.

    The bridge shares the model's tensors and processes none of them: no folding, no centring (`center_writing_weights` would move the
    residual stream of LayerNorm models by a tenth). It computes attention by itself, as `attention: eager` does.
    """

    def __init__(self, config: BridgeConfig | None = None):
        self.config = config or BridgeConfig()

    @staticmethod
    def view(model: ModelHandle) -> Any:
        """A TransformerBridge over the parameters of `model` (`ModelHandle.view`); MissingDependency where the library has none."""
        # The bridge rewires the module it is given, so it gets a copy of the structure whose parameters and buffers are the same tensors.
        shared = {id(tensor): tensor for group in (model.hf.parameters(), model.hf.buffers()) for tensor in group}
        return LIBRARY.take(BRIDGE, attributes=("boot_transformers", "run_with_cache")).boot_transformers(
            str(model_dir_or_id(model.spec)),
            hf_model=copy.deepcopy(model.hf, dict(shared)),
            tokenizer=model.tokenizer,
            device=model.device,
            dtype=torch_dtype(model.spec.dtype),
        )

    def open(self, model: ModelHandle | None, tokens: TokenDataset | None, sites: Sequence[str], *, lm_batch: int) -> BridgeSession:
        """Check the sites and the context, and build the bridge. UsageError names what TransformerLens lacks."""
        if model is None or tokens is None:
            raise UsageError("transformer_lens/bridge needs a model and text", where="extract.uses", fix="set model.name and data.train")
        if not sites:
            raise UsageError("no site to extract", where="extract.sites", fix="write sites: [resid_post.2]")
        if tokens.context > model.shape.context:
            raise UsageError(
                f"sequences of {tokens.context} tokens are longer than {model.spec.name} allows",
                why=f"it accepts {model.shape.context} positions",
                where="data.train.context",
                fix=f"use at most {model.shape.context}",
            )
        for site in sites:
            if reason := self.config.refusal(site, model.shape):
                raise UsageError(reason, where="extract.sites", fix="another site, or extract: {uses: native/hf}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                bridge = model.bridge()
        except MissingDependency:
            raise
        except Exception as error:  # TransformerLens raises what it likes for a model that it has no adapter for
            raise StageFailed(
                f"TransformerLens cannot bridge {model.spec.name}",
                said=f"{type(error).__name__}: {error}",
                fix="extract: {uses: native/hf} reads any Hugging Face model",
            ) from error
        return BridgeSession(bridge, model, tokens, sites, lm_batch)


class BridgeSession:
    """Batch `b` is always the same sequences in the same forward pass, so its rows depend on `b` alone."""

    def __init__(self, bridge: Any, model: ModelHandle, tokens: TokenDataset, sites: Sequence[str], lm_batch: int):
        self.bridge, self.model, self.tokens, self.lm_batch = bridge, model, tokens, lm_batch
        self.hooks = {str(site): hook_name(str(site), model.shape) for site in sites}
        deepest = max(layer(site) for site in self.hooks)
        # Stopped at the input of the next block; after the last one the head runs too, which TransformerLens cannot leave out.
        self.stop = deepest + 1 if 0 <= deepest < model.shape.n_layers - 1 else None
        self.n_batches = tokens.n_batches(lm_batch)
        self.calibration_batches = tokens.calibration_batches(lm_batch)
        self.data_hash = tokens.hash
        first = self._read(tokens.tokens(0, 1)[:, :2])
        self.widths = {site: x_BTD.shape[-1] for site, x_BTD in first.items()}

    @torch.no_grad()
    def _read(self, tokens_BT: torch.Tensor) -> dict[str, torch.Tensor]:
        """site -> [batch, positions, d], copies; heads of `attn_z` side by side."""
        top = int(tokens_BT.max())
        if top >= self.model.shape.vocab:
            raise StageFailed(
                f"token id {top} is outside the model's vocabulary of {self.model.shape.vocab}",
                why="the tokens were made with another tokenizer",
                fix="use the tokenizer that belongs to the model",
            )
        # Given as ids, so nothing is prepended and no padding mask is made up.
        _, cache = self.bridge.run_with_cache(
            tokens_BT.to(self.model.device),
            names_filter=list(dict.fromkeys(self.hooks.values())),
            stop_at_layer=self.stop,
            return_cache_object=False,
            output_attentions=False,
            use_cache=False,
        )
        absent = [name for name in self.hooks.values() if name not in cache]
        if absent:
            LIBRARY.has(object(), f"the TransformerBridge of {self.model.spec.name}", absent[0])
        batch, positions = tokens_BT.shape
        return {site: cache[name].reshape(batch, positions, -1).clone() for site, name in self.hooks.items()}

    def rows(self, batch: int) -> Rows:
        """All sites' rows of one language-model batch, on the model's device and in its dtype, from one forward pass."""
        i, j = self.tokens.batch_range(batch, self.lm_batch)
        tokens_BT = self.tokens.tokens(i, j)
        sequences, context = tokens_BT.shape
        return Rows(
            acts={site: x_BTD.reshape(sequences * context, -1) for site, x_BTD in self._read(tokens_BT).items()},
            keep_N=self.tokens.keep(i, j).reshape(-1),
            token_ids_N=tokens_BT.reshape(-1),
            positions_N=torch.arange(context).repeat(sequences),
            sequences_N=torch.arange(i, j).repeat_interleave(context),
        )

    def kept(self, batch: int) -> int:
        """Rows of that batch that are not excluded; read from the index, no model."""
        return self.tokens.kept(*self.tokens.batch_range(batch, self.lm_batch))

    def close(self) -> None:
        """Nothing is held between batches: TransformerLens' hooks live only inside a forward pass."""
