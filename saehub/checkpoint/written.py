"""What a writer was given and what reads back in; what is not as it was meant, in words, out: the part of a certificate that needs no library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saehub.errors import FormatError, SaehubError
from saehub.jsonio import hash_json

if TYPE_CHECKING:
    from saehub.checkpoint.sae import SAE

SITES = ("site", "target_site")


def mistakes(source: SAE, target: SAE, changed: Sequence[str], notes: Mapping[str, Any]) -> list[str]:
    """What the writer of `target` (as read back) got wrong, whatever it computes on some rows; empty if nothing.

    A latent that no row wakes is only seen here: a tensor that the writer calls bit-exact must be, and one that is not (`changed`) needs a
    fold or a loss that says why. A site must not turn into another one; a target that cannot carry it may say none.
    """
    broken = [name for name in changed if name in notes.get("bit_exact", ())]
    if not broken and not notes.get("folded") and not notes.get("dropped"):
        broken = list(changed)
    found = [f"{', '.join(broken)} read back changed, and the writer says nothing of it"] if broken else []
    for key in SITES:
        was, now = _name(source.provenance, key), _name(target.provenance, key)
        if now is not None and (was is None or _canonical(now, source) != _canonical(was, source)):
            found.append(f"the target says that its {key} is {now}, the source {'says none' if was is None else f'says {was}'}")
    return found


def lost_sites(source: SAE, target: SAE) -> list[str]:
    """Sites that the target does not say: its format has no place for them."""
    names = [(key, _name(source.provenance, key)) for key in SITES]
    return [f"{key} {name}" for key, name in names if name is not None and _name(target.provenance, key) is None]


def identity(sae: SAE) -> dict[str, Any]:
    """What a certificate keeps of an SAE besides its tensors' hash."""
    return {"config_hash": hash_json(sae.config.to_json()), "sites": {key: _name(sae.provenance, key) for key in SITES}}


def drift(recorded: Mapping[str, Any], sae: SAE, tensors_hash: str | None = None) -> str | None:
    """How `sae` differs from what a certificate recorded (`tensors_hash` and `identity`), or None.

    A site that was not recorded does not count: some formats take it from the folder's name. `tensors_hash` of `sae`, if known.
    """
    from saehub.checkpoint.format import sae_hash

    now = identity(sae)
    if recorded.get("tensors_hash") != (tensors_hash or sae_hash(sae)):
        return "other tensors"
    if recorded.get("config_hash") not in (None, now["config_hash"]):
        return "another config"
    sites = recorded.get("sites") or {}
    if any(name is not None and now["sites"].get(key) != name for key, name in sites.items()):
        return "another site"
    return None


def stale(path: Path, sae: SAE, tensors_hash: str | None = None) -> str | None:
    """Why the certificate in the folder `path` says nothing of the `sae` read from it; None if there is none, or it does."""
    from saehub.checkpoint.certificate import FILE, Certificate

    if not (path / FILE).is_file():
        return None
    try:
        other = drift(Certificate.read(path / FILE).target, sae, tensors_hash)
    except FormatError as error:
        return error.what
    return f"{FILE} speaks of {other}: the files were changed after the conversion" if other else None


def _name(provenance: Mapping[str, Any], key: str) -> str | None:
    return provenance.get(key) or provenance.get(f"unknown_{key}") or None


def _canonical(name: str, sae: SAE) -> str:
    """One of the names of a tensor: `model.layers.6:out` and `resid_post.6` are the same, in a model whose family is known."""
    from saehub.api import ModelShape
    from saehub.checkpoint.foreign import local_shape
    from saehub.sites import Site

    unknown = ModelShape("other", n_layers=10**6, d_model=1, d_mlp=1, n_heads=1, d_head=1, vocab=1, context=1)
    try:
        return str(Site.from_foreign(str(name), local_shape(sae.provenance.get("model") or {}) or unknown))
    except SaehubError:
        return str(name)
