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


def left_out_in_words(told: Mapping[str, Mapping[str, Any]] | None) -> list[str]:
    """A sentence of each feature and recommender of `userip_fast.ctr.warm.leave_out`."""
    lines = []
    for feature, by in (told or {}).items():
        for backbone, d in by.items():
            seen = d["held_out"]
            if seen["difference"] is None:
                why = f"{seen['rows']:,} training rows of such users have one label alone"
            else:
                why = (
                    f"on {seen['rows']:,} held-out rows of {seen['users']:,} such users "
                    f"{feature} - none is {_told(seen)}"
                )
            kept = "are left out of" if d["left_out"] else "stay in"
            lines.append(
                f"{backbone}, {feature}: codes {kept} the scores of users with {d['rows_from']} "
                f"training rows or more: {why}"
                + (f"; kept in, it is {_told(d['kept_in'])} on test rows" * d["left_out"])
            )
    return lines


def _told(d: Mapping[str, Any]) -> str:
    low, high = d["ci95"]
    return f"{d['difference']:+.4f} [{low:+.4f}, {high:+.4f}]"
