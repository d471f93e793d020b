"""A checkpoint folder (and the language model, if at hand) in; a list of checks with their outcomes out: is this still the dictionary that was saved?"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from saehub.errors import FormatError, SaehubError, UsageError

if TYPE_CHECKING:
    import torch

    from saehub.checkpoint.probe import Probe
    from saehub.checkpoint.sae import SAE
    from saehub.data.model import ModelHandle

REPLAY_TOLERANCE = 1e-11
"""Largest difference of float64 features and reconstructions, relative to the row's largest, and of margins, relative to the largest
feature of the probe: summation order, nothing else."""
ACTIVE_SHARE = 0.9
"""A probe that activates fewer of its rows proves nothing."""
SITE_TOLERANCE = {"float32": 2e-3, "bfloat16": 6e-2, "float16": 2e-2}
"""Largest relative difference ‖x - x'‖/‖x‖ of a re-extracted row, by the model's or the rows' coarser dtype: batch shape and attention kernel move the last bits."""

PROVABLE = (
    "only the probe of a training run, saved with its tokens, can prove the site; "
    "saehub eval PATH --with native/core --model MODEL warns where another site fits better"
)
ADD_PROBE = "saehub convert PATH NEW --to saehub --model MODEL adds a probe (without tokens: it proves the dictionary, not the site)"

Status = Literal["ok", "failed", "not verified", "inconclusive"]


@dataclass(frozen=True)
class Check:
    """One question and its answer."""

    name: str
    """`header`, `tensors`, `probe file`, `probe replay`, `site`, …"""
    status: Status
    detail: str
    """What was compared, with numbers."""
    fix: str | None = None


@dataclass
class Report:
    """What `saehub verify` prints."""

    path: str
    format: str
    checks: list[Check] = field(default_factory=list)
    site_open: Status = "not verified"
    """What a site is that nothing can prove: `inconclusive` where it was asked for."""

    @property
    def ok(self) -> bool:
        """Nothing failed and nothing was inconclusive (`not verified` says so and is not a failure)."""
        return not any(check.status in ("failed", "inconclusive") for check in self.checks)

    @property
    def verdict(self) -> str:
        """`verified: header, tensors; not verified: site`, or `NOT verified: probe replay`: what was shown, and what was not."""
        names = {status: [check.name for check in self.checks if check.status == status] for status in ("ok", "not verified")}
        if not self.ok:
            return f"NOT verified: {', '.join(check.name for check in self.checks if check.status in ('failed', 'inconclusive'))}"
        return "; ".join(f"{word}: {', '.join(found)}" for word, found in zip(("verified", "not verified"), names.values(), strict=True) if found)

    def add(self, name: str, status: Status, detail: str, fix: str | None = None) -> None:
        """Append a check."""
        self.checks.append(Check(name, status, detail, fix))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"path": self.path, "format": self.format, "ok": self.ok, "checks": [vars(check) for check in self.checks]}

    def __str__(self) -> str:
        width = max((len(check.name) for check in self.checks), default=0)
        lines = [
            f"{check.name:<{width}}  {check.status:<12}  {check.detail}" + (f"\n{'':<{width}}  fix: {check.fix}" if check.fix else "")
            for check in self.checks
        ]
        return "\n".join([f"{self.path} ({self.format})", *lines])


def verify(source: str | Path, model: ModelHandle | str | None = None) -> Report:
    """Check a checkpoint: header and tensor hashes, the golden probe replayed in float64 on the CPU, and with the model (loaded, or its
    name) the site.

    Never raises for a damaged checkpoint: that is a failed check. A site that the model was given for and that nothing here can prove is
    inconclusive. UsageError if nothing is at `source`.
    """
    from saehub.checkpoint.load import NATIVE, codec, find_format, locate, unknown

    path, _ = locate(source)
    name = find_format(path)
    report = Report(str(source), name or "unknown")
    report.site_open = "not verified" if model is None else "inconclusive"
    if name is None:
        error = unknown(path)
        report.add("format", "failed", _one_line(error), error.fix)
    elif name == NATIVE:
        _verify_native(report, path, model)
    else:
        try:
            sae = codec(name)[1].read(path)
            report.add("tensors", "ok", f"readable, {len(sae.tensors())} tensors of the right shapes, no NaN; the format stores no hashes")
            _verify_certificate(report, path, sae, "inconclusive")
        except SaehubError as error:
            report.add("tensors", "failed", _one_line(error), error.fix)
        report.add("site", report.site_open, "the format stores no probe", PROVABLE)
    return report


def _verify_native(report: Report, path: Path, model: ModelHandle | str | None) -> None:
    from saehub.checkpoint import format as v1
    from saehub.checkpoint.probe import read_probe
    from saehub.jsonio import sha256_file

    try:
        header = v1.read_header(path)
        report.add("header", "ok", f"format {header['format_version']}, hash {header['hash'][:16]}…")
        sae = v1.load(path)
        report.add("tensors", "ok", f"{len(header['tensors'])} tensors match their SHA-256 ({header['tensors_hash'][:16]}…)")
    except SaehubError as error:
        report.add("tensors" if report.checks else "header", "failed", _one_line(error), error.fix)
        return
    _verify_certificate(report, path, sae, "not verified")  # the hashes say that it is what was saved, whatever a conversion left open
    file = path / v1.PROBE
    if header["probe"] is None:
        if file.exists():
            report.add("probe file", "failed", f"{file} exists, but the header lists no probe", v1.RESTORE)
        else:
            report.add("probe replay", "not verified", "saved without a probe", ADD_PROBE)
        report.add("site", report.site_open, "no probe", PROVABLE)
        return
    try:
        found = sha256_file(file) if file.is_file() else None
        if found != header["probe"]["sha256"]:
            raise FormatError(f"{file} is {'missing' if found is None else 'not the probe that was saved'}", fix=v1.RESTORE)
        probe = read_probe(file, sae)
    except SaehubError as error:
        report.add("probe file", "failed", _one_line(error), error.fix)
        return
    report.add("probe file", "ok", f"{probe.rows} rows" + (", with tokens" if probe.token_ids_N is not None else ", without tokens"))
    _replay(report, sae, probe)
    _verify_site(report, sae, probe, model)


def _replay(report: Report, sae: SAE, probe: Probe) -> None:
    """Recompute the probe and compare; a support difference counts unless the row's margins, stored and found, are within rounding.

    Margins are compared too: a threshold that moves by a thousandth changes every row's margin, but few rows' latents.
    """
    import torch

    from saehub.checkpoint.probe import answers

    with torch.no_grad():
        values, indices, offsets, reconstruction_ND, margin_N = answers(sae, probe.x)
    shape = (probe.rows, sae.config.d_sae)
    worst_feature, flipped = 0.0, 0
    compared_N = torch.ones(probe.rows, dtype=torch.bool)
    for row in range(probe.rows):
        was, now = torch.zeros(shape[1], dtype=torch.float64), torch.zeros(shape[1], dtype=torch.float64)
        was[probe.feature_indices[probe.row_offsets[row] : probe.row_offsets[row + 1]]] = probe.feature_values[
            probe.row_offsets[row] : probe.row_offsets[row + 1]
        ]
        now[indices[offsets[row] : offsets[row + 1]]] = values[offsets[row] : offsets[row + 1]]
        scale = max(float(was.abs().max()), float(now.abs().max()), 1e-300)
        if bool(((was != 0) != (now != 0)).any()):
            compared_N[row] = False  # other latents, another reconstruction
            flipped += max(float(probe.margin_N[row]), float(margin_N[row])) > REPLAY_TOLERANCE * scale  # else a tie within rounding
            continue
        worst_feature = max(worst_feature, float((was - now).abs().max()) / scale)
    scale_N = torch.maximum(probe.reconstruction_ND.abs().amax(1), reconstruction_ND.abs().amax(1)).clamp(min=1e-300)
    differences_N = ((probe.reconstruction_ND - reconstruction_ND).abs().amax(1) / scale_N)[compared_N]
    worst_output = float(differences_N.max()) if differences_N.numel() else 0.0
    largest = max(float(probe.feature_values.abs().max()) if probe.feature_values.numel() else 0.0, 1e-300)
    gaps_N = ((probe.margin_N - margin_N).abs() / torch.maximum(probe.margin_N, margin_N).clamp(min=largest))[compared_N]
    worst_margin = float(gaps_N.max()) if gaps_N.numel() and probe.feature_values.numel() else 0.0
    detail = (
        f"float64: features within {worst_feature:.1e}, reconstruction within {worst_output:.1e}, margins within {worst_margin:.1e}, "
        f"{flipped} rows with other latents; mean L0 {probe.mean_l0:.1f}"
    )
    if flipped or max(worst_feature, worst_output, worst_margin) > REPLAY_TOLERANCE:
        report.add(
            "probe replay",
            "failed",
            f"{detail} (allowed {REPLAY_TOLERANCE:.0e})",
            "this dictionary is not the one that was saved: restore it",
        )
    elif probe.active_rows < ACTIVE_SHARE * probe.rows:
        report.add(
            "probe replay",
            "inconclusive",
            f"{detail}; only {probe.active_rows} of {probe.rows} rows activate any latent",
            "save again with a probe of rows it activates on",
        )
    elif int(compared_N.sum()) < ACTIVE_SHARE * probe.rows:
        report.add(
            "probe replay",
            "inconclusive",
            f"{detail}; {probe.rows - int(compared_N.sum())} of {probe.rows} rows are ties",
            "save again with a probe of other rows",
        )
    else:
        report.add("probe replay", "ok", detail)


def _verify_site(report: Report, sae: SAE, probe: Probe, model: ModelHandle | str | None) -> None:
    """Extract the probe's rows again from its token contexts; only this proves which tensor the dictionary reads."""
    site, target = sae.provenance.get("site"), sae.provenance.get("target_site")
    if probe.contexts_ST is None:
        report.add("site", report.site_open, "the probe was saved without its tokens", PROVABLE)
        return
    if model is None:
        report.add("site", "not verified", f"it claims {site}", "saehub verify PATH --model MODEL")
        return
    if not site:
        report.add("site", report.site_open, "the checkpoint names no site")
        return
    from saehub.checkpoint.inputs import open_model

    model = open_model(model, sae.provenance)
    claimed = (sae.provenance.get("model") or {}).get("fingerprint")
    if claimed and getattr(model, "fingerprint", None) not in (None, claimed):
        report.add(
            "model", "failed", f"the SAE was trained on {claimed}, this model is {model.fingerprint}", "give the same model and revision"
        )
    for label, name, rows_ND in (("site", site, probe.x_ND), ("target site", target, probe.target_ND)):
        if rows_ND is None or not name:
            if label == "target site" and target:
                report.add(label, report.site_open, f"it claims {target}; the probe holds no target rows")
            continue
        try:
            _compare_site(report, label, name, rows_ND, probe, model)
        except SaehubError as error:
            report.add(label, "failed", f"{name}: {_one_line(error)}", error.fix)


def _compare_site(report: Report, label: str, name: str, rows_ND: torch.Tensor, probe: Probe, model: ModelHandle) -> None:
    import torch

    dtypes = {str(rows_ND.dtype).removeprefix("torch."), str(next(model.hf.parameters()).dtype).removeprefix("torch.")}
    allowed = max(SITE_TOLERANCE.get(dtype, 2e-3) for dtype in dtypes)
    found_ND = _extract(model, probe, [name])[name]
    if found_ND.shape != rows_ND.shape:
        report.add(
            label, "failed", f"{name} has width {found_ND.shape[1]} in this model, the probe {rows_ND.shape[1]}", "is it the right model?"
        )
        return
    worst = float(_relative(rows_ND, found_ND).max())
    if worst <= allowed:
        report.add(label, "ok", f"{name}: {probe.rows} rows extracted again, within {worst:.1e} (allowed {allowed:.0e})")
        return
    middle = float(torch.quantile(_relative(rows_ND, found_ND), 0.5))
    nearest, distance = _nearest_site(model, probe, rows_ND)
    hint = (
        f"the rows are those of {nearest} (within {distance:.1e})"
        if nearest and distance <= allowed
        else "no site of this model gives these rows: is it the right model?"
    )
    report.add(
        label,
        "failed",
        f"{name}: rows differ by {middle:.1e} (median), {worst:.1e} at most, allowed {allowed:.0e}; {hint}",
        "correct the site, or give the right model",
    )


def _relative(a_ND: torch.Tensor, b_ND: torch.Tensor) -> torch.Tensor:
    a_ND, b_ND = a_ND.double(), b_ND.double()
    return (a_ND - b_ND).norm(dim=1) / a_ND.norm(dim=1).clamp(min=1e-12)


def _extract(model: ModelHandle, probe: Probe, names: list[str]) -> dict[str, torch.Tensor]:
    """Rows [N, d] at each site, a few contexts a forward pass."""
    import torch

    from saehub.activations.taps import read
    from saehub.sites import Site

    taps = {name: Site.parse(name).tap(model.shape) for name in names}
    pieces: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    order = []
    for start in range(0, probe.contexts_ST.shape[0], 8):
        contexts_BT = probe.contexts_ST[start : start + 8]
        here_N = ((probe.context_of_row_N >= start) & (probe.context_of_row_N < start + 8)).nonzero().squeeze(1)
        order.append(here_N)
        for name, x_BTD in read(model.hf, contexts_BT, taps).items():
            x_BTD = x_BTD.detach().cpu()
            pieces[name].append(x_BTD[probe.context_of_row_N[here_N] - start, probe.positions_N[here_N]].flatten(1))
    back = torch.cat(order).argsort()
    return {name: torch.cat(parts)[back] for name, parts in pieces.items()}


def _nearest_site(model: ModelHandle, probe: Probe, rows_ND: torch.Tensor) -> tuple[str | None, float]:
    """Of all named sites of the model, the one whose rows are nearest, and how near in the worst row."""
    from saehub.sites import KINDS, Site

    from saehub.activations.taps import resolve

    names = []
    for name in ["embed", *(f"{kind}.{layer}" for layer in range(model.shape.n_layers) for kind in KINDS if kind != "embed")]:
        try:
            if Site.parse(name).width(model.shape) == rows_ND.shape[1]:
                resolve(model.hf, Site.parse(name).tap(model.shape).module)
                names.append(name)
        except UsageError:  # a site that this family, or this model, lacks
            continue
    if not names:
        return None, float("inf")
    found = _extract(model, probe, names)
    distances = {name: float(_relative(rows_ND, found_ND).max()) for name, found_ND in found.items() if found_ND.shape == rows_ND.shape}
    best = min(distances, key=distances.__getitem__, default=None)
    return best, distances.get(best, float("inf"))


def _verify_certificate(report: Report, path: Path, sae: SAE, open_: Status) -> None:
    """A conversion certificate beside the files: does it still speak of these tensors? `open_`: what one is that proved nothing."""
    from saehub.checkpoint.certificate import FILE, Certificate
    from saehub.checkpoint.written import stale

    if not (path / FILE).is_file():
        return
    changed = stale(path, sae)
    if changed:
        report.add("certificate", "failed", changed, "convert again")
        return
    certificate = Certificate.read(path / FILE)
    detail = "; of the source: ".join([f"these tensors: {certificate.outcome}", *certificate.cautions])
    report.add("certificate", "ok" if certificate.passed else open_, detail)


def _one_line(error: SaehubError) -> str:
    return error.what + (f" ({error.why})" if error.why else "")
