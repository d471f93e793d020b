"""An SAE's config and tensors in; features and reconstructions by the equations of the README, in numpy float64, out: no code of saehub's computes here."""

from __future__ import annotations

import numpy as np

UNIT = 2.0**-24
"""Of float32."""


def wide(tensors) -> dict[str, np.ndarray]:
    """Torch tensors (any dtype) as float64 arrays."""
    return {name: tensor.double().numpy() if tensor.is_floating_point() else tensor.numpy() for name, tensor in tensors.items()}


def canonical(config, tensors) -> dict[str, np.ndarray]:
    """Everything folded that can be: no scaling by decoder norms, nothing subtracted. With n_i = ‖V_i‖:

    W n, (b - c W) n, V / n, c, θ for every latent;  a gated encoder's b_gate - c W and b_mag - c W e^r.
    """
    a = wide(tensors)
    if config.decoder_norm_scaling:
        n_F = np.linalg.norm(a["W_dec"], axis=1)
        a["W_enc"], a["b_enc"], a["W_dec"] = a["W_enc"] * n_F, a["b_enc"] * n_F, a["W_dec"] / n_F[:, None]
    if config.subtract_b_dec and ("b_enc" in a or "b_gate" in a):
        shift_F = a["b_dec"] @ a["W_enc"]
        if "b_gate" in a:
            a["b_gate"], a["b_mag"] = a["b_gate"] - shift_F, a["b_mag"] - shift_F * np.exp(a["r_mag"])
        else:
            a["b_enc"] = a["b_enc"] - shift_F
    if "threshold" in a:
        a["threshold"] = np.broadcast_to(a["threshold"], (config.d_sae,))
    a.pop("group_sizes", None)
    return a


def normed(norm: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows under `norm`, and scale and offset that undo it on an output."""
    if norm == "constant_norm_rescale":
        scale = np.linalg.norm(x, axis=1, keepdims=True) / x.shape[1] ** 0.5
        return x / scale, scale, np.zeros_like(scale)
    if norm == "layer_norm":
        mean, deviation = x.mean(1, keepdims=True), x.std(1, ddof=1, keepdims=True)
        return (x - mean) / (deviation + 1e-5), deviation, mean
    return x, np.ones((len(x), 1)), np.zeros((len(x), 1))


def run(config, tensors, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features [n, d_sae] and reconstruction [n, d_out] of float64 rows [n, d_in] (a temporal SAE: of sequences [s, t, d_in], n = s t)."""
    a = canonical(config, tensors)
    if config.architecture == "temporal":
        return tuple(np.concatenate(parts) for parts in zip(*(attend(config, a, sequence) for sequence in x), strict=True))
    xp, scale, offset = normed(config.norm_in, x)
    if config.architecture == "matching_pursuit":
        f = pursue(config, a, xp - a["b_dec"] if config.subtract_b_dec else xp)
        y = f @ a["W_dec"] + (a["b_dec"] if config.subtract_b_dec else 0)
    else:
        f = activate(config, a, xp)
        y = f @ a["W_dec"] + a["b_dec"]
    if config.norm_out != "none":
        y = y * scale + offset
    return f, y + (x @ a["W_skip"].T if "W_skip" in a else 0)


def activate(config, a: dict[str, np.ndarray], xp: np.ndarray) -> np.ndarray:
    if config.architecture == "gated":
        drive = xp @ a["W_enc"]
        return (drive + a["b_gate"] > 0) * np.maximum(drive * np.exp(a["r_mag"]) + a["b_mag"], 0)
    p = xp @ a["W_enc"] + a["b_enc"]
    if config.architecture == "relu":
        return np.maximum(p, 0)
    if config.architecture in ("jumprelu", "batchtopk", "matryoshka"):
        return np.maximum(p, 0) * (p > a["threshold"])
    k = int(config.params["k"])
    if config.architecture == "groupmax":
        grouped = p.reshape(len(p), k, -1)
        return np.where(grouped == grouped.max(2, keepdims=True), np.maximum(grouped, 0), 0).reshape(p.shape)
    signed = config.architecture == "abstopk"
    ranked = np.abs(p) if signed else p
    kept = ranked >= np.sort(ranked, axis=1)[:, -k][:, None]
    return np.where(kept, p if signed else np.maximum(p, 0), 0)


def pursue(config, a: dict[str, np.ndarray], residual: np.ndarray) -> np.ndarray:
    """Row by row, as the algorithm is told."""
    found = np.zeros((len(residual), config.d_sae))
    steps = config.params["max_iterations"] or config.d_in
    for row, r in enumerate(residual):
        for _ in range(steps):
            before = set(np.flatnonzero(found[row]))
            i = int(np.argmax(a["W_dec"] @ r))
            value = max(float(a["W_dec"][i] @ r), 0.0)
            found[row, i] += value
            r = r - value * a["W_dec"][i]
            same = config.params["stop_on_duplicate_support"] and before == set(np.flatnonzero(found[row]))
            if same or np.linalg.norm(r) < config.params["residual_threshold"]:
                break
    return found


def attend(config, a: dict[str, np.ndarray], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One sequence [t, d], position by position."""
    p, V = config.params, a["W_dec"]
    W = V.T if p["tied"] else a["W_enc"]
    xp, scale, offset = normed(config.norm_in, x)
    r = xp * p["input_scale"] - (a["b_dec"] if config.subtract_b_dec else 0)
    predicted = np.zeros((len(x), config.d_sae))
    for layer in range(p["n_attn_layers"]):

        def linear(name: str, rows: np.ndarray, layer=layer) -> np.ndarray:
            return rows @ a[f"attn_layers.{layer}.{name}.weight"].T + a[f"attn_layers.{layer}.{name}.bias"]

        codes = np.maximum(r @ W / (4 * config.d_in), 0)
        before = np.concatenate([np.zeros_like(codes[:1]), codes[:-1]])
        queries, keys, values = linear("q_target", codes), linear("k_ctx", before), linear("v_ctx", before)
        mixed = np.zeros_like(values)
        for t in range(len(x)):
            for q, k, v, out in zip(*(np.array_split(part, p["n_heads"], axis=1) for part in (queries, keys[: t + 1], values[: t + 1], mixed)), strict=True):
                weights = np.exp(k @ q[t] / q.shape[1] ** 0.5)
                out[t] = weights @ v / weights.sum()
        guess = np.maximum(linear("c_proj", mixed), 0)
        D = guess @ V
        s = (D * r).sum(1, keepdims=True) / (np.linalg.norm(D, axis=1, keepdims=True) + 1e-6) ** 2
        predicted, r = predicted + s * guess, r - s * D
    f = np.maximum(r @ W / (4 * config.d_in), 0)
    if p["k"] is not None:
        f = np.where(f >= np.sort(f, axis=1)[:, -p["k"]][:, None], f, 0)
    y = ((f + predicted) @ V + (a["b_dec"] if config.subtract_b_dec or not p["tied"] else 0)) / p["input_scale"]
    return f, y * scale + offset if config.norm_out != "none" else y
