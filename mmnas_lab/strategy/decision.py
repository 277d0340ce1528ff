"""A choice among options that were scored several times: the best, its confidence, and ties by cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student


@dataclass(frozen=True)
class Decision:
    """What a choice came to.

    Attributes:
        option: that was taken.
        scores: by option, one a seed, in the order of the seeds; higher is better. None of an option that
            had no rival.
        tied: options whose mean is within the noise of the best one's, the best included.
        confidence: probability that the best mean is truly above the next one's, by a paired t-test.
        flops: of a forward pass of one sample, by option; what breaks a tie.
    """

    option: str
    scores: dict[str, list[float]]
    tied: tuple[str, ...]
    confidence: float | None
    flops: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Plain values, with mean and standard deviation of each option."""
        return {
            "option": self.option,
            "tie": list(self.tied) if len(self.tied) > 1 else [],
            "confidence": self.confidence,
            "options": {
                name: {
                    "mean": float(np.mean(scores)) if scores else None,
                    "std": float(np.std(scores, ddof=1)) if len(scores) > 1 else None,
                    "scores": scores,
                    "flops": self.flops[name],
                }
                for name, scores in self.scores.items()
            },
        }


def decide(scores: Mapping[str, Sequence[float]], flops: Mapping[str, int], tie: float) -> Decision:
    """The best option, or of those within the noise of it the one that computes least.

    Args:
        scores: by option, one a seed, paired over the options; higher is better.
        flops: by option.
        tie: standard errors of a paired difference up to which it counts as noise; with one seed a
            difference of 0 alone is a tie.
    """
    means = {option: float(np.mean(values)) for option, values in scores.items()}
    best = max(means, key=lambda option: means[option])
    tied = [option for option in scores if option == best or _within_noise(scores[best], scores[option], tie)]
    others = [option for option in scores if option != best]
    confidence = None
    if others and len(scores[best]) > 1:
        next_best = max(others, key=lambda option: means[option])
        difference = np.subtract(scores[best], scores[next_best])
        error = difference.std(ddof=1) / math.sqrt(len(difference))
        if error > 0:
            confidence = float(student.cdf(difference.mean() / error, len(difference) - 1))
        else:
            confidence = 1.0 if difference.mean() > 0 else 0.5
    option = min(tied, key=lambda name: (flops[name], -means[name]))
    plain = {name: [float(value) for value in values] for name, values in scores.items()}
    return Decision(option, plain, tuple(tied), confidence, dict(flops))


def _within_noise(best: Sequence[float], other: Sequence[float], tie: float) -> bool:
    difference = np.subtract(best, other)
    if len(difference) < 2:
        return bool(difference[0] == 0)
    return bool(difference.mean() <= tie * difference.std(ddof=1) / math.sqrt(len(difference)))


def margin(decision: Decision) -> float:
    """Mean score of the option taken minus that of the best other one; 0 where there is no other."""
    means = {name: float(np.mean(scores)) for name, scores in decision.scores.items() if scores}
    others = [mean for name, mean in means.items() if name != decision.option]
    return means[decision.option] - max(others) if others else 0.0


def told(decision: Decision) -> str:
    parts = [f"{name} {np.mean(scores):.4f}" for name, scores in decision.scores.items()]
    end = f"{decision.option} taken"
    if len(decision.tied) > 1:
        end = f"a tie of {', '.join(decision.tied)}, {decision.option} computes least"
    elif decision.confidence is not None:
        end += f", confidence {decision.confidence:.2f}"
    return f"{', '.join(parts)}; {end}"
