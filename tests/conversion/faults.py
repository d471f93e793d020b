"""A clean checkpoint in, a damaged one out: every fault with the one detector that must catch it, and the words that it must say.

| detector | what it compares | where |
|---|---|---|
| hash | SHA-256 of tensors, header and probe; a certificate's hashes of tensors and config | `load`, `verify` |
| schema | names, shapes, dtypes, NaN, sizes that a file claims, code in it, paths out of it | `load`, `verify`, `convert` |
| replay | the golden probe, computed again in float64 | `verify` |
| site | the probe's rows, extracted again from the model | `verify --model` |
| tensors | what the writer calls bit-exact (and the site) with what is read back | `convert` |
| run | features and reconstructions of both libraries | `convert` |
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file

from saehub.checkpoint import format as v1
from saehub.checkpoint.probe import read_probe
from saehub.checkpoint.sae import SAE

HASH, SCHEMA, REPLAY, SITE, TENSORS, RUN = "hash", "schema", "replay", "site", "tensors", "run"
DETECTORS = {
    HASH: "SHA-256 of tensors, header, probe, and of what a certificate speaks of",
    SCHEMA: "names, shapes, dtypes, NaN, claimed sizes, code, paths",
    REPLAY: "the golden probe, computed again in float64",
    SITE: "the probe's rows, extracted again: `verify --model`",
    TENSORS: "what is read back against what the writer calls bit-exact",
    RUN: "both libraries on the same rows",
}


@dataclass(frozen=True)
class Fault:
    """One way in which a checkpoint can be wrong."""

    detector: str
    """The one that catches it; the others see nothing wrong."""
    words: str
    """Part of what it says."""
    base: str
    """Which clean SAE is damaged."""
    inject: Callable[[Path], None]
    """Damages a folder."""
    format: str = "saehub"
    """Of the folder: the target's, where convert must catch it."""


# ---------------------------------------------------------------------- tools
def tensors_of(change: Callable[[dict], Any], name: str = v1.WEIGHTS) -> Callable[[Path], None]:
    """Change a safetensors file and nothing else."""

    def inject(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)

    return inject


def header_of(change: Callable[[dict], Any], *, rehash: bool = True) -> Callable[[Path], None]:
    """Change saehub.json; with `rehash`, as someone would who knows the format."""

    def inject(folder: Path) -> None:
        header = json.loads((folder / v1.HEADER).read_text())
        change(header)
        if rehash:
            header["tensors_hash"] = v1.tensors_hash(header["tensors"])
            header["hash"] = v1.header_hash(header)
        (folder / v1.HEADER).write_text(json.dumps(header))

    return inject


def resaved(config: dict[str, Any] | None = None, **changes: Callable[[dict], torch.Tensor]) -> Callable[[Path], None]:
    """Another SAE under the old probe, with every hash made anew: what a bug before saving looks like."""

    def inject(folder: Path) -> None:
        sae = v1.load(folder)
        probe, tensors = read_probe(folder / v1.PROBE, sae), sae.tensors()
        tensors |= {name: change(tensors).contiguous() for name, change in changes.items()}
        v1.save(SAE.build(sae.config.replace(**(config or {})), tensors, sae.provenance), folder, probe=probe, overwrite=True)

    return inject


def provenance_of(**fields: Any) -> Callable[[Path], None]:
    return header_of(lambda header: header["provenance"].update(fields))


def probe_of(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    """Change the probe and its hash."""

    def inject(folder: Path) -> None:
        from saehub.jsonio import sha256_file

        tensors_of(change, v1.PROBE)(folder)
        header_of(lambda header: header["probe"].update(sha256=sha256_file(folder / v1.PROBE)))(folder)

    return inject


def both(*injections: Callable[[Path], None]) -> Callable[[Path], None]:
    def inject(folder: Path) -> None:
        for one in injections:
            one(folder)

    return inject


def file_of(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def json_of(name: str, change: Callable[[dict], Any]) -> Callable[[Path], None]:
    def inject(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return inject


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def swap(a: str, b: str) -> Callable[[dict], None]:
    def change(tensors: dict) -> None:
        tensors[a], tensors[b] = tensors[b].clone(), tensors[a].clone()

    return change


def huge(data: bytes) -> bytes:
    """A safetensors header that claims 2^60 numbers."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    first = next(key for key in header if key != "__metadata__")
    header[first] |= {"shape": [2**40, 2**20]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


class Trap:
    """Unpickled, it would leave a file in the working directory."""

    def __reduce__(self):
        return os.system, ("touch trapped",)


def npz_with(name: str, content: Callable[[], bytes], how: int = zipfile.ZIP_STORED) -> Callable[[Path], None]:
    """Replace (or add) one member of params.npz."""

    def inject(folder: Path) -> None:
        with zipfile.ZipFile(folder / "params.npz") as archive:
            members = {info.filename: archive.read(info) for info in archive.infolist()}
        with zipfile.ZipFile(folder / "params.npz", "w", how) as archive:
            for member, data in (members | {name: content()}).items():
                archive.writestr(member, data)

    return inject


def _pickled_array() -> bytes:
    trap = np.empty(1, dtype=object)
    trap[0] = Trap()
    stream = io.BytesIO()
    np.save(stream, trap, allow_pickle=True)
    return stream.getvalue()


def npy(shape: tuple[int, ...], data: bytes = b"") -> bytes:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + data


def torch_bomb(folder: Path) -> None:
    """ae.pt whose storage unpacks to far more than the file."""
    with zipfile.ZipFile(folder / "ae.pt") as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    data = next(name for name in members if "/data/" in name)
    with zipfile.ZipFile(folder / "ae.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (members | {data: bytes(2**27)}).items():
            archive.writestr(name, content)


def torch_pickle(folder: Path) -> None:
    torch.save(torch.load(folder / "ae.pt", weights_only=True) | {"x": Trap()}, folder / "ae.pt")


def torch_huge(folder: Path) -> None:
    torch.save(torch.load(folder / "ae.pt", weights_only=True) | {"encoder.weight": torch.ones(1).expand(2**30, 2**10)}, folder / "ae.pt")


def torch_of(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    def inject(folder: Path) -> None:
        state = torch.load(folder / "ae.pt", weights_only=True)
        change(state)
        torch.save({name: tensor.contiguous() for name, tensor in state.items()}, folder / "ae.pt")

    return inject


def npz_of(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    def inject(folder: Path) -> None:
        arrays = dict(np.load(folder / "params.npz"))
        change(arrays)
        np.savez(folder / "params.npz", **arrays)

    return inject


def listed(*names: str) -> Callable[[Path], None]:
    """The index of a circuit-tracer set."""

    def inject(folder: Path) -> None:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        (folder / "config.yaml").write_text(yaml.safe_dump(config | {"transcoders": list(names)}))

    return inject


def scaled(name: str, factor: float) -> Callable[[dict], None]:
    return lambda tensors: tensors.update({name: tensors[name] * factor})


def rounded(t: torch.Tensor) -> torch.Tensor:
    return t.bfloat16().to(t.dtype)


def half_of_a_row(tensors: dict) -> None:
    tensors["W_dec"][7] *= 0.5


def nudged(t: torch.Tensor) -> torch.Tensor:
    """Every weight by one unit in the last place."""
    return torch.nextafter(t, torch.full_like(t, float("inf")))


def roll(name: str) -> Callable[[dict], torch.Tensor]:
    return lambda tensors: tensors[name].roll(1, 0)


def zero(name: str) -> Callable[[dict], torch.Tensor]:
    return lambda tensors: torch.zeros_like(tensors[name])


# ---------------------------------------------------------------------- the hub's own folder: `verify --model` must see it
CHECKPOINT: dict[str, Fault] = {
    # somebody changed a file
    "a flipped bit in the tensors": Fault(HASH, "is not the tensor that was saved", "jumprelu", file_of(v1.WEIGHTS, lambda data: flip(data, len(data) - 999))),
    "a flipped bit in the probe": Fault(HASH, "is not the probe that was saved", "jumprelu", file_of(v1.PROBE, lambda data: flip(data, len(data) - 999))),
    "two tensors swapped in the file": Fault(HASH, "is not the tensor that was saved", "jumprelu", tensors_of(swap("b_enc", "threshold"))),
    "a square decoder transposed in the file": Fault(HASH, "W_dec is not the tensor", "square", tensors_of(lambda t: t.update(W_dec=t["W_dec"].T))),
    "k changed in saehub.json": Fault(HASH, "was changed after it was written", "topk", header_of(lambda h: h["params"].update(k=9), rehash=False)),
    "site changed in saehub.json": Fault(HASH, "was changed after it was written", "topk", header_of(lambda h: h["provenance"].update(site="resid_post.2"), rehash=False)),
    "a stale saehub.json beside new tensors": Fault(HASH, "is not the tensor that was saved", "topk", tensors_of(lambda t: t.update({n: v + 1e-3 for n, v in t.items()}))),
    "a stale probe": Fault(HASH, "is not the probe that was saved", "topk", tensors_of(lambda t: t.update(x=t["x"].flip(0)), v1.PROBE)),
    "a tensor hash that the list of tensors does not give": Fault(HASH, "does not follow from", "topk", both(header_of(lambda h: h["tensors"]["b_dec"].update(sha256="0" * 64), rehash=False), header_of(lambda h: h.update(hash=v1.header_hash(h)), rehash=False))),
    # what a file is made of
    "truncated tensors": Fault(SCHEMA, "cannot be read", "jumprelu", file_of(v1.WEIGHTS, lambda data: data[: len(data) // 2])),
    "truncated saehub.json": Fault(SCHEMA, "is not JSON", "jumprelu", file_of(v1.HEADER, lambda data: data[: len(data) // 2])),
    "no saehub.json": Fault(SCHEMA, "saehub.json of the format saehub is missing", "jumprelu", lambda folder: (folder / v1.HEADER).unlink()),
    "no tensors": Fault(SCHEMA, "does not exist", "jumprelu", lambda folder: (folder / v1.WEIGHTS).unlink()),
    "a missing tensor": Fault(SCHEMA, "b_enc", "jumprelu", tensors_of(lambda t: t.pop("b_enc"))),
    "an extra tensor": Fault(SCHEMA, "W_extra", "jumprelu", tensors_of(lambda t: t.update(W_extra=torch.ones(3)))),
    "a missing tensor, also in the list": Fault(SCHEMA, "missing: threshold", "jumprelu", both(tensors_of(lambda t: t.pop("threshold")), header_of(lambda h: h["tensors"].pop("threshold")))),
    "a wrong dtype": Fault(SCHEMA, "expected float32", "jumprelu", tensors_of(lambda t: t.update(W_enc=t["W_enc"].bfloat16()))),
    "a transposed decoder": Fault(SCHEMA, "W_dec does not match", "jumprelu", tensors_of(lambda t: t.update(W_dec=t["W_dec"].T))),
    "a huge shape in the header of the tensors": Fault(SCHEMA, "cannot be read", "jumprelu", file_of(v1.WEIGHTS, huge)),
    "a huge shape in saehub.json": Fault(SCHEMA, "does not match", "jumprelu", header_of(lambda h: (h.update(d_sae=2**31 - 1), h["tensors"]["W_enc"].update(shape=[160, 2**31 - 1])))),
    "a header that claims 2^60 bytes": Fault(SCHEMA, "cannot be read", "jumprelu", file_of(v1.WEIGHTS, lambda data: (2**60).to_bytes(8, "little") + data[8:])),
    "a pickle called sae.safetensors": Fault(SCHEMA, "cannot be read", "jumprelu", file_of(v1.WEIGHTS, lambda _: pickle.dumps(Trap()))),
    "NaN, hashed again": Fault(SCHEMA, "NaN", "jumprelu", None),
    "an architecture that nobody provides": Fault(SCHEMA, "pip install", "jumprelu", header_of(lambda h: h.update(architecture="hyperrelu", architecture_provider="saehub-hyper"))),
    "a format of the future": Fault(SCHEMA, "reads versions up to", "jumprelu", header_of(lambda h: h.update(format_version=2))),
    "k above d_sae": Fault(SCHEMA, "from 1 to", "topk", header_of(lambda h: h["params"].update(k=10**6))),
    "a key twice in saehub.json": Fault(SCHEMA, "occurs twice", "topk", file_of(v1.HEADER, lambda data: data.replace(b'"format":', b'"format": "x", "format":', 1))),
    "a probe that points outside the dictionary": Fault(SCHEMA, "points outside", "topk", probe_of(lambda t: t["feature_indices"].fill_(10**9))),
    "a probe that lacks its margins": Fault(SCHEMA, "is not a probe", "topk", probe_of(lambda t: t.pop("margin"))),
    # another dictionary under the same probe
    "decoder transposed": Fault(REPLAY, "reconstruction within", "square", resaved(W_dec=lambda t: t["W_dec"].T)),
    "encoder transposed": Fault(REPLAY, "rows with other latents", "square", resaved(W_enc=lambda t: t["W_enc"].T)),
    "encoder and decoder swapped": Fault(REPLAY, "rows with other latents", "square", resaved(W_enc=lambda t: t["W_dec"], W_dec=lambda t: t["W_enc"])),
    "b_dec not subtracted": Fault(REPLAY, "rows with other latents", "topk", resaved({"subtract_b_dec": False})),
    "a wrong norm": Fault(REPLAY, "rows with other latents", "topk", resaved({"norm_in": "layer_norm", "norm_out": "layer_norm"})),
    "a wrong norm factor": Fault(REPLAY, "features within", "constant norm", resaved(W_enc=lambda t: t["W_enc"] * 160**0.5)),
    "output norm forgotten": Fault(REPLAY, "reconstruction within", "constant norm", resaved({"norm_out": "none"})),
    "threshold rounded to bfloat16": Fault(REPLAY, "margins", "jumprelu", resaved(threshold=lambda t: rounded(t["threshold"]))),
    "thresholds off by 0.1 %": Fault(REPLAY, "margins", "jumprelu", resaved(threshold=lambda t: t["threshold"] * 1.001)),
    "one threshold for all off by 0.1 %": Fault(REPLAY, "margins", "batchtopk", resaved(threshold=lambda t: t["threshold"] * 1.001)),
    "ReLU for TopK": Fault(REPLAY, "rows with other latents", "topk", resaved({"architecture": "relu", "params": {}})),
    "ReLU for JumpReLU": Fault(REPLAY, "rows with other latents", "jumprelu", resaved(threshold=lambda t: t["threshold"] * 0)),
    "k one too large": Fault(REPLAY, "rows with other latents", "topk", resaved({"params": {"k": 9}})),
    "k one too small": Fault(REPLAY, "rows with other latents", "topk", resaved({"params": {"k": 7}})),
    "groups of another size": Fault(REPLAY, "rows with other latents", "groupmax", resaved({"params": {"k": 16}})),
    "one step of matching pursuit more": Fault(REPLAY, "rows with other latents", "matching_pursuit", resaved({"params": {"max_iterations": 7, "residual_threshold": 0.0, "stop_on_duplicate_support": False}})),
    "the rescale flag flipped": Fault(REPLAY, "rows with other latents", "topk", resaved({"decoder_norm_scaling": True})),
    "the rescale flag flipped, equal supports": Fault(REPLAY, "features within", "relu", resaved({"decoder_norm_scaling": True})),
    "encoder negated": Fault(REPLAY, "rows with other latents", "topk", resaved(W_enc=lambda t: -t["W_enc"])),
    "latents permuted in the decoder only": Fault(REPLAY, "reconstruction within", "topk", resaved(W_dec=roll("W_dec"))),
    "latents permuted everywhere": Fault(REPLAY, "rows with other latents", "topk", resaved(W_enc=lambda t: t["W_enc"].roll(1, 1), b_enc=roll("b_enc"), W_dec=roll("W_dec"))),
    "b_enc dropped": Fault(REPLAY, "rows with other latents", "topk", resaved(b_enc=zero("b_enc"))),
    "b_dec dropped, not subtracted": Fault(REPLAY, "reconstruction within", "transcoder", resaved(b_dec=zero("b_dec"))),
    "W_skip dropped": Fault(REPLAY, "reconstruction within", "skip transcoder", resaved(W_skip=zero("W_skip"))),
    "W_skip transposed": Fault(REPLAY, "reconstruction within", "skip transcoder", resaved(W_skip=lambda t: t["W_skip"].T)),
    "gate and magnitude swapped": Fault(REPLAY, "rows with other latents", "gated", resaved(b_gate=lambda t: t["b_mag"], b_mag=lambda t: t["b_gate"])),
    "r_mag not exponentiated": Fault(REPLAY, "features within", "gated", resaved(r_mag=lambda t: t["r_mag"].exp())),
    "decoder rounded to bfloat16": Fault(REPLAY, "reconstruction within", "topk", resaved(W_dec=lambda t: rounded(t["W_dec"]))),
    "weights off by one unit in the last place": Fault(REPLAY, "features within", "topk", resaved(W_enc=lambda t: nudged(t["W_enc"]))),
    "the scale of the activations forgotten": Fault(REPLAY, "rows with other latents", "jumprelu", resaved(b_enc=lambda t: t["b_enc"] / 3, b_dec=lambda t: t["b_dec"] / 3, threshold=lambda t: t["threshold"] / 3)),
    "k one too small, and a probe that calls every row a tie": Fault(REPLAY, "rows with other latents", "topk", both(resaved({"params": {"k": 7}}), probe_of(lambda t: t["margin"].zero_()))),
    # the right dictionary, at the wrong place
    "a wrong layer": Fault(SITE, "the rows are those of resid_post.1", "topk", provenance_of(site="resid_post.2")),
    "a wrong kind of site": Fault(SITE, "the rows are those of resid_post.1", "topk", provenance_of(site="resid_mid.1")),
    "a site of another width": Fault(SITE, "has width 432", "topk", provenance_of(site="mlp_act.1")),
    "a layer that the model lacks": Fault(SITE, "resid_post.9", "topk", provenance_of(site="resid_post.9")),
    "a wrong target site": Fault(SITE, "the rows are those of mlp_out.1", "transcoder", provenance_of(target_site="attn_out.1")),
    "input and target site swapped": Fault(SITE, "the rows are those of mlp_out.1", "transcoder", provenance_of(site="mlp_out.1", target_site="resid_mid.1")),
    "another model": Fault(SITE, "was trained on", "topk", provenance_of(model={"name": "builtin/tiny-llama", "fingerprint": "sha256:0"})),
    "positions shifted by one": Fault(SITE, "no site of this model gives these rows", "topk", probe_of(lambda t: t["positions"].add_(1).clamp_(max=31))),
    "tokens of another text": Fault(SITE, "no site of this model gives these rows", "topk", probe_of(lambda t: t.update(contexts=(t["contexts"] + 1) % 4096))),
}  # fmt: skip


def _nan(folder: Path) -> None:
    from saehub.jsonio import sha256_tensor

    tensors_of(lambda t: t["W_enc"].view(-1).__setitem__(7, float("nan")))(folder)
    digest = sha256_tensor(load_file(folder / v1.WEIGHTS)["W_enc"])
    header_of(lambda h: h["tensors"]["W_enc"].update(sha256=digest))(folder)


CHECKPOINT["NaN, hashed again"] = Fault(SCHEMA, "NaN", "jumprelu", _nan)

# ---------------------------------------------------------------------- a writer that is wrong: `convert` must see it
WEIGHTS = "sae_weights.safetensors"
WRITER: dict[str, Fault] = {
    "saelens: decoder transposed": Fault(TENSORS, "W_dec", "square", tensors_of(lambda t: t.update(W_dec=t["W_dec"].T), WEIGHTS), "saelens"),
    "saelens: threshold rounded to bfloat16": Fault(TENSORS, "threshold", "jumprelu", tensors_of(lambda t: t.update(threshold=rounded(t["threshold"])), WEIGHTS), "saelens"),
    "saelens: thresholds off by 0.1 %": Fault(TENSORS, "threshold", "jumprelu", tensors_of(scaled("threshold", 1.001), WEIGHTS), "saelens"),
    "saelens: everything stored in bfloat16": Fault(TENSORS, "W_enc", "jumprelu", tensors_of(lambda t: t.update({n: v.bfloat16() for n, v in t.items()}), WEIGHTS), "saelens"),
    "saelens: b_enc dropped": Fault(TENSORS, "b_enc", "topk", tensors_of(lambda t: t["b_enc"].zero_(), WEIGHTS), "saelens"),
    "saelens: latents permuted in the decoder only": Fault(TENSORS, "W_dec", "topk", tensors_of(lambda t: t.update(W_dec=t["W_dec"].roll(1, 0)), WEIGHTS), "saelens"),
    "saelens: the decoder row of a latent that never fires": Fault(TENSORS, "W_dec", "dead latent", tensors_of(half_of_a_row, WEIGHTS), "saelens"),
    "sparsify: encoder not transposed": Fault(TENSORS, "W_enc", "square", tensors_of(lambda t: t.update({"encoder.weight": t["encoder.weight"].T})), "sparsify"),
    "sparsify: W_skip dropped": Fault(TENSORS, "W_skip", "skip transcoder", tensors_of(lambda t: t["W_skip"].zero_()), "sparsify"),
    "dictionary_learning: encoder negated": Fault(TENSORS, "W_enc", "topk", torch_of(lambda t: t["encoder.weight"].neg_()), "dictionary_learning"),
    "gemma_scope: one unit in the last place": Fault(TENSORS, "b_dec", "jumprelu", npz_of(lambda a: a.update(b_dec=np.nextafter(a["b_dec"], np.float32(9)))), "gemma_scope"),
    "circuit_tracer: W_skip transposed": Fault(TENSORS, "W_skip", "skip relu", tensors_of(lambda t: t.update(W_skip=t["W_skip"].T), "layer_1.safetensors"), "circuit_tracer"),
    "saelens: another layer": Fault(TENSORS, "resid_post.2", "topk", json_of("cfg.json", lambda c: c["metadata"].update(hook_name="blocks.2.hook_resid_post")), "saelens"),
    "saelens: resid_post for whatever it was": Fault(TENSORS, "resid_post.1", "mlp_out", json_of("cfg.json", lambda c: c["metadata"].update(hook_name="blocks.1.hook_resid_post")), "saelens"),
    "saelens: k one too large": Fault(RUN, "differ", "topk", json_of("cfg.json", lambda c: c.update(k=9)), "saelens"),
    "saelens: ReLU for TopK": Fault(RUN, "differ", "topk", json_of("cfg.json", lambda c: c.update(architecture="standard")), "saelens"),
    "saelens: b_dec not subtracted": Fault(RUN, "differ", "topk", json_of("cfg.json", lambda c: c.update(apply_b_dec_to_input=False)), "saelens"),
    "saelens: the rescale flag flipped": Fault(RUN, "differ", "topk", json_of("cfg.json", lambda c: c.update(rescale_acts_by_decoder_norm=True)), "saelens"),
    "saelens: a norm from nowhere": Fault(RUN, "differ", "topk", json_of("cfg.json", lambda c: c.update(normalize_activations="layer_norm")), "saelens"),
    "saelens: the norm forgotten": Fault(RUN, "differ", "constant norm", json_of("cfg.json", lambda c: c.update(normalize_activations="none")), "saelens"),
    "sparsify: k one too small": Fault(RUN, "differ", "topk", json_of("cfg.json", lambda c: c.update(k=7)), "sparsify"),
    "sparsify: TopK for group-max": Fault(RUN, "differ", "groupmax", json_of("cfg.json", lambda c: c.update(activation="topk")), "sparsify"),
    "sparsify: an autoencoder for a transcoder": Fault(RUN, "differ", "topk transcoder", json_of("cfg.json", lambda c: c.update(transcode=False)), "sparsify"),
    "dictionary_learning: the class that does not subtract": Fault(RUN, "differ", "relu", both(torch_of(lambda t: t.update({"decoder.bias": t.pop("bias")})), json_of("config.json", lambda c: c["trainer"].update(dict_class="AutoEncoderNew"))), "dictionary_learning"),
}  # fmt: skip
"""`convert` writes with a codec whose files are then changed like this."""

LOADER: dict[str, Fault] = {
    "saelens rounds the threshold": Fault(RUN, "differ", "jumprelu", tensors_of(lambda t: t.update(threshold=rounded(t["threshold"])), WEIGHTS), "saelens"),
    "saelens reads TopK as ReLU": Fault(RUN, "differ", "topk", json_of("cfg.json", lambda c: c.update(architecture="standard")), "saelens"),
    "saelens casts to the config's dtype": Fault(RUN, "differ", "jumprelu", tensors_of(lambda t: t.update({n: rounded(v) for n, v in t.items()}), WEIGHTS), "saelens"),
    "sparsify casts a mixture to bfloat16": Fault(RUN, "differ", "topk", tensors_of(lambda t: t.update({n: rounded(v) for n, v in t.items()})), "sparsify"),
    "dictionary_learning normalises the decoder": Fault(RUN, "differ", "relu", torch_of(lambda t: t.update({"decoder.weight": t["decoder.weight"] / t["decoder.weight"].norm(dim=0)})), "dictionary_learning"),
    "gemma_scope's formula with another threshold": Fault(RUN, "differ", "jumprelu", npz_of(lambda a: a.update(threshold=a["threshold"] * np.float32(1.001))), "gemma_scope"),
}  # fmt: skip
"""The target's files are right, and its library computes as if they said this."""

# ---------------------------------------------------------------------- a folder of another library that is not what it says
FOREIGN: dict[str, Fault] = {
    "saelens: truncated file": Fault(SCHEMA, "cannot be read", "jumprelu", file_of(WEIGHTS, lambda data: data[: len(data) // 2]), "saelens"),
    "saelens: huge shape": Fault(SCHEMA, "cannot be read", "jumprelu", file_of(WEIGHTS, huge), "saelens"),
    "saelens: extra tensor": Fault(SCHEMA, "W_extra", "jumprelu", tensors_of(lambda t: t.update(W_extra=torch.ones(3)), WEIGHTS), "saelens"),
    "saelens: missing tensor": Fault(SCHEMA, "missing: threshold", "jumprelu", tensors_of(lambda t: t.pop("threshold"), WEIGHTS), "saelens"),
    "saelens: NaN": Fault(SCHEMA, "NaN", "jumprelu", tensors_of(lambda t: t["W_dec"].view(-1).__setitem__(3, float("nan")), WEIGHTS), "saelens"),
    "saelens: whole numbers": Fault(SCHEMA, "dtype torch.int32", "jumprelu", tensors_of(lambda t: t.update(W_enc=t["W_enc"].int()), WEIGHTS), "saelens"),
    "saelens: transposed decoder": Fault(SCHEMA, "W_dec has shape", "jumprelu", tensors_of(lambda t: t.update(W_dec=t["W_dec"].T), WEIGHTS), "saelens"),
    "saelens: an architecture that is none": Fault(SCHEMA, "did you mean", "jumprelu", json_of("cfg.json", lambda c: c.update(architecture="jumpreluu")), "saelens"),
    "saelens: unfolded whitening": Fault(SCHEMA, "whitening", "jumprelu", json_of("cfg.json", lambda c: c.update(normalize_activations="covariance_whitening")), "saelens"),
    "sparsify: truncated file": Fault(SCHEMA, "cannot be read", "topk", file_of(v1.WEIGHTS, lambda data: data[:-9]), "sparsify"),
    "sparsify: decoder transposed": Fault(SCHEMA, "transposed", "topk", tensors_of(lambda t: t.update(W_dec=t["W_dec"].T)), "sparsify"),
    "sparsify: k that is a word": Fault(SCHEMA, "k is 'many'", "topk", json_of("cfg.json", lambda c: c.update(k="many")), "sparsify"),
    "dictionary_learning: pickle bomb": Fault(SCHEMA, "holds more than tensors", "topk", torch_pickle, "dictionary_learning"),
    "dictionary_learning: bare pickle": Fault(SCHEMA, "not a torch.save file", "topk", file_of("ae.pt", lambda _: pickle.dumps(Trap())), "dictionary_learning"),
    "dictionary_learning: zip bomb": Fault(SCHEMA, "is compressed", "topk", torch_bomb, "dictionary_learning"),
    "dictionary_learning: huge shape by strides": Fault(SCHEMA, "", "topk", torch_huge, "dictionary_learning"),
    "dictionary_learning: k off by one": Fault(SCHEMA, "says k is 8", "topk", json_of("config.json", lambda c: c["trainer"].update(k=9)), "dictionary_learning"),
    "gemma_scope: pickled array": Fault(SCHEMA, "can run code", "jumprelu", npz_with("b_dec.npy", _pickled_array), "gemma_scope"),
    "gemma_scope: zip bomb": Fault(SCHEMA, "unpack", "jumprelu", npz_with("W_enc.npy", lambda: npy((2**12, 2**13), bytes(2**27)), zipfile.ZIP_DEFLATED), "gemma_scope"),
    "gemma_scope: huge shape": Fault(SCHEMA, "says its shape is", "jumprelu", npz_with("W_enc.npy", lambda: npy((2**40, 2**40), bytes(64))), "gemma_scope"),
    "gemma_scope: a member outside the archive": Fault(SCHEMA, "outside", "jumprelu", npz_with("../../b_enc.npy", lambda: npy((320,), bytes(1280))), "gemma_scope"),
    "gemma_scope: a scaling factor": Fault(SCHEMA, "scaling_factor is not 1", "jumprelu", npz_of(lambda a: a.update(scaling_factor=np.full(320, 2, np.float32))), "gemma_scope"),
    "circuit_tracer: path traversal in the index of shards": Fault(SCHEMA, "outside the folder", "skip relu", listed("layer_1.safetensors", "../../secret.safetensors"), "circuit_tracer"),
    "circuit_tracer: absolute path in the index of shards": Fault(SCHEMA, "outside the folder", "skip relu", listed("/etc/passwd.safetensors"), "circuit_tracer"),
    "circuit_tracer: YAML that runs code": Fault(SCHEMA, "", "skip relu", file_of("config.yaml", lambda data: data + b"x: !!python/object/apply:os.system ['touch trapped']\n"), "circuit_tracer"),
}  # fmt: skip

# ---------------------------------------------------------------------- a converted folder, changed afterwards: its certificate must not hold any more
CONVERTED: dict[str, Fault] = {
    "saelens: tensors": Fault(HASH, "were changed after", "topk", tensors_of(lambda t: t["b_dec"].add_(1e-3), WEIGHTS), "saelens"),
    "saelens: k": Fault(HASH, "were changed after", "topk", json_of("cfg.json", lambda c: c.update(k=9)), "saelens"),
    "saelens: the rescale flag": Fault(HASH, "were changed after", "topk", json_of("cfg.json", lambda c: c.update(rescale_acts_by_decoder_norm=True)), "saelens"),
    "saelens: b_dec not subtracted": Fault(HASH, "were changed after", "relu", json_of("cfg.json", lambda c: c.update(apply_b_dec_to_input=False)), "saelens"),
    "saelens: the norm": Fault(HASH, "were changed after", "constant norm", json_of("cfg.json", lambda c: c.update(normalize_activations="none")), "saelens"),
    "saelens: another layer": Fault(HASH, "were changed after", "topk", json_of("cfg.json", lambda c: c["metadata"].update(hook_name="blocks.2.hook_resid_post")), "saelens"),
    "sparsify: k": Fault(HASH, "were changed after", "topk", json_of("cfg.json", lambda c: c.update(k=7)), "sparsify"),
    "dictionary_learning: the class that does not subtract": Fault(HASH, "were changed after", "relu", both(torch_of(lambda t: t.update({"decoder.bias": t.pop("bias")})), json_of("config.json", lambda c: c["trainer"].update(dict_class="AutoEncoderNew"))), "dictionary_learning"),
    "gemma_scope: tensors": Fault(HASH, "were changed after", "jumprelu", npz_of(lambda a: a.update(threshold=a["threshold"] * np.float32(1.001))), "gemma_scope"),
    "circuit_tracer: tensors": Fault(HASH, "were changed after", "skip relu", tensors_of(lambda t: t["b_dec"].add_(1e-3), "layer_1.safetensors"), "circuit_tracer"),
}  # fmt: skip

ALL = {"saehub folder": CHECKPOINT, "wrong writer": WRITER, "wrong library": LOADER, "foreign folder": FOREIGN, "changed after conversion": CONVERTED}


def table() -> str:
    """Markdown: every fault and its detector."""
    rows = [f"| {where} | {name} | {fault.detector} |" for where, faults in ALL.items() for name, fault in faults.items()]
    count = {detector: sum(fault.detector == detector for faults in ALL.values() for fault in faults.values()) for detector in DETECTORS}
    lines = [f"| {detector} | {what} | {count[detector]} |" for detector, what in DETECTORS.items()]
    return "\n".join(["| detector | what it compares | faults |", "|---|---|---|", *lines, "", "| where | fault | detector |", "|---|---|---|", *rows])
