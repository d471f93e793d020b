"""Firing counts of latents in; how many effective tokens a silent latent was watched for, and the share that is dead by that budget, out.

How long must a latent stay silent to be called dead?  Over N independent rows a latent of rate r stays silent with probability
(1-r)^N ≈ e^(-rN), so silence puts the 95 % upper bound -ln(0.05)/N ≈ 3/N on r (the rule of three: Hanley & Lippman-Hand, JAMA 249,
1983; Jovanovic & Levy, Am. Stat. 51, 1997). Rows of a text are not independent: latents fire in bursts. If bursts come at random and
hold m firings on average, a latent of rate r stays silent over n rows with probability e^(-r n/m): the rows count as N = n/m. (1/m is
the extremal index of Leadbetter, Z. Wahrsch. 65, 1983, estimated here by its blocks estimator, a block being a sequence.)

A silent latent shows no bursts of its own, so it is given those of the rarest latents i that did fire: m_i = firings of i / sequences in
which i fired. They differ, and the burstiest are the ones likeliest to be missed; a plain mean would promise too much. N is therefore
the number for which the rule of three holds averaged over them:

    N = -ln(0.05) n / x,   where   mean_i e^(-x/m_i) = 0.05

so that a latent of rate 3/N with the burstiness of one drawn at random stays silent with probability 0.05. All m_i = 1 gives N = n.
What this takes for granted: sequences are independent, and silent latents are no burstier than the rare ones that fired.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

RATES = (1e-4, 1e-5, 1e-6)
"""Rates r0 at which the dead share is always given, besides the configured one."""
MISS = 0.05
"""Probability of silence that the 95 % bound allows."""
RARE_SHARE = 0.05
"""A latent is rare that fired in at most this share of the sequences: two bursts hardly ever fall into one."""
LEAST_LATENTS = 20
"""With fewer rare latents than this, the so many rarest ones are taken."""


@dataclass(frozen=True)
class Budget:
    """For how long silent latents were watched."""

    rows: int
    """n: rows (kept tokens) seen."""
    sequences: int
    tokens: float
    """N: effective tokens."""
    burst: float
    """n/N: firings that count as one."""
    latents: int
    """Latents that N was estimated from."""

    @property
    def bound(self) -> float:
        """3/N: the 95 % upper bound on the rate of a latent that never fired."""
        return 3 / self.tokens if self.tokens else math.inf

    def decides(self, rate: float) -> bool:
        """Whether silence proves a rate of at most `rate`."""
        return self.bound <= rate

    def undecided(self, rate: float) -> str:
        """Why not, and how many rows would do."""
        needed = self.rows * (3 / rate) / self.tokens if self.tokens else math.inf
        return (
            f"undecided at this budget: N = {self.tokens:,.0f} effective tokens ({self.rows:,} rows in bursts of {self.burst:.2g}) is below "
            f"3/r0 = {3 / rate:,.0f} for r0 = {rate:g}; about {needed:,.0f} rows would decide it"
        )


def budget(fired_F: np.ndarray, sequences_F: np.ndarray, rows: int, sequences: int) -> Budget:
    """The effective tokens N of the module's docstring.

    Args: `fired_F` rows and `sequences_F` sequences in which each latent fired (int [F]), out of `rows` and `sequences`.
    When nothing fired at all, bursts are unknown and a sequence counts as one token: the least that the data can mean.
    """
    alive = sequences_F > 0
    if not alive.any() or rows == 0:
        return Budget(rows, sequences, float(min(sequences, rows)), rows / max(min(sequences, rows), 1), 0)
    cut = RARE_SHARE * sequences
    if (alive & (sequences_F <= cut)).sum() < LEAST_LATENTS:
        ordered = np.sort(sequences_F[alive])
        cut = ordered[min(LEAST_LATENTS, len(ordered)) - 1]
    chosen = alive & (sequences_F <= cut)
    burst_I = fired_F[chosen] / sequences_F[chosen]
    x = _silence(burst_I)
    tokens = -math.log(MISS) * rows / x
    return Budget(rows, sequences, tokens, rows / tokens, int(chosen.sum()))


def _silence(burst_I: np.ndarray) -> float:
    """x with mean_i e^(-x/m_i) = 0.05, by bisection between the values for all bursts least and all greatest."""
    sizes, counts = np.unique(burst_I, return_counts=True)
    low, high = -math.log(MISS) * sizes[0], -math.log(MISS) * sizes[-1]
    for _ in range(200):
        middle = (low + high) / 2
        if (counts * np.exp(-middle / sizes)).sum() / counts.sum() > MISS:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def silent_share(sequences_F: np.ndarray, last_F: np.ndarray, sequences: np.ndarray) -> tuple[float, float | None, np.ndarray]:
    """Share of latents that never fired, its standard error over sequences, and u_j: latents that fired in sequence j alone.

    Leaving sequence j out silences u_j more latents, which gives the jackknife error (Heltshe & Forrester, Biometrics 39, 1983, for the
    number of species in quadrats, the same statistic):  se² = (S-1)/S Σ_j (u_j - ū)², divided by F².

    Args: sequences in which each latent fired and the last of them (int [F]); indices of the sequences looked at (int [S]).
    """
    latents = len(sequences_F)
    only = last_F[sequences_F == 1]
    alone_S = np.bincount(only, minlength=int(sequences.max(initial=-1)) + 1)[sequences] if len(sequences) else np.zeros(0)
    share = float((sequences_F == 0).sum()) / latents
    S = len(sequences)
    if S < 2:
        return share, None, alone_S
    return share, math.sqrt((S - 1) / S * float(((alone_S - alone_S.mean()) ** 2).sum())) / latents, alone_S
