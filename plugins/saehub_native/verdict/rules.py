"""Evidence about one SAE in; a verdict with reasons, flags and what to check next out. The table `RULES` is all there is to it. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from saehub_native.verdict.config import VerdictConfig
from saehub_native.verdict.evidence import Evidence

PLUMBING = (
    "hooks: `saehub doctor --recipe R` compares the tensor with a plain hook, and scans the neighbouring sites",
    "finiteness and dtype of the activations: extract.dtype, model.dtype",
    "scaling: extract.normalize, and whether the SAE was trained in the units that it is given",
    "whether updates were applied: the learning rate, and a loss that falls in events.jsonl",
)
UPDATES = ("whether updates were applied: lr, warmup and the number of steps", "a loss that falls in events.jsonl")
CAPACITY = (
    "fewer latents, or a larger k",
    "the revival of dead latents (auxk_alpha, revive), and the learning rate",
    "more training tokens; the curve over tokens in native/health says whether latents still wake up",
)
COPIES = ("the closest pairs in native/health", "fewer latents, or a larger k", "initialisation and seed: copies that start alike stay alike")
DOMAIN = ("a mixture in data.train that holds the domain you care about", "fewer passes over the same text (repeat)", "the same numbers on a third domain")
NOT_SPARSE = 0.1
SPREAD = 2.0
"""Standard deviation of the natural logarithm of healthy firing rates: 0.87 decades."""


@dataclass(frozen=True)
class Rule:
    """One line of the table."""

    id: str
    verdict: str
    when: str
    """The condition in words."""
    applies: Callable[[Evidence, VerdictConfig], str | None]
    """The reason with its numbers, where the condition holds."""
    next: tuple[str, ...]
    """What to check."""
    doomed: bool = False
    """Whether more training does not mend it: said of the faults that the zoo shows at 10 % of the rows and at the end alike."""


@dataclass(frozen=True)
class Judgement:
    """What is said about one SAE."""

    verdict: str
    """collapsed, dead, duplicated, deceptively good, undecided or good."""
    reasons: tuple[str, ...]
    """Of the rule that decided, then of others that point the same way."""
    flags: tuple[str, ...]
    """True whatever the verdict: undercomplete, not sparse, budget unknown, null not measured, site in doubt, ablation costs no cross-entropy, out of sample not measured."""
    next: tuple[str, ...]
    rule: str
    """Id of the rule that decided."""
    doomed: bool
    """Whether more training would not mend it."""
    score: float | None
    """Capacity put to use (`saehub.verdict_score/1`): orders a sweep."""


# ---------------------------------------------------------------------- conditions
def _not_finite(e: Evidence, t: VerdictConfig) -> str | None:
    for value, what in ((e.finite_weights, "weights"), (e.finite_rows, "rows")):
        if value is not None and value < 1:
            return f"{1 - value:.2g} of its {what} are NaN or infinite"
    return next((reason for reason in e.broken if "NaN" in reason or "infinite" in reason), None)


def _untrained(e: Evidence, t: VerdictConfig) -> str | None:
    if e.moved is not None and e.moved < t.untrained_moved:
        return f"untrained: training moved its weights by {e.moved:.2g} of their norm, so it is still its initial state"
    return None


def _explains_nothing(e: Evidence, t: VerdictConfig) -> str | None:
    if e.fvu is not None and e.fvu >= t.collapsed_fvu:
        return f"FVU {e.fvu:.3g}: the mean of the rows alone scores 1"
    if e.recovered is not None and e.recovered <= t.collapsed_recovered:
        return f"{e.recovered:.1%} of the cross-entropy is recovered: zeros in its place score 0"
    return None


def _no_better_than_random(e: Evidence, t: VerdictConfig) -> str | None:
    if e.fvu is not None and e.fvu_random is not None and e.fvu >= t.random_share * e.fvu_random:
        return f"FVU {e.fvu:.3g}, while random directions of the same k and width score {e.fvu_random:.3g}"
    return None


def silent_null(expected: float) -> float:
    """Share of latents of a healthy dictionary that stay silent where a latent of the mean rate fires `expected` times.

        E_r e^(-r n),   log r normal with mean rate r̄ and standard deviation SPREAD,   r̄ n = `expected`

    by quadrature over ±6 standard deviations. Rates of trained SAEs spread over decades: rare latents are silent in little data, and alive.
    """
    nodes = [(i - 300) / 50 for i in range(601)]
    weights = [math.exp(-(z**2) / 2) for z in nodes]
    silent = [math.exp(-expected * math.exp(SPREAD * z - SPREAD**2 / 2)) for z in nodes]
    return sum(w * s for w, s in zip(weights, silent, strict=True)) / sum(weights)


def proven_dead(e: Evidence) -> float | None:
    """The dead share as far as the budget proves it.

    By native/core's rule, or as published (no budget); else the silent share s beyond the share s₀ that a healthy dictionary of that L0
    and width leaves silent in so little data, (s - s₀) / (1 - s₀).
    """
    if e.dead is None or e.dead_decided or e.bound is None:
        return e.dead
    if e.mean_rate is None or not 0 < e.bound < math.inf:
        return 0.0
    null = silent_null(3 / e.bound * e.mean_rate)
    return max(0.0, (e.dead - null) / (1 - null)) if null < 1 else 0.0


def _dead_words(e: Evidence) -> str:
    if e.dead_decided:
        return f"{e.dead:.1%} of the latents are dead"
    if e.bound is None:
        return f"{e.dead:.1%} of the latents are dead (as reported: budget unknown)"
    return f"{e.dead:.1%} of the latents never fired in {3 / e.bound:,.0f} effective tokens, where {silent_null(3 / e.bound * (e.mean_rate or 0)):.1%} would be natural"


def excellent(e: Evidence, t: VerdictConfig) -> str | None:
    """Whether reconstruction alone would please, in words."""
    if e.recovered is not None:
        return f"{e.recovered:.1%} of the cross-entropy is recovered" if e.recovered >= t.excellent_recovered else None
    if e.fvu is not None and e.fvu_random is not None and e.fvu <= t.excellent_random * e.fvu_random:
        return f"FVU {e.fvu:.3g} (random directions: {e.fvu_random:.3g})"
    return None


def _mostly_dead(e: Evidence, t: VerdictConfig) -> str | None:
    dead = proven_dead(e)
    return _dead_words(e) if dead is not None and dead >= t.dead_mostly else None


def _half_dead(e: Evidence, t: VerdictConfig) -> str | None:
    dead = proven_dead(e)
    if dead is None or dead < t.dead_half or excellent(e, t):
        return None
    return f"{_dead_words(e)}, and reconstruction does not make up for it"


def _duplicates(e: Evidence, t: VerdictConfig) -> str | None:
    return f"{e.duplicates:.1%} of the latents have a near-duplicate" if e.duplicates is not None and e.duplicates >= t.duplicate_share else None


def _redundant(e: Evidence, t: VerdictConfig) -> str | None:
    if e.excess is not None and e.redundancy_null is not None and e.excess >= t.redundancy_excess:
        return f"redundancy {e.redundancy:.3f}, random directions give {e.redundancy_null:.3f}"
    return None


def _wasted(e: Evidence, t: VerdictConfig) -> str | None:
    dead, good = proven_dead(e), excellent(e, t)
    return f"{good}, and {_dead_words(e)}" if good and dead is not None and dead >= t.dead_wasted else None


def _template(e: Evidence, t: VerdictConfig) -> str | None:
    if e.recovered is not None and e.recovered_out is not None and e.recovered - e.recovered_out >= t.crater and excellent(e, t):
        return f"{e.recovered:.1%} of the cross-entropy is recovered in sample, {e.recovered_out:.1%} on {e.outside}"
    known = None not in (e.fvu, e.fvu_out, e.fvu_random, e.fvu_random_out)
    if known and e.fvu <= t.template_inside * e.fvu_random and e.fvu_out >= t.template_outside * e.fvu_random_out:
        return f"FVU {e.fvu:.3g} in sample and {e.fvu_out:.3g} on {e.outside}, where random directions score {e.fvu_random_out:.3g}"
    return None


RULES: tuple[Rule, ...] = (
    Rule("not finite", "collapsed", "a weight or a row is NaN or infinite", _not_finite, PLUMBING, doomed=True),
    Rule("untrained", "collapsed", "weights moved < untrained_moved of their norm since the first step", _untrained, UPDATES),
    Rule("dead", "dead", "dead share ≥ dead_mostly", _mostly_dead, CAPACITY, doomed=True),
    Rule("explains nothing", "collapsed", "FVU ≥ collapsed_fvu, or CE recovered ≤ collapsed_recovered", _explains_nothing, PLUMBING, doomed=True),
    Rule("half dead", "dead", "dead share ≥ dead_half, and reconstruction is not excellent", _half_dead, CAPACITY),
    Rule("duplicates", "duplicated", "near-duplicates ≥ duplicate_share", _duplicates, COPIES, doomed=True),
    Rule("redundant", "duplicated", "(redundancy - null) / (1 - null) ≥ redundancy_excess", _redundant, COPIES),
    Rule("no better than random", "collapsed", "FVU ≥ random_share × FVU of random directions", _no_better_than_random, PLUMBING),
    Rule("wasted", "deceptively good", "reconstruction is excellent, and dead share ≥ dead_wasted", _wasted, CAPACITY),
    Rule("template", "deceptively good", "FVU ≤ template_inside × random in sample, ≥ template_outside × random out of sample; or CE recovered falls by crater", _template, DOMAIN),
)
"""In order of precedence; the first that applies decides. Thresholds are the fields of `VerdictConfig`."""


# ---------------------------------------------------------------------- judging
def judge(e: Evidence, t: VerdictConfig | None = None) -> Judgement:
    """The first rule that applies; without one, `good` where nothing is missing and everything is in order, else `undecided`."""
    t = t or VerdictConfig()
    hits = [(rule, reason) for rule in RULES if (reason := rule.applies(e, t))]
    flags, score = tuple(_flags(e)), _score(e)
    if hits:
        rule = hits[0][0]
        same = [reason for other, reason in hits if other.verdict == rule.verdict]
        same = [reason for i, reason in enumerate(same) if not any(reason.startswith(before) for before in same[:i])]
        also = [f"also: {reason}" for other, reason in hits if other.verdict != rule.verdict and rule.verdict != "collapsed"]
        steps = rule.next
        if rule.id == "no better than random" and (proven_dead(e) or 0) >= t.dead_wasted:  # the likelier cause
            also, steps = [f"also: {_dead_words(e)}"], (*CAPACITY, *steps)
        return Judgement(rule.verdict, tuple(dict.fromkeys([*same, *also])), flags, steps, rule.id, rule.doomed, score)
    doubts = _doubts(e, t)
    if doubts:
        return Judgement("undecided", tuple(reason for reason, _ in doubts), flags, tuple(dict.fromkeys(fix for _, fix in doubts)), "doubts", False, score)
    return Judgement("good", (_praise(e),), flags, (), "nothing speaks against it", False, score)


def _flags(e: Evidence) -> list[str]:
    found = []
    if e.latents is not None and e.d_in is not None and e.latents < e.d_in:
        found.append("undercomplete")
    if e.mean_rate is not None and e.mean_rate > NOT_SPARSE:
        found.append("not sparse")
    if e.dead is None:
        found.append("deadness not measured")
    elif e.bound is None and not e.dead_decided:
        found.append("budget unknown")
    if e.redundancy_null is None:
        found.append("null not measured")
    if e.cautions:
        found.append("site in doubt")
    if not e.loss_clear:
        found.append("ablation costs no cross-entropy")
    if e.fvu_out is None and e.recovered_out is None:
        found.append("out of sample not measured")
    return found


def _doubts(e: Evidence, t: VerdictConfig) -> list[tuple[str, str]]:
    """(why it is not good, what would decide it) for everything that is missing or lies between the thresholds."""
    found = [(caution, "its site: the source that it came from, and `saehub doctor --recipe R`") for caution in e.cautions]
    if e.fvu is None and e.recovered is None:
        found.append(("reconstruction was not measured", "evaluate: [{uses: native/core}]"))
    elif e.fvu is not None and e.fvu_random is not None:
        if e.fvu > t.adequate_random * e.fvu_random and (e.recovered is None or e.recovered < t.excellent_recovered):
            found.append((f"FVU {e.fvu:.3g} is not clearly better than random directions ({e.fvu_random:.3g})", "more training tokens, or a larger k"))
    elif e.recovered is None or e.recovered < t.excellent_recovered:
        found.append((f"reconstruction is moderate ({e.recovered:.1%} recovered), and no baseline was measured beside it" if e.recovered is not None
                      else "no baseline was measured beside the FVU", "evaluate: [{uses: native/core, with: {baselines: true}}]"))  # fmt: skip
    if e.dead is None:
        found.append(("deadness was not measured", "evaluate: [{uses: native/core}]"))
    elif e.bound is None and not e.dead_decided:
        found.append((f"{e.dead:.1%} dead, budget unknown", "measure deadness by token budget: native/core"))
    elif e.dead > t.dead_fine:
        few = proven_dead(e) <= t.dead_fine
        found.append((f"{_dead_words(e)}: {'too few tokens to tell' if few else 'much of it is unused'}", "more evaluation tokens" if few else CAPACITY[1]))
    if e.redundancy is None or e.redundancy_null is None:
        found.append(("redundancy was not measured" if e.redundancy is None else f"redundancy {e.redundancy:.3f}, null not measured", "evaluate: [{uses: native/health}]"))
    elif e.excess > t.redundancy_fine:
        found.append((f"redundancy {e.redundancy:.3f} is well above the {e.redundancy_null:.3f} of random directions", COPIES[0]))
    if e.duplicates is not None and e.duplicates > t.duplicate_share / 4:
        found.append((f"{e.duplicates:.1%} of the latents have a near-duplicate", COPIES[0]))
    if e.fvu_out is None and e.recovered_out is None:
        found.append(("out of sample was not measured", "data.eval: {out_of_sample: {source: …}}"))
    recovered_there = e.recovered_out is not None and e.recovered_out >= t.excellent_recovered
    if None not in (e.fvu_out, e.fvu_random_out) and e.fvu_out > t.adequate_random * e.fvu_random_out and not recovered_there:
        found.append((f"FVU {e.fvu_out:.3g} on {e.outside} is not clearly better than random directions ({e.fvu_random_out:.3g})", DOMAIN[0]))
    if None not in (e.recovered, e.recovered_out) and e.recovered - e.recovered_out > t.crater / 2:
        found.append((f"{e.recovered:.1%} of the cross-entropy is recovered in sample, {e.recovered_out:.1%} on {e.outside}", DOMAIN[0]))
    return found


def _praise(e: Evidence) -> str:
    words = [f"{e.recovered:.1%} of the cross-entropy recovered" if e.recovered is not None else f"FVU {e.fvu:.3g} (random directions: {e.fvu_random:.3g})"]
    words.append("every latent fires" if e.dead == 0 else f"{e.dead:.1%} dead" if e.dead_decided else f"at most {e.dead:.1%} dead")
    words.append(f"redundancy {e.redundancy:.3f} (random directions: {e.redundancy_null:.3f})")
    words.append("it holds out of sample")
    return ", ".join(words)


def _score(e: Evidence) -> float | None:
    recovered = e.recovered if e.recovered is not None else 1 - e.fvu if e.fvu is not None else None
    if recovered is None or e.dead is None or e.excess is None:
        return None
    return max(0.0, recovered) * (1 - e.dead) * (1 - max(0.0, e.excess))
