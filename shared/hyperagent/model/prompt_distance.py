"""Measure how unlike the training prompts a prompt is, from the hypernetwork's own features.

A hypernetwork makes an adapter of every prompt, also of one that nothing in training prepared it for, and that adapter can
be worse than none. Its features show it: with x the mean over the latents of the encoder's output, the distance is

    d(x) = sqrt((x - mean)' C^-1 (x - mean) / D),    C = (1 - s) S + s tr(S)/D I

the Mahalanobis distance from the training prompts per dimension, about 1 for a prompt like them. S is their covariance, and
s the shrinkage of Ledoit and Wolf (2004), which minimizes the expected squared error of C: hundreds of prompts do not
determine a covariance of up to a thousand dimensions, and directions in which they hardly vary must not dominate. Up to the
constant factor 1 - s of C, this adds lambda tr(S)/D I to S with lambda = s / (1 - s).

A prompt is unusual if it is farther away than 99% of the held-out prompts, whose repositories training did not see.

Legend of shape suffixes: N prompts, D width of the hypernetwork, P prompt tokens, L latents, Q quantiles.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor

from hyperagent.errors import CorruptRecord, DataError
from hyperagent.model.featurizer import PromptFeaturizer
from hyperagent.model.hypernetwork import AgenticHyperNetwork

_NUM_QUANTILES = 101
_USUAL_SHARE = 0.99
_FLOAT32_RESOLUTION = 1e-6
"""Relative size of differences between float32 features that are rounding errors."""


@dataclass(frozen=True)
class PromptNovelty:
    """How unlike the training prompts one prompt is."""

    distance: float
    """Distance d from the training prompts."""
    threshold: float
    """Distance up to which a prompt is usual."""
    share_nearer: float
    """Share of the held-out prompts that are nearer to the training prompts, in [0, 1]."""

    @property
    def is_unusual(self) -> bool:
        """Whether the prompt is farther away than the threshold."""
        return self.distance > self.threshold


@dataclass(frozen=True, eq=False)
class PromptStatistics:
    """Distribution of the training prompts' features, and the distances of the held-out prompts."""

    mean_D: NDArray[np.float64]
    """Mean feature of the training prompts."""
    inverse_factor_DD: NDArray[np.float64]
    """W with W'W = C^-1, so that d(x) is the norm of W (x - mean), divided by sqrt(D)."""
    quantiles_Q: NDArray[np.float64]
    """Distances of the held-out prompts: their quantiles 0%, 1%, ..., 100%."""
    threshold: float
    """The 99% quantile of these distances; the largest of them if there are fewer than 100."""
    num_training: int
    """Number of training prompts."""
    num_held_out: int
    """Number of held-out prompts."""

    def distance(self, x_D: NDArray[np.floating]) -> float:
        """Return d(x) of one feature [D]."""
        return float(_distances(x_D[None], self.mean_D, self.inverse_factor_DD)[0])

    def novelty(self, x_D: NDArray[np.floating]) -> PromptNovelty:
        """Return the distance of one feature [D], compared with those of the held-out prompts."""
        distance = self.distance(x_D)
        share = float(np.interp(distance, self.quantiles_Q, np.linspace(0, 1, _NUM_QUANTILES)))
        return PromptNovelty(distance, self.threshold, share)

    def encode(self) -> bytes:
        """Return the content of a safetensors file that holds the statistics."""
        return save(
            {
                "mean": self.mean_D,
                "inverse_factor": self.inverse_factor_DD,
                "quantiles": self.quantiles_Q,
                "threshold": np.array(self.threshold),
                "num_prompts": np.array([self.num_training, self.num_held_out]),
            }
        )

    @staticmethod
    def decode(content: bytes, *, width: int) -> PromptStatistics:
        """Read what `encode` returned, for a hypernetwork of width D.

        Raises:
            CorruptRecord: the content is not that of such statistics.
        """
        try:
            tensors = load(content)
            shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
            expected = {
                "mean": [width],
                "inverse_factor": [width, width],
                "quantiles": [_NUM_QUANTILES],
                "threshold": [],
                "num_prompts": [2],
            }
            if shapes != expected or not all(np.isfinite(tensor).all() for tensor in tensors.values()):
                raise CorruptRecord(
                    f"the prompt statistics have the tensors {shapes}, not finite ones of {expected}; export the bundle again"
                )
        except SafetensorError as error:
            raise CorruptRecord(f"the prompt statistics cannot be read: {error}; export the bundle again") from error
        return PromptStatistics(
            mean_D=tensors["mean"],
            inverse_factor_DD=tensors["inverse_factor"],
            quantiles_Q=tensors["quantiles"],
            threshold=float(tensors["threshold"]),
            num_training=int(tensors["num_prompts"][0]),
            num_held_out=int(tensors["num_prompts"][1]),
        )


def prompt_statistics(
    network: AgenticHyperNetwork,
    featurize: PromptFeaturizer,
    training_prompts: Iterable[NDArray[np.uint32]],
    held_out_prompts: Iterable[NDArray[np.uint32]],
) -> PromptStatistics:
    """Compute the statistics of a hypernetwork's prompts, on the network's device, one prompt [P] at a time.

    Raises:
        DataError: there are no held-out prompts, or the features of the training prompts do not differ.
    """
    training_ND, held_out_ND = (
        np.array([_feature(network, featurize, prompt) for prompt in prompts], np.float64)
        for prompts in (training_prompts, held_out_prompts)
    )
    if len(held_out_ND) == 0:
        raise DataError("there is no held-out prompt to calibrate distances with; hold out a repository")
    if len(training_ND) < 2 or training_ND.var(0).mean() <= (_FLOAT32_RESOLUTION * np.abs(training_ND).max()) ** 2:
        raise DataError(
            f"the {len(training_ND)} training prompts have the same features, so distances from them have no "
            "scale; train on prompts that differ"
        )
    inverse_factor_DD = np.linalg.inv(np.linalg.cholesky(shrunken_covariance(training_ND)))
    distances_N = _distances(held_out_ND, training_ND.mean(0), inverse_factor_DD)
    quantile = 1.0 if len(distances_N) < 100 else _USUAL_SHARE
    return PromptStatistics(
        mean_D=training_ND.mean(0),
        inverse_factor_DD=inverse_factor_DD,
        quantiles_Q=np.quantile(distances_N, np.linspace(0, 1, _NUM_QUANTILES)),
        threshold=float(np.quantile(distances_N, quantile)),
        num_training=len(training_ND),
        num_held_out=len(held_out_ND),
    )


def feature_of(latents_LD: Tensor) -> NDArray[np.float32]:
    """Return the feature [D] of a prompt from the encoder's output."""
    feature: NDArray[np.float32] = latents_LD.float().mean(0).cpu().numpy()
    return feature


def shrunken_covariance(x_ND: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the covariance [D, D] with the shrinkage of Ledoit and Wolf (2004), which is positive definite."""
    num, dim = x_ND.shape
    centered_ND = x_ND - x_ND.mean(0)
    covariance_DD = centered_ND.T @ centered_ND / num
    scale = np.trace(covariance_DD) / dim
    dispersion = np.square(covariance_DD - scale * np.eye(dim)).sum()
    # The mean over the prompts of |x x' - S|^2, divided by their number: the variance of S as an estimate.
    noise = (np.square(np.square(centered_ND).sum(1)).mean() - np.square(covariance_DD).sum()) / num
    # Two prompts have no noise by this formula, and a covariance of rank 1.
    shrinkage = 1.0 if noise >= dispersion else max(noise / dispersion, _FLOAT32_RESOLUTION)
    shrunken: NDArray[np.float64] = (1 - shrinkage) * covariance_DD + shrinkage * scale * np.eye(dim)
    return shrunken


@torch.no_grad()
def _feature(
    network: AgenticHyperNetwork, featurize: PromptFeaturizer, prompt_ids_P: NDArray[np.uint32]
) -> NDArray[np.float32]:
    ids_1P = torch.from_numpy(prompt_ids_P.astype(np.int64))[None].to(network.common_V.device)
    mask_1P = network.readable(ids_1P, torch.ones_like(ids_1P, dtype=torch.bool))
    return feature_of(network.encoder(featurize(ids_1P), mask_1P)[0])


def _distances(
    x_ND: NDArray[np.floating], mean_D: NDArray[np.float64], inverse_factor_DD: NDArray[np.float64]
) -> NDArray[np.float64]:
    standardized_ND = (x_ND - mean_D) @ inverse_factor_DD.T
    distances_N: NDArray[np.float64] = np.sqrt(np.square(standardized_ND).mean(1))
    return distances_N
