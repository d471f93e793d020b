"""Every component that saehub itself registers in; each passes the suite of its kind out. A new component is accepted by passing here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from saehub.api import KINDS
from saehub.pipeline.components import Components
from saehub.plugins import catalog
from saehub.testing import check_evaluator, check_exporter, check_extractor, check_trainer
from saehub.testing.saes import random_sae
from saehub.testing.stage import Stage

CHECKS = {"extractor": check_extractor, "trainer": check_trainer, "evaluator": check_evaluator, "exporter": check_exporter}
OURS = [item.address for kind in KINDS for item in catalog().components(kind).values() if item.distribution == "saehub"]
KIND = {item.address: kind for kind in KINDS for item in catalog().components(kind).values()}


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Stage:
    """One tiny model and its texts for the module."""
    return Stage(tmp_path_factory.mktemp("stage"))


@pytest.fixture(scope="module")
def workers() -> Iterator[Components]:
    """One worker a plugin for the module, as in a run: its library is imported once."""
    with Components() as components:
        yield components


def stored_activations(folder: Path) -> dict:
    """Settings for `native/files`: 24 sequences of 8 positions at two sites."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(0)
    tensors = {"resid_post.0": torch.randn(24, 8, 12, generator=draw), "mlp_out.0": torch.randn(24, 8, 20, generator=draw)}
    save_file({**tensors, "token_ids": torch.arange(24 * 8).reshape(24, 8) % 50}, folder / "rows.safetensors")
    return {"with_": {"path": str(folder), "exclude_ids": [0]}, "sites": ["resid_post.0", "mlp_out.0"]}


def published(tmp: Path) -> dict[str, dict]:
    """A folder or file in each layout that is only read, written here as its publisher describes it, from one random SAE."""
    sae = random_sae("jumprelu", subtract_b_dec=False, kind="autoencoder")
    t = {name: tensor.clone() for name, tensor in sae.tensors().items()}
    rows = {"W_enc": t["W_enc"].T.contiguous(), "W_dec": t["W_dec"].T.contiguous()}

    gemma = tmp / "gemma-scope-2"
    gemma.mkdir()
    (gemma / "config.json").write_text(json.dumps({"architecture": "jump_relu", "type": "sae", "model_name": "google/gemma-3-270m"}))
    names = {"w_enc": "W_enc", "b_enc": "b_enc", "w_dec": "W_dec", "b_dec": "b_dec", "threshold": "threshold"}
    save_file({name: t[ours] for name, ours in names.items()}, gemma / "params.safetensors")

    openai = tmp / "openai" / "resid_post_mlp_v5_32k" / "autoencoders"
    openai.mkdir(parents=True)
    entries = {"pre_bias": t["b_dec"], "latent_bias": t["b_enc"], "encoder.weight": rows["W_enc"], "decoder.weight": rows["W_dec"]}
    torch.save({**entries, "activation": "TopK", "activation_state_dict": {"k": 6, "postact_fn": "ReLU"}}, openai / "6.pt")
    torch.save({**entries, "activation": "ReLU"}, openai / "7.pt")

    goodfire = tmp / "goodfire"
    goodfire.mkdir()
    linear = {
        "encoder_linear.weight": rows["W_enc"],
        "encoder_linear.bias": t["b_enc"],
        "decoder_linear.weight": rows["W_dec"],
        "decoder_linear.bias": t["b_dec"],
    }
    torch.save(linear, goodfire / "Llama-3.1-8B-Instruct-SAE-l19.pth")

    qwen = tmp / "SAE-Res-Qwen3-1.7B-W32K-L0_6"
    qwen.mkdir()
    torch.save({**rows, "b_enc": t["b_enc"], "b_dec": t["b_dec"]}, qwen / "layer12.sae.pt")
    (qwen / "README.md").write_text("| Setting | Value |\n|---|---|\n| Top-K | 6 |\n")

    llama = tmp / "llama-scope"
    (llama / "checkpoints").mkdir(parents=True)
    hook = "blocks.15.hook_resid_post"
    about = {"d_model": 16, "act_fn": "jumprelu", "hook_point_in": hook, "hook_point_out": hook, "norm_activation": "dataset-wise"}
    about |= {"jump_relu_threshold": 0.3, "dataset_average_activation_norm": {"in": 5.0, "out": 5.0}, "sparsity_include_decoder_norm": True}
    (llama / "hyperparams.json").write_text(json.dumps(about))
    weights = {"encoder.weight": rows["W_enc"], "encoder.bias": t["b_enc"], "decoder.weight": rows["W_dec"], "decoder.bias": t["b_dec"]}
    save_file(weights, llama / "checkpoints" / "final.safetensors")
    return {
        "formats/gemma_scope_2": {"folders": {"jump_relu": gemma}},
        "formats/openai": {"folders": {"topk": openai / "6.pt", "relu": openai / "7.pt"}},
        "formats/goodfire": {"folders": {"relu": goodfire}},
        "formats/qwen_scope": {"folders": {"topk": qwen}},
        "formats/llama_scope": {"folders": {"2024": llama}},
    }


def placed_transcoders() -> dict:
    """Transcoders that say where they read and what they predict: circuit-tracer's layout must know."""
    made = {}
    for architecture in ("relu", "jumprelu", "batchtopk"):
        for kind in ("transcoder", "skip_transcoder"):
            sae = random_sae(architecture, kind=kind, subtract_b_dec=False)
            sae.provenance.update(site="mlp_in.1", target_site="mlp_out.1")
            made[f"{architecture} {kind}"] = sae
    return made


READ_ONLY = ("formats/gemma_scope_2", "formats/openai", "formats/goodfire", "formats/qwen_scope", "formats/llama_scope")
# What a component needs in order to be tried: settings without defaults, and what it must refuse. Others are tried as they are.
TRAIN = {"batch": 256, "width": 96}
SAELENS = {
    "standard": {"l1_coefficient": 0.5},
    "gated": {"l1_coefficient": 1.0},
    "topk": {"k": 4},
    "abstopk": {"k": 4},
    "jumprelu": {"l0_coefficient": 0.2, "jumprelu_init_threshold": 0.1},
    "batchtopk": {"k": 4.0},
    "matryoshka_batchtopk": {"k": 4.0, "matryoshka_widths": [48, 96]},
    "matching_pursuit": {"max_iterations": 4},
}
RECOVER = {"abstopk": 0.7}  # planted features add up with positive signs only; signed latents have more ways to say the same


def sparsify(word: str) -> dict:
    """Settings of a Sparsify trainer, and what it must refuse."""
    if word == "end_to_end":
        refuses = [{"k": 0}, {"batch": 8}, {"skip_connection": True}, {"activation": "groupmax", "k": 5}]
        return {"with_": {**TRAIN, "batch": 64, "k": 4, "optimizer": "adam", "lr": 3e-3}, "refuses": refuses, "steps": 40}
    refuses = [{"k": 1000}, {"k": 0}, {"lr": -1.0}, {"expansion": 4.0}, {"optimizer": "adam", "warmup": 400}, {"k_decay_steps": 401}]
    refuses += {"groupmax": [{"k": 5}, {"k_decay_steps": 10}], "multi_topk": [{"k": 25}]}.get(word, [])
    arguments = {"with_": {**TRAIN, "k": 4}, "refuses": refuses, "transcoder": "transcoder" in word}
    if word == "skip_transcoder":  # the linear path explains part of what the features would; signum needs more than 400 steps there
        arguments |= {"with_": {**TRAIN, "k": 4, "optimizer": "adam", "lr": 3e-3}, "recover": 0.7}
    return arguments


toys = spec_from_file_location("saebench_toys", Path(__file__).parents[1] / "adapters" / "saebench_toys.py")
saebench_toys = module_from_spec(toys)
toys.loader.exec_module(saebench_toys)


def saebench(tmp: Path, word: str) -> dict:
    """Settings of a SAEBench evaluator on local data, small enough for a test; one seed where two add nothing."""
    stage, with_ = saebench_toys.prepared(word, tmp)
    return {"with_": with_, **({"stage": stage} if stage else {})}


# dictionary_learning's penalties and rates are for long runs; 400 steps on planted features want more of both.
DL = {**TRAIN, "lr": 1e-2}
DL_REFUSES = [{"lr": -1.0}, {"expansion": 4.0}, {"warmup_steps": 1000}, {"decay_start": 0.01}]
DL_TOPK = {"with_": {**DL, "k": 4}, "refuses": [*DL_REFUSES, {"k": 97}, {"k": 0}, {"threshold_beta": 1.0}, {"dead_after": 0}]}
DL_ANNEAL = [*DL_REFUSES, {"resample_steps": 100}, {"sparsity_function": "Lp"}, {"anneal_end": 390}, {"anneal_start": 395}]
DICTIONARY_LEARNING = {
    "standard": {"with_": {**DL, "l1_penalty": 0.2}, "refuses": [*DL_REFUSES, {"resample_steps": 50, "decay_start": 0.8}]},
    "standard_april": {"with_": {**DL, "l1_penalty": 0.2}, "refuses": DL_REFUSES},
    "topk": DL_TOPK,
    "batch_topk": {**DL_TOPK, "refuses": [*DL_TOPK["refuses"], {"threshold_start_step": 399}]},
    "matryoshka_batch_topk": {
        "with_": {**DL_TOPK["with_"], "group_fractions": [0.5, 0.5]},
        "refuses": [*DL_TOPK["refuses"], {"group_fractions": [0.5, 0.4]}, {"group_fractions": [0.001, 0.999]}, {"group_weights": [1.0]}],
    },
    "jump_relu": {"with_": {**DL, "lr": 3e-3, "target_l0": 4.0, "bandwidth": 0.05}, "refuses": [*DL_REFUSES, {"bandwidth": 0.0}]},
    "gated": {"with_": {**DL, "l1_penalty": 0.4}, "refuses": DL_REFUSES},
    "p_anneal": {"with_": {**DL, "initial_sparsity_penalty": 0.2}, "refuses": DL_ANNEAL},
    "gated_anneal": {"with_": {**DL, "initial_sparsity_penalty": 0.4}, "refuses": DL_ANNEAL},
}
ARGUMENTS = {
    "native/topk": lambda tmp: {
        "with_": {**TRAIN, "k": 4},
        "refuses": [{"k": 1000}, {"k": 0}, {"lr": -1.0}, {"expansion": 4.0}, {"warmup": 2.0}],
    },
    "native/batchtopk": lambda tmp: {"with_": {**TRAIN, "k": 4}, "refuses": [{"k": 1000}, {"k_anneal": 2.0}]},
    "native/matryoshka_batchtopk": lambda tmp: {"with_": {**TRAIN, "k": 4}, "refuses": [{"prefixes": [0.5]}, {"prefixes": [1.0, 1.0]}]},
    "native/relu": lambda tmp: {"with_": {**TRAIN, "target_l0": 4.0}, "refuses": [{"target_l0": 1000.0}, {"p_end": 0.0}]},
    "native/jumprelu": lambda tmp: {"with_": {**TRAIN, "target_l0": 4.0}, "refuses": [{"bandwidth": 0.0}, {"penalty": "l2"}]},
    "native/gated": lambda tmp: {"with_": {**TRAIN, "target_l0": 4.0}, "refuses": [{"sparsity": -1.0}]},
    "native/abstopk": lambda tmp: {"with_": {**TRAIN, "k": 4}, "refuses": [{"k": 1000}]},
    "native/groupmax": lambda tmp: {"with_": {**TRAIN, "k": 4}, "refuses": [{"k": 5}, {"k_anneal": 0.5}]},
    **{
        f"saelens/{word}": (lambda tmp, word=word, with_=with_: {"with_": {**TRAIN, "lr": 3e-3, **with_}, "recover": RECOVER.get(word, 0.8), "refuses": [{"lr": 0.0}, {"lr_warm_up_steps": 400}]})
        for word, with_ in SAELENS.items()
    },
    **{f"sparsify/{word}": (lambda tmp, word=word: sparsify(word)) for word in ("topk", "groupmax", "multi_topk", "transcoder", "skip_transcoder", "end_to_end")},
    **{f"dictionary_learning/{name}": (lambda tmp, given=given: dict(given)) for name, given in DICTIONARY_LEARNING.items()},
    "dictionary_learning/evaluate": lambda tmp: {"with_": {"batch": 64, "batch_size": 8}},
    "native/files": lambda tmp: stored_activations(tmp / "activations"),
    "formats/circuit_tracer": lambda tmp: {"saes": placed_transcoders()},
    **{f"saebench/{word}": (lambda tmp, word=word: saebench(tmp, word)) for word in saebench_toys.SETTINGS},
    **{address: (lambda tmp, address=address: published(tmp)[address]) for address in READ_ONLY},
}


def test_every_kind_has_a_component_of_ours():
    assert {KIND[address] for address in OURS} == set(KINDS)


def test_arguments_name_components_that_exist():
    assert set(ARGUMENTS) <= set(OURS)


@pytest.mark.quick
@pytest.mark.parametrize("address", [address for address in OURS if address.startswith("native/") and KIND[address] == "trainer"])
def test_plugins_check_has_settings_to_try_a_trainer_with(address):
    """`saehub plugins check native` needs no `--set` for them."""
    from saehub.recipe.check import make_config

    registered = catalog().find("trainer", address)
    assert make_config(registered, dict(registered.load_config().EXAMPLE)).width == 96


@pytest.mark.parametrize("address", OURS)
def test_component(address, stage, workers, tmp_path):
    kind = KIND[address]
    arguments = {**ARGUMENTS.get(address, lambda tmp: {})(tmp_path), "workers": workers}
    if kind != "exporter":
        arguments.setdefault("stage", stage)
    report = CHECKS[kind](address, **arguments)
    assert report.ok, f"\n{report}"


def test_the_saelens_exporter_says_what_it_can_and_refuses_the_rest():
    """The architectures of SAELens 6 go through; those it has no class for are refused by name, not approximated."""
    exporter = catalog().find("exporter", "saelens").load()(None)
    assert exporter.refusal(random_sae("topk")) is None and exporter.refusal(random_sae("jumprelu")) is None
    assert exporter.refusal(random_sae("groupmax"))
