"""Damaged and hostile files: each is a FormatError that names the file and says what to do; nothing runs, and nothing large is allocated."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from saehub.checkpoint.load import codec, exporters, find_format
from saehub.errors import FormatError

pytestmark = pytest.mark.quick


def refuses(case, *words: str, path: Path | None = None, names: Path | str | None = None) -> FormatError:
    """`read` and `run` both refuse; every exporter's `sniff` keeps its temper."""
    path = path or case.path
    for address in exporters():
        assert codec(address)[1].sniff(path) in (True, False)
    find_format(path)
    instance = codec(case.address)[1]
    with pytest.raises(FormatError) as error:
        instance.read(path)
    said = str(error.value)
    assert str(names or case.weights) in said and error.value.fix and all(word in said for word in words), said
    return error.value


def rewrite(case, change) -> None:
    """`change(dict of tensors)` applied to the weights, in whatever container they are."""
    file = case.weights
    if file.suffix == ".npz":
        stored = dict(np.load(file, allow_pickle=False))
        tensors = {name: torch.from_numpy(array) for name, array in stored.items()}
        change(tensors)
        np.savez(file, **{name: tensor.numpy() for name, tensor in tensors.items()})
    elif file.suffix == ".safetensors":
        tensors = load_file(file)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    else:
        tensors = torch.load(file, weights_only=True)
        change(tensors)
        torch.save(tensors, file)


def matrix(tensors: dict, part: str) -> str:
    """The name of the encoder or decoder matrix in the publisher's words."""
    words = {"enc": ("w_enc", "encoder", "w_e"), "dec": ("w_dec", "decoder", "w_d")}[part]
    return next(name for name, t in tensors.items() if getattr(t, "ndim", 0) == 2 and name.lower().startswith(words))


# ---------------------------------------------------------------------- the same damage to every layout
def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def zero(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, zero, empty, Path.unlink], ids=lambda damage: damage.__name__)
def test_damaged_weights(plain_case, damage):
    damage(plain_case.weights)
    if damage is Path.unlink:  # a file that was named, or the folder without it
        names = plain_case.path if plain_case.path.is_dir() else plain_case.path.parent
        refuses(plain_case, path=names if plain_case.address != "formats/qwen_scope" else plain_case.path, names=names)
    else:
        refuses(plain_case)


TENSOR_FAULTS = {
    "missing decoder": (lambda t: t.pop(matrix(t, "dec")), ()),
    "missing encoder": (lambda t: t.pop(matrix(t, "enc")), ()),
    "NaN": (lambda t: t[matrix(t, "enc")].view(-1).__setitem__(7, float("nan")), ("NaN",)),
    "infinite": (lambda t: t[matrix(t, "dec")].view(-1).__setitem__(7, float("inf")), ("infinite",)),
    "transposed decoder": (lambda t: t.update({matrix(t, "dec"): t[matrix(t, "dec")].T.contiguous()}), ()),
    "an extra tensor": (lambda t: t.update(W_extra=torch.ones(3)), ("not expected: W_extra",)),
    "a bias of one": (
        lambda t: t.update(
            {next(n for n, v in t.items() if "b" in n.lower() and getattr(v, "ndim", 0) == 1 and "threshold" not in n): torch.ones(1)}
        ),
        ("shape [1]",),
    ),
    "whole numbers": (lambda t: t.update({matrix(t, "enc"): t[matrix(t, "enc")].to(torch.int32)}), ()),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_wrong_tensors(plain_case, fault):
    change, words = TENSOR_FAULTS[fault]
    rewrite(plain_case, change)
    refuses(plain_case, *words)


# ---------------------------------------------------------------------- npz
def npy_header(shape: tuple, descr: str = "<f4") -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def entry(case, name: str, data: bytes, how: int = zipfile.ZIP_STORED) -> None:
    """Replace one member of the archive."""
    with zipfile.ZipFile(case.weights) as old:
        kept = {info.filename: old.read(info) for info in old.infolist() if info.filename != name}
    with zipfile.ZipFile(case.weights, "w", how) as new:
        for member, content in (*kept.items(), (name, data)):
            new.writestr(member, content)


class Trap:
    """Unpickled, it would leave a file."""

    def __reduce__(self):
        return os.system, ("touch trapped",)


def test_hostile_npz(layout, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trap = np.empty(1, dtype=object)
    trap[0] = Trap()
    stream = io.BytesIO()
    np.save(stream, trap, allow_pickle=True)
    case = layout("gemma_scope")
    whole = case.weights.read_bytes()
    faults = {
        "pickled": (lambda: entry(case, "b_dec.npy", stream.getvalue()), "can run code"),
        "huge shape": (lambda: entry(case, "W_enc.npy", npy_header((2**40, 2**40)) + bytes(64)), "says its shape is"),
        "negative shape": (lambda: entry(case, "W_enc.npy", npy_header((-1, -16)) + bytes(64)), "says its shape is"),
        "bomb": (lambda: entry(case, "W_enc.npy", npy_header((2**12, 2**12)) + bytes(2**26), zipfile.ZIP_DEFLATED), "unpack to"),
        "whole numbers": (lambda: entry(case, "b_enc.npy", npy_header((40,), "<i4") + bytes(160)), "holds int32"),
        "structured": (lambda: entry(case, "b_enc.npy", b"\x93NUMPY\x03\x00" + bytes(200)), "is not an array"),
        "no array": (lambda: entry(case, "b_enc.npy", b"hello"), "is not an array"),
        "wandering name": (lambda: entry(case, "../../b_enc.npy", npy_header((40,)) + bytes(160)), "lies outside it"),
        "scaled": (lambda: entry(case, "scaling_factor.npy", npy_header((1,)) + struct.pack("<f", 2.0)), "scaling_factor is not 1"),
        "flipped bit": (lambda: case.weights.write_bytes(whole[:900] + bytes([whole[900] ^ 1]) + whole[901:]), "CRC"),
    }
    for fault, (change, words) in faults.items():
        case.weights.write_bytes(whole)
        change()
        assert refuses(case, words), fault
    case.weights.write_bytes(whole)
    with zipfile.ZipFile(case.weights, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("b_enc.npy", npy_header((40,)) + bytes(160))
    refuses(case, "occurs twice")
    assert not (tmp_path / "trapped").exists()


# ---------------------------------------------------------------------- torch files
@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize("name", ["openai", "goodfire", "qwen_scope"])
def test_hostile_torch_files(layout, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    case = layout(name)
    stored = torch.load(case.weights, weights_only=True)
    big = torch.ones(1).expand(2**30, 2**10)
    encoder = matrix(stored, "enc")
    faults = {
        "a pickle that runs code": (lambda: torch.save(stored | {"x": Trap()}, case.weights), "nothing in it was run"),
        "a bare pickle": (lambda: case.weights.write_bytes(pickle.dumps(Trap())), "not a whole zip archive"),
        "a list": (lambda: torch.save([1, 2], case.weights), "holds a list"),
        "numbers for names": (lambda: torch.save({1: torch.ones(1)}, case.weights), "expected a map of names"),
        "a terabyte of strides": (lambda: torch.save(stored | {encoder: big}, case.weights), "says its shape is [1073741824, 1024]"),
        "sparse": (lambda: torch.save(stored | {encoder: stored[encoder].to_sparse()}, case.weights), "not a plain dense tensor"),
    }
    for fault, (change, words) in faults.items():
        change()
        assert refuses(case, words), fault
    torch.save(stored, case.weights)
    with zipfile.ZipFile(case.weights) as archive:
        content = {info.filename: archive.read(info) for info in archive.infolist()}
    member = next(name for name in content if "/data/" in name)
    with zipfile.ZipFile(case.weights, "w", zipfile.ZIP_DEFLATED) as archive:
        for item, data in (content | {member: bytes(2**26)}).items():
            archive.writestr(item, data)
    refuses(case, "unpack to")
    assert not (tmp_path / "trapped").exists()


def test_openai_activations(layout):
    case = layout("openai")
    rewrite(case, lambda tensors: [tensors.pop(f"activation.{key}") for key in ("k", "postact_fn")])
    for content, words in (
        ({"activation": "Identity"}, "'Identity'"),
        ({"activation": "TopK", "activation_state_dict": {"k": 5, "postact_fn": "Identity"}}, "postact_fn"),
        ({"activation": "TopK", "activation_state_dict": {}}, "k None"),
        ({"activation": "TopK", "activation_state_dict": {"k": True, "postact_fn": "ReLU"}}, "k True"),
        ({"activation": "TopK", "activation_state_dict": 3}, "with 3"),
        ({"activation": "TopK", "activation_state_dict": {"k": 5, "postact_fn": "ReLU"}, "activation.k": 4}, "say {'k': 4}"),
    ):
        rewrite(case, lambda tensors, content=content: tensors.update(content))
        refuses(case, words)
    tied = layout("openai_tied")
    rewrite(tied, lambda tensors: tensors.update({"decoder.linear.weight": tensors["encoder.weight"] + 1}))
    refuses(tied, "is not its encoder")


def test_qwen_scope_must_be_told_k(layout):
    case = layout("qwen_scope")
    card = case.path.with_name("README.md")
    card.write_text(card.read_text().replace("| Top-K | 5 |", "| Top-K | 6 |"))
    refuses(case, "5 in the folder's name and 6 in README.md")
    card.unlink()
    assert codec(case.address)[1].read(case.path).config.params["k"] == 5
    moved = case.path.parents[3] / "layer12.sae.pt"
    case.path.rename(moved)
    refuses(case, "said nowhere", path=moved, names=moved)


# ---------------------------------------------------------------------- safetensors
@pytest.mark.parametrize("name", ["gemma_scope_2", "llama_scope", "circuit_tracer"])
def test_hostile_safetensors(layout, name):
    case = layout(name)
    whole = case.weights.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    first = next(key for key in header if key != "__metadata__")
    for change in ({"shape": [2**40, 2**20]}, {"shape": [2**62, 2**62]}, {"data_offsets": [0, 2**50]}, {"dtype": "F999"}):
        text = json.dumps(header | {first: header[first] | change}).encode()
        case.weights.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
        refuses(case, "cannot be read")
    case.weights.write_bytes((2**60).to_bytes(8, "little") + whole[8:])
    refuses(case, "cannot be read")


def test_gemma_scope_2_is_one_layer(layout):
    case = layout("gemma_scope_2")
    config = case.path / "config.json"
    said = json.loads(config.read_text())
    for change, words in (
        ({"type": "crosscoder"}, "crosscoder"),
        ({"architecture": "topk"}, "topk"),
        ({"affine_connection": True}, "has no affine_skip_connection"),
    ):
        config.write_text(json.dumps(said | change))
        refuses(case, words, names=case.path)
    for text in ("{", "[1]", "[" * 100_000):
        config.write_text(text)
        refuses(case, names=config)
    config.unlink()
    assert codec(case.address)[1].read(case.path).provenance["origin"]["config"] == {}
    rewrite(case, lambda tensors: tensors.update(w_dec=tensors["w_dec"][:, None].repeat(1, 3, 1)))
    refuses(case, "several layers")


LLAMA = {
    "no norm": ({"dataset_average_activation_norm": None}, "add \"dataset_average_activation_norm\""),
    "a norm of zero": ({"dataset_average_activation_norm": {"in": 0, "out": 1}}, "is 0"),
    "batch-wise norms": ({"norm_activation": "batch-wise"}, "not a function of one row"),
    "batchtopk": ({"act_fn": "batchtopk"}, "depends on the batch"),
    "another kind": ({"sae_type": "crosscoder"}, "crosscoder"),
    "a gated encoder": ({"use_glu_encoder": True}, "use_glu_encoder"),
    "no hook": ({"hook_point_in": None}, "hook_point_in is None"),
    "negative threshold": ({"jump_relu_threshold": -0.5}, "-0.5"),
    "no size": ({"d_model": "12"}, "d_model is '12'"),
    "another size": ({"d_model": 13}, "expected [13]"),
    "subtracting transcoder": ({"hook_point_out": "blocks.15.hook_mlp_out", "apply_decoder_bias_to_pre_encoder": True}, "another site"),
}  # fmt: skip


@pytest.mark.parametrize("fault", LLAMA)
def test_llama_scope_configs(layout, fault):
    case = layout("llama_scope")
    change, words = LLAMA[fault]
    config = case.path / "hyperparams.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    refuses(case, words, names=case.path)


def test_llamascopium_garbage_norms(layout):
    """The library stores uninitialised memory where no norm was set."""
    case = layout("llamascopium_transcoder")
    for value in (float("nan"), 0.0, -3.0, float("inf")):
        rewrite(
            case,
            lambda tensors, value=value: tensors.update({"dataset_average_activation_norm.blocks.4.hook_mlp_out": torch.tensor(value)}),
        )
        refuses(case, "average norm", names=case.path)


# ---------------------------------------------------------------------- circuit-tracer's list of files
TRAVERSALS = {
    "parent": (["layer_0.safetensors", "../secret.safetensors"], "lies outside the folder"),
    "absolute": (["/etc/secret.safetensors"], "lies outside the folder"),
    "hub": (["hf://org/repo/layer_0.safetensors"], "not in this folder"),
    "npz": (["layer_0/params.npz"], "layers are safetensors files"),
    "a number": ([3], "expected the name of a file"),
    "a layer that is a word": ([{"layer": "one", "filepath": "layer_1.safetensors"}], "expected the name of a file"),
    "absent": (["layer_9.safetensors"], "is not a layer of"),
}


@pytest.mark.parametrize("fault", TRAVERSALS)
def test_lists_that_leave_the_folder(layout, tmp_path, fault):
    case = layout("circuit_tracer")
    entries, words = TRAVERSALS[fault]
    save_file({"x": torch.ones(1)}, tmp_path / "secret.safetensors")
    config = case.path.with_name("config.yaml")
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), "transcoders": entries}))
    refuses(case, words, names=config)


YAMLS = {
    "code": (
        "model_kind: !!python/object/apply:os.system ['touch trapped']\nfeature_input_hook: a\nfeature_output_hook: b\n",
        "cannot be read as YAML",
    ),
    "anchors": ("a: &a [1, 1]\nb: &b [*a, *a]\nfeature_input_hook: a\nfeature_output_hook: b\n", "YAML anchors"),
    "a list": ("- 1\n", "is a list"),
    "broken": ("{", "cannot be read as YAML"),
    "bytes": (b"\xff\xfe\x00", "cannot be read as YAML"),
    "long": ("feature_input_hook: a\nfeature_output_hook: b\nx: " + "y" * 2**20, "bytes"),
    "cross-layer": ("model_kind: cross_layer_transcoder\nfeature_input_hook: a\nfeature_output_hook: b\n", "several layers"),
}


@pytest.mark.parametrize("fault", YAMLS)
def test_hostile_yaml(layout, tmp_path, monkeypatch, fault):
    monkeypatch.chdir(tmp_path)
    case = layout("circuit_tracer")
    text, words = YAMLS[fault]
    config = case.path.with_name("config.yaml")
    config.write_bytes(text if isinstance(text, bytes) else text.encode())
    refuses(case, words, names=config)
    assert not (tmp_path / "trapped").exists()


def test_circuit_tracer_negative_thresholds(layout):
    case = layout("circuit_tracer")
    rewrite(case, lambda tensors: tensors["activation_function.threshold"].neg_())
    refuses(case, "negative values")
