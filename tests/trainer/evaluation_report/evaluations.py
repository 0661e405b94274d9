"""A full evaluation report as JSON values; every number is distinct, so a page that shows it can be searched for it."""

from __future__ import annotations

from typing import Any

FOREIGN = "<script>alert('x')</script>|[a](javascript:1)`&amp;*b*_c_"


def arm(kl: float, closed: float | None, low: float | None, high: float | None, place: int) -> dict[str, Any]:
    return {
        "kl": kl,
        "gap_closed": closed,
        "gap_low": low,
        "gap_high": high,
        "top1_agreement": 0.7111 + place / 100,
        "perplexity": 3.0123 - place / 7,
        "tool_calls_exact": 0.3217 + place / 50,
        "dependent_kl": 2 * kl + 0.0013,
        "other_kl": kl / 2 + 0.0007,
        "num_seeds": 3,
    }


ARMS: dict[str, dict[str, Any]] = {
    "own": arm(0.1612, 0.6104, 0.5611, 0.6545, 7),
    "frozen": arm(0.4138, None, None, None, 0),
    "static": arm(0.2507, 0.3942, 0.3318, 0.4471, 5),
    "shuffled": arm(0.4421, -0.0684, -0.1312, -0.0103, 1),
    "same_repository": arm(0.2011, 0.514, 0.4623, 0.5718, 6),
    "empty": arm(0.3904, 0.0565, 0.0114, 0.1037, 2),
    "mean": arm(0.2712, 0.3446, 0.2829, 0.4052, 4),
    "trained_on_shuffled": arm(0.2544, 0.3852, 0.3237, 0.4419, 3),
    "oracle": arm(0.1026, 0.7521, 0.7053, 0.7986, 8),
    "teacher": arm(0.0, 1.0, 1.0, 1.0, 9),
}


def evaluation() -> dict[str, Any]:
    """Return a report with every part."""
    repositories = ["numpy/numpy", "pallets/flask", FOREIGN, "psf/requests"]
    return {
        "version": 1,
        "run": {"folder": "runs/own-seed-0", "step": 2400, "seed": 11},
        "view": "internalized",
        "split": "held_out",
        "num_repositories": 12,
        "num_trajectories": 57,
        "num_rows": 48_313,
        "num_seeds": 3,
        "arms": {name: dict(values) for name, values in ARMS.items()},
        "conditioning": {
            "verdict": "conditioning pays",
            "reason": "own prompts save 0.0895 [0.0721, 0.107] nats over a static LoRA (21.6% of the frozen student's KL)",
            "margin": 0.05,
            "num_clusters": 12,
            "conditioning_gain": {"mean": 0.2809, "low": 0.2466, "high": 0.3155},
            "over_static": {"mean": 0.0895, "low": 0.0721, "high": 0.1068},
            "over_trained_on_shuffled": {"mean": 0.0932, "low": 0.0755, "high": 0.1109},
            "over_frozen": {"mean": 0.2526, "low": 0.2244, "high": 0.2807},
        },
        "by_position": [
            {
                "first": 512 * number**2,
                "last": 512 * (number + 1) ** 2 - 1,
                "num_rows": 6000 + number,
                "kl": {name: values["kl"] * (1.4 - number / 10) for name, values in ARMS.items()},
            }
            for number in range(8)
        ],
        "by_class": [
            {
                "name": name,
                "num_rows": 9000 + place,
                "kl": {key: values["kl"] * (0.6 + place / 3) for key, values in ARMS.items()},
            }
            for place, name in enumerate(("tool call", "text", "end of turn"))
        ],
        "similarity": {
            "repositories": repositories,
            "cosine": [
                [1.0, 0.412, -0.137, 0.655],
                [0.412, 1.0, 0.231, 0.548],
                [-0.137, 0.231, 1.0, 0.093],
                [0.655, 0.548, 0.093, 1.0],
            ],
            "mean_cosine": 0.3003,
            "own_beats_others": 0.9123,
        },
        "teacher_check": {
            "kl": 0.1379,
            "dependent_share": 0.2246,
            "threshold": 0.1,
            "num_rows": 7117,
            "nothing_to_distill": False,
        },
        "interference": {"kl_frozen_to_adapted": 0.0177, "num_rows": 2113},
        "out_of_distribution": {"held_out_median": 0.2719, "threshold": 0.8713, "share_flagged": 0.0417},
        "cost": {
            "adapter_ms": 41.7,
            "adapter_parameters": 1_228_800,
            "adapter_bytes": 4_915_200,
            "evaluation_s": 93.4,
        },
        "texts": [
            {
                "arm": name,
                "prompt": "Rename the function average to mean everywhere.",
                "text": f"\ndef mean(values):\n    # {said}\n    return sum(values) / len(values)  # ``` <b>",
                "rules": [{"name": "author tag", "value": "team-7", "followed": said == "team-7"}],
            }
            for name, said in (("frozen", "no tag"), ("own", "team-7"))
        ],
    }
