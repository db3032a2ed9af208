"""report.html: what a run read, learned and found, in one file that needs nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from html import escape
from io import StringIO
from typing import TYPE_CHECKING, Any

from userip_fast.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 22%, transparent); }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; } h3 { font-size: 1rem; }
table { border-collapse: collapse; margin: .6rem 0; }
th, td { text-align: left; vertical-align: top; padding: .2rem .9rem .2rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
th { white-space: nowrap; }
td.number { text-align: right; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
.pairs > tbody > tr > td { text-align: left; }
svg { max-width: 100%; height: auto; }
.note { opacity: .7; }
"""
# Both read on white and on black.
_INK, _ACCENT = "#808080", "#3b82c4"


def write_report(
    path: str | os.PathLike[str],
    metrics: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    cards: Mapping[str, Sequence[Mapping[str, Any]]],
) -> None:
    """Writes a self-contained HTML page.

    Args:
        path: Of the page; it appears whole or not at all.
        metrics: As in metrics.json. Each mapping in it becomes a table; `fields` becomes one row
            per field, and its `counts` a bar chart.
        records: One per round, as in metrics.jsonl; `nll_per_weight` is plotted over `round`.
        cards: Field -> code cards, as `CodeCard.to_dict` gives them.
    """
    fields = metrics.get("fields", {})
    body = ["<h1>userip_fast: collaborative IDs</h1>"]
    single = {k: v for k, v in metrics.items() if not isinstance(v, Mapping)}
    sections = {k: v for k, v in metrics.items() if isinstance(v, Mapping) and k != "fields"}
    for title, values in {**sections, "run": single}.items():
        if values:
            body += [f"<h2>{escape(title)}</h2>", _pairs(values)]
    if fields:
        body += ["<h2>fields</h2>", _grid(fields)]
    body += _plots(records, {n: f["counts"] for n, f in fields.items() if f.get("counts")})
    if records:
        rounds = {str(r["round"] + 1): {k: r[k] for k in r if k != "round"} for r in records}
        body += ["<h2>rounds</h2>", _grid(rounds)]
    for name, codes in cards.items():
        body += [f"<h2>codes of {escape(name)}</h2>", _cards(codes)]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>userip_fast report</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )
    with atomic_file(path) as tmp:
        tmp.write_text(page, encoding="utf-8")


def _cards(codes: Sequence[Mapping[str, Any]]) -> str:
    """Codes by number of users; the items with their lift (share here over share among all)."""
    rows = []
    for card in sorted(codes, key=lambda c: (-c["users"], c["code"])):
        items = [f"{item} (x{lift:.1f})" for item, lift in zip(card["items"], card["lift"])]
        rows.append([card["code"], card["users"], ", ".join(card["words"]), " | ".join(items)])
    return _table(["code", "users", "words", "typical items (lift)"], rows)


def _flat(values: Mapping[str, Any], under: str = "") -> dict[str, Any]:
    """Nested mappings as one, names joined by a space."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= (
            _flat(value, f"{under}{key} ") if isinstance(value, Mapping) else {under + key: value}
        )
    return out


def _pairs(values: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><th>{escape(k)}</th>{_cell(v)}</tr>" for k, v in _flat(values).items())
    return f'<table class="pairs">{rows}</table>'


def _grid(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A line per row; counts of codes are left out, they are plotted."""
    flat = {name: _flat(values) for name, values in rows.items()}
    columns = dict.fromkeys(c for values in flat.values() for c in values)
    columns = {c: None for c in columns if c.split(" ")[-1] != "counts"}
    lines = [[name, *(values.get(c, "") for c in columns)] for name, values in flat.items()]
    return _table(["", *columns], lines)


def _table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = ["".join(f"<th>{escape(h)}</th>" for h in head)]
    lines += ["".join(map(_cell, row)) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return f"<td>{ {True: 'yes', False: 'no', None: '-'}[value] }</td>"
    if isinstance(value, int):
        return f'<td class="number">{value:,}</td>'
    if isinstance(value, float):
        return f'<td class="number">{value:,.4g}</td>'
    if isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
        return f"<td>{_table(value[0], (row.values() for row in value))}</td>"
    if isinstance(value, list | tuple):
        return f"<td>{escape(', '.join(map(str, value)) or '-')}</td>"
    return f"<td>{escape(str(value))}</td>"


def _plots(records: Sequence[Mapping[str, Any]], counts: Mapping[str, Sequence[int]]) -> list[str]:
    try:
        import matplotlib as mpl
    except ImportError:
        return ['<p class="note">No plots: matplotlib is not installed.</p>']
    style: dict[str, Any] = {"svg.fonttype": "none"}
    style |= {f"axes.spines.{side}": False for side in ("top", "right")}
    style |= {f"axes.{part}color": _INK for part in ("edge", "label", "title")}
    style |= {f"{part}.color": _INK for part in ("text", "xtick", "ytick")}
    with mpl.rc_context(style):
        out = [_svg(partial(_draw_nll, records))] if records else []
        return out + [_svg(partial(_draw_usage, name, c)) for name, c in counts.items()]


def _draw_nll(records: Sequence[Mapping[str, Any]], axes: Axes) -> None:
    rounds = [r["round"] + 1 for r in records]
    axes.plot(rounds, [r["nll_per_weight"] for r in records], "o-", color=_ACCENT)
    axes.set(xlabel="round", ylabel="nats per loss weight", title="NLL of behaviour", xticks=rounds)


def _draw_usage(name: str, counts: Sequence[int], axes: Axes) -> None:
    axes.bar(range(len(counts)), sorted(counts, reverse=True), color=_ACCENT)
    axes.set(xlabel="codes, most used first", ylabel="users", title=f"users of each {name} code")
    axes.set_xticks([])


def _svg(draw: Callable[[Axes], None]) -> str:
    """One inline figure."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 2.8), layout="constrained")
    draw(figure.add_subplot())
    text = StringIO()
    with mpl.rc_context({"svg.hashsalt": "userip_fast"}):  # the same page for the same run
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]  # without the XML prologue
