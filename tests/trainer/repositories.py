"""Simulate evaluations over repositories whose true effects are known, and the intervals that the report does without.

Legend of shape suffixes: S training seeds, C repositories, N samples, B bootstrap draws. All intervals are 95% intervals.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hyperagent_trainer.evaluation.arms import FROZEN, OWN, STATIC, TRAINED_ON_SHUFFLED
from hyperagent_trainer.evaluation.student_t import two_sided_t

Skew = Literal["normal", "right", "left"]
FROZEN_KL = 0.2
"""Mean KL of the frozen student in nats per row."""
SPREAD = 0.1
"""Standard deviation of the advantage over the static arm between repositories, as a share of the frozen KL."""
_OF_SAMPLES, _OF_SEEDS, _OF_INTERACTION = 0.5, 0.3, 0.3
"""Standard deviations between samples, seeds, and seeds within a repository, relative to that between repositories."""


@dataclass(frozen=True)
class Setting:
    """What is simulated."""

    num_repositories: int
    skew: Skew
    """Distribution of the repositories' advantages: lognormal with sigma 1 for `right`, mirrored for `left`: with `left` own prompts
    help a little in most repositories and hurt much in a few."""
    most_samples: int
    """Every repository has 1 to this many samples, equally likely."""
    num_seeds: int
    """Training seeds; only with several do they differ."""


@dataclass(frozen=True)
class Simulated:
    """One evaluation without any advantage over the static arm yet."""

    frozen_N: NDArray[np.float64]
    noise_SN: NDArray[np.float64]
    """Deviation of the advantage over the static arm from its true value in nats."""
    rows_N: NDArray[np.int64]
    repositories: list[int]

    def sums(self, effect: float) -> dict[str, NDArray[np.float64]]:
        """Return the sums of KL by arm if own prompts save `effect` of the frozen KL over the static arm.

        The arm trained on shuffled prompts is far behind, so the static arm alone decides: the case in which a verdict is wrong
        most often.
        """
        own_SN = np.broadcast_to(0.5 * self.frozen_N, self.noise_SN.shape)
        static_SN = own_SN + effect * self.frozen_N + self.noise_SN
        return {FROZEN: self.frozen_N, OWN: own_SN, STATIC: static_SN, TRAINED_ON_SHUFFLED: own_SN + 3 * self.frozen_N}


def simulate(setting: Setting, generator: np.random.Generator) -> Simulated:
    """Draw repositories, their samples and what differs between them."""
    num, seeds = setting.num_repositories, setting.num_seeds
    of_sample = np.repeat(np.arange(num), generator.integers(1, setting.most_samples, num, endpoint=True))
    shape = (seeds, len(of_sample))
    rows_N = np.ceil(generator.lognormal(np.log(80), 0.5, len(of_sample))).astype(np.int64)
    levels_C = generator.lognormal(-0.5 * 0.3**2, 0.3, num)
    frozen_N = (FROZEN_KL * rows_N * levels_C[of_sample]).astype(np.float64)
    noise_SN = _effects(setting.skew, num, generator)[of_sample] + _OF_SAMPLES * generator.normal(size=shape[1])
    if seeds > 1:
        of_seeds = _OF_SEEDS * generator.normal(size=(seeds, 1))
        noise_SN = noise_SN + of_seeds + _OF_INTERACTION * generator.normal(size=(seeds, num))[:, of_sample]
    noise_SN = (SPREAD * FROZEN_KL * rows_N * np.broadcast_to(noise_SN, shape)).astype(np.float64)
    return Simulated(frozen_N, noise_SN, rows_N, of_sample.tolist())


def _effects(skew: Skew, num: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """Draw effects with mean 0 and standard deviation 1."""
    if skew == "normal":
        return generator.normal(size=num)
    standardized: NDArray[np.float64] = (generator.lognormal(size=num) - np.exp(0.5)) / np.sqrt((np.e - 1) * np.e)
    return standardized if skew == "right" else -standardized


def by_repository(values_SN: NDArray[np.float64], repositories: list[int]) -> NDArray[np.float64]:
    """Return the sums over the samples of every repository, shape [S, C]."""
    return np.array([np.bincount(repositories, weights=values) for values in np.atleast_2d(values_SN)])


def percentile_interval(
    numerators_SC: NDArray[np.float64], denominators_C: NDArray[np.float64], *, seed: int
) -> tuple[float, float]:
    """Return the percentile bootstrap of the ratio, which the report does without: with few repositories it is too short."""
    num = len(denominators_C)
    counts_BC = np.random.default_rng(seed).multinomial(num, np.full(num, 1 / num), size=1999)
    low, high = np.quantile((counts_BC @ numerators_SC.mean(0)) / (counts_BC @ denominators_C), [0.025, 0.975])
    return float(low), float(high)


def t_interval(numerators_SC: NDArray[np.float64], denominators_C: NDArray[np.float64]) -> tuple[float, float]:
    """Return Student's t interval of the ratio with the linearized error and, over seeds, Satterthwaite's degrees of freedom."""
    seeds, num = numerators_SC.shape
    ratios_S, total = numerators_SC.sum(1) / denominators_C.sum(), denominators_C.sum()
    mean = float(ratios_S.mean())
    residuals_C = numerators_SC.mean(0) - mean * denominators_C
    variances = [float(num / (num - 1) * (residuals_C**2).sum() / total**2)]
    degrees = [num - 1]
    if seeds > 1:
        variances.append(float(ratios_S.var(ddof=1)) / seeds)
        degrees.append(seeds - 1)
    together = sum(variances) ** 2 / sum(v**2 / d for v, d in zip(variances, degrees, strict=True))
    half = two_sided_t(0.95, int(together)) * sum(variances) ** 0.5
    return mean - half, mean + half
