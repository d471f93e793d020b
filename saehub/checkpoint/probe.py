"""An SAE and real input rows in; the golden probe out: what this dictionary computes in float64, to be recomputed anywhere, any time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saehub.errors import FormatError, UsageError

if TYPE_CHECKING:
    from saehub.checkpoint.sae import SAE

MIN_ROWS = 64
"""Fewer rows than this do not say much about a dictionary."""
SHAPES = {
    "x": ("N", "d_in"),
    "feature_values": ("nnz",),
    "feature_indices": ("nnz",),
    "row_offsets": ("N+1",),
    "reconstruction": ("N", "d_out"),
    "margin": ("N",),
    "token_ids": ("N",),
    "positions": ("N",),
    "contexts": ("S", "T"),
    "context_of_row": ("N",),
    "target": ("N", "d_out"),
    "sequence_length": (),
}
_OPTIONAL = ("target", "sequence_length")
_TOKENS = ("token_ids", "positions", "contexts", "context_of_row")


@dataclass(frozen=True)
class Probe:
    """N real rows and the float64 answers of the stored tensors to them. Features are sparse: row r has the entries
    row_offsets[r] … row_offsets[r+1] of `feature_indices` (ascending) and `feature_values`."""

    x_ND: Tensor
    """[N, d_in], as the SAE was given them (raw units), any floating dtype."""
    feature_values: Tensor
    """float64 [nnz]."""
    feature_indices: Tensor
    """int64 [nnz]."""
    row_offsets: Tensor
    """int64 [N+1]."""
    reconstruction_ND: Tensor
    """float64 [N, d_out]."""
    margin_N: Tensor
    """float64 [N]: the least change of a pre-activation that would change the row's support."""
    token_ids_N: Tensor | None = None
    """int64 [N]: the token at each row."""
    positions_N: Tensor | None = None
    """int64 [N]: its position in the context."""
    contexts_ST: Tensor | None = None
    """int64 [S, T]: the token sequences the rows come from, as the model read them."""
    context_of_row_N: Tensor | None = None
    """int64 [N]: which of them."""
    target_ND: Tensor | None = None
    """[N, d_out]: a transcoder's real targets."""
    sequence_length: int | None = None
    """T where the SAE is not row-wise: rows 0 … T-1 are one sequence, T … 2T-1 the next."""

    @property
    def x(self) -> Tensor:
        """The rows as the SAE takes them: [N, d_in], or [N/T, T, d_in] where it needs whole sequences."""
        return self.x_ND if self.sequence_length is None else self.x_ND.reshape(-1, self.sequence_length, self.x_ND.shape[1])

    @property
    def rows(self) -> int:
        """N."""
        return self.x_ND.shape[0]

    @property
    def active_rows(self) -> int:
        """Rows with at least one active latent."""
        return int((self.row_offsets.diff() > 0).sum())

    @property
    def mean_l0(self) -> float:
        """Active latents a row."""
        return self.feature_values.shape[0] / max(1, self.rows)

    def to_tensors(self) -> dict[str, Tensor]:
        """What stands in probe.safetensors."""
        named = {
            "x": self.x_ND, "feature_values": self.feature_values, "feature_indices": self.feature_indices, "row_offsets": self.row_offsets,
            "reconstruction": self.reconstruction_ND, "margin": self.margin_N, "token_ids": self.token_ids_N, "positions": self.positions_N,
            "contexts": self.contexts_ST, "context_of_row": self.context_of_row_N, "target": self.target_ND,
            "sequence_length": None if self.sequence_length is None else torch.tensor(self.sequence_length),
        }  # fmt: skip
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def answers(sae: SAE, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Float64 on the CPU, in chunks of rows [N, d_in] (or of sequences [S, T, d_in], N = S·T, where the SAE needs them whole): feature
    values, indices and row offsets, reconstruction [N, d_out], margin [N]."""
    from saehub.checkpoint.sae import CHUNK_ELEMENTS

    values, indices, counts, reconstructions, margins = [], [], [], [], []
    step = max(1, CHUNK_ELEMENTS // (4 * sae.config.d_sae)) if sae.row_wise else 1
    for start in range(0, x.shape[0], step):
        x_BD = x[start : start + step].to("cpu", torch.float64)
        p_BF = sae.preacts(sae.centre(x_BD))
        acts_BF = sae.activate(p_BF)
        recon_BD, margin_BF = sae.decode(acts_BF, like=x_BD, dtype=torch.float64), sae.margin(p_BF)
        if not sae.row_wise:
            acts_BF, recon_BD, margin_BF = acts_BF.flatten(0, 1), recon_BD.flatten(0, 1), margin_BF.flatten(0, 1)
        rows, latents = acts_BF.nonzero(as_tuple=True)
        values.append(acts_BF[rows, latents])
        indices.append(latents)
        counts.append((acts_BF != 0).sum(1))
        reconstructions.append(recon_BD)
        margins.append(margin_BF.amin(1).clamp(max=torch.finfo(torch.float64).max))
    offsets = torch.nn.functional.pad(torch.cat(counts).cumsum(0), (1, 0))
    return torch.cat(values), torch.cat(indices), offsets, torch.cat(reconstructions), torch.cat(margins)


def make_probe(
    sae: SAE,
    x_ND: Tensor,
    token_ids: Tensor | None = None,
    positions: Tensor | None = None,
    contexts: Tensor | None = None,
    *,
    target_ND: Tensor | None = None,
) -> Probe:
    """The golden probe of `sae` on rows [N, d_in], N ≥ 64, in the units that `sae` takes.

    `token_ids` and `positions` [N] and `contexts` [N, T] (each row's whole token sequence) let `verify --model` extract the rows
    again; all three or none. `target_ND` [N, d_out] does the same for a transcoder's output site. An SAE that is not row-wise takes whole
    sequences [S, T, d_in], N = S·T, in place of rows. UsageError on wrong shapes.
    """
    length = None
    if not sae.row_wise:
        if x_ND.ndim != 3:
            raise UsageError(
                f"a probe of {sae.config.architecture} from rows of shape {list(x_ND.shape)}",
                why="its features depend on the whole sequence",
                fix="give sequences [S, T, d_in]",
            )
        length, x_ND = x_ND.shape[1], x_ND.flatten(0, 1)
    if x_ND.ndim != 2 or x_ND.shape[1] != sae.config.d_in or x_ND.shape[0] < MIN_ROWS:
        raise UsageError(
            f"a probe from rows of shape {list(x_ND.shape)}", why=f"expected at least {MIN_ROWS} rows of d_in = {sae.config.d_in}"
        )
    if not bool(x_ND.isfinite().all()):
        raise UsageError("a probe from rows with NaN or infinity", fix="choose other rows")
    tokens = (token_ids, positions, contexts)
    if any(part is None for part in tokens) != all(part is None for part in tokens):
        raise UsageError("a probe with some of token_ids, positions and contexts", fix="give all three, or none")
    stored: dict[str, Tensor] = {}
    if token_ids is not None and positions is not None and contexts is not None:
        stored = _context_tensors(x_ND.shape[0], *(part.detach().cpu().long() for part in (token_ids, positions, contexts)))
    if target_ND is not None and tuple(target_ND.shape) != (x_ND.shape[0], sae.config.d_out):
        raise UsageError(f"probe targets of shape {list(target_ND.shape)}", why=f"expected [{x_ND.shape[0]}, {sae.config.d_out}]")
    x_ND = x_ND.detach().cpu()
    cpu = (
        sae
        if next(iter(sae.tensors().values())).device.type == "cpu"
        else type(sae)(sae.config, {n: t.cpu() for n, t in sae.tensors().items()})
    )
    with torch.no_grad():
        x = x_ND if length is None else x_ND.reshape(-1, length, x_ND.shape[1])
        values, indices, offsets, reconstruction, margin = answers(cpu, x)
    target_ND = None if target_ND is None else target_ND.detach().cpu()
    return Probe(x_ND, values, indices, offsets, reconstruction, margin, **stored, target_ND=target_ND, sequence_length=length)


def _context_tensors(rows: int, token_ids_N: Tensor, positions_N: Tensor, contexts_NT: Tensor) -> dict[str, Tensor]:
    if not (token_ids_N.shape == positions_N.shape == (rows,) and contexts_NT.ndim == 2 and contexts_NT.shape[0] == rows):
        raise UsageError(
            "token_ids, positions and contexts of a probe do not fit its rows", why=f"expected [{rows}], [{rows}], [{rows}, T]"
        )
    if int(positions_N.min()) < 0 or int(positions_N.max()) >= contexts_NT.shape[1]:
        raise UsageError("a probe position lies outside its context", why=f"contexts have {contexts_NT.shape[1]} tokens")
    if not torch.equal(contexts_NT.gather(1, positions_N[:, None]).squeeze(1), token_ids_N):
        raise UsageError("a probe's token_ids are not the tokens at its positions", fix="contexts[r, positions[r]] must be token_ids[r]")
    contexts_ST, context_of_row_N = contexts_NT.unique(dim=0, return_inverse=True)
    return {"token_ids_N": token_ids_N, "positions_N": positions_N, "contexts_ST": contexts_ST, "context_of_row_N": context_of_row_N}


def read_probe(file: Path, sae: SAE) -> Probe:
    """A stored probe, shapes and ranges checked against the SAE; FormatError names the file."""
    from saehub.checkpoint.format import RESTORE, read_tensors

    found = read_tensors(Path(file))
    needed = [name for name in SHAPES if name not in (*_TOKENS, *_OPTIONAL)]
    missing = [name for name in needed if name not in found]
    unknown = [name for name in found if name not in SHAPES]
    some_tokens = [name for name in _TOKENS if name in found]
    if missing or unknown or len(some_tokens) not in (0, len(_TOKENS)):
        raise FormatError(
            f"{file} is not a probe",
            why=f"missing: {', '.join(missing or [n for n in _TOKENS if n not in found]) or 'none'}; not known: {', '.join(unknown) or 'none'}",
            fix=RESTORE,
        )
    sizes = {"N": found["margin"].numel(), "nnz": found["feature_values"].numel(), "d_in": sae.config.d_in, "d_out": sae.config.d_out}
    sizes["N+1"] = sizes["N"] + 1
    for name, tensor in found.items():
        expected = [sizes.get(size, tensor.shape[axis] if axis < tensor.ndim else -1) for axis, size in enumerate(SHAPES[name])]
        floating = name in ("x", "feature_values", "reconstruction", "margin", "target")
        if list(tensor.shape) != expected or tensor.is_floating_point() != floating or (not floating and tensor.dtype != torch.int64):
            raise FormatError(
                f"{file}: {name} is {tensor.dtype} {list(tensor.shape)}",
                why=f"expected {expected}, {'floating' if floating else 'int64'}",
                fix=RESTORE,
            )
        if floating and not bool(tensor.isfinite().all()):
            raise FormatError(f"{file}: {name} holds NaN or infinity", fix=RESTORE)
    _check_ranges(file, found, sizes, sae.config.d_sae)
    length = int(found["sequence_length"]) if "sequence_length" in found else None
    if (length is None) != sae.row_wise or (length is not None and (length < 1 or sizes["N"] % length)):
        raise FormatError(
            f"{file}: sequence_length is {length}",
            why=f"a {sae.config.architecture} probe of {sizes['N']} rows has {'none' if sae.row_wise else 'one that divides them'}",
            fix=RESTORE,
        )
    return Probe(
        found["x"], found["feature_values"], found["feature_indices"], found["row_offsets"], found["reconstruction"], found["margin"],
        found.get("token_ids"), found.get("positions"), found.get("contexts"), found.get("context_of_row"), found.get("target"),
        length,
    )  # fmt: skip


def _check_ranges(file: Path, found: dict[str, Tensor], sizes: dict[str, int], d_sae: int) -> None:
    """Indices must point into what they index: a reader that trusts them would read elsewhere or crash."""
    from saehub.checkpoint.format import RESTORE

    bounds = {"feature_indices": d_sae}
    if "contexts" in found:
        bounds |= {"positions": found["contexts"].shape[1], "context_of_row": found["contexts"].shape[0]}
    for name, below in bounds.items():
        if found[name].numel() and not (int(found[name].min()) >= 0 and int(found[name].max()) < below):
            raise FormatError(f"{file}: {name} points outside 0 … {below - 1}", fix=RESTORE)
    offsets = found["row_offsets"]
    if int(offsets[0]) != 0 or int(offsets[-1]) != sizes["nnz"] or bool((offsets.diff() < 0).any()):
        raise FormatError(f"{file}: row_offsets do not partition the {sizes['nnz']} features", fix=RESTORE)
