"""An SAE, its site and a model in; why SAEBench cannot measure it there, or None, out: asked before any work."""

from __future__ import annotations

from saehub.api import EvalContext, Subject
from saehub.errors import UsageError


def refusal(subject: Subject, context: EvalContext, *, row_wise: bool = True, heads: bool = False, only: str | None = None) -> str | None:
    """Why this SAE is not measured.

    Args:
        row_wise: whether the eval encodes single rows, so that an SAE that needs whole sequences cannot take part.
        heads: whether the eval knows sites whose rows are attention heads side by side.
        only: the one kind of site (such as `resid_post`) that the eval reads, whatever it is told.
    """
    from saehub.sites import Site

    config = subject.sae.config
    if config.kind != "autoencoder" or subject.target_site not in (None, subject.site):
        return f"SAEBench puts the reconstruction back where it read: a {config.kind} predicts another site"
    if row_wise and not subject.sae.row_wise:
        return f"SAEBench encodes single rows here; {config.architecture} needs whole sequences"
    if context.model is None:
        return None
    site = Site.parse(subject.site)
    try:
        width, name = site.width(context.model.shape), site.names(context.model.shape)["transformer_lens"]
    except UsageError as error:
        return error.what
    if name is None or site.layer is None:
        return f"{subject.site} has no TransformerLens hook in a layer, and SAEBench knows no other address"
    if width != config.d_in:
        return f"the SAE reads {config.d_in} numbers a row, {subject.site} of {context.model.spec.name} has {width}"
    if site.kind == "attn_z" and not heads:
        return "SAEBench reads hook_z here as heads × width, not as rows"
    if only is not None and site.kind != only:
        return f"SAEBench reads {only} of the layer here whatever site the SAE is of; {subject.site} would be measured on the wrong tensor"
    return None


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
