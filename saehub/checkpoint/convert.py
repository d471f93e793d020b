"""A checkpoint in one library's format in; the same dictionary in another's, with a certificate that both libraries agree, out."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saehub.checkpoint.certificate import ACTIVE_SHARE, BY_EQUATION, BY_LIBRARY, FILE, INCONCLUSIVE, LOSSY, REFUSED, UNVERIFIED, Certificate
from saehub.errors import Caution, CheckFailed, FormatError, SaehubError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from saehub.checkpoint.probe import Probe
    from saehub.checkpoint.sae import SAE
    from saehub.data.model import ModelHandle

Invoke = Callable[..., Any]
"""`invoke(registered, config, method, **kwargs)`: one call of an exporter's method, in a worker process where its library needs one."""
ORIGINAL = "original"
"""Folder beside the target with the source's own tensors (`keep_original`)."""


class Refused(CheckFailed):
    """A conversion that was not made; `certificate` says why (outcome `refused`)."""

    def __init__(self, what: str, certificate: Certificate, **parts: Any):
        super().__init__(what, **parts)
        self.certificate = certificate


def in_process(registered: Any, config: Any, method: str, **kwargs: Any) -> Any:
    """`Invoke` without a worker: the library is imported here (tests; libraries that do no harm)."""
    return getattr(registered.load()(config), method)(**kwargs)


def convert(
    src: str | Path,
    dst: str | Path,
    to: str,
    *,
    from_: str | None = None,
    model: ModelHandle | str | None = None,
    verify: bool = True,
    allow_lossy: bool = False,
    keep_original: bool = False,
    strict: bool = False,
    seed: int = 0,
    invoke: Invoke | None = None,
) -> Certificate:
    """Read `src` (a folder or hf:// id), write `dst` in the format `to`, run both with their own libraries, and certify.

    The target is read back, and source and target are run in float32 on the golden probe's rows (if `src` has a probe) and on fresh
    ones: activations of `model` if given, else synthetic. `dst/conversion.json` is the certificate that is returned. Nothing is left at
    `dst` unless it is complete. With `verify=False` neither library runs, and the outcome is `unverified`.

    Raises Refused (exit code 1) where the target cannot say it, or where the two differ and `allow_lossy` is not set; UsageError for an
    unknown format or an existing `dst`; CheckFailed where `src` was changed after a certificate of its own and `strict` is set (else the new
    certificate has a caution: it proves what was converted, not that this is what was once written); MissingDependency where a library that must run is not installed.
    """
    from saehub.checkpoint.inputs import open_model
    from saehub.checkpoint.load import codec, locate, read, record_origin
    from saehub.checkpoint.written import lost_sites, mistakes, stale

    path, origin = locate(src)
    dst = Path(dst)
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise UsageError(f"{dst} exists and is not empty", fix="choose another folder, or remove it")
    target = _Side(dst, *codec(to))
    found, *how = read(path, from_)
    source = _Side(path, *how)
    source.sae = _kept_original(path, found) or found
    if origin:
        record_origin(source.sae, origin)
    certificate = Certificate("", source.about(src), target.about(dst))
    changed = stale(path, found, certificate.source["tensors_hash"]) if source.sae is found else None
    if changed:
        certificate.cautions.append(changed)
        if strict:
            fix = "convert its source again, or leave --strict out: the certificate then carries this as a caution"
            raise CheckFailed(f"{src} was changed after it was written", why=changed, fix=fix)
        warnings.warn(Caution(f"{src}: {changed}, so nothing vouches for what is converted now (saehub verify {src})"), stacklevel=2)
    reason = getattr(target.codec, "refusal", lambda sae: None)(source.sae)
    if reason:
        raise _refused(certificate, reason, source.sae, but=target.name)
    model = open_model(model, source.sae.provenance)

    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{dst.name}.", dir=dst.parent))
    except OSError as error:
        raise UsageError(f"{dst} cannot be written", why=error.strerror or str(error), fix="name a folder that you may write to") from error
    try:
        target.path = scratch / "target"
        try:
            notes = target.codec.write(source.sae, target.path) or {}
        except CheckFailed as error:  # a writer's own refusal
            raise _refused(certificate, error.what + (f": {error.why}" if error.why else ""), source.sae, but=target.name) from error
        target.sae = target.codec.read(target.path)
        if target.registered is None:
            _add_probe(source, target, model)
        certificate.target = target.about(dst)
        _note_tensors(certificate, source.sae, target.sae, notes)
        folds = getattr(source.codec, "folds", lambda path: [])(source.path)  # what reading had to fold, as from a training checkpoint
        certificate.folded = [*(f"on reading: {fold}" for fold in folds), *certificate.folded]
        certificate.dropped += lost_sites(source.sae, target.sae)
        wrong = mistakes(source.sae, target.sae, certificate.changed, notes)
        if verify and (allow_lossy or not wrong):
            _certify(certificate, source, target, model, seed, invoke)
        else:
            certificate.outcome, certificate.reason = UNVERIFIED, "asked not to verify"
        if wrong:
            more = [certificate.reason] if certificate.outcome == REFUSED else []
            certificate.outcome, certificate.reason = REFUSED, "; ".join([*wrong, *more])
        if certificate.outcome == REFUSED and allow_lossy:
            certificate.outcome = LOSSY
        if certificate.outcome == REFUSED:
            raise Refused(
                f"{src} was not converted: in {target.name} it is another dictionary",
                certificate,
                why=certificate.reason,
                fix="--allow-lossy writes it all the same",
            )
        if keep_original:
            from saehub.checkpoint.format import save

            save(source.sae, target.path / ORIGINAL)
            certificate.original = ORIGINAL
        certificate.write(target.path)
        if dst.exists():
            dst.rmdir()
        target.path.replace(dst)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return certificate


class _Side:
    """Source or target: where it is, in which format, who runs it."""

    def __init__(self, path: Path, name: str, codec: Any, registered: Any):
        self.path, self.name, self.codec, self.registered = path, name, codec, registered
        self.sae: SAE | None = None

    def about(self, shown: str | Path) -> dict[str, Any]:
        from saehub import __version__
        from saehub.checkpoint.format import sae_hash
        from saehub.checkpoint.written import identity

        versions = self.registered.library_versions() if self.registered else {"saehub": __version__}
        found: dict[str, Any] = {"path": str(shown), "format": self.name, "versions": versions}
        if self.sae is None:
            return found
        return found | {"tensors_hash": sae_hash(self.sae), "architecture": self.sae.config.architecture, **identity(self.sae)}

    def probe(self) -> Probe | None:
        """The golden probe, where this side is in the hub's own format and has one."""
        from saehub.checkpoint import format as v1
        from saehub.checkpoint.probe import read_probe

        file = self.path / v1.PROBE
        return read_probe(file, self.sae) if self.registered is None and file.is_file() else None

    def run(self, x_ND: Tensor, invoke: Invoke) -> tuple[Tensor, Tensor]:
        """With the library's own code."""
        if self.registered is None:
            return self.codec.run(self.path, x_ND)
        config = self.registered.load_config()
        acts_NF, recon_ND = invoke(self.registered, config() if config else None, "run", path=self.path, x_ND=x_ND)
        return acts_NF, recon_ND


def _certify(certificate: Certificate, source: _Side, target: _Side, model: ModelHandle | None, seed: int, invoke: Invoke | None) -> None:
    """Run both, compare, and put numbers and outcome into the certificate."""
    import torch

    from saehub.checkpoint.compare import compare
    from saehub.checkpoint.inputs import ROWS, rows_for
    from saehub.plugins import catalog

    if invoke is None:
        from saehub.pipeline.components import call_component as invoke
    for side in (source, target):
        if side.registered is not None:
            try:
                catalog().require(side.registered)
            except SaehubError as error:
                error.fix = f"{error.fix}   (or --no-verify: the result then says `unverified`)"
                raise
    rows = max(64, min(ROWS, 2**25 // source.sae.config.d_sae))
    x_ND, certificate.inputs = rows_for(source.sae, source.probe(), model, rows=rows, seed=seed)
    with torch.no_grad():
        found = compare(source.sae, target.sae, source.run(x_ND, invoke), target.run(x_ND, invoke), x_ND)
        certificate.low_precision = _low_precision(source.sae, x_ND)
    for name, value in found.values.items():
        setattr(certificate, name, value)
    if found.problems:
        certificate.outcome, certificate.reason = REFUSED, "; ".join(found.problems)
    elif certificate.active_share < ACTIVE_SHARE:
        certificate.outcome = INCONCLUSIVE
        certificate.reason = f"only {certificate.active_share:.0%} of the rows activate any latent (needed: {ACTIVE_SHARE:.0%}); give real activations with --model"
    else:
        by_library = target.registered is None or bool(target.registered.component.requires)
        certificate.outcome = BY_LIBRARY if by_library else BY_EQUATION


def _add_probe(source: _Side, target: _Side, model: ModelHandle | None) -> None:
    """Give a checkpoint in the hub's own format a golden probe: the source's, or one on real activations of `model` (without tokens: those
    rows come from the site that is claimed, so they cannot prove it)."""
    from saehub.checkpoint import format as v1
    from saehub.checkpoint.inputs import ROWS, SEQUENCE, real_rows
    from saehub.checkpoint.probe import make_probe

    old = source.probe()
    if old is not None:
        tokens = (old.token_ids_N, old.positions_N, None if old.contexts_ST is None else old.contexts_ST[old.context_of_row_N])
        probe = make_probe(target.sae, old.x, *tokens, target_ND=old.target_ND)
    elif model is not None:
        length = None if source.sae.row_wise else SEQUENCE
        probe = make_probe(target.sae, real_rows(model, str(source.sae.provenance.get("site") or ""), ROWS, length))
    else:
        return
    v1.save(target.sae, target.path, probe=probe, overwrite=True)


def _low_precision(sae: SAE, x_ND: Tensor) -> dict[str, Any] | None:
    """What running in the stored 16-bit dtype costs, by our own code; information, not a criterion."""
    import torch

    stored = {str(t.dtype).removeprefix("torch.") for t in sae.tensors().values()} & {"bfloat16", "float16"}
    if not stored:
        return None
    wide_ND = sae(x_ND, dtype=torch.float32)
    gap = float((sae(x_ND).float() - wide_ND).norm() / wide_ND.norm().clamp(min=1e-30))
    return {"dtype": ", ".join(sorted(stored)), "frobenius": gap}


def _note_tensors(certificate: Certificate, source: SAE, target: SAE, notes: Any) -> None:
    """Compare what was read back with the source, tensor by tensor, whatever the writer says; its folds and losses are its own words."""
    from saehub.checkpoint.stream import equal

    was, now = source.tensors(), target.tensors()
    same = [n for n in was if n in now and equal(was[n].cpu(), now[n].cpu())]
    certificate.bit_exact, certificate.changed = same, [n for n in was if n not in same]
    certificate.folded, certificate.dropped = list(notes.get("folded", ())), list(notes.get("dropped", ()))
    certificate.side_channel = list(notes.get("side_channel", ()))


def _refused(certificate: Certificate, reason: str, sae: SAE, *, but: str) -> Refused:
    """The refusal, with the formats that can say this SAE."""
    from saehub.checkpoint.load import NATIVE

    can = [*([NATIVE] if but != NATIVE else []), *formats_for(sae, but=but)]
    certificate.outcome, certificate.reason = REFUSED, reason
    return Refused(f"{but} cannot say this SAE", certificate, why=reason, fix=f"formats that can: {', '.join(can)}")


def formats_for(sae: SAE, *, but: str) -> list[str]:
    """Addresses of the registered exporters, `but` one, that say they can write this SAE."""
    from saehub.checkpoint.load import _instance, exporters

    can = []
    for address, registered in exporters().items():
        try:
            codec = _instance(registered)
            if address != but and hasattr(codec, "refusal") and codec.refusal(sae) is None:
                can.append(address)
        except SaehubError:
            continue
    return can


def _kept_original(path: Path, found: SAE) -> SAE | None:
    """The source tensors that an earlier `--keep-original` put beside, if the folder is still what that conversion wrote."""
    from saehub.checkpoint import format as v1
    from saehub.checkpoint.written import drift

    if not v1.is_checkpoint(path / ORIGINAL) or not (path / FILE).is_file():
        return None
    other = drift(Certificate.read(path / FILE).target, found)
    if other:
        raise FormatError(
            f"{path} was changed after its conversion, but {ORIGINAL}/ beside it was not",
            why=f"{FILE} speaks of {other}",
            fix=f"remove {path / ORIGINAL} to convert what is there now",
        )
    return v1.load(path / ORIGINAL)
