"""The settings of `transformer_lens/bridge` (none) and the sites that it knows: a site and a model's sizes in, its hook name or a reason out; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from saehub.errors import SaehubError
from saehub.sites import Site

if TYPE_CHECKING:
    from saehub.api import ModelShape


@dataclass(frozen=True)
class BridgeConfig:
    """`transformer_lens/bridge` has no settings of its own: model, dtype, attention and batch are the recipe's; weights are never processed."""

    def refusal(self, site: str, shape: ModelShape) -> str | None:
        """Why TransformerLens cannot read `site`, or None; said at plan."""
        try:
            name = hook_name(site, shape)
        except SaehubError as error:
            return str(error.what)
        if name is None:
            return f"TransformerLens has no hook for {site} in a model of the {shape.family} family; extract: {{uses: native/hf}} reads any module"
        return None


def hook_name(site: str, shape: ModelShape) -> str | None:
    """TransformerLens' name of a site, such as `blocks.6.hook_resid_post`; None where it has none (module paths, encoders). UsageError: no such site."""
    return Site.parse(site).names(shape)["transformer_lens"]


def layer(site: str) -> int:
    """The block in which a site lies; -1 for `embed`."""
    number = Site.parse(site).layer
    return -1 if number is None else number
