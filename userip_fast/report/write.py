"""report.html: a verdict on a run, what the codes mean, and the numbers behind both, in one file.

`report_run` gathers what a run folder holds, `write_report` makes a page of it; `userip show` adds
a search to the same sections (`userip_fast.report.show`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from userip_fast.core.config import Config
from userip_fast.core.errors import FormatError
from userip_fast.core.files import read_json, read_tensors
from userip_fast.core.visible import visible
from userip_fast.report import page, pictures
from userip_fast.report.cards import code_cards, name_of
from userip_fast.report.verdict import OTHERS, verdict


def report_run(run: str | os.PathLike[str]) -> Path:
    """Writes `run/report.html` from all that a run folder holds.

    Beside metrics, rounds and code cards of `fit`, these are shown where they are: prompts and
    thresholds of the model, the embedded LM's training, the codewords, `confusion.json` of the
    demo, `explain.json` of `userip explain`, and every `ctr.json` in the folder or one below.

    Raises:
        FormatError: The folder holds no run, or a file of it is torn.
    """
    root = Path(run)
    with torn_is_told(root):
        write_report(root / "report.html", *gather(root))
    return root / "report.html"


class torn_is_told:  # noqa: N801  # reads as what it does
    """What a file of the run garbles is a FormatError that names the folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, e: BaseException | None, _: object) -> None:
        garbled = ArithmeticError, AttributeError, LookupError, TypeError, ValueError
        if isinstance(e, garbled):
            raise FormatError(
                f"{self.root}: a file of the run does not hold what was written "
                f"({type(e).__name__}: {e})"
            ) from e


Gathered = tuple[
    dict[str, Any], list[dict[str, Any]], dict[str, list[dict[str, Any]]], dict[str, Any]
]
"""Metrics, records, cards, and the rest: the arguments of `write_report`."""


def gather(root: Path) -> Gathered:
    """What a run folder holds.

    Raises:
        FormatError: The folder holds no run, or a file of it is torn.
    """
    if not (root / "metrics.json").is_file():
        raise FormatError(f"{root}: holds no metrics.json, so it is no run folder of `userip fit`")
    lines = root / "metrics.jsonl"
    try:
        told = lines.read_text("utf-8").splitlines() if lines.is_file() else []
        records = [json.loads(line) for line in told]
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
    if (model / "manifest.json").is_file():
        more["behaviour"] = read_json(model / "manifest.json").get("behaviour", {})
    if (model / "codebooks.safetensors").is_file():
        tensors = read_tensors(model / "codebooks.safetensors")
        config = Config.load(model / "config.json")
        more["fields"] = config.fields  # in the order of the codebooks
        more["codewords"] = {
            f.name: tensors[f"{j}.codewords"].float().numpy()
            for j, f in enumerate(config.fields)
            if f"{j}.codewords" in tensors
        }
        cards = {f.name: cards[f.name] for f in config.fields if f.name in cards} | cards
    ctr = {p.parent.name: read_json(p) for p in sorted(root.glob("*/ctr.json"))}
    if (root / "ctr.json").is_file():
        ctr["ctr"] = read_json(root / "ctr.json")
    more["ctr"] = ctr
    return read_json(root / "metrics.json"), records, cards, more


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
        records: One per round, as in metrics.jsonl.
        cards: Field -> code cards, as `CodeCard.to_dict` gives them.
        more: `behaviour`, `fields`, `lm_training`, `codewords`, `confusion`, `explain`, `ctr`, as
            `gather` finds them.
    """
    page.write_page(path, "userip_fast report", sections(metrics, records, cards, more or {}))


def sections(
    metrics: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    cards: Mapping[str, Sequence[Mapping[str, Any]]],
    more: Mapping[str, Any],
) -> list[str]:
    """The page's body, from the verdict to the last number."""
    users = metrics.get("data", {}).get("users", metrics.get("users"))
    body = [f"<h1>{f'Profiles of {users:,} users' if users else 'Profiles of users'}</h1>"]
    body += [_byline(metrics)]
    if not (metrics or cards):
        return body
    told = verdict(metrics, more.get("lm_training", {}), cards, more.get("ctr", {}))
    body += ['<div class="verdict">', *(f"<p>{escape(visible(t))}</p>" for t in told), "</div>"]
    found = {
        "The run": _run(metrics, more),
        _curves_title(more): _curves(records, more),
        "Recommenders with and without the codes": _ctr(more.get("ctr", {})),
        **{
            f"Codes of {name}": _field(j, name, own, metrics, more)
            for j, (name, own) in enumerate(cards.items())
        },
        "Codes and traits they never saw": _associations(more.get("explain", {})),
        "What the words mean": [page.legend()],
    }
    found = {title: part for title, part in found.items() if part}
    links = (f'<a href="#s{i}">{escape(visible(t))}</a>' for i, t in enumerate(found))
    body.append(f"<nav>{' '.join(links)}</nav>")
    for i, (title, part) in enumerate(found.items()):
        body += [f'<h2 id="s{i}">{escape(visible(title))}</h2>', *part]
    return [*body, "<details><summary>Every number</summary>", *_numbers(metrics, records),
            "</details>"]  # fmt: skip


def _byline(metrics: Mapping[str, Any]) -> str:
    run = metrics.get("run", {})
    told = [f"userip_fast {run['userip_fast']}"] if "userip_fast" in run else ["userip_fast"]
    if "date" in run:
        told.append(
            datetime.fromisoformat(run["date"]).astimezone(UTC).strftime("%d %B %Y, %H:%M UTC")
        )
    return f'<p class="muted">{escape(" · ".join(told))}</p>'


def _run(metrics: Mapping[str, Any], more: Mapping[str, Any]) -> list[str]:
    """Command, data, prompts, thresholds, LM and time."""
    data, fit, lm = (metrics.get(n, {}) for n in ("data", "fit", "lm"))
    rows: dict[str, Any] = {}
    if command := metrics.get("run", {}).get("command"):
        rows["command"] = command
    if "events" in data:
        order = "in time order" if data.get("time_ordered") else "without times"
        rows["data"] = (
            f"{data['users']:,} users, {data['items']:,} items, {data['events']:,} events, {order}"
        )
    dropped = data.get("dropped", {})
    if why := dropped.get("counts"):
        rows["rows dropped"] = ", ".join(f"{count:,} {rule}" for rule, count in why.items())
    if told := data.get("told"):
        share = told["told"] / max(1, told["events"])
        rows["read by the LM"] = f"{told['told']:,} of {told['events']:,} events ({share:.0%})"
    fmt = more.get("behaviour", {})
    if text := fmt.get("text"):
        rows["an event is told as"] = fmt.get("template", "").replace("{text}", text)
    if scale := fmt.get("scale"):
        rows["reactions by rating"] = _scale(scale["words"], scale["thresholds"])
    for f in more.get("fields", ()):
        words = f"; starts at {', '.join(f.candidates)}" if f.candidates else ""
        rows[f"prompt of {f.name}"] = f"“{f.prompt} …”, {f.codebook_size} codes{words}"
    if lm:
        rows["language model"] = ", ".join(
            str(lm[n]) for n in ("source", "quantization", "dtype", "device") if n in lm
        )
    if "seconds" in fit:
        rows["time"] = (
            f"{fit['seconds']:,.0f} s, {fit['users_per_second']:,.1f} users a second, "
            f"{fit['forward_equivalents']:.2f} LM passes a user"
        )
    if "seed" in metrics:
        rows["seed"] = str(metrics["seed"])
    return [page.pairs(rows)] if rows else []


def _scale(words: Sequence[str], thresholds: Sequence[float]) -> str:
    """disliked below 4, okay below 5, liked from 5."""
    told = [f"{w} below {t:g}" for w, t in zip(words, thresholds)]
    return ", ".join([*told, f"{words[-1]} from {thresholds[-1]:g}"])


def _curves_title(more: Mapping[str, Any]) -> str:
    held_out = (more.get("lm_training") or {}).get("nll")
    return "Do profiles predict new users?" if held_out else "Training"


def _curves(records: Sequence[Mapping[str, Any]], more: Mapping[str, Any]) -> list[str]:
    """Held-out loss of the LM beside what never looks at a user; the codes' objective by round."""
    drawn = []
    training = more.get("lm_training") or {}
    nll, tokens = training.get("nll"), training.get("tokens", ())
    held_out = training.get("held_out") or [None]
    if nll and None not in held_out:
        # The curve counts a loss weight, the comparison an event; they meet at the best point.
        unit = nll["told"] / min(held_out)
        seen = [(at, unit * x) for at, x in zip(tokens, held_out)]
        # What an LM begins at, far above, would flatten what matters.
        worst = max(nll.values())
        limit = worst + 2 * (worst - nll["told"])
        while len(seen) > 2 and seen[0][1] > limit:
            seen.pop(0)
        lines = [_line("told of ten events", seen, "accent")]
        levels = [(_SHORT.get(n, n), x) for n, x in nll.items() if n in OTHERS]
        drawn.append(page.figure(
            "The LM on users held out",
            pictures.curves("loss of users held out", lines, levels, "tokens read", "nats"),
        ))  # fmt: skip
    elif tokens:
        lines = [_line("training", zip(tokens, training["loss"]), "accent")]
        drawn.append(page.figure(
            "Training of the LM", pictures.curves("loss", lines, [], "tokens read", "nats")
        ))  # fmt: skip
    drawn += _rounds(records)
    if not drawn:
        return []
    notes = []
    if nll:
        notes.append(
            f"{page.term('users held out', 'Users held out')} are told by ten of their events; "
            f"dashed lines never look at the user. In {page.term('nats')}, less is better."
        )
    if any(r.get("elbo_held_out") is not None for r in records):
        notes.append(
            f"{page.term('ELBO')}: more is better. The two groups of users lie apart as their "
            "histories do; rounds that lower either are taken back."
        )
    return [page.pictures(drawn), *(f'<p class="note">{note}</p>' for note in notes)]


_SHORT = {"untold": "told nothing", "item": "item's own rate", "constant": "reaction's rate"}


def _line(label: str, points: Iterable[tuple[float, float]], kind: str) -> pictures.Line:
    x, y = zip(*points)
    return label, x, y, kind


def _rounds(records: Sequence[Mapping[str, Any]]) -> list[str]:
    if any("elbo" in r for r in records):
        told = {"elbo": "training users", "elbo_held_out": "users held out"}
        ylabel, title = "nats a user", "EM: ELBO by round"
    else:
        told = {"nll_per_weight": "NLL"}
        ylabel, title = "nats per loss weight", "EM: NLL of behaviour"
    lines = []
    for (name, label), kind in zip(told.items(), ("other", "accent")):
        own = [(r["round"] + 1, r[name]) for r in records if r.get(name) is not None]
        if own:
            lines.append(_line(label, own, kind))
    if not lines:
        return []
    drawn = pictures.curves(title, lines, [], "round", ylabel, [r["round"] + 1 for r in records])
    return [page.figure(title, drawn)]


def _field(
    number: int,
    name: str,
    codes: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Any],
    more: Mapping[str, Any],
) -> list[str]:
    """Usage, map and cards of a field's codes."""
    by_code = sorted(codes, key=lambda c: c["code"])
    counts = metrics.get("fields", {}).get(name, {}).get("counts") or [c["users"] for c in by_code]
    drawn = (
        [page.figure("How many users have each code", pictures.usage(name, counts))]
        if counts
        else []
    )
    words = [name_of(c).split(", ")[0] for c in by_code]
    if name in more.get("codewords", {}) and len(by_code) > 1:
        users = [c["users"] for c in by_code]
        drawn.append(page.figure(
            "How near codes are to each other",
            pictures.code_map(name, more["codewords"][name], users, words),
        ))  # fmt: skip
    if truth := more.get("confusion", {}).get(name):
        counted = pictures.confusion(name, np.asarray(truth["counts"]), truth["traits"])
        drawn.append(page.figure("Planted trait and code", counted))
    explained = more.get("explain", {}).get("fields", {}).get(name, {}).get("codes", [])
    scale = more.get("behaviour", {}).get("scale") or {}
    shown = code_cards(codes, explained, number, scale.get("words", ()))
    return [page.pictures(drawn), shown]


def _ctr(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """AUC of each evaluation, and what stands beside it."""
    if not results:
        return []
    from userip_fast.report.words import codes_in_words, in_words, left_out_in_words

    drawn = [
        page.figure(f"{name}: {r['protocol']}, {r['label']}", pictures.ctr_dots(r, name))
        for name, r in results.items()
    ]
    body = [
        page.pictures(drawn),
        f'<p class="note">Dots are {page.term("AUC")} with 95 % intervals over test users and '
        f"seeds; in colour what this package adds. Dashed: {page.term('none')}.</p>",
    ]
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
        body += [f"<h3>{escape(visible(name))}</h3>", page.table(["AUC", *backbones], rows)]
        notes = [f"Item alone: {floor}."] if floor else []  # older files have none of these
        notes += [f"{line}." for line in left_out_in_words(r.get("left_out"))]
        notes += r.get("warnings", [])
        notes += [f"Codes, seed {s}: {codes_in_words(c)}." for s, c in r.get("codes", {}).items()]
        body += [f'<p class="note">{escape(visible(note))}</p>' for note in notes]
    return body


def _associations(explained: Mapping[str, Any]) -> list[str]:
    rows = [
        [name, column, a["users"], a["bits"], a["chance_bits"], a["p"]]
        for name, columns in explained.get("associations", {}).items()
        for column, a in columns.items()
    ]
    head = ["field", "trait", "users", "shared bits", "by chance", "p (permutations)"]
    return [page.table(head, rows)] if rows else []


def _numbers(metrics: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> list[str]:
    """All of metrics.json and metrics.jsonl."""
    single = {k: v for k, v in metrics.items() if not isinstance(v, Mapping)}
    parts = {k: v for k, v in metrics.items() if isinstance(v, Mapping) and k != "fields"}
    body = []
    for title, values in {**parts, "other": single}.items():
        if values:
            body += [f"<h3>{escape(visible(title))}</h3>", page.pairs(values)]
    if fields := metrics.get("fields", {}):
        body += ["<h3>fields</h3>", page.grid(fields)]
    if records:
        shown = [{k: v for k, v in r.items() if k not in ("round", "time")} for r in records]
        rounds = {str(r["round"] + 1): told for r, told in zip(records, shown)}
        body += ["<h3>rounds</h3>", page.grid(rounds)]
    return body
