"""What an evaluation found, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def in_words(by: Mapping[str, Any]) -> str:
    """A mean, with its deviation where there are several seeds."""
    several = len(by["seeds"]) > 1
    return f"{by['mean']:.4f} ± {by['std']:.4f}" if several else f"{by['mean']:.4f}"


def codes_in_words(codes: Mapping[str, Any]) -> str:
    """`describe_codes` in a line, field by field."""

    def listed(name: str, form: str) -> str:
        return " and ".join(format(x, form) for x in codes[name])

    parts = [
        f"perplexity {listed('perplexity', '.1f')}",
        f"dead {listed('dead', 'd')}",
        f"largest {listed('largest', '.0%')} of users",
        f"generosity (of choices: popularity) tells {listed('generosity_share', '.0%')} of them",
    ]
    for name, by in codes["bits"].items():
        shared = " and ".join(f"{x:.3f}" for x in by["shared"])
        chance = " and ".join(f"{x:.3f}" for x in by["permuted"])
        parts.append(f"{name} {shared} bits (by chance {chance})")
    if "largest_probability" in codes:
        sure = f"mean largest probability {listed('largest_probability', '.2f')}"
        if "same_again" in codes:
            sure += f", same code by other events {listed('same_again', '.2f')}"
        parts.append(sure)
    return "; ".join(parts)
