"""Named configurations of the cycle: the published presets."""

from __future__ import annotations

from typing import Any

__all__ = ["PRESETS"]

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "aggressive": {
        "sparsity_end": 0.9,
        "cycles": 7,
        "steps_per_cycle": 2000,
        "amnesty_start": 0.15,
        "amnesty_end": 0.05,
    },
    "conservative": {
        "sparsity_end": 0.5,
        "cycles": 3,
        "steps_per_cycle": 500,
        "rule": "sgd",
        "amnesty_start": 0.20,
    },
    "densification": {
        "schedule": "densification",
        "sparsity_start": 0.7,
        "sparsity_end": 0.0,
        "amnesty_start": 0.30,
        "amnesty_end": 0.10,
    },
    "quick_test": {
        "sparsity_end": 0.5,
        "cycles": 2,
        "steps_per_cycle": 100,
        "split": (0.5, 0.1, 0.4),
    },
    "published": {"theta_lr": 1e-4, "theta_betas": (0.9, 0.9), "granularity": "layer"},
}
"""Options of the published presets. All but "published" take this package's theta learning rate and granularity."""
