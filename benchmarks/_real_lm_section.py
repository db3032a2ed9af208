"""What `real_lm.py` compares, and its section of docs/results.md."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

KNOWN = "new users, 10 events"
HELD = "new users, 10 events, a fifth of the items held out"
TITLES = {"text_titles": "text", "affinity_titles": "affinity"}
"""Features of the results table by titles alone."""
_ALL = (
    "none", "text", "mixture", "foldin", "affinity", "smollm2_alone", "smollm2", "all", "all+ids",
    "all+smollm2",
)  # fmt: skip
FEATURES = {KNOWN: _ALL, HELD: (*_ALL[:2], "text_titles", *_ALL[2:5], "affinity_titles", *_ALL[5:])}
"""`affinity` and `ids` are of the embedded LM."""
DIFFERENCES = (
    ("smollm2", "none"), ("smollm2", "text"), ("smollm2", "text_titles"), ("smollm2", "mixture"),
    ("smollm2", "foldin"), ("smollm2", "affinity"), ("smollm2", "affinity_titles"),
    ("smollm2_alone", "text"), ("all+smollm2", "all"), ("all+smollm2", "all+ids"),
)  # fmt: skip
NAMES = {
    "text_titles": "text, titles alone",
    "affinity": "affinity of the embedded LM",
    "affinity_titles": "affinity of the embedded LM, titles alone",
    "smollm2_alone": "affinity of SmolLM2, its word alone",
    "smollm2": "affinity of SmolLM2, counts added",
    "all+ids": "all + codes of the embedded LM",
    "all+smollm2": "all + codes of SmolLM2",
}


def section(result: Mapping[str, Any]) -> list[str]:
    """Its section of docs/results.md."""
    lines = [
        "## A frozen LM of 135M parameters that reads titles alone",
        "",
        "SmolLM2-135M, none of whose weights is trained (`benchmarks/real_lm.py`), reads an item's"
        " title, and behind it one soft row, a linear map of the user's fold-in vector, that asks"
        ' for " yes" or " no"; the map alone is learned, from teachers, by whose choice an item is.'
        " The fifth of the items that the second evaluation holds out was held out for both: of"
        " those the map and the codes knew nothing, only counts and baselines did. 16 codes begin"
        " at the groups of the mixture without an LM and stay there; judges choose how they are"
        " read, as in a fit. The embedded LM beside it was trained from nothing on the same"
        " teachers' texts, which also name genres (and authors). Choices, new users known by 10"
        " events, rows of the tables above, LightGBM, one seed; differences with a 95 % interval"
        " over users. *Never met*: rows of items that nothing in training knows.",
        "",
    ]
    for name, log in result["logs"].items():
        read, table = log["read"], log["table"]
        first, last = log["learning"][0], log["learning"][-1]
        hours = (read["seconds"] + last["seconds"] + table["seconds"]) / 3600
        lines += [
            f"### {name}, SmolLM2",
            "",
            f"{read['tokens']:,} tokens of {read['titles']:,} titles read once in"
            f" {read['seconds']:.0f} s ({read['bytes'] / 1e9:.1f} GB of keys and values);"
            f" {log['events']:,} choices of {log['users']:,} teachers, each beside {log['beside']}"
            f" other users, in {last['seconds']:.0f} s; the table of all titles under"
            f" {log['codes']} codes {table['rows']:,} rows in {table['seconds']:.0f} s: together"
            f" {hours:.2f} h of one core. (Profile first, the table alone would be"
            f" {log['codes'] * (read['tokens'] + read['titles']):,} rows.) Whose choice of"
            f" {log['beside'] + 1} users, judges: {first['judges']:.3f} nats before,"
            f" {last['judges']:.3f} in the end, guessing {math.log(log['beside'] + 1):.3f}; the"
            f" chooser comes before another in {last['judges_right']:.1%}. Codes of both LMs by"
            f" the event table's recipe {log['table_recipe']}.",
            "",
        ]
        found = log["evaluations"]
        heads = [
            f"{'a fifth of the items held out' if e == HELD else 'all items'}, {where}"
            for e in found for where in ("all rows", "never met")
        ]  # fmt: skip
        lines += ["| feature | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
        for f in FEATURES[HELD]:
            every = [r["auc"][w].get(f) for r in found.values() for w in ("all", "unmet")]
            cells = ["" if x is None else f"{x:.4f}" for x in every]
            lines.append(f"| {NAMES.get(f, f)} | " + " | ".join(cells) + " |")
        for a, b in DIFFERENCES:
            every = [r["differences"][w] for r in found.values() for w in ("all", "unmet")]
            cells = [_interval(d.get(f"{a} - {b}")) for d in every]
            lines.append(f"| {NAMES.get(a, a)} - {NAMES.get(b, b)} | " + " | ".join(cells) + " |")
        lines.append("")
        for e, r in found.items():
            told = [
                f"{n.replace('_', ' ')} {x:.4f} ({r['numbers']['unmet'][n]:.4f})"
                for n, x in r["numbers"]["all"].items()
            ]
            rows = f"{r['rows']['all']:,} rows, {r['rows']['unmet']:,} never met"
            lines.append(f"- {e} ({rows}), single numbers (never met): {', '.join(told)}.")
        lines.append("")
    return lines


def _interval(d: Mapping[str, Any] | None) -> str:
    if d is None:
        return ""
    low, high = d["ci95"]
    return f"{d['difference']:+.4f} [{low:+.4f}, {high:+.4f}]"
