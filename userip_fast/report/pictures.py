"""The report's pictures: small figures that say what they show, on hover number by number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from userip_fast.report.svg import (
    LINE,
    Scale,
    Svg,
    axes,
    number,
    place_labels,
    shortened,
    spread,
    width_of,
)

WIDTH, HEIGHT = 360, 230
_TOP, _BOTTOM, _LEFT = 30, 40, 44

Line = tuple[str, Sequence[float], Sequence[float], str]
"""Label, x, y, class."""


def curves(
    title: str,
    lines: Sequence[Line],
    levels: Sequence[tuple[str, float]],
    xlabel: str,
    ylabel: str,
    xticks: Sequence[float] | None = None,
) -> str:
    """Curves, and levels to compare them with; both are named at their right ends.

    Args:
        levels: Label and y of dashed lines.
    """
    names = [label for label, *_ in lines] + [label for label, _ in levels]
    margin = 12 + max(width_of(n) for n in names)
    svg = Svg(WIDTH + margin - 60, HEIGHT, title)
    ys = [y for _, _, own, _ in lines for y in own] + [y for _, y in levels]
    xs = [x for _, own, _, _ in lines for x in own]
    room = 0.06 * (max(ys) - min(ys))
    x = Scale(min(xs), max(xs), _LEFT, svg.width - margin)
    y = Scale(min(ys) - room, max(ys) + room, HEIGHT - _BOTTOM, _TOP)
    axes(svg, x, y, xlabel, ylabel, xticks)
    ends = [y(own[-1]) for _, _, own, _ in lines] + [y(level) for _, level in levels]
    places = spread(ends, LINE, _TOP, HEIGHT - _BOTTOM)
    kinds = [kind for *_, kind in lines] + ["muted"] * len(levels)
    for _, level in levels:
        svg.line(x.start, y(level), x.stop, y(level), "level")
    for label, own_x, own_y, kind in lines:
        svg.path([(x(a), y(b)) for a, b in zip(own_x, own_y)], f"curve {kind}")
        for a, b in zip(own_x, own_y):
            told = f"{label}: {b:.4g} at {number(a)}"
            svg.dot(x(a), y(b), 2.2 if len(own_x) < 12 else 1.4, f"fill {kind}", told)
    for name, place, kind in zip(names, places, kinds):
        svg.text(x.stop + 6, place, name, kind)
    return str(svg)


def usage(name: str, counts: Sequence[int]) -> str:
    """Users of each code, the most used first."""
    svg = Svg(WIDTH, 150, f"users of each {name} code")
    shown = sorted(enumerate(counts), key=lambda c: -c[1])
    x = Scale(0, len(counts), _LEFT, WIDTH - 8)
    y = Scale(0, max(max(counts), 1), 150 - 26, 22)
    for tick in y.ticks(3):
        svg.line(x.start, y(tick), x.stop, y(tick), "grid")
        svg.text(x.start - 5, y(tick), number(tick), "muted", "end")
    svg.text(2, 8, "users", "muted")
    wide = (x.stop - x.start) / len(counts)
    for i, (code, users) in enumerate(shown):
        at = x.start + i * wide + 0.1 * wide
        told = f"code {code}: {users:,} users"
        svg.rect(at, y(users), 0.8 * wide, y.start - y(users), "fill accent", told)
    told = f"codes of {name}, most used first"
    svg.text((x.start + x.stop) / 2, 150 - 12, told, "muted", "middle")
    return str(svg)


def code_map(
    name: str, codewords: np.ndarray[Any, Any], users: Sequence[int], words: Sequence[str]
) -> str:
    """The soft prompts that the codes stand for, in their two widest directions.

    Args:
        codewords: [K, m D].
        users: [K], area of a code's dot.
        words: [K], its label; where there is no room for it the code's number stands in the dot.
    """
    x = codewords - codewords.mean(0)
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    place = np.zeros((len(x), 2))
    place[:, : min(2, len(s))] = (u * s)[:, :2]
    share = (s**2 / max(float((s**2).sum()), 1e-12))[:2].sum()
    title = f"{name}: codewords in two directions, {share:.0%} of their variance"
    svg = Svg(WIDTH + 80, 300, title)
    across = Scale(*_ends(place[:, 0]), 50, svg.width - 50)
    down = Scale(*_ends(place[:, 1]), 278, 22)
    largest = max(1, max(users, default=1))
    dots = [
        (across(a), down(b), 4 + 11 * math.sqrt(n / largest)) for (a, b), n in zip(place, users)
    ]
    labels = [shortened(w, 24) for w in words]
    order = sorted(range(len(dots)), key=lambda i: -users[i])
    inside = (2.0, 2.0, svg.width - 2, svg.height - 2)
    found = place_labels([dots[i] for i in order], [labels[i] for i in order], inside)
    for i in order:
        told = f"code {i}: {words[i]}, {users[i]:,} users"
        svg.dot(*dots[i], f"fill hue{i % 8} soft", told)
    for i, at in zip(order, found):
        if at is not None:
            svg.text(*at, labels[i], "label", "middle")
        else:
            svg.text(dots[i][0], dots[i][1], str(i), "label number", "middle")
    return str(svg)


def _ends(values: np.ndarray[Any, Any]) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def confusion(name: str, counts: np.ndarray[Any, Any], traits: Sequence[str]) -> str:
    """Users by planted trait (rows) and code, columns ordered so that matches meet the diagonal."""
    order, left = [], list(range(counts.shape[1]))
    for row in counts:
        if left:
            best = max(left, key=lambda c: row[c])
            order.append(best)
            left.remove(best)
    columns = order + left
    margin = 10 + max(width_of(t) for t in traits)
    cell, high = 34, 24
    svg = Svg(margin + cell * len(columns) + 4, 24 + high * len(traits) + 34,
              f"{name}: planted trait and code")  # fmt: skip
    for i, trait in enumerate(traits):
        svg.text(margin - 6, 24 + high * (i + 0.5), trait, "muted", "end")
        row = counts[i]
        for j, code in enumerate(columns):
            share = row[code] / max(row.sum(), 1)
            told = f"{trait}, code {code}: {row[code]:,} users, {share:.0%} of the trait's"
            x, y = margin + cell * j, 24 + high * i
            svg.rect(x + 1, y + 1, cell - 2, high - 2, f"heat{min(4, math.ceil(4 * share))}", told)
            if row[code]:
                ink = "onheat" if share > 0.5 else ""
                svg.text(x + cell / 2, y + high / 2, str(row[code]), ink, "middle")
    for j, code in enumerate(columns):
        at = margin + cell * (j + 0.5)
        svg.text(at, 24 + high * len(traits) + 10, str(code), "muted", "middle")
    svg.text(margin, 24 + high * len(traits) + 26, "code", "muted")
    svg.text(2, 10, "planted trait", "muted")
    return str(svg)


OURS = ("ids", "ids_prob", "affinity", "ids_affinity", "theta", "all+ids")


def ctr_points(result: Mapping[str, Any]) -> list[tuple[float, float, float, str]]:
    """Mean AUC, its interval and name of each feature, averaged over recommenders, best last.

    Args:
        result: A ctr.json. Intervals are those of the recommenders, averaged.
    """
    points = []
    for feature in result["settings"]["features"]:
        if by := result["auc"][feature]:
            mean = float(np.mean([v["mean"] for v in by.values()]))
            low, high = np.mean([v["ci95"] for v in by.values()], axis=0)
            points.append((mean, float(low), float(high), feature))
    return sorted(points)


def ctr_dots(result: Mapping[str, Any], title: str) -> str:
    """A dot with its interval for each feature, best first; dashed: what `none` reaches."""
    points = ctr_points(result)[::-1]
    floor = max(result.get("floor", {}).values(), default=None)
    if not points:
        return ""
    values = [v for p in points for v in p[:3]]
    far = ""
    if floor is not None and floor >= min(values) - (max(values) - min(values)) / 2:
        values.append(floor)
    elif floor is not None:  # it would take all the room
        far, floor = f"item alone: {floor:.3f}, further left", None
    margin = 10 + max(width_of(p[-1]) for p in points)
    row = 18
    svg = Svg(430, 34 + row * len(points) + 40, title)
    x = Scale(min(values), max(values), margin + 6, svg.width - 14)
    bottom = 32 + row * len(points)
    for tick in x.ticks(4):
        svg.line(x(tick), 28, x(tick), bottom, "grid")
        svg.text(x(tick), bottom + 11, f"{tick:.3g}", "muted", "middle")
    for name, value, kind, top in (
        ("item alone", floor, "level dotted", 8),
        ("none", next((p[0] for p in points if p[-1] == "none"), None), "level", 20),
    ):
        if value is not None:
            svg.line(x(value), top + 6, x(value), bottom, kind)
            at = min(max(x(value), margin + 30), svg.width - 32)
            svg.text(at, top, name, "muted", "middle")
    for i, (mean, low, high, feature) in enumerate(points):
        y = 32 + row * (i + 0.5)
        ours = feature in OURS
        kind = "accent" if ours else "other"
        told = f"{feature}: AUC {mean:.4f}, 95 % interval {low:.4f} to {high:.4f}"
        svg.text(margin, y, feature, "strong" if ours else "", "end")
        svg.line(x(low), y, x(high), y, f"interval {kind}")
        svg.dot(x(mean), y, 4, f"fill {kind}", told)
    if far:
        svg.text(2, 8, far, "muted")
    svg.text((x.start + x.stop) / 2, bottom + 28, "AUC on test users, mean of the recommenders",
             "muted", "middle")  # fmt: skip
    return str(svg)


def interval(low: float, middle: float, high: float, most: float) -> str:
    """How many times as often, as a dot with its interval on a logarithmic line from 1."""
    svg = Svg(96, 14, f"{middle:.1f} times as often, 95 % interval {low:.1f} to {high:.1f}")
    x = Scale(0, math.log(max(most, 1.01)), 3, 93)
    at = [x(math.log(max(v, 1.0))) for v in (low, middle, high)]
    svg.line(3, 7, 93, 7, "grid")
    svg.line(3, 3, 3, 11, "axis")
    svg.line(at[0], 7, at[2], 7, "interval accent")
    svg.dot(at[1], 7, 3.5, "fill accent")
    return str(svg)
