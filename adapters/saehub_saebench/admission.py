"""An SAE, its site and a model in; why SAEBench cannot measure it there, or None, out: asked before any work."""

from __future__ import annotations

from saehub.api import EvalContext, PlannedSAE, Subject
from saehub.errors import UsageError
from saehub_saebench.config import NO_HOOK, Autoencoders


def refusal(subject: Subject, context: EvalContext, admits: Autoencoders) -> str | None:
    """Why this SAE is not measured: what `admits`, the eval's settings, said at plan, and what takes the model to know."""
    from saehub.sites import Site

    config = subject.sae.config
    elsewhere = subject.target_site if subject.target_site != subject.site else None
    if reason := admits.refusal(PlannedSAE(subject.id, config.architecture, config.kind, target_site=elsewhere, row_wise=subject.sae.row_wise)):
        return reason
    if context.model is None:
        return None
    site = Site.from_foreign(subject.site, context.model.shape)
    try:
        width, name = site.width(context.model.shape), site.names(context.model.shape)["transformer_lens"]
    except UsageError as error:
        return error.what
    if name is None:
        return NO_HOOK.format(site=subject.site)
    if width != config.d_in:
        return f"the SAE reads {config.d_in} numbers a row, {subject.site} of {context.model.spec.name} has {width}"
    return admits.site_refusal(str(site))


def bridge_of(context: EvalContext):
    """The model as a TransformerBridge with unprocessed weights, and a tokenizer of its own that SAEBench may change.

    A TransformerBridge passes for a HookedTransformer in every eval, once `JAXTYPING_DISABLE=1` keeps the type checks out.
    """
    import copy

    model = context.model.bridge()
    if not hasattr(model, "_saehub_tokenizer"):
        words = copy.deepcopy(context.model.tokenizer)
        if words.pad_token_id is None:
            words.pad_token = words.eos_token or words.bos_token
        model.tokenizer = words  # the bridge sets it up, and may keep another object
        model.tokenizer.__class__ = ordered(type(model.tokenizer))
        model._saehub_tokenizer = True
    return model


def ordered(cls: type) -> type:
    """`cls` with its vocabulary in the order of ids. A fast tokenizer gives it in that of a hash map, another one each time it is asked,
    and SAEBench draws its words and examples from it: without this no seed makes absorption repeatable."""
    return type(cls.__name__, (cls,), {"vocab": property(lambda self: dict(sorted(self.get_vocab().items(), key=lambda item: item[1])))})
