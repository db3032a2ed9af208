"""report.html: what a run read, learned and found, in one file that needs nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from userip_fast import pictures
from userip_fast.config import Config
from userip_fast.errors import FormatError
from userip_fast.files import atomic_file, read_json, read_tensors

_STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 22%, transparent); }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; } h3 { font-size: 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0; }
th, td { text-align: left; vertical-align: top; padding: .2rem .9rem .2rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
th { white-space: nowrap; }
td.number { text-align: right; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
.pairs > tbody > tr > td { text-align: left; }
svg { max-width: 100%; height: auto; }
.pictures, .cards { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); }
.cards { grid-template-columns: repeat(auto-fill, minmax(min(16rem, 100%), 1fr)); }
.card { border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .8rem; }
.card h3 { margin: 0; } .card p { margin: .2rem 0; overflow-wrap: anywhere; }
.note { opacity: .7; }
"""


def report_run(run: str | os.PathLike[str]) -> Path:
    """Writes `run/report.html` from all that a run folder holds.

    Beside metrics, rounds and code cards of `fit`, these are shown where they are: the embedded
    LM's training, the codewords, `confusion.json` of the demo, `explain.json` of `userip explain`,
    and every `ctr.json` in the folder or one folder below.

    Raises:
        FormatError: The folder holds no run, or a file of it is torn.
    """
    root = Path(run)
    if not (root / "metrics.json").is_file():
        raise FormatError(f"{root}: holds no metrics.json, so it is no run folder of `userip fit`")
    lines = root / "metrics.jsonl"
    try:
        records = (
            [json.loads(r) for r in lines.read_text("utf-8").splitlines()]
            if (lines.is_file())
            else []
        )
    except ValueError as e:
        raise FormatError(f"{lines}: holds a line that is not JSON ({e})") from e
    model = root / "model"
    cards = read_json(model / "codes.json") if (model / "codes.json").is_file() else {}
    more: dict[str, Any] = {}
    for name, path in {
        "lm_training": model / "lm" / "training.json",
        "confusion": root / "confusion.json",
        "explain": root / "explain.json",
    }.items():
        if path.is_file():
            more[name] = read_json(path)
    if (model / "codebooks.safetensors").is_file():
        tensors = read_tensors(model / "codebooks.safetensors")
        fields = Config.load(model / "config.json").fields  # in the order of the codebooks
        more["codewords"] = {
            f.name: tensors[f"{j}.codewords"].float().numpy()
            for j, f in enumerate(fields)
            if f"{j}.codewords" in tensors
        }
    ctr = {p.parent.name: read_json(p) for p in sorted(root.glob("*/ctr.json"))}
    if (root / "ctr.json").is_file():
        ctr["ctr"] = read_json(root / "ctr.json")
    more["ctr"] = ctr
    metrics = read_json(root / "metrics.json")
    try:
        write_report(root / "report.html", metrics, records, cards, more)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
        raise FormatError(
            f"{root}: a file of the run does not hold what was written ({type(e).__name__}: {e})"
        ) from e
    return root / "report.html"


def write_report(
    path: str | os.PathLike[str],
    metrics: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    cards: Mapping[str, Sequence[Mapping[str, Any]]],
    more: Mapping[str, Any] | None = None,
) -> None:
    """Writes a self-contained HTML page.

    Args:
        path: Of the page; it appears whole or not at all.
        metrics: As in metrics.json. Each mapping in it becomes a table; `fields` becomes one row
            per field, and its `counts` a bar chart.
        records: One per round, as in metrics.jsonl; `nll_per_weight` is plotted over `round`.
        cards: Field -> code cards, as `CodeCard.to_dict` gives them.
        more: `lm_training`, `codewords`, `confusion`, `explain`, `ctr`, as `report_run` finds them.
    """
    more = more or {}
    fields = metrics.get("fields", {})
    body = ["<h1>userip_fast: collaborative IDs</h1>"]
    body += _new_users(more.get("lm_training", {}).get("nll"))
    body += _pictures(metrics, records, cards, more)
    body += _ctr(more.get("ctr", {}))
    explained = more.get("explain", {})
    for name, codes in cards.items():
        extra = explained.get("fields", {}).get(name, {})
        body += [f"<h2>codes of {escape(name)}</h2>", _cards(codes, extra.get("codes", []))]
    if associations := explained.get("associations"):
        body += ["<h2>codes and traits they never saw</h2>", _associations(associations)]
    single = {k: v for k, v in metrics.items() if not isinstance(v, Mapping)}
    sections = {k: v for k, v in metrics.items() if isinstance(v, Mapping) and k != "fields"}
    for title, values in {**sections, "run": single}.items():
        if values:
            body += [f"<h2>{escape(title)}</h2>", _pairs(values)]
    if fields:
        body += ["<h2>fields</h2>", _grid(fields)]
    if records:
        rounds = {str(r["round"] + 1): {k: r[k] for k in r if k != "round"} for r in records}
        body += ["<h2>rounds</h2>", _grid(rounds)]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>userip_fast report</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )
    with atomic_file(path) as tmp:
        tmp.write_text(page, encoding="utf-8")


def _new_users(nll: Mapping[str, float] | None) -> list[str]:
    """How well the embedded LM predicts users whom it has not seen, and whether telling helps."""
    if not nll:
        return []
    others = {name: x for name, x in nll.items() if name != "told"}
    known = {
        "untold": "told nothing of them",
        "item": "by how the item fares with all",
        "constant": "by how often each reaction occurs",
    }
    against = ", ".join(f"{x:.3f} {known.get(name, name)}" for name, x in others.items())
    helps = nll["told"] < min(others.values(), default=float("inf"))
    verdict = "Profiles help to predict new users" if helps else "Profiles say little of new users"
    text = f"{verdict}: {nll['told']:.3f} nats told of ten events; {against}."
    return [f"<p>{escape(text)}</p>"]


def _pictures(
    metrics: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    cards: Mapping[str, Sequence[Mapping[str, Any]]],
    more: Mapping[str, Any],
) -> list[str]:
    """Curves, usage, maps of codewords and, where the truth is known, confusion with it."""
    try:
        drawn = []
        if training := more.get("lm_training"):
            curves = [training.get(name) for name in ("scored", "held_out")]
            drawn.append(pictures.lm_curve(training["tokens"], training["loss"], *curves))
        told = [r for r in records if "nll_per_weight" in r]
        if told:
            drawn.append(pictures.nll_curve(told))
        for name in dict.fromkeys([*metrics.get("fields", {}), *cards]):
            codes = sorted(cards.get(name, ()), key=lambda c: c["code"])
            counts = metrics.get("fields", {}).get(name, {}).get("counts")
            if counts := counts or [c["users"] for c in codes]:
                drawn.append(pictures.usage(name, counts))
            words = [c["words"][0] if c["words"] else str(c["code"]) for c in codes]
            if name in more.get("codewords", {}) and len(codes) > 1:
                drawn.append(
                    pictures.code_map(
                        name, more["codewords"][name], [c["users"] for c in codes], words
                    )
                )
            if truth := more.get("confusion", {}).get(name):
                drawn.append(pictures.confusion(name, np.asarray(truth["counts"]), truth["traits"]))
    except ImportError:
        return ['<p class="note">No plots: matplotlib is not installed.</p>']
    return [_grid_of("pictures", drawn)] if drawn else []


def _ctr(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """AUC of each evaluation, and what stands beside it."""
    if not results:
        return []
    from userip_fast.ctr.codes import codes_in_words
    from userip_fast.ctr.statistics import in_words

    body = ["<h2>recommenders with and without the IDs</h2>"]
    try:
        drawn = [
            pictures.ctr_dots(r, f"{name}: {r['protocol']}, {r['label']}")
            for name, r in results.items()
        ]
        body.append(_grid_of("pictures", drawn))
    except ImportError:
        pass  # said above
    for name, r in results.items():
        backbones = list(dict.fromkeys(b for by in r["auc"].values() if by for b in by))
        rows = []
        for feature in r["settings"]["features"]:
            by = r["auc"][feature]
            cells = (
                ["n/a: " + r["reasons"][feature]]
                if by is None
                else [in_words(by[b]) if b in by else "" for b in backbones]
            )
            rows.append([feature, *cells])
        floor = ", ".join(f"{n.replace('_', ' ')} {x:.4f}" for n, x in r.get("floor", {}).items())
        body += [f"<h3>{escape(name)}</h3>", _table(["AUC", *backbones], rows)]
        notes = [f"Item alone: {floor}."] if floor else []  # older files have none of these
        notes += r.get("warnings", [])
        notes += [f"Codes, seed {s}: {codes_in_words(c)}." for s, c in r.get("codes", {}).items()]
        body += [f'<p class="note">{escape(note)}</p>' for note in notes]
    return body


def _cards(codes: Sequence[Mapping[str, Any]], explained: Sequence[Mapping[str, Any]]) -> str:
    """Codes by number of users; what they choose more than others, by the users it was not found
    on, and the items with their lift (share here over share among all)."""
    extra = {e["code"]: e for e in explained}
    drawn = []
    for card in sorted(codes, key=lambda c: (-c["users"], c["code"])):
        parts = [f"<h3>code {card['code']}: {card['users']:,} users</h3>"]
        items = [f"{item} (x{lift:.1f})" for item, lift in zip(card["items"], card["lift"])]
        more = extra.get(card["code"], {})
        told = [
            f"{t['what']} x{t['ratio']:.1f} ({t['low']:.1f} to {t['high']:.1f})"
            for t in card.get("told", ())
        ]
        went = [f"{word} {share:.0%}" for word, share in card.get("reactions", {}).items()]
        lines = {
            "": ", ".join(card["words"]),
            "more than others: ": ", ".join(told),
            "reactions: ": ", ".join(went),
            "contrastive: ": " | ".join(items),
            "typical: ": " | ".join(more.get("typical", [])),
            "avoided: ": " | ".join(more.get("avoided", [])),
        }
        parts += [
            f"<p>{label and f'<b>{label}</b>'}{escape(text)}</p>"
            for label, text in lines.items()
            if text
        ]
        for example in more.get("examples", []):
            sure = "" if example["p"] is None else f" (p {example['p']:.2f})"
            text = f"user {example['user']}{sure}: {example['behaviour']}"
            parts.append(f'<p class="note">{escape(text)}</p>')
        drawn.append(f'<div class="card">{"".join(parts)}</div>')
    return f'<div class="cards">{"".join(drawn)}</div>'


def _associations(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    rows = [
        [name, column, a["users"], a["bits"], a["chance_bits"], a["p"]]
        for name, columns in found.items()
        for column, a in columns.items()
    ]
    head = ["field", "trait", "users", "shared bits", "by chance", "p (permutations)"]
    return _table(head, rows)


def _grid_of(kind: str, drawn: Iterable[str]) -> str:
    return f'<div class="{kind}">' + "".join(f"<div>{d}</div>" for d in drawn) + "</div>"


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
    rows_text = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table>{rows_text}</table></div>'


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
