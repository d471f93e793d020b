"""Every metric of `native/core` against straight float64 loops over whole tensors, and what must hold by definition."""

from __future__ import annotations

import math

import pytest
import torch

from saehub.checkpoint.config import SAEConfig
from saehub.checkpoint.sae import SAE
from saehub.sites import Site
from saehub.testing.saes import random_sae
from saehub_native.evaluate.definitions import DEFINITIONS

pytestmark = pytest.mark.quick


def reference(x_STD, y_STD, keep_ST, sae) -> dict[str, float]:
    """FVU and the rest from the definitions, row by row."""
    rows = [(s, t) for s in range(keep_ST.shape[0]) for t in range(keep_ST.shape[1]) if keep_ST[s, t]]
    f = [sae.encode(x_STD[s, t][None])[0].double() for s, t in rows]
    yhat = [sae.decode(f[n].float()[None], like=x_STD[s, t][None])[0].double() for n, (s, t) in enumerate(rows)]
    y = [y_STD[s, t].double() for s, t in rows]
    mean, error = sum(y) / len(y), [a - b for a, b in zip(y, yhat, strict=True)]
    bias = sum(error) / len(error)
    total = sum(float((a - mean) @ (a - mean)) for a in y)
    wrong = sum(float(e @ e) for e in error)
    return {
        "fvu": wrong / total,
        "explained_variance": 1 - sum(float((e - bias) @ (e - bias)) for e in error) / total,
        "mse": wrong / len(rows) / len(mean),
        "cosine": sum(float(a @ b / (a.norm() * b.norm())) for a, b in zip(y, yhat, strict=True)) / len(rows),
        "l0": sum(int((row != 0).sum()) for row in f) / len(rows),
        "l1": sum(float(row.abs().sum()) for row in f) / len(rows),
        "never_fired_share": 1 - float((torch.stack(f) != 0).any(0).double().mean()),
        "feature_density": float((torch.stack(f) != 0).double().mean()),
    }


def log_probabilities(stage, site, ids_ST, replace=None):
    """Log-probabilities [S, T, V] in float64, with the tensor at `site` replaced through a plain hook."""
    tap = Site.parse(site).tap(stage.model.shape)
    hook = lambda _m, _a, output: replace(output) if isinstance(output, torch.Tensor) else (replace(output[0]), *output[1:])  # noqa: E731
    handle = stage.model.hf.get_submodule(tap.module).register_forward_hook(hook) if replace is not None else None
    try:
        with torch.no_grad():
            return stage.model.hf(ids_ST).logits.double().log_softmax(-1)
    finally:
        if handle:
            handle.remove()


def loss_reference(stage, site, tokens, x_STD, y_STD, sae, bos) -> dict[str, float]:
    """Cross-entropies, KLs and shares recovered, position by position."""
    ids, keep = tokens.ids_ST, tokens.keep_ST
    mean = y_STD[keep].double().mean(0).float()

    def put(value):
        return lambda output: torch.where(keep[..., None], value, output)

    runs = {
        "clean": log_probabilities(stage, site, ids),
        "spliced": log_probabilities(stage, site, ids, put(sae.decode(sae.encode(x_STD), like=x_STD))),
        "zero": log_probabilities(stage, site, ids, put(torch.zeros(()))),
        "mean": log_probabilities(stage, site, ids, put(mean)),
    }
    counted = [(s, t) for s in range(len(ids)) for t in range(ids.shape[1] - 1) if keep[s, t] and keep[s, t + 1] and ids[s, t + 1] != bos]
    ce = {name: sum(-float(logp[s, t, ids[s, t + 1]]) for s, t in counted) / len(counted) for name, logp in runs.items()}
    kl = {name: sum(float((runs["clean"][s, t].exp() * (runs["clean"][s, t] - logp[s, t])).sum()) for s, t in counted) / len(counted)
          for name, logp in runs.items()}  # fmt: skip
    return {
        **{f"ce_{name}": ce[name] for name in ce},
        **{f"kl_{name}": kl[name] for name in ("spliced", "zero", "mean")},
        **{f"ce_recovered_{kind}": (ce[kind] - ce["spliced"]) / (ce[kind] - ce["clean"]) for kind in ("zero", "mean")},
        **{f"kl_recovered_{kind}": 1 - kl["spliced"] / kl[kind] for kind in ("zero", "mean")},
    }


CASES = {
    "topk, decoded sparsely": lambda fitted: (fitted(), "resid_post.0", None),
    "topk, decoded densely": lambda fitted: (fitted(k=20), "resid_post.1", None),
    "relu": lambda fitted: (random_sae("relu", d_in=32, d_sae=80), "mlp_out.0", None),
    "abstopk": lambda fitted: (random_sae("abstopk", d_in=32, d_sae=80), "resid_post.0", None),
    "run-time norm": lambda fitted: (random_sae("jumprelu", d_in=32, norm_in="layer_norm", norm_out="layer_norm"), "resid_post.0", None),
    "transcoder": lambda fitted: (random_sae("topk", d_in=32, kind="transcoder", subtract_b_dec=False, d_out=32), "mlp_in.1", "mlp_out.1"),
    "skip transcoder": lambda fitted: (random_sae("relu", d_in=32, kind="skip_transcoder", subtract_b_dec=False, d_out=32), "mlp_in.0", "mlp_out.0"),
}


@pytest.mark.parametrize("case", CASES)
def test_every_metric_equals_the_float64_loops(case, stage, datasets, activations, context, measure, fitted, plain):
    sae, site, target = CASES[case](fitted)
    found = measure(context({"a": (sae, site, target)}))
    for name, dataset in datasets.items():
        x, y = activations(dataset, site), activations(dataset, target or site)
        expected = reference(x, y, dataset.tokens.keep_ST, sae) | loss_reference(stage, target or site, dataset.tokens, x, y, sae, plain.BOS)
        for metric, value in expected.items():
            row = found["a", name, metric]
            assert row.status == "ok", row.reason
            assert row.value == pytest.approx(value, rel=2e-5, abs=2e-6), metric
            assert row.site == site and row.dataset_hash == dataset.hash and row.subject_hashes == ("hash-a",)


def test_rows_say_everything_that_a_number_needs(context, measure, fitted):
    found = measure(context({"a": (fitted(), "resid_post.0", None)}), baselines=("pca", "random", "identity"))
    for (_, _, metric), row in found.items():
        assert row.definition in DEFINITIONS and DEFINITIONS[row.definition].metric == metric.partition("@")[0]
        assert row.evaluator == "native/core" and row.version and row.seed == 7
        if row.status == "ok":
            assert row.stderr is not None and row.stderr >= 0 and row.n in (23, 16) and row.unit_of_n == "sequences", metric
            assert row.ci_low <= row.value <= row.ci_high
            if "numerator" in row.parts:
                assert sum(row.parts["numerator"]) / sum(row.parts["denominator"]) == pytest.approx(row.value, rel=1e-9, abs=1e-12)
                assert len(row.parts["numerator"]) == {"in_sample": 24, "out_of_sample": 17}[row.dataset]
        else:
            assert row.reason
        row.to_json()
    metrics = {id for id in DEFINITIONS}
    assert {row.definition for row in found.values()} == metrics


def identity(d: int) -> SAE:
    eye = torch.eye(d)
    tensors = {"W_enc": torch.cat([eye, -eye], 1), "b_enc": torch.zeros(2 * d), "W_dec": torch.cat([eye, -eye]), "b_dec": torch.zeros(d)}
    return SAE.build(SAEConfig("relu", d, 2 * d), tensors)


def constant(value_D: torch.Tensor) -> SAE:
    d = len(value_D)
    tensors = {"W_enc": torch.zeros(d, 8), "b_enc": torch.zeros(8), "W_dec": torch.zeros(8, d), "b_dec": value_D}
    return SAE.build(SAEConfig("relu", d, 8), tensors)


def test_perfect_zero_and_mean_reconstructions(datasets, activations, context, measure):
    data = datasets["in_sample"]
    mean_D = activations(data, "resid_post.0")[data.tokens.keep_ST].double().mean(0).float()
    saes = {"identity": identity(32), "zero": constant(torch.zeros(32)), "mean": constant(mean_D)}
    found = measure(context({id: (sae, "resid_post.0", None) for id, sae in saes.items()}))

    def value(id, metric):
        return found[id, "in_sample", metric].value

    assert value("identity", "fvu") == 0 and value("identity", "mse") == 0 and value("identity", "explained_variance") == 1
    assert value("identity", "cosine") == pytest.approx(1, abs=1e-12)
    for kind in ("ce_recovered_zero", "ce_recovered_mean", "kl_recovered_zero", "kl_recovered_mean"):
        assert value("identity", kind) == pytest.approx(1, abs=1e-6)
        assert value(kind.rpartition("_")[2], kind) == pytest.approx(0, abs=1e-6)
    assert value("mean", "fvu") == pytest.approx(1, abs=1e-6) and value("mean", "explained_variance") == pytest.approx(0, abs=1e-6)
    assert value("zero", "cosine") == 0 and value("zero", "never_fired_share") == 1
    assert value("zero", "fvu") > 1 and value("zero", "explained_variance") == pytest.approx(0, abs=1e-6)  # its error is constant but for x


def test_a_broken_sae_gives_failed_rows_and_the_others_go_on(context, measure, fitted):
    good, broken, narrow = fitted(), fitted(), random_sae("topk", d_in=16)
    broken.W_dec.data[3] = float("nan")
    found = measure(context({"good": (good, "resid_post.0", None), "nan": (broken, "resid_post.0", None), "narrow": (narrow, "resid_post.0", None)}))
    alone = measure(context({"good": (good, "resid_post.0", None)}))
    for key, row in alone.items():
        assert found[key].value == row.value
    for (id, _, metric), row in found.items():
        independent = metric in ("ce_clean", "ce_zero", "ce_mean", "kl_zero", "kl_mean") or metric.endswith(("_pca", "_random"))
        if id != "good" and not independent:
            assert row.status == "failed" and row.value is None
            assert ("NaN" if id == "nan" else "UsageError") in row.reason
    assert found["nan", "in_sample", "fvu_pca"].value == found["good", "in_sample", "fvu_pca"].value


def test_a_share_of_a_gap_within_its_error_carries_a_caveat(context, measure, fitted):
    """The model is random and so is the text: ablation hardly hurts its predictions, but moves them far."""
    found = measure(context({"a": (fitted(), "resid_post.0", None)}))
    assert "zero-ablation costs" in found["a", "in_sample", "ce_recovered_zero"].note
    assert found["a", "in_sample", "ce_recovered_zero"].parts["clear"] is False
    assert found["a", "in_sample", "kl_recovered_zero"].note is None


def test_broken_activations_name_their_site(context, measure, fitted):
    def spoil(site, x_ND, first):
        return x_ND.clone().index_fill_(0, torch.tensor([4]), math.inf) if site == "resid_post.0" and first == 5 else x_ND

    saes = {"a": (fitted(), "resid_post.0", None), "b": (fitted("resid_post.1"), "resid_post.1", None)}
    found = measure(context(saes, spoil=spoil))
    assert found["a", "in_sample", "fvu"].status == "failed" and "resid_post.0" in found["a", "in_sample", "fvu"].reason
    assert found["b", "in_sample", "fvu"].status == "ok"
