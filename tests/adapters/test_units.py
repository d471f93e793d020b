"""What a batch is called that the mean of dictionary_learning's metrics is over, and what a mean over datasets says of itself."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("count", "said"), [(10, "batch of 10 sequences"), (32, "batch of 32 sequences"), (33, "batches of up to 32 sequences"), (64, "batches of 32 sequences"), (0, "batches of 32 sequences")]
)
def test_a_short_batch_is_not_called_a_whole_one(count, said):
    from saehub_dictionary_learning.evaluate import _unit

    assert _unit(count, 32, "sequences") == said


def test_a_mean_over_datasets_says_so():
    from types import SimpleNamespace

    from saehub_saebench.rows import Place, Scores, mean_over, measurements

    subject = SimpleNamespace(id="a", hash="h", site="resid_post.0")
    place = Place("sae_probes", subject, SimpleNamespace(seed=0), (1, 2), note="caution")
    scores = {seed: Scores({"sae_top_k_test_accuracy@1": 0.5 + seed / 10}, note=mean_over(["x", "y"])) for seed in (1, 2)}
    (row,) = measurements(place, scores)
    assert row.value == pytest.approx(0.65) and row.dataset is None and row.note == "mean over 2 datasets; caution"
    assert mean_over(["x"]) == "of the one dataset x"
