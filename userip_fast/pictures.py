"""The report's pictures: one small inline SVG each, readable on white, on black and on a phone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any

import numpy as np

from userip_fast.visible import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, ACCENT = "#808080", "#3b82c4"

Draw = Callable[["Axes"], None]


def svg(draw: Draw, width: float = 4.6, height: float = 2.8) -> str:
    """One inline figure; the same bytes for the same picture.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[str, Any] = {"svg.fonttype": "none", "svg.hashsalt": "userip_fast"}
    style["text.parse_math"] = False  # a word may hold a dollar sign
    style |= {f"axes.spines.{side}": False for side in ("top", "right")}
    style |= {f"axes.{part}color": INK for part in ("edge", "label", "title")}
    style |= {f"{part}.color": INK for part in ("text", "xtick", "ytick")}
    with mpl.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # letters are drawn by who shows them
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.add_subplot())
        text = StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    found = visible(text.getvalue())  # no control characters from a word
    return found[found.index("<svg") :]  # without the XML prologue


def lm_curve(
    tokens: Sequence[int],
    loss: Sequence[float],
    scored: Sequence[float] | None = None,
    held_out: Sequence[float | None] | None = None,
) -> str:
    """Loss of the embedded LM's training: of all tokens, of what the E-step asks, and that of users
    held out."""

    def draw(axes: Axes) -> None:
        x = np.asarray(tokens) / 1000
        axes.plot(x, loss, color=ACCENT, lw=1, label="all tokens")
        if scored and held_out and None not in held_out:
            axes.plot(x, scored, color=ACCENT, lw=1, ls=":", label="what is asked")
            axes.plot(x, np.asarray(held_out, float), lw=1, color="#c05a2b", label="users held out")
            axes.legend(frameon=False, fontsize=7)
        axes.set(xlabel="thousand tokens", ylabel="nats", title="training of the LM")

    return svg(draw)


def nll_curve(records: Sequence[Mapping[str, Any]]) -> str:
    """NLL of the behaviour, round by round."""

    def draw(axes: Axes) -> None:
        rounds = [r["round"] + 1 for r in records]
        axes.plot(rounds, [r["nll_per_weight"] for r in records], "o-", color=ACCENT)
        axes.set(
            xlabel="round", ylabel="nats per loss weight", title="NLL of behaviour", xticks=rounds
        )

    return svg(draw)


def usage(name: str, counts: Sequence[int]) -> str:
    """Users of each code."""

    def draw(axes: Axes) -> None:
        axes.bar(range(len(counts)), sorted(counts, reverse=True), color=ACCENT)
        axes.set(
            xlabel="codes, most used first", ylabel="users", title=f"users of each {name} code"
        )
        axes.set_xticks([])

    return svg(draw)


def code_map(
    name: str, codewords: np.ndarray[Any, Any], users: Sequence[int], words: Sequence[str]
) -> str:
    """The soft prompts that the codes stand for, in their two widest directions.

    Args:
        codewords: [K, m D].
        users: [K], area of a code's dot.
        words: [K], its label.
    """
    x = codewords - codewords.mean(0)
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    place = np.zeros((len(x), 2))
    place[:, : min(2, len(s))] = (u * s)[:, :2]
    share = (s**2 / max(float((s**2).sum()), 1e-12))[:2].sum()

    def draw(axes: Axes) -> None:
        size = 20 + 380 * np.asarray(users) / max(1, max(users, default=1))
        colors = [_PALETTE[i % len(_PALETTE)] for i in range(len(x))]
        axes.scatter(place[:, 0], place[:, 1], s=size, c=colors, alpha=0.65, lw=0)
        for (a, b), word in zip(place, words):
            axes.annotate(word, (a, b), fontsize=9, ha="center", va="center")
        axes.margins(0.16)
        axes.set(xticks=[], yticks=[], title=f"{name}: codewords ({share:.0%} of their variance)")

    return svg(draw, 4.6, 3.6)


def confusion(name: str, counts: np.ndarray[Any, Any], traits: Sequence[str]) -> str:
    """Users by planted trait (rows) and code, columns ordered so that matches meet the diagonal."""
    order, left = [], list(range(counts.shape[1]))
    for row in counts:
        if left:
            best = max(left, key=lambda c: row[c])
            order.append(best)
            left.remove(best)
    shown = counts[:, order + left]

    def draw(axes: Axes) -> None:
        share = shown / np.maximum(shown.sum(1, keepdims=True), 1)
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for i, j in np.ndindex(shown.shape):
            if shown[i, j]:
                ink = "white" if share[i, j] > 0.3 else INK
                axes.text(j, i, str(shown[i, j]), ha="center", va="center", fontsize=8, color=ink)
        axes.set_yticks(range(len(traits)), traits)
        axes.set_xticks(range(shown.shape[1]), [str(c) for c in order + left])
        axes.set(xlabel="code", title=f"{name}: planted trait and code")

    return svg(draw, 4.6, 0.6 + 0.34 * len(traits))


def auc_dots(axes: Axes, result: Mapping[str, Any]) -> None:
    """A dot with interval for each feature, the mean over its recommenders, sorted; `none` a line.

    Args:
        result: A ctr.json. Intervals are those of the recommenders, averaged.
    """
    points = []
    for feature in result["settings"]["features"]:
        if by := result["auc"][feature]:
            mean = float(np.mean([v["mean"] for v in by.values()]))
            low, high = np.mean([v["ci95"] for v in by.values()], axis=0)
            points.append((mean, low, high, feature))
    points.sort()
    for y, (mean, low, high, feature) in enumerate(points):
        ours = feature.startswith("ids") or feature in ("affinity", "all+ids")
        color = ACCENT if ours else INK
        axes.plot([low, high], [y, y], color=color, lw=1.6, alpha=0.55)
        axes.plot(mean, y, "D" if ours else "o", color=color, ms=4.5)
        if feature == "none":
            axes.axvline(mean, color=INK, lw=0.8, ls="--")
    if floor := result.get("floor"):
        axes.axvline(max(floor.values()), color=INK, lw=0.8, ls=":", alpha=0.6)
    axes.set_yticks(range(len(points)), [p[-1] for p in points], fontsize=8)
    axes.grid(axis="x", alpha=0.25)
    axes.set_xlabel("AUC (dashed: none; dotted: item alone)", fontsize=8)


def ctr_dots(result: Mapping[str, Any], title: str) -> str:
    """`auc_dots` as a picture of its own."""

    def draw(axes: Axes) -> None:
        auc_dots(axes, result)
        axes.set_title(title)

    return svg(draw, 5.2, 0.9 + 0.22 * len(result["settings"]["features"]))


_PALETTE = (
    "#3b82c4", "#d97b29", "#4a9c5d", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c",
    "#b5a12a", "#2fa3b5", "#6b8e23", "#a0522d", "#6a5acd", "#cd5c5c", "#20937a", "#b8860b",
)  # fmt: skip
