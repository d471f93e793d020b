"""A folder a layout, written by numpy and torch alone, with the published equation in numpy float64 and what the SAE must say of itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

D, F, K = 12, 40, 5


@dataclass
class Case:
    """One published layout."""

    path: Path
    """What is read: a folder, or a file where a folder holds several SAEs."""
    address: str
    formula: Callable
    """float64 rows [n, d] -> features, reconstruction, from the stored arrays."""
    stored: dict[str, np.ndarray]
    """Our tensor -> the array that must stand in it, bit for bit."""
    weights: Path
    architecture: str
    kind: str = "autoencoder"
    site: str | None = None
    target: str | None = None
    unknown: str | None = None
    origin: dict = field(default_factory=dict)
    """Must be in provenance.origin.config."""


def draw(*shape: int, seed: int, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def arrays() -> dict[str, np.ndarray]:
    """Random weights under our names; decoder rows of different lengths."""
    lengths = np.linspace(0.5, 2, F, dtype=np.float32)[:, None]
    return {
        "W_enc": draw(D, F, seed=1, scale=D**-0.5),
        "b_enc": draw(F, seed=2, scale=0.2),
        "W_dec": draw(F, D, seed=3, scale=D**-0.5) * lengths,
        "b_dec": draw(D, seed=4, scale=0.3),
        "threshold": np.abs(draw(F, seed=5, scale=0.3)) + 0.1,
        "W_skip": draw(D, D, seed=6, scale=0.2),
    }


def wide(*values: np.ndarray) -> list[np.ndarray]:
    return [value.astype(np.float64) for value in values]


def largest(p: np.ndarray, k: int, ranked: np.ndarray) -> np.ndarray:
    cut = np.sort(ranked, axis=1)[:, -k][:, None]
    return np.where(ranked >= cut, np.maximum(p, 0), 0)


def torch_file(path: Path, content: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: torch.from_numpy(v.copy()) if isinstance(v, np.ndarray) else v for name, v in content.items()}, path)
    return path


def tensor_file(path: Path, content: dict[str, np.ndarray]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.from_numpy(np.ascontiguousarray(v)) for name, v in content.items()}, path)
    return path


def jump(a: dict, skip: bool = False) -> Callable:
    """Gemma Scope's tutorial: mask = pre > threshold; acts = mask * relu(pre); recon = acts @ W_dec + b_dec."""
    W, b, V, c, theta, S = wide(a["W_enc"], a["b_enc"], a["W_dec"], a["b_dec"], a["threshold"], a["W_skip"])

    def formula(x):
        p = x @ W + b
        f = np.maximum(p, 0) * (p > theta)
        return f, f @ V + c + (x @ S.T if skip else 0)

    return formula


# ---------------------------------------------------------------------- builders
def gemma_scope(tmp: Path) -> Case:
    a, folder = arrays(), tmp / "google/gemma-scope-2b-pt-mlp/layer_7/width_16k/average_l0_71"
    folder.mkdir(parents=True)
    stored = {name: a[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    np.savez(folder / "params.npz", **stored)
    return Case(
        folder,
        "formats/gemma_scope",
        jump(a),
        stored,
        folder / "params.npz",
        "jumprelu",
        site="mlp_out.7",
        origin={"folder": "layer_7/width_16k/average_l0_71"},
    )


def gemma_scope_compressed_transcoder(tmp: Path) -> Case:
    """Compressed, lower-case names, a unit scaling_factor, a hook that no module holds."""
    a, folder = arrays(), tmp / "models--google--gemma-scope-2b-pt-transcoders/snapshots/abc/layer_3/width_16k/average_l0_54"
    folder.mkdir(parents=True)
    stored = {name: a[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    np.savez_compressed(
        folder / "params.npz",
        scaling_factor=np.ones(F, np.float32),
        w_enc=a["W_enc"],
        w_dec=a["W_dec"],
        **{n: a[n] for n in ("b_enc", "b_dec", "threshold")},
    )
    return Case(
        folder,
        "formats/gemma_scope",
        jump(a),
        stored,
        folder / "params.npz",
        "jumprelu",
        "transcoder",
        target="mlp_out.3",
        unknown="blocks.3.ln2.hook_normalized",
    )


def _gemma_2(folder: Path, a: dict, config: dict, skip: bool = False) -> dict[str, np.ndarray]:
    names = {"w_enc": "W_enc", "w_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}
    content = {theirs: a[ours] for theirs, ours in names.items()} | ({"affine_skip_connection": a["W_skip"].T} if skip else {})
    tensor_file(folder / "params.safetensors", content)
    (folder / "config.json").write_text(json.dumps(config))
    return {ours: a[ours] for ours in names.values()} | ({"W_skip": a["W_skip"]} if skip else {})


def gemma_scope_2(tmp: Path) -> Case:
    a, folder = arrays(), tmp / "resid_post/layer_9_width_16k_l0_small"
    hook = "model.layers.9.output"
    config = {
        "architecture": "jump_relu",
        "type": "sae",
        "model_name": "google/gemma-3-1b-pt",
        "hf_hook_point_in": hook,
        "hf_hook_point_out": hook,
        "affine_connection": False,
        "width": F,
        "l0": 20,
    }
    stored = _gemma_2(folder, a, config)
    return Case(
        folder, "formats/gemma_scope_2", jump(a), stored, folder / "params.safetensors", "jumprelu", site="resid_post.9", origin=config
    )


def gemma_scope_2_skip_transcoder(tmp: Path) -> Case:
    a, folder = arrays(), tmp / "transcoder_all/layer_5_width_16k_l0_big_affine"
    config = {"architecture": "jump_relu", "model_name": "google/gemma-3-4b-it", "affine_connection": True}
    config |= {
        "hf_hook_point_in": "model.layers.5.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.5.post_feedforward_layernorm.output",
    }
    stored = _gemma_2(folder, a, config, skip=True)
    return Case(
        folder,
        "formats/gemma_scope_2",
        jump(a, skip=True),
        stored,
        folder / "params.safetensors",
        "jumprelu",
        "skip_transcoder",
        "mlp_in.5",
        "mlp_out.5",
        origin=config,
    )


def llama_scope(tmp: Path) -> Case:
    """2024: on loading, biases are divided by √d/norm, decoder rows made unit vectors, and θ is compared in raw units."""
    a, folder = arrays(), tmp / "Llama3_1-8B-Base-L15R-8x"
    config = {"hook_point_in": "blocks.15.hook_resid_post", "hook_point_out": "blocks.15.hook_resid_post", "d_model": D, "d_sae": F, "expansion_factor": F / D, "act_fn": "jumprelu", "jump_relu_threshold": 0.35546875,
              "norm_activation": "dataset-wise", "dataset_average_activation_norm": {"in": 10.8125, "out": 10.8125}, "sparsity_include_decoder_norm": True, "use_decoder_bias": True, "apply_decoder_bias_to_pre_encoder": False, "use_glu_encoder": False, "top_k": 50}  # fmt: skip
    weights = tensor_file(
        folder / "checkpoints/final.safetensors",
        {"encoder.weight": a["W_enc"].T, "encoder.bias": a["b_enc"], "decoder.weight": a["W_dec"].T, "decoder.bias": a["b_dec"]},
    )
    (folder / "hyperparams.json").write_text(json.dumps(config))
    W, b, V, c = wide(a["W_enc"], a["b_enc"], a["W_dec"], a["b_dec"])

    def formula(x):
        s, n = D**0.5 / 10.8125, np.linalg.norm(V, axis=1)
        p = (x @ W + b / s) * n
        f = np.where(p > np.float32(0.35546875), p, 0)
        return f, f @ (V / n[:, None]) + c / s

    stored = {"W_enc": a["W_enc"], "W_dec": a["W_dec"], "threshold": np.full(F, 0.35546875, np.float32)}
    return Case(folder, "formats/llama_scope", formula, stored, weights, "jumprelu", site="resid_post.15", origin=config)


def _late(folder: Path, activation: str, config: dict, content: dict[str, np.ndarray]) -> tuple[dict, Path]:
    config = {
        "sae_type": "sae",
        "d_model": D,
        "expansion_factor": F / D,
        "act_fn": activation,
        "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": True,
        "top_k": K,
        "use_decoder_bias": True,
        "dtype": "torch.float32",
    } | config
    weights = tensor_file(folder / "sae_weights.safetensors", content)
    (folder / "config.json").write_text(json.dumps(config))
    return config, weights


def llamascopium_transcoder(tmp: Path) -> Case:
    """2026: rows are normalised to an average of √d, the gate sees p ‖W_D‖, and the output is denormalised by its own norm."""
    a, folder = arrays(), tmp / "transcoder"
    hooks = {"hook_point_in": "blocks.4.ln2.hook_normalized", "hook_point_out": "blocks.4.hook_mlp_out"}
    norms = {
        f"dataset_average_activation_norm.{hooks[side]}": np.array(value, np.float32)
        for side, value in (("hook_point_in", 6.5), ("hook_point_out", 2.25))
    }
    content = {
        "W_E": a["W_enc"],
        "b_E": a["b_enc"],
        "W_D": a["W_dec"],
        "b_D": a["b_dec"],
        "activation_function.log_jumprelu_threshold": np.log(a["threshold"]),
        **norms,
    }
    config, weights = _late(folder, "jumprelu", hooks, content)
    W, b, V, c, log_theta = wide(a["W_enc"], a["b_enc"], a["W_dec"], a["b_dec"], np.log(a["threshold"]))

    def formula(x):
        s_in, s_out = D**0.5 / 6.5, D**0.5 / 2.25
        p = s_in * x @ W + b
        f = p * (p * np.linalg.norm(V, axis=1) > np.exp(log_theta))
        return f / s_in, (f @ V + c) / s_out  # features in raw units

    return Case(
        folder,
        "formats/llama_scope",
        formula,
        {"W_enc": a["W_enc"]},
        weights,
        "jumprelu",
        "transcoder",
        target="mlp_out.4",
        unknown="blocks.4.ln2.hook_normalized",
        origin=config,
    )


def llamascopium_topk(tmp: Path) -> Case:
    """The k largest p ‖W_D‖; norms given in the config, as an R1-Distill folder must be completed; token-wise norms have no folds."""
    a, folder = arrays(), tmp / "topk"
    hooks = {
        "hook_point_in": "blocks.2.hook_mlp_out",
        "hook_point_out": "blocks.2.hook_mlp_out",
        "dataset_average_activation_norm": {"in": 3.0, "out": 3.0},
    }
    content = {"encoder.weight": a["W_enc"].T, "encoder.bias": a["b_enc"], "decoder.weight": a["W_dec"].T, "decoder.bias": a["b_dec"]}
    config, weights = _late(folder, "topk", hooks, content)
    W, b, V, c = wide(a["W_enc"], a["b_enc"], a["W_dec"], a["b_dec"])

    def formula(x):
        s, n = D**0.5 / 3.0, np.linalg.norm(V, axis=1)
        p = s * x @ W + b
        f = largest(p, K, np.maximum(p * n, 0))
        return f * n / s, (f @ V + c) / s

    return Case(
        folder, "formats/llama_scope", formula, {"W_enc": a["W_enc"], "W_dec": a["W_dec"]}, weights, "topk", site="mlp_out.2", origin=config
    )


def llamascopium_token_wise(tmp: Path) -> Case:
    a, folder = arrays(), tmp / "tokenwise"
    hooks = {
        "hook_point_in": "blocks.0.hook_resid_pre",
        "hook_point_out": "blocks.0.hook_resid_pre",
        "norm_activation": "token-wise",
        "sparsity_include_decoder_norm": False,
    }
    config, weights = _late(folder, "relu", hooks, {"W_E": a["W_enc"], "b_E": a["b_enc"], "W_D": a["W_dec"], "b_D": a["b_dec"]})
    W, b, V, c = wide(a["W_enc"], a["b_enc"], a["W_dec"], a["b_dec"])

    def formula(x):
        s = D**0.5 / np.linalg.norm(x, axis=1, keepdims=True)
        f = np.maximum(s * x @ W + b, 0)
        return f, (f @ V + c) / s

    return Case(
        folder,
        "formats/llama_scope",
        formula,
        {n: a[n] for n in ("W_enc", "b_enc", "W_dec", "b_dec")},
        weights,
        "relu",
        site="resid_pre.0",
        origin=config,
    )


def openai(tmp: Path) -> Case:
    """TopK with layer norm; statistics beside, and k twice, as the library's `state_dict` has it."""
    a = arrays()
    content = {"pre_bias": a["b_dec"], "encoder.weight": np.ascontiguousarray(a["W_enc"].T), "latent_bias": a["b_enc"], "decoder.weight": np.ascontiguousarray(a["W_dec"].T),
               "stats_last_nonzero": np.zeros(F, np.int64), "latents_activation_frequency": np.ones(F, np.float32), "latents_mean_square": np.zeros(F, np.float32), "activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}, "activation.k": K, "activation.postact_fn": "ReLU"}  # fmt: skip
    path = torch_file(tmp / "gpt2-small/resid_delta_mlp_v5_32k/autoencoders/6.pt", content)
    W, b, V, c = wide(a["W_enc"], a["b_enc"], a["W_dec"], a["b_dec"])

    def formula(x):
        mu = x.mean(1, keepdims=True)
        sd = (x - mu).std(1, ddof=1, keepdims=True)
        p = ((x - mu) / (sd + 1e-5) - c) @ W + b
        f = largest(p, K, p)
        return f, (f @ V + c) * sd + mu

    return Case(
        path,
        "formats/openai",
        formula,
        {n: a[n] for n in ("W_enc", "b_enc", "W_dec", "b_dec")},
        path,
        "topk",
        site="mlp_out.6",
        origin={"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}},
    )


def openai_tied(tmp: Path) -> Case:
    """The first release: ReLU, no norm; here with tied weights."""
    a = arrays()
    encoder = np.ascontiguousarray(a["W_enc"].T)
    path = torch_file(
        tmp / "somewhere/6.pt",
        {
            "pre_bias": a["b_dec"],
            "encoder.weight": encoder,
            "latent_bias": a["b_enc"],
            "decoder.linear.weight": encoder,
            "activation": "ReLU",
            "activation_state_dict": {},
        },
    )
    W, b, c = wide(a["W_enc"], a["b_enc"], a["b_dec"])

    def formula(x):
        f = np.maximum((x - c) @ W + b, 0)
        return f, f @ W.T + c

    return Case(path.parent, "formats/openai", formula, {"W_enc": a["W_enc"], "W_dec": a["W_enc"].T, "b_dec": a["b_dec"]}, path, "relu")


def goodfire(tmp: Path) -> Case:
    a = arrays()
    content = {
        "encoder_linear.weight": np.ascontiguousarray(a["W_enc"].T),
        "encoder_linear.bias": a["b_enc"],
        "decoder_linear.weight": np.ascontiguousarray(a["W_dec"].T),
        "decoder_linear.bias": a["b_dec"],
    }
    path = torch_file(tmp / "Llama-3.1-8B-Instruct-SAE-l19.pth", content)
    (tmp / "config.yaml").write_text("expansion: 16\nsite: layer 19\n")
    W, b, V, c = wide(a["W_enc"], a["b_enc"], a["W_dec"], a["b_dec"])

    def formula(x):
        f = np.maximum(x @ W + b, 0)
        return f, f @ V + c

    return Case(
        tmp,
        "formats/goodfire",
        formula,
        {n: a[n] for n in ("W_enc", "b_enc", "W_dec", "b_dec")},
        path,
        "relu",
        site="resid_post.19",
        origin={"expansion": 16, "site": "layer 19"},
    )


def qwen_scope(tmp: Path) -> Case:
    """Two layers in one folder, so the file is named; k in the card and in the repository's name."""
    a, folder = arrays(), tmp / f"models--Qwen--SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}/snapshots/abc"
    content = {
        "W_enc": np.ascontiguousarray(a["W_enc"].T),
        "b_enc": a["b_enc"],
        "W_dec": np.ascontiguousarray(a["W_dec"].T),
        "b_dec": a["b_dec"],
    }
    path = torch_file(folder / "layer12.sae.pt", content)
    torch_file(folder / "layer3.sae.pt", content)
    (folder / "README.md").write_text(f"# Qwen-Scope\n| Property | Value |\n|---|---|\n| Base model | Qwen3-1.7B |\n| Top-K | {K} |\n")
    W, b, V, c = wide(a["W_enc"], a["b_enc"], a["W_dec"], a["b_dec"])

    def formula(x):
        p = x @ W + b
        f = largest(p, K, p)
        return f, f @ V + c

    return Case(
        path,
        "formats/qwen_scope",
        formula,
        {n: a[n] for n in ("W_enc", "b_enc", "W_dec", "b_dec")},
        path,
        "topk",
        site="resid_post.12",
        origin={"file": "layer12.sae.pt"},
    )


def _set(folder: Path, a: dict, layers: tuple[int, ...], names: tuple[str, ...], config: dict) -> dict:
    ours = {"threshold": "activation_function.threshold"}
    content = {ours.get(name, name): a[name].T if name == "W_enc" else a[name] for name in names}
    for layer in layers:
        tensor_file(folder / f"layer_{layer}.safetensors", content)
    config = {"model_name": "meta-llama/Llama-3.2-1B", "model_kind": "transcoder_set", "scan": "llama-scan"} | config
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return config


def circuit_tracer(tmp: Path) -> Case:
    """A JumpReLU set of three layers."""
    a, names = arrays(), ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    config = _set(tmp, a, (0, 1, 2), names, {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"})
    W, b, V, c, theta = wide(*(a[n] for n in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")))

    def formula(x):
        p = x @ W + b
        f = p * (p > theta)
        return f, f @ V + c

    return Case(
        tmp / "layer_1.safetensors",
        "formats/circuit_tracer",
        formula,
        {n: a[n] for n in names},
        tmp / "layer_1.safetensors",
        "jumprelu",
        "transcoder",
        "resid_mid.1",
        "mlp_out.1",
        origin=config,
    )


def circuit_tracer_skip(tmp: Path) -> Case:
    """A ReLU layer with a skip path, listed by name; an input hook that no module holds."""
    a, names = arrays(), ("W_enc", "W_dec", "b_enc", "b_dec", "W_skip")
    config = _set(
        tmp,
        a,
        (0,),
        names,
        {"feature_input_hook": "ln2.hook_normalized", "feature_output_hook": "mlp.hook_out", "transcoders": ["layer_0.safetensors"]},
    )
    W, b, V, c, S = wide(*(a[n] for n in ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip")))

    def formula(x):
        f = np.maximum(x @ W + b, 0)
        return f, f @ V + c + x @ S.T

    return Case(
        tmp,
        "formats/circuit_tracer",
        formula,
        {n: a[n] for n in names},
        tmp / "layer_0.safetensors",
        "relu",
        "skip_transcoder",
        target="mlp_out.0",
        unknown="blocks.0.ln2.hook_normalized",
        origin=config,
    )


LAYOUTS = {build.__name__: build for build in (gemma_scope, gemma_scope_compressed_transcoder, gemma_scope_2, gemma_scope_2_skip_transcoder, llama_scope, llamascopium_transcoder, llamascopium_topk,
                                              llamascopium_token_wise, openai, openai_tied, goodfire, qwen_scope, circuit_tracer, circuit_tracer_skip)}  # fmt: skip


@pytest.fixture
def layout(tmp_path):
    """`layout("gemma_scope")` writes that layout into a folder of its own."""

    def build(name: str) -> Case:
        folder = tmp_path / f"case-{name}"
        folder.mkdir()
        return LAYOUTS[name](folder)

    return build


@pytest.fixture(params=LAYOUTS)
def case(request, layout) -> Case:
    """Every layout in turn."""
    return layout(request.param)


@pytest.fixture(
    params=[
        name
        for name in LAYOUTS
        if "_" not in name or name in ("gemma_scope", "gemma_scope_2", "llama_scope", "qwen_scope", "circuit_tracer")
    ]
)
def plain_case(request, layout) -> Case:
    """One layout an exporter."""
    return layout(request.param)


@pytest.fixture
def rows() -> np.ndarray:
    """Float32 [200, D], with a mean of their own."""
    return draw(200, D, seed=11, scale=1.5) + draw(D, seed=12, scale=0.4)


@pytest.fixture(autouse=True)
def one_thread():
    """Small problems: one thread, put back after the test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
