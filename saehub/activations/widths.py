"""A model's name and a site in; the width of the tensor there out, without loading weights."""

from __future__ import annotations

import torch
import transformers

from saehub.activations import taps
from saehub.api import ModelShape, ModelSpec
from saehub.data.model import auto_class, read_config
from saehub.errors import UsageError
from saehub.sites import Site


def site_width(spec: ModelSpec, site: Site, shape: ModelShape) -> int:
    """Size of the last dimension at `site`: from the tables, else from the shapes of the module's own weights (built without data on the meta device)."""
    width = site.width(shape)
    if width is not None:
        return width
    config = read_config(spec.name, spec.revision, fetch=True)
    with torch.device("meta"):
        model = getattr(transformers, auto_class(config)).from_config(transformers.AutoConfig.for_model(**config))
    module = taps.resolve(model, site.module)
    weight = getattr(module, "weight", None)
    if weight is not None and weight.ndim == 1:  # a norm
        return weight.shape[0]
    if isinstance(module, torch.nn.Linear):
        return weight.shape[1] if site.io == "in" else weight.shape[0]
    if weight is not None and weight.ndim == 2 and (isinstance(module, torch.nn.Embedding) or type(module).__name__ == "Conv1D"):
        return weight.shape[0] if site.io == "in" and not isinstance(module, torch.nn.Embedding) else weight.shape[1]
    raise UsageError(
        f"the width at {site} cannot be read before the model runs",
        why=f"it is a {type(module).__name__}",
        fix="name a linear layer or norm beside it",
    )
