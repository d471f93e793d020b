"""What a run of `native/core` may depend on and touch: batch sizes, memory, the model, several SAEs at once, missing parts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from saehub.api import EvalDataset
from saehub.errors import Interrupted, StageFailed
from saehub.testing.saes import random_sae

pytestmark = pytest.mark.quick


def same(left, right, rel=1e-5):
    assert left.keys() == right.keys()
    for key, row in left.items():
        assert row.status == right[key].status, key
        if row.status == "ok":
            assert row.value == pytest.approx(right[key].value, rel=rel, abs=1e-7), key
            assert row.stderr == pytest.approx(right[key].stderr, rel=1e-3, abs=1e-7), key
            assert row.n == right[key].n


def saes(fitted):
    return {
        "topk": (fitted(), "resid_post.0", None),
        "relu": (random_sae("relu", d_in=32, d_sae=80), "resid_post.0", None),
        "deep": (fitted("resid_post.1", 48, 5), "resid_post.1", None),
        "coder": (random_sae("topk", d_in=32, kind="transcoder", subtract_b_dec=False, d_out=32), "mlp_in.1", "mlp_out.1"),
    }


def test_results_do_not_depend_on_batches_or_memory(context, measure, fitted):
    whole = measure(context(saes(fitted), lm_batch=24), loss_sequences=10)
    same(measure(context(saes(fitted), lm_batch=7), loss_sequences=10), whole)
    # 1 MiB: logits of a few sequences and features of a few rows at a time, so that chunks begin inside sequences.
    same(measure(context(saes(fitted), lm_batch=24), loss_sequences=10, memory=2**20), whole)


def test_chunks_that_begin_inside_a_sequence(monkeypatch, context, measure, fitted):
    from saehub_native.evaluate import subjects

    whole = measure(context(saes(fitted)))
    monkeypatch.setattr(subjects, "BYTES_A_LATENT", 2**31 // (64 * 5))  # five rows of 64 latents
    same(measure(context(saes(fitted))), whole)


def test_several_saes_in_one_pass_are_each_measured_alone(context, measure, fitted):
    together = measure(context(saes(fitted)))
    for id, entry in saes(fitted).items():
        same(measure(context({id: entry})), {key: row for key, row in together.items() if key[0] == id}, rel=1e-6)


def test_clean_and_ablated_passes_are_shared(stage, context, measure, fitted):
    calls = []
    handle = stage.model.hf.lm_head.register_forward_hook(lambda *_: calls.append(1))
    try:

        def passes(**entries):
            calls.clear()
            measure(context(entries, lm_batch=32))
            return len(calls)

        one = passes(a=(fitted(), "resid_post.0", None))
        # a batch a dataset: clean, zero, mean, pca, random, the SAE
        assert one == 2 * 6
        # a second SAE at the site adds its own pass, and no baseline of the same width and k
        assert passes(a=(fitted(), "resid_post.0", None), b=(fitted(), "resid_post.0", None)) == one + 2
        # another site adds two ablations, two baselines and the SAE
        assert passes(a=(fitted(), "resid_post.0", None), b=(fitted("resid_post.1"), "resid_post.1", None)) == one + 2 * 5
    finally:
        handle.remove()


def test_nothing_else_is_touched(stage, context, measure, fitted):
    hf, sae = stage.model.hf, fitted()
    before = {name: t.clone() for name, t in hf.state_dict().items()}
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in hf.named_modules()}
    weights = {name: t.clone() for name, t in sae.tensors().items()}
    state = torch.get_rng_state()
    for grad in (True, False):
        torch.set_grad_enabled(grad)
        try:
            measure(context({"a": (sae, "resid_post.0", None)}), baselines=True)
            assert torch.is_grad_enabled() is grad
        finally:
            torch.set_grad_enabled(True)
    assert torch.equal(torch.get_rng_state(), state) and not hf.training
    assert all(torch.equal(t, before[name]) for name, t in hf.state_dict().items())
    assert {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in hf.named_modules()} == hooks
    assert all(torch.equal(t, weights[name]) for name, t in sae.tensors().items())


def test_progress_grows_to_one(context, measure, fitted):
    events = []
    given = replace(context({"a": (fitted(), "resid_post.0", None)}), emit=events.append)
    measure(given)
    progress = [event["progress"] for event in events]
    assert progress == sorted(progress) and progress[-1] == pytest.approx(1) and "sequences" in events[-1]["text"]


def test_an_sae_that_is_not_row_wise_gets_whole_sequences(context, measure, fitted, plain):
    seen = []

    def not_row_wise(sae):
        class Sequential(type(sae)):
            row_wise = False

            def encode(self, x):
                seen.append(tuple(x.shape))
                return super().encode(x)

        return Sequential(sae.config, sae.tensors())

    wide = fitted(k=20)
    same(measure(context({"a": (not_row_wise(wide), "resid_post.0", None)})), measure(context({"a": (wide, "resid_post.0", None)})))
    assert all(len(shape) == 3 and shape[1:] == (plain.CONTEXT, 32) for shape in seen)


def test_what_is_switched_off_or_impossible_says_so(context, measure, fitted, datasets):
    saes = {"a": (fitted(), "resid_post.0", None)}
    off = measure(context(saes), loss=False, baselines=False)
    assert off["a", "in_sample", "ce_recovered_zero"].reason == "switched off (loss: false)"
    assert off["a", "in_sample", "fvu_pca"].reason == "switched off (baselines: false)"
    assert off["a", "in_sample", "fvu"].status == "ok"
    bare = measure(context(saes, model=None))
    assert bare["a", "in_sample", "ce_clean"].status == "not_measured" and "no language model" in bare["a", "in_sample", "ce_clean"].reason
    coder = measure(context({"a": (random_sae("topk", d_in=32, kind="transcoder", subtract_b_dec=False, d_out=32), "mlp_in.1", "mlp_out.1")}))
    assert "transcoder" in coder["a", "in_sample", "fvu_pca"].reason and coder["a", "in_sample", "ce_recovered_zero"].status == "ok"
    limited = measure(context(saes), loss_sequences=10)["a", "in_sample", "ce_spliced"]
    assert limited.n == 9 and limited.note == "first 10 of 24 sequences" and sum(limited.parts["denominator"][10:]) == 0
    with pytest.raises(StageFailed, match="no rows"):
        measure(replace(context(saes), rows=None))


def test_rows_from_files_have_blocks_for_sequences(context, measure, fitted, datasets):
    given = context({"a": (fitted(), "resid_post.0", None)}, data={"mine": EvalDataset("mine", None, "h")}, model=None, sequences=False,
                    spoil=datasets["in_sample"])  # fmt: skip
    found = measure(given)
    known = measure(context({"a": (fitted(), "resid_post.0", None)}))
    row = found["a", "mine", "fvu"]
    assert row.unit_of_n == "blocks of 128 rows" and row.n == 3
    assert row.value == pytest.approx(known["a", "in_sample", "fvu"].value, rel=1e-9)


def test_a_dataset_without_rows_is_not_measured(context, measure, fitted, datasets, plain):
    empty = plain.Tokens(6, 3)
    empty.keep_ST[:] = False
    found = measure(context({"a": (fitted(), "resid_post.0", None)}, data={**datasets, "empty": EvalDataset("empty", empty, "h")}))
    rows = [row for (_, dataset, _), row in found.items() if dataset == "empty"]
    assert rows and all(row.status == "not_measured" and "no row of empty is kept" in row.reason for row in rows)
    assert found["a", "in_sample", "fvu"].status == "ok"


def test_interruption_goes_through(context, measure, fitted):
    sae = fitted()

    def stop(*_args, **_kwargs):
        raise Interrupted("Ctrl-C")

    sae.encode_sparse = stop
    with pytest.raises(Interrupted):
        measure(context({"a": (sae, "resid_post.0", None)}))
