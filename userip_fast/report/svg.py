"""Inline SVG figures in the colours of the page that they stand in, drawn without a library.

A figure is as wide as its column and never wider than it was drawn, so that its letters stay
readable on a phone. What it shows is told again on hover, by `<title>`.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence
from html import escape

from userip_fast.core.visible import visible

LETTER = 6.3  # width of a letter of 11 px, about
LINE = 13  # height of a line of text


class Svg:
    """Shapes, in pixels from the upper left."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self.width, self.height = width, height
        self.title = title
        self.parts: list[str] = []

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str = "axis") -> None:
        self.parts.append(
            f'<line x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}" class="{kind}"/>'
        )

    def path(self, points: Iterable[tuple[float, float]], kind: str) -> None:
        d = "L".join(f"{_n(x)} {_n(y)}" for x, y in points)
        self.parts.append(f'<path d="M{d}" class="{kind}"/>')

    def rect(self, x: float, y: float, w: float, h: float, kind: str, told: str = "") -> None:
        box = f'x="{_n(x)}" y="{_n(y)}" width="{_n(max(w, 0))}" height="{_n(max(h, 0))}"'
        self.parts.append(f'<rect {box} class="{kind}">{_told(told)}</rect>')

    def dot(self, x: float, y: float, r: float, kind: str, told: str = "") -> None:
        self.parts.append(
            f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{_n(r)}" class="{kind}">{_told(told)}</circle>'
        )

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> None:
        """`y` is the middle of the line."""
        at = f'x="{_n(x)}" y="{_n(y + 4)}" text-anchor="{anchor}"'
        self.parts.append(f'<text {at} class="{kind}">{escape(visible(text))}</text>')

    def __str__(self) -> str:
        return (
            f'<svg viewBox="0 0 {_n(self.width)} {_n(self.height)}" role="img" '
            f'style="max-width:{_n(self.width)}px"><title>{escape(visible(self.title))}</title>'
            + "".join(self.parts)
            + "</svg>"
        )


class Scale:
    """Values to pixels."""

    def __init__(self, low: float, high: float, start: float, stop: float) -> None:
        if not (math.isfinite(low) and math.isfinite(high) and math.isfinite(high - low)):
            raise ValueError(f"{low} to {high} cannot be drawn")
        if high <= low:
            low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
        self.low, self.high, self.start, self.stop = low, high, start, stop

    def __call__(self, x: float) -> float:
        share = (x - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self, most: int = 5) -> list[float]:
        """Round numbers between the ends."""
        raw = (self.high - self.low) / most
        size = 10.0 ** math.floor(math.log10(raw))
        step = size * next(m for m in (1, 2, 5, 10) if m * size >= raw)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def axes(
    svg: Svg, x: Scale, y: Scale, xlabel: str, ylabel: str, xticks: Sequence[float] | None = None
) -> None:
    """Lines, ticks and labels of a plot; y grows upwards."""
    svg.line(x.start, y.start, x.stop, y.start)
    for tick in x.ticks() if xticks is None else xticks:
        svg.line(x(tick), y.start, x(tick), y.start + 4)
        svg.text(x(tick), y.start + 13, number(tick), "muted", "middle")
    for tick in y.ticks(6):
        svg.line(x.start, y(tick), x.stop, y(tick), "grid")
        svg.text(x.start - 5, y(tick), number(tick), "muted", "end")
    svg.text((x.start + x.stop) / 2, y.start + 30, xlabel, "muted", "middle")
    svg.text(2, y.stop - 12, ylabel, "muted")


def number(x: float) -> str:
    """1200000 as 1.2M, 0.25 as 0.25."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(x) >= size:
            return f"{x / (1e3 if unit == 'k' else size):.4g}{unit}"
    return f"{x:.4g}"


def width_of(text: str) -> float:
    """Of a line of text, about."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return LETTER * (len(text) + 0.8 * wide)


def shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places moved as little as it takes to lie `gap` apart between the ends, in their order."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    out = [0.0] * len(places)
    at = low - gap
    for i in order:
        at = out[i] = max(places[i], at + gap)
    at = high + gap
    for i in reversed(order):
        at = out[i] = min(out[i], at - gap)
    return out


Box = tuple[float, float, float, float]
"""x1, y1, x2, y2."""


def place_labels(
    dots: Sequence[tuple[float, float, float]], labels: Sequence[str], inside: Box
) -> list[tuple[float, float] | None]:
    """Where labels go so that none lies over another one or over a dot: x and y of their middles,
    beside their dots. None where there is no room; the first labels choose first.

    Args:
        dots: x, y, radius.
    """
    taken: list[Box] = [(x - r, y - r, x + r, y + r) for x, y, r in dots]
    found: list[tuple[float, float] | None] = []
    for (x, y, r), label in zip(dots, labels):
        w = width_of(label) / 2 + 1
        h = LINE / 2
        here = None
        for far in (3, 10, 18):
            side, up = r + far + w, r + far + h
            tries = [(x + side, y), (x - side, y), (x, y - up), (x, y + up)]
            tries += [(x + a * (0.7 * r + far + w), y + b * up) for a in (1, -1) for b in (-1, 1)]
            here = next((at for at in tries if _fits(_box(at, w, h), taken, inside)), None)
            if here is not None:
                taken.append(_box(here, w, h))
                break
        found.append(here)
    return found


def _box(middle: tuple[float, float], w: float, h: float) -> Box:
    return middle[0] - w, middle[1] - h, middle[0] + w, middle[1] + h


def _fits(box: Box, taken: Iterable[Box], inside: Box) -> bool:
    x1, y1, x2, y2 = box
    if x1 < inside[0] or y1 < inside[1] or x2 > inside[2] or y2 > inside[3]:
        return False
    return not any(x1 < b[2] and b[0] < x2 and y1 < b[3] and b[1] < y2 for b in taken)


def _told(text: str) -> str:
    return f"<title>{escape(visible(text))}</title>" if text else ""


def _n(x: float) -> str:
    return f"{x:.1f}".removesuffix(".0")
