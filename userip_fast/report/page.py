"""A page that needs nothing else: its style, tables, and what its words mean."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from userip_fast.core.files import atomic_file
from userip_fast.core.visible import visible

GLOSSARY = {
    "code": "One of the values that a profile field may take; its users behave alike.",
    "nats": "Mean negative log likelihood: how surprised the LM is. Less is better.",
    "users held out": "Users whom neither the LM nor the codes have learned from.",
    "times as often": "A trait's share of what the code's users choose, over its share of what "
    "all users choose; found on one half of the users, told with the figures of the other. The "
    "interval holds 95 %, by jackknife over users.",
    "stand out": "Items over-represented among the code's users; x is their share there over "
    "their share among all.",
    "perplexity": "How many equally frequent codes would spread users as evenly.",
    "codeword": "The soft prompt that a code stands for: what the LM reads in a user's place.",
    "ELBO": "Lower bound of the log likelihood of a user's behaviour under the codes, in nats. "
    "More is better.",
    "AUC": "How often a recommender ranks a positive test row above a negative one; 0.5 is chance.",
    "none": "The recommender without any profile of the user, statistics of the item and of the "
    "user's events included.",
    "shared bits": "Mutual information of code and trait; by chance: the same on permuted users.",
}
"""What the page's words mean, as a legend and on hover."""

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --card: #f6f8fa; --ink: #1b1f24;
  --muted: #57606a;
  --line: #d4d9df; --accent: #1f6fb2; --second: #b4461a; --other: #6b7580; --soft: #cfe3f5;
  --heat0: #f6f8fa; --heat1: #d6e7f6; --heat2: #a5cbea; --heat3: #2f7cba; --heat4: #1a5a93;
  --onheat: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1d2126; --ink: #e6e8ea;
  --muted: #a3adb7; --line: #3a4149; --accent: #6cb3f0; --second: #f0935f; --other: #98a2ad;
  --soft: #234a6d; --heat0: #1d2126; --heat1: #1c3a55; --heat2: #22557f; --heat3: #7cbcf0;
  --heat4: #a9d4f7; --onheat: #10151a; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: var(--ink);
  background: var(--page); max-width: 68rem; margin: 0 auto; padding: 1.2rem 1rem 3rem; }
h1 { font-size: 1.55rem; margin: .4rem 0 .2rem; line-height: 1.25; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .4rem; } h3 { font-size: 1rem; margin: 0; }
p { margin: .35rem 0; } .muted, .note { color: var(--muted); }
a { color: var(--accent); } nav a { margin-right: 1rem; white-space: nowrap; }
abbr { text-decoration: underline dotted var(--muted); cursor: help; }
.verdict { border-left: 4px solid var(--accent); background: var(--card); padding: .6rem 1rem;
  margin: 1rem 0; border-radius: 0 .5rem .5rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .5rem 0; }
th, td { text-align: left; vertical-align: top; padding: .22rem .9rem .22rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
th { font-weight: 600; } .pairs th { white-space: nowrap; overflow-wrap: normal; }
.pairs td { text-align: left !important; } td.number { text-align: right;
  font-variant-numeric: tabular-nums; overflow-wrap: normal; }
code { font: .92em ui-monospace, SFMono-Regular, Menlo, monospace; overflow-wrap: anywhere; }
.pictures, .cards { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); }
.cards { grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); }
.pictures { margin-bottom: 1.2rem; } figure { margin: 0; } figcaption { font-weight: 600;
  margin-bottom: .2rem; }
.card { border: 1px solid var(--line); border-radius: .6rem; background: var(--card);
  padding: .7rem .9rem; overflow-wrap: anywhere; }
.card .size { color: var(--muted); font-size: .9rem; }
.card h4 { margin: .6rem 0 .1rem; font-size: .82rem; font-weight: 600; color: var(--muted); }
.told { display: grid; grid-template-columns: minmax(6.2rem, 1fr) minmax(3rem, 96px) auto;
  gap: .1rem .6rem; align-items: center; }
.told b { font-variant-numeric: tabular-nums; } .told span { color: var(--muted);
  font-size: .85em; }
.share { display: flex; height: .6rem; border-radius: .3rem; overflow: hidden;
  margin: .3rem 0 .15rem; }
.share i { display: block; } .share0 { background: var(--second); }
.share1 { background: var(--other); }
.share2 { background: var(--accent); } .share3 { background: var(--soft); }
ul { margin: .1rem 0; padding-left: 1.1rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; margin: .5rem 0; }
dt { font-weight: 600; } dd { margin: 0; }
summary { cursor: pointer; font-weight: 600; margin-top: 2rem; }
svg { width: 100%; height: auto; display: block; overflow: visible; }
svg text { font: 11px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: var(--ink); }
svg text.muted { fill: var(--muted); } svg text.strong { font-weight: 700; fill: var(--accent); }
svg text.label { font-size: 11px; } svg text.number { font-weight: 700; }
svg text.accent { fill: var(--accent); } svg text.second { fill: var(--second); }
svg text.other { fill: var(--muted); } svg text.onheat { fill: var(--onheat); }
.axis { stroke: var(--muted); stroke-width: 1; } .grid { stroke: var(--line); stroke-width: 1; }
.level { stroke: var(--muted); stroke-dasharray: 5 3; } .dotted { stroke-dasharray: 1.5 3; }
.curve { fill: none; stroke-width: 1.8; }
.curve.accent, .interval.accent { stroke: var(--accent); }
.curve.second { stroke: var(--second); } .curve.other, .interval.other { stroke: var(--other); }
.interval { stroke-width: 2; } .fill.accent { fill: var(--accent); }
.fill.other { fill: var(--other); }
.fill.second { fill: var(--second); } .soft { fill-opacity: .38; }
.heat0 { fill: var(--heat0); } .heat1 { fill: var(--heat1); } .heat2 { fill: var(--heat2); }
.heat3 { fill: var(--heat3); } .heat4 { fill: var(--heat4); }
.hue0 { fill: #3b82c4; } .hue1 { fill: #d97b29; } .hue2 { fill: #4a9c5d; } .hue3 { fill: #c44e52; }
.hue4 { fill: #8172b3; } .hue5 { fill: #937860; } .hue6 { fill: #2fa3b5; } .hue7 { fill: #b5a12a; }
@media (max-width: 34rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .4rem; }
  .pairs th, .pairs td { display: block; border: 0; padding: 0; } .pairs th { padding-top: .5rem; }
  .pairs > tbody > tr > td { text-align: left; } }
@media print { :root { --page: #fff; --card: #fff; --ink: #000; --muted: #444; --line: #bbb; }
  body { max-width: none; padding: 0; font-size: 11px; } nav, .search { display: none; }
  .card, figure, tr { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .cards { grid-template-columns: 1fr 1fr; } .scroll { overflow: visible; } }
"""


def write_page(
    path: str | os.PathLike[str], title: str, body: Iterable[str], script: str = ""
) -> None:
    """Writes a page that holds all it needs; it appears whole or not at all."""
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(visible(title))}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + (f"\n<script>{script}</script>" if script else "")
        + "\n</body></html>\n"
    )
    with atomic_file(path) as tmp:
        tmp.write_text(page, encoding="utf-8")


def term(word: str, shown: str = "") -> str:
    """A word with its meaning on hover."""
    return f'<abbr title="{escape(GLOSSARY[word])}">{escape(shown or word)}</abbr>'


def legend() -> str:
    """What the words mean."""
    rows = "".join(f"<dt>{escape(w)}</dt><dd>{escape(m)}</dd>" for w, m in GLOSSARY.items())
    return f"<dl>{rows}</dl>"


def figure(title: str, drawn: str) -> str:
    return f"<figure><figcaption>{escape(visible(title))}</figcaption>{drawn}</figure>"


def pictures(drawn: Iterable[str]) -> str:
    return f'<div class="pictures">{"".join(drawn)}</div>'


def flat(values: Mapping[str, Any], under: str = "") -> dict[str, Any]:
    """Nested mappings as one, names joined by a space."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= flat(value, f"{under}{key} ") if isinstance(value, Mapping) else {under + key: value}
    return out


def pairs(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{escape(visible(k))}</th>{_cell(v)}</tr>" for k, v in flat(values).items()
    )
    return f'<table class="pairs">{rows}</table>'


def grid(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A line per row; counts of codes are left out, they are plotted."""
    lines = {name: flat(values) for name, values in rows.items()}
    columns = dict.fromkeys(c for values in lines.values() for c in values)
    columns = {c: None for c in columns if c.split(" ")[-1] != "counts"}
    cells = [[name, *(values.get(c, "") for c in columns)] for name, values in lines.items()]
    return table(["", *columns], cells)


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = ["".join(f"<th>{escape(visible(h))}</th>" for h in head)]
    lines += ["".join(map(_cell, row)) for row in rows]
    rows_text = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll" tabindex="0"><table>{rows_text}</table></div>'


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return f"<td>{ {True: 'yes', False: 'no', None: '-'}[value] }</td>"
    if isinstance(value, int):
        return f'<td class="number">{value:,}</td>'
    if isinstance(value, float):
        return f'<td class="number">{value:,.4g}</td>'
    if isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
        return f"<td>{table(value[0], (row.values() for row in value))}</td>"
    if isinstance(value, list | tuple):
        return f"<td>{escape(visible(', '.join(map(str, value)) or '-'))}</td>"
    return f"<td>{escape(visible(value))}</td>"
