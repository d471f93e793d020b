"""A width, a number of steps and a target L0 in; how each peer is searched for its best settings, run by run, out.

A search is a generator: it yields a label and settings, and is sent what came of them. Its learning rate doubles from a start until the
result gets worse, and halves where the start was the best, so that the best rate lies inside of what was tried. Where L0 is the outcome
of a coefficient, the coefficient is moved at every rate until L0 is within 8 % of the target (at most 3 runs), and results are compared
after a correction for what is left, FVU · √(L0 / target): the slope that the ReLU and gated SAEs of these benchmarks have.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, field, replace

Outcome = dict[str, float]
Search = Generator[tuple[str, dict], Outcome, None]
MATCHED, TRIES, RATES = 0.08, 3, 9


@dataclass(frozen=True)
class Family:
    """One trainer of a peer, with what is searched."""

    component: str
    settings: dict
    """Of every run."""
    first: float
    """The first learning rate to try."""
    tuned: dict = field(default_factory=dict)
    """Settings that go with a rate of ours, such as a decay."""
    label: str = ""
    coefficient: str | None = None
    """The setting that decides L0, whose value in `settings` is the first one."""
    slope: float = -1.25
    """Expected d ln L0 / d ln coefficient, until two runs show it."""
    defaults: bool = True
    """Whether to try the library's own learning rate too."""

    def search(self, target: float) -> Search:
        """Yield runs, best rate inside of what was tried."""
        if self.defaults:
            yield from self._matched({}, "defaults", target, self.settings.get(self.coefficient))
        tried: dict[float, float] = {}
        value = self.settings.get(self.coefficient)
        while (rate := next_rate(tried, self.first)) is not None:
            tried[rate], value = yield from self._matched({**self.tuned, "lr": rate}, f"lr {rate:g}", target, value)

    def _matched(self, extra: dict, label: str, target: float, value: float | None) -> Generator[tuple[str, dict], Outcome, tuple[float, float | None]]:
        """One rate, its coefficient moved until L0 is near the target; the best score, and the coefficient that came nearest."""
        label = ", ".join(part for part in (self.label, label) if part)
        if self.coefficient is None:
            outcome = yield label, {**self.settings, **extra}
            return score(outcome, target), None
        points: list[tuple[float, float]] = []
        best, nearest = math.inf, (math.inf, value)
        for _ in range(TRIES):
            value = float(f"{value:.3g}")
            outcome = yield f"{label}, {self.coefficient.split('_')[0]} {value:g}", {**self.settings, **extra, self.coefficient: value}
            away = math.log(max(outcome["l0"], 1e-3) / target)
            best = min(best, score(outcome, target) if abs(away) < 0.5 else math.inf)
            nearest = min(nearest, (abs(away), value))
            points.append((math.log(value), away))
            if abs(away) <= MATCHED:
                break
            slope = self.slope
            if len(points) > 1 and points[-1][0] != points[-2][0]:
                seen = (points[-1][1] - points[-2][1]) / (points[-1][0] - points[-2][0])
                slope = seen if -6 < seen < -0.2 else slope
            value *= math.exp(max(-2.5, min(2.5, -away / slope)))
        return best, nearest[1]


def next_rate(tried: dict[float, float], first: float) -> float | None:
    """The rate to try after these (rate -> score): on from an end that is the best so far; None once the best one lies inside."""
    if not tried:
        return first
    rates, best = sorted(tried), min(tried, key=tried.get)
    if len(tried) >= RATES or best not in (rates[0], rates[-1]):
        return None
    return best * 2 if best == rates[-1] else best / 2


def score(outcome: Outcome, target: float) -> float:
    """FVU, corrected for an L0 beside the target."""
    return outcome["fvu"] * math.sqrt(outcome["l0"] / target) if math.isfinite(outcome["fvu"]) else math.inf


def families(steps: int, fixed: dict, k: int) -> dict[str, list[Family]]:
    """Native architecture -> the peers' trainers of it."""
    with_k, groups = {"k": k, **fixed}, (1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
    # A window that the run can reach, and a decay over its last fifth.
    lens_tuned = {"lr_decay_steps": steps // 5, "dead_feature_window": max(8, steps // 32)}
    dl_tuned = {"decay_start": steps * 4 // 5}
    late = {"threshold_start_step": steps * 9 // 10}  # by default its running threshold starts after the whole run
    warm = {"sparsity_warmup_steps": steps // 20}

    def saelens(word: str, settings: dict, **more) -> Family:
        return Family(f"saelens/{word}", {"lr_warm_up_steps": steps // 20, **settings}, 4e-3, lens_tuned, **more)

    def dictionary_learning(word: str, settings: dict, **more) -> Family:
        return Family(f"dictionary_learning/{word}", {"warmup_steps": steps // 20, **settings}, 4e-3, dl_tuned, **more)

    def sparsify(word: str) -> list[Family]:
        adam = Family(f"sparsify/{word}", with_k, 8e-3, {"optimizer": "adam", "warmup": steps // 20}, "adam", defaults=False)
        return [Family(f"sparsify/{word}", with_k, 5e-2, {}, "signum"), adam]

    widths = [round(fixed["width"] * share) for share in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)]
    jump = {"l0_warm_up_steps": steps // 20}
    anthropic = {
        "jumprelu_sparsity_loss_mode": "tanh", "jumprelu_bandwidth": 2.0, "jumprelu_init_threshold": 0.1, "jumprelu_ste_to_input": True,
        "pre_act_loss_coefficient": 3e-6,
    }  # fmt: skip
    l1 = {**fixed, "l1_warm_up_steps": steps // 20}
    quadratic = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": k}
    return {
        "topk": [saelens("topk", with_k), dictionary_learning("topk", with_k), *sparsify("topk")],
        "batchtopk": [saelens("batchtopk", with_k), dictionary_learning("batchtopk", with_k | late)],
        "matryoshka_batchtopk": [
            saelens("matryoshka_batchtopk", with_k | {"matryoshka_widths": widths}),
            dictionary_learning("matryoshka_batchtopk", with_k | late | {"group_fractions": list(groups)}),
        ],
        "abstopk": [saelens("abstopk", with_k)],
        "groupmax": sparsify("groupmax"),
        "jumprelu": [
            saelens("jumprelu", fixed | jump | quadratic, label="quadratic"),
            replace(saelens("jumprelu", fixed | jump | anthropic | {"l0_coefficient": 1.0}, label="tanh"), coefficient="l0_coefficient"),
            dictionary_learning("jumprelu", fixed | warm | {"target_l0": k}),
        ],
        "relu": [
            saelens("standard", l1 | {"l1_coefficient": 1.5}, coefficient="l1_coefficient"),
            dictionary_learning("standard_april", fixed | warm | {"l1_penalty": 0.13}, coefficient="l1_penalty"),
        ],
        "gated": [
            saelens("gated", l1 | {"l1_coefficient": 2.2}, coefficient="l1_coefficient"),
            dictionary_learning("gated", fixed | warm | {"l1_penalty": 0.17}, coefficient="l1_penalty"),
        ],
    }  # fmt: skip
