"""`native/verdict`: the essay's table, every rule at its threshold, verdicts from measurements, and a run that plans, caches and prints them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from saehub.api import Measurement
from saehub.report.verdicts import alike, layer_table, rank, verdicts
from saehub_native.verdict.config import VerdictConfig
from saehub_native.verdict.definitions import DEFINITIONS, WORDS
from saehub_native.verdict.evaluator import score_error
from saehub_native.verdict.evidence import Evidence, gather
from saehub_native.verdict.rules import RULES, judge

# Layer, latents, recovered, L0, dead, redundancy of Llama-3.1-8B-Instruct (d = 4,096): all that the published table says.
ESSAY = {4: (1200, 0.977, 298, 0.677, 0.395), 10: (400, 0.928, 115, 0.408, 0.286), 19: (400, 0.703, 167, 0.195, 0.264), 28: (400, 0.0, 194, 0.01, 0.281)}
FINE = Evidence(
    latents=1280, d_in=160, l0=32, fvu=0.17, fvu_random=0.48, fvu_pca=0.43, fvu_out=0.25, fvu_random_out=0.5, recovered=0.96, recovered_out=0.93,
    dead=0.01, bound=1e-4, redundancy=0.26, redundancy_null=0.24, duplicates=0.0, finite_weights=1.0, finite_rows=1.0, outside="out_of_sample",
)  # fmt: skip


def published(layer: int):
    latents, recovered, l0, dead, redundancy = ESSAY[layer]
    return judge(Evidence(latents=latents, d_in=4096, l0=l0, recovered=recovered, dead=dead, redundancy=redundancy))


@pytest.mark.quick
def test_the_essays_rows_alone():
    said = {layer: published(layer) for layer in ESSAY}
    assert {layer: judgement.verdict for layer, judgement in said.items()} == {
        4: "deceptively good", 10: "deceptively good", 19: "undecided", 28: "collapsed"}  # fmt: skip
    for layer in (4, 10):  # deadness beside recovery
        (reason,) = said[layer].reasons
        assert "recovered" in reason and "dead" in reason and "budget unknown" in reason
    for judgement in said.values():
        assert {"undercomplete", "not sparse", "budget unknown", "null not measured"} <= set(judgement.flags)
    assert any("hooks" in step for step in said[28].next) and any("updates" in step for step in said[28].next)  # debug first
    assert any("null not measured" in reason for reason in said[19].reasons) and any("budget unknown" in reason for reason in said[19].reasons)
    ranks = rank({layer: judgement.score for layer, judgement in said.items()})
    assert ranks[19] == 1 and ranks[28] == 4  # the healthiest of this sweep, whatever its absolute verdict


@pytest.mark.quick
def test_a_fine_sae_is_good_and_says_why():
    judgement = judge(FINE)
    assert judgement.verdict == "good" and not judgement.flags and not judgement.next
    assert "96.0%" in judgement.reasons[0] and "0.240" in judgement.reasons[0]


CASES = {
    "not finite": ("collapsed", {"finite_weights": 0.999}),
    "untrained": ("collapsed", {"moved": 1e-6}),
    "dead": ("dead", {"dead": 0.9}),
    "explains nothing": ("collapsed", {"fvu": 0.95}),
    "half dead": ("dead", {"dead": 0.6, "recovered": 0.5}),
    "duplicates": ("duplicated", {"duplicates": 0.3}),
    "redundant": ("duplicated", {"redundancy": 0.7}),
    "no better than random": ("collapsed", {"fvu": 0.47, "recovered": 0.6}),
    "wasted": ("deceptively good", {"dead": 0.5}),
    "template": ("deceptively good", {"fvu_out": 0.49}),
}


@pytest.mark.quick
def test_a_reason_is_said_once():
    judgement = judge(replace(FINE, dead=0.97, bound=1e-3, recovered=0.2))  # dead by two rules, in the same words
    assert judgement.verdict == "dead" and sum("97.0%" in reason for reason in judgement.reasons) == 1


@pytest.mark.quick
def test_every_rule_has_a_case_and_says_what_it_saw():
    assert [rule.id for rule in RULES] == list(CASES)
    for rule in RULES:
        word, changes = CASES[rule.id]
        judgement = judge(replace(FINE, **changes))
        assert (judgement.rule, judgement.verdict, rule.verdict) == (rule.id, word, word)
        assert judgement.reasons and judgement.next and judgement.verdict in WORDS


@pytest.mark.quick
@pytest.mark.parametrize(
    "changes, word, why",
    [
        ({"dead": 0.9, "bound": 1.0}, "undecided", "too few tokens"),  # silent, but the budget proves nothing
        ({"dead": 0.9, "bound": 1.0, "dead_decided": True}, "dead", "dead"),  # native/core's own rule decides
        ({"redundancy_null": None}, "undecided", "null not measured"),
        ({"fvu_out": None, "recovered_out": None}, "undecided", "out of sample"),
        ({"fvu": None, "recovered": None}, "undecided", "reconstruction was not measured"),
        ({"fvu": 0.4, "recovered": None}, "undecided", "random directions"),
        ({"dead": None}, "undecided", "deadness was not measured"),
        ({"dead": 0.2}, "undecided", "never fired"),
        ({"redundancy": 0.52}, "undecided", "well above"),
        ({"duplicates": 0.1}, "undecided", "near-duplicate"),
        ({"recovered_out": 0.2}, "deceptively good", "out_of_sample"),
        ({"broken": ("5 rows came out of the SAE with NaN or infinite numbers",), "fvu": None}, "collapsed", "NaN"),
        ({"fvu": 0.95, "dead": 0.99}, "dead", "never fired"),  # nothing fires: deadness is the cause, and comes first
    ],
)
def test_what_is_missing_or_between_is_undecided_and_causes_come_first(changes, word, why):
    judgement = judge(replace(FINE, **changes))
    assert judgement.verdict == word and any(why in reason for reason in judgement.reasons), judgement


@pytest.mark.quick
@pytest.mark.parametrize("expected", [0.1, 1.0, 6.0, 100.0])
def test_the_null_of_silence_is_the_integral_over_log_normal_rates(expected):
    from scipy import stats
    from scipy.integrate import quad

    from saehub_native.verdict.rules import SPREAD, silent_null

    rates = stats.lognorm(s=SPREAD, scale=expected * np.exp(-(SPREAD**2) / 2))
    assert rates.mean() == pytest.approx(expected)
    wanted = quad(lambda z: np.exp(-rates.ppf(stats.norm.cdf(z))) * stats.norm.pdf(z), -7, 7, limit=200)[0]
    assert silent_null(expected) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.quick
def test_thresholds_are_settings():
    assert judge(replace(FINE, dead=0.2), VerdictConfig(dead_fine=0.25)).verdict == "good"
    with pytest.raises(ValueError, match="dead_half"):
        VerdictConfig(dead_half=0)
    assert set(DEFINITIONS) == {"saehub.verdict/1", "saehub.verdict_score/1", "saehub.out_minus_in/1"}


def row(metric: str, value: float | None, dataset: str | None = None, sae: str = "a", **more) -> Measurement:
    return Measurement(metric, value, (sae,), "native/core", f"saehub.{metric}/1", ("h",), "resid_post.2", dataset, dataset and "x", **more)


@pytest.mark.quick
def test_evidence_takes_in_sample_out_of_sample_and_the_strictest_decided_deadness():
    rows = [
        row("fvu", 0.3, "out_of_sample"), row("fvu", 0.2, "in_sample"), row("redundancy", 0.3), row("fvu", None, "third", status="failed", reason="NaN rows"),
        row("dead_share", None, "in_sample", status="not_measured", reason="undecided"), row("dead_share@1e-04", 0.1, "in_sample", parts={"bound": 5e-5}),
        row("never_fired_share", 0.1, "in_sample", parts={"bound": 5e-5}),
    ]  # fmt: skip
    found = gather(rows, latents=64, d_in=32)
    assert (found.fvu, found.fvu_out, found.redundancy, found.dead, found.dead_decided, found.bound) == (0.2, 0.3, 0.3, 0.1, True, 5e-5)
    assert found.broken == ("NaN rows",) and found.sources["fvu"].dataset == "in_sample"
    named = gather([row("fvu", 0.2, "wiki"), row("fvu", 0.4, "code")])
    assert (named.fvu, named.fvu_out, named.outside) == (0.2, 0.4, "code")
    assert gather([]).fvu is None


@pytest.mark.quick
def test_a_share_of_no_gap_is_no_evidence():
    """An untrained model loses nothing by zeros: 303 % or -1000 % of nothing neither praises nor condemns."""
    for share in (3.03, -10.0):
        rows = [row("ce_recovered_zero", share, name, parts={"clear": False}) for name in ("in_sample", "out_of_sample")]
        rows += [row("fvu", 0.2, "in_sample"), row("fvu_random", 0.5, "in_sample"), row("fvu", 0.25, "out_of_sample"), row("fvu_random", 0.5, "out_of_sample")]
        rows += [row("never_fired_share", 0.0, "in_sample"), row("redundancy", 0.3), row("redundancy_null", 0.3)]
        found = gather(rows, latents=64, d_in=32)
        judgement = judge(found)
        assert found.recovered is None and found.recovered_out is None and "ce_recovered_zero" not in {source.metric for source in found.sources.values()}
        assert judgement.score == pytest.approx(1 - 0.2) and "ablation costs no cross-entropy" in judgement.flags
        assert "recovered" not in " ".join(judgement.reasons) and layer_table(rows)[0][3] == "no gap"


@pytest.mark.quick
def test_what_fits_another_site_better_is_not_good():
    told = "FVU 0.17 at resid_post.3, 0.1 at resid_pre.3: probably mislabelled"
    judgement = judge(replace(FINE, cautions=(told,)))
    assert judgement.verdict == "undecided" and told in judgement.reasons and "site in doubt" in judgement.flags


@pytest.mark.quick
def test_no_better_than_random_for_lack_of_latents_says_so():
    judgement = judge(replace(FINE, fvu=0.49, recovered=0.8, dead=0.48))
    assert judgement.verdict == "collapsed" and any("48.0%" in reason for reason in judgement.reasons) and judgement.next[0].startswith("fewer latents")
    assert len(judge(replace(FINE, fvu=0.49, recovered=0.8)).reasons) == 1


@pytest.mark.quick
@pytest.mark.parametrize(("changes", "why"), [({"fvu": 0.34, "fvu_out": 0.49, "recovered_out": 0.8}, "0.49 on out_of_sample"), ({"recovered_out": 0.6}, "60.0% on out")])
def test_what_does_not_hold_out_of_sample_is_not_good(changes, why):
    judgement = judge(replace(FINE, **changes))
    assert judgement.verdict == "undecided" and why in " ".join(judgement.reasons)


@pytest.mark.quick
@pytest.mark.parametrize("loss", [True, False])
def test_the_error_of_the_score_is_that_of_drawing_its_factors(loss):
    errors = {"ce_recovered_zero": 0.004, "fvu": 0.003, "never_fired_share": 0.002, "redundancy": 0.005}
    values = {"ce_recovered_zero": 0.95, "fvu": 0.2, "never_fired_share": 0.1, "redundancy": 0.4}
    rows = [row(name, values[name], None if name == "redundancy" else "in_sample", stderr=errors[name]) for name in values if loss or name != "ce_recovered_zero"]
    found = gather([*rows, row("redundancy_null", 0.25)], latents=64, d_in=32)
    drawn = {name: np.random.default_rng(i).normal(values[name], errors[name], 200_000) for i, name in enumerate(values)}
    product = (drawn["ce_recovered_zero"] if loss else 1 - drawn["fvu"]) * (1 - drawn["never_fired_share"]) * (1 - (drawn["redundancy"] - 0.25) / 0.75)
    score = judge(found).score
    assert score == pytest.approx(product.mean(), rel=1e-3) and score_error(found, score) == pytest.approx(product.std(), rel=0.02)
    assert score_error(gather([*rows[:-1], row("redundancy", 0.4)], latents=64, d_in=32), score) is None


@pytest.mark.quick
def test_verdicts_alike_are_told_once():
    def said(sae: str, site: str, why: str) -> Measurement:
        return replace(row("verdict", 4, sae=sae, parts={"word": "undecided", "reasons": [why], "next": ["more"]}), site=site)

    found = alike(verdicts([said("a", "x", "few"), said("b", "y", "other"), said("c", "y", "few")]))
    assert [(one.sae, one.site, one.reasons) for one in found] == [("a, c", "x, y", ("few",)), ("b", "y", ("other",))]


@pytest.mark.quick
def test_the_table_ranks_what_it_shows_and_a_lone_sae_has_no_rank():
    def judged(sae: str, word: str, score: float) -> list[Measurement]:
        return [row("verdict", WORDS.index(word), sae=sae, parts={"word": word, "reasons": ["r"]}), row("verdict_score", score, sae=sae)]

    two = [*judged("a", "deceptively good", 0.2), *judged("b", "undecided", 0.4)]
    assert [(v.sae, v.word, v.rank, v.of) for v in verdicts(two)] == [("a", "deceptively good", 2, 2), ("b", "undecided", 1, 2)]
    assert verdicts(two)[1].standing == "1 of 2, healthiest of this run"
    assert [line[-2:] for line in layer_table(two)] == [("deceptively good", "2 of 2"), ("undecided", "1 of 2, healthiest of this run")]
    assert verdicts(judged("a", "good", 0.9))[0].rank is None
    failed = row("verdict", None, status="failed", reason="broken")
    assert verdicts([failed])[0].word == "undecided" and verdicts([failed])[0].reasons == ("broken",)
