"""An honest toy evaluator and one liar for every promise in; proof that the suite passes the first and catches the second, by name, out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from saehub.testing import check_evaluator
from saehub.testing.components import ToyEvaluator
from saehub.testing.stage import Stage


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Stage:
    """One tiny model for the whole module; every check compares before and after, so that what one liar leaves behind does not hide the next."""
    return Stage(tmp_path_factory.mktemp("stage"))


def test_the_toy_evaluator_passes(stage):
    check_evaluator((ToyEvaluator, None), stage=stage).raise_if_failed()


class Noisy(ToyEvaluator):
    def evaluate(self, context):
        return [replace(row, value=row.value + float(torch.rand(()))) for row in super().evaluate(context)]


class BatchMean(ToyEvaluator):
    """The mean over batches of batch means: a value that moves with the batch size when the last batch is short."""

    def _measure(self, subject, dataset, context):
        row = super()._measure(subject, dataset, context)
        means = [subject.sae.encode(rows.acts[subject.site]).square().sum(1).mean() for rows in context.rows(dataset, [subject.site])]
        return replace(row, value=float(torch.stack(means).mean()))


class LeavesOut(ToyEvaluator):
    def evaluate(self, context):
        return [row for row in super().evaluate(context) if row.subjects == ("first",)]


class NoError(ToyEvaluator):
    def evaluate(self, context):
        return [replace(row, stderr=None) for row in super().evaluate(context)]


class NoReason(ToyEvaluator):
    def evaluate(self, context):
        return [replace(row, value=None, stderr=None, status="not_measured") for row in super().evaluate(context)][:1] + list(
            super().evaluate(context)
        )[1:]


class WrongHash(ToyEvaluator):
    def evaluate(self, context):
        return [replace(row, subject_hashes=("0" * 64,)) for row in super().evaluate(context)]


class OneWordTwoMeanings(ToyEvaluator):
    def evaluate(self, context):
        return [replace(row, better="higher" if row.dataset == "in_sample" else "lower") for row in super().evaluate(context)]


class Compares(ToyEvaluator):
    def evaluate(self, context):
        rows = list(super().evaluate(context))
        return [replace(row, value=row.value / len(context.subjects)) for row in rows]


class ChangesTheSAE(ToyEvaluator):
    def evaluate(self, context):
        for subject in context.subjects:
            subject.sae.W_dec.data /= subject.sae.W_dec.data.norm(dim=1, keepdim=True) * 1.001
        return super().evaluate(context)


class LeavesAHook(ToyEvaluator):
    def evaluate(self, context):
        context.model.hf.register_forward_hook(lambda *_: None)
        return list(super().evaluate(context))


class TurnsGradientsOff(ToyEvaluator):
    def evaluate(self, context):
        torch.set_grad_enabled(False)
        return list(super().evaluate(context))


class CutsToFit(ToyEvaluator):
    def _measure(self, subject, dataset, context):
        width = subject.sae.config.d_in
        found = [
            (subject.sae.encode(rows.acts[subject.site][:, :width]) != 0).sum(1) * subject.sae.W_enc.sum()
            for rows in context.rows(dataset, [subject.site])
        ]
        whole = replace(subject, site=subject.site)
        row = super()._measure(whole, dataset, context)
        return replace(row, value=float(torch.cat(found).float().mean()), stderr=1.0, n=1, status="ok", reason=None)


LIARS = {
    "global random numbers": ("same question, same answer", Noisy),
    "mean of batch means": ("batch size changes no value", BatchMean),
    "leaves an SAE out": ("measures every SAE", LeavesOut),
    "no standard error": ("well-formed measurements", NoError),
    "no reason": ("well-formed measurements", NoReason),
    "hash of another SAE": ("well-formed measurements", WrongHash),
    "one definition, two meanings": ("one definition, one meaning", OneWordTwoMeanings),
    "depends on company": ("each SAE as if alone", Compares),
    "changes the SAE": ("SAEs and model untouched", ChangesTheSAE),
    "leaves a hook": ("SAEs and model untouched", LeavesAHook),
    "gradients switched off": ("SAEs and model untouched", TurnsGradientsOff),
    "cuts rows to fit": ("what does not fit is not measured", CutsToFit),
}


@pytest.mark.parametrize("name", LIARS)
def test_a_lying_evaluator_is_caught(name, stage):
    promise, cls = LIARS[name]
    report = check_evaluator((cls, None), only=[promise], stage=stage)
    assert {check.name for check in report.failures} == {promise}, str(report)
