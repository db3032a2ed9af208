"""Codes as cards: what a code's users choose more than others, how it went, who they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from userip_fast.core.visible import visible
from userip_fast.report import page, pictures


def code_cards(
    codes: Sequence[Mapping[str, Any]],
    explained: Sequence[Mapping[str, Any]],
    field: int = 0,
    reactions: Sequence[str] = (),
) -> str:
    """Cards of a field's codes, the most used first.

    Args:
        codes: As in codes.json.
        explained: As in explain.json; may be empty.
        field: Number of the field, for links to a card.
        reactions: Words for how an event went, the worst first.
    """
    extra = {e["code"]: e for e in explained}
    everyone = max(1, sum(c["users"] for c in codes))
    most = max((t["high"] for c in codes for t in c.get("told", ())), default=1.0)
    order = sorted(codes, key=lambda c: (-c["users"], c["code"]))
    mean = {
        w: sum(c["users"] * c.get("reactions", {}).get(w, 0.0) for c in codes) / everyone
        for w in reactions
    }
    drawn = (
        _card(c, extra.get(c["code"], {}), everyone, most, mean, anchor(field, c["code"]))
        for c in order
    )
    return f'<div class="cards">{"".join(drawn)}</div>'


def _card(
    card: Mapping[str, Any],
    more: Mapping[str, Any],
    everyone: int,
    most: float,
    mean: Mapping[str, float],
    name: str,
) -> str:
    users = card["users"]
    parts = [
        f"<h3>{_text(name_of(card))}</h3>",
        f'<p class="size">code {card["code"]} · {users:,} users ({users / everyone:.1%})</p>',
    ]
    if told := card.get("told", ()):
        parts += [f"<h4>Choose more, {page.term('times as often')}</h4>", _told(told, most)]
    elif users:
        parts.append('<p class="note">Nothing that other users bear out tells it apart.</p>')
    if went := card.get("reactions"):
        parts += ["<h4>Reactions</h4>", _shares(went, mean)]
    items = [f"{item} (x{lift:.1f})" for item, lift in zip(card["items"], card["lift"])]
    for title, listed in (
        (f"Items that {page.term('stand out')}", items),
        ("Most met", more.get("typical", ())),
        ("Met less than by others", more.get("avoided", ())),
    ):
        parts += _listed(title, listed)
    examples = []
    for one in more.get("examples", ()):
        sure = "" if one["p"] is None else f", sure by {one['p']:.0%}"
        examples.append(f"user {one['user']}{sure}: {one['behaviour']}")
    parts += _listed("For example", examples)
    return f'<div class="card" id="{name}">{"".join(parts)}</div>'


def anchor(field: int, code: int) -> str:
    """Id of a code's card on the page."""
    return f"code-{field}-{code}"


def name_of(card: Mapping[str, Any]) -> str:
    """What its users choose more; or, of an LM that knows words, the nearest one."""
    told = [t["what"] for t in card.get("told", ())]
    words = list(card["words"])
    return ", ".join(words if set(words) <= set(told) else words[:1]) or f"code {card['code']}"


def _told(told: Iterable[Mapping[str, Any]], most: float) -> str:
    rows = []
    for t in told:
        drawn = pictures.interval(t["low"], t["ratio"], t["high"], most)
        limits = f"{t['low']:.1f} to {t['high']:.1f}"
        rows.append(
            f"<div>{_text(t['what'])}</div>{drawn}"
            f"<div><b>{t['ratio']:.1f}</b> <span>{limits}</span></div>"
        )
    return f'<div class="told">{"".join(rows)}</div>'


def _shares(went: Mapping[str, float], mean: Mapping[str, float]) -> str:
    """Of each reaction, as a bar and in words, beside the mean over all users' codes."""
    went = {w: went.get(w, 0.0) for w in mean} or went
    drawn = "".join(
        f'<i class="share{i % 4}" style="width:{100 * share:.1f}%"></i>'
        for i, share in enumerate(went.values())
    )
    words = ", ".join(f"{word} {share:.0%}" for word, share in went.items())
    said = f'<div class="share">{drawn}</div><p>{_text(words)}</p>'
    if mean:
        usual = ", ".join(f"{share:.0%}" for share in mean.values())
        said += f'<p class="note">all codes: {usual}</p>'
    return said


def _listed(title: str, texts: Sequence[str]) -> list[str]:
    """`title` is HTML."""
    if not texts:
        return []
    return [f"<h4>{title}</h4>", f"<ul>{''.join(f'<li>{_text(t)}</li>' for t in texts)}</ul>"]


def _text(text: str) -> str:
    return escape(visible(text))
