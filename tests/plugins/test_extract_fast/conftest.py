"""A model in memory and random tokens in; an open `native/hf` session, and the same rows by plain hooks, out."""

from types import SimpleNamespace

import pytest
import torch

from saehub.data.model import shape_of
from saehub.sites import Site
from saehub_native import extract

CONTEXT, SEQUENCES = 12, 11  # the last batch of four is smaller
SITES = ["resid_pre.1", "attn_z.1", "mlp_act.1", "resid_post.1", "resid_mid.2"]  # before, inside and after a block; the last ends the pass


def opened(hf, sites=SITES, lm_batch=4):
    tokens_NT = torch.randint(1, 61, (SEQUENCES, CONTEXT), generator=torch.Generator().manual_seed(1))
    tokens_NT[::3, 7:] = 0  # padding at the end of some sequences
    tokens = SimpleNamespace(
        context=CONTEXT,
        hash="toy",
        n_batches=lambda lm_batch: -(-SEQUENCES // lm_batch),
        calibration_batches=lambda lm_batch: 0,
        tokens=lambda i, j: tokens_NT[i:j],
        keep=lambda i, j: tokens_NT[i:j] != 0,
        batch_range=lambda batch, lm_batch: (batch * lm_batch, min(SEQUENCES, (batch + 1) * lm_batch)),
        kept=lambda i, j: int((tokens_NT[i:j] != 0).sum()),
    )
    return extract.HFSession(SimpleNamespace(hf=hf, shape=shape_of(hf.config.to_dict())), tokens, sites, lm_batch), tokens_NT


def plain(hf, tokens_BT, sites=SITES):
    """site -> [B, T, d] by one hook a site on the whole model; no code of ours runs the model."""
    found, handles, shape = {}, [], shape_of(hf.config.to_dict())
    first = lambda value: value[0] if isinstance(value, tuple) else value  # noqa: E731
    for site in sites:
        tap = Site.parse(site).tap(shape)
        module = hf.get_submodule(tap.module)
        if tap.io == "in":
            hook = lambda m, args, kwargs, site=site: found.__setitem__(site, (args[0] if args else kwargs["hidden_states"]).clone())  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(lambda m, a, out, site=site: found.__setitem__(site, first(out).clone())))
    with torch.no_grad():
        hf(tokens_BT)
    for handle in handles:
        handle.remove()
    return found


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.fixture(scope="session")
def toys():
    return SimpleNamespace(context=CONTEXT, sites=SITES, opened=opened, plain=plain, relative=relative)
