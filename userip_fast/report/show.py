"""`userip show RUN`: the report with a search over codes, items and users, in one file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from userip_fast.bank import FeatureBank
from userip_fast.core.errors import ConfigError
from userip_fast.core.visible import visible
from userip_fast.model.fitted import Model
from userip_fast.report import page
from userip_fast.report.cards import anchor, name_of
from userip_fast.report.write import gather, sections, torn_is_told

_SEARCH = """
<section class="search"><h2>Look something up</h2>
<p><label for="q">A word of a code's name or of an item's text, or a user's key:</label></p>
<input id="q" type="search" autocomplete="off" spellcheck="false">
<div id="found" aria-live="polite"></div></section>
"""

_STYLE = """
.search input { width: 100%; font: inherit; padding: .5rem .7rem; color: var(--ink);
  background: var(--card); border: 1px solid var(--muted); border-radius: .5rem; }
.search h3 { margin-top: .8rem; } .search .hit { border-bottom: 1px solid var(--line);
  padding: .25rem 0; overflow-wrap: anywhere; } .card:target { outline: 3px solid var(--accent); }
"""

_SCRIPT = """
const data = JSON.parse(document.getElementById("data").textContent);
const q = document.getElementById("q"), found = document.getElementById("found");
const few = 8;
function add(parent, tag, text, kind) {
  const e = document.createElement(tag);
  if (text) e.textContent = text;
  if (kind) e.className = kind;
  return parent.appendChild(e);
}
function link(parent, j, k) {
  const code = data.fields[j].codes[k];
  const a = add(parent, "a", code ? code.name : "code " + k);
  a.href = code ? "#" + code.anchor : "#";
}
function group(title, hits, draw) {
  if (!hits.length) return;
  const cut = hits.length > few ? ", the first " + few : "";
  add(found, "h3", title + " (" + hits.length + cut + ")");
  for (const hit of hits.slice(0, few)) draw(add(found, "div", "", "hit"), hit);
}
function drawItem(div, item) {
  add(div, "b", item.text);
  add(div, "span", " " + item.count.toLocaleString("en") + " events", "muted");
  if (!item.liked) return;
  let at = 0;
  data.fields.forEach((field, j) => {
    const own = item.liked.slice(at, at + field.codes.length).map((p, k) => [p, k]);
    at += field.codes.length;
    own.sort((a, b) => b[0] - a[0]);
    const p = add(div, "div", field.name + ", " + data.liked + ": ");
    const ends = own.length > 4 ? [...own.slice(0, 3), own[own.length - 1]] : own;
    ends.forEach(([value, k], i) => {
      if (i) p.append(i === 3 ? " … " : ", ");
      link(p, j, k);
      p.append(" " + value.toFixed(2));
    });
  });
}
function drawUser(div, user) {
  add(div, "b", "user " + user.key);
  user.codes.forEach((k, j) => {
    const p = add(div, "div", data.fields[j].name + ": ");
    link(p, j, k);
    if (user.p) p.append(" (sure by " + Math.round(100 * user.p[j]) + " %)");
  });
}
function search() {
  found.replaceChildren();
  const words = q.value.toLowerCase().split(/\\s+/).filter(Boolean);
  if (!words.length) return;
  const has = text => words.every(w => text.toLowerCase().includes(w));
  const codes = data.fields.flatMap((f, j) =>
    f.codes.map((c, k) => ({ j, k, c })).filter(x => has(f.name + " " + x.k + " " + x.c.words)));
  group("Codes", codes, (div, x) => {
    link(div, x.j, x.k);
    add(div, "span", " " + data.fields[x.j].name + " " + x.k + ", " +
      x.c.users.toLocaleString("en") + " users", "muted");
  });
  const key = words.join(" ");
  group("Items", data.items.filter(i => has(i.text) || i.key.toLowerCase() === key), drawItem);
  const users = data.users.filter(u => u.key.toLowerCase().startsWith(key));
  users.sort((a, b) => a.key.length - b.key.length);
  group("Users", users, drawUser);
  if (!found.children.length) add(found, "p", "Nothing found among " + data.told + ".", "muted");
}
q.addEventListener("input", search);
"""


def show_run(run: str | os.PathLike[str], *, users: int = 1000, items: int = 3000) -> Path:
    """Writes `run/explore.html`: the report, with a search that needs no server.

    Args:
        users: Of the bank, in its order, which is that of hashes: a sample.
        items: The most frequent ones; of a model with an event table with how each code likes them.

    Raises:
        FormatError: The folder holds no run, or a file of it is torn.
        ConfigError: A number is negative.
    """
    if users < 0 or items < 0:
        raise ConfigError(f"users and items must be 0 or more, are {users} and {items}")
    root = Path(run)
    with torn_is_told(root):
        metrics, records, cards, more = gather(root)
        model, bank = Model.load(root / "model"), FeatureBank.open(root / "bank")
        liked, told_items = _items(model, items)
        data = {
            "fields": [
                {
                    "name": visible(f.name),
                    "codes": [
                        {
                            "name": visible(name_of(card)),
                            "words": visible(_words(card)),
                            "users": card["users"],
                            "anchor": anchor(j, card["code"]),
                        }
                        for card in sorted(cards[f.name], key=lambda c: c["code"])
                    ],
                }
                for j, f in enumerate(model.config.fields)
            ],
            "liked": liked,
            "items": told_items,
            "users": (told_users := _users(bank, users)),
            "told": f"all codes, {len(told_items):,} items and {len(told_users):,} users",
        }
        body = sections(metrics, records, cards, more)
        text = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
        at = next((i for i, part in enumerate(body) if part.startswith("<nav>")), len(body))
        body[at:at] = [f"<style>{_STYLE}</style>", _SEARCH,
                       f'<script type="application/json" id="data">{text}</script>']  # fmt: skip
        page.write_page(root / "explore.html", "userip_fast: explore a run", body, _SCRIPT)
    return root / "explore.html"


def _words(card: dict[str, Any]) -> str:
    """What a search for a code looks at."""
    return " ".join([*card["words"], *(t["what"] for t in card.get("told", ())), *card["items"]])


def _users(bank: FeatureBank, most: int) -> list[dict[str, Any]]:
    count = min(most, len(bank))
    keys = bank.keys()[:count].to_pylist()
    codes = bank.codes()[:count].tolist()
    sure = None if bank.probabilities is None else np.asarray(bank.probabilities[:count])
    return [
        {
            "key": visible(key),
            "codes": own,
            "p": None if sure is None else [round(float(p), 3) for p in sure[i]],
        }
        for i, (key, own) in enumerate(zip(keys, codes))
    ]


def _items(model: Model, most: int) -> tuple[str, list[dict[str, Any]]]:
    """What "liked" tells, and the most frequent items."""
    catalogue = model.catalogue
    order = np.argsort(-catalogue.counts, kind="stable")[:most]
    keys = catalogue.item_keys.take(order).to_pylist()
    texts = catalogue.item_text.take(order).to_pylist()
    told: list[dict[str, Any]] = [
        {"key": visible(k), "text": visible(t), "count": int(n)}
        for k, t, n in zip(keys, texts, catalogue.counts[order])
    ]
    if not model.has_table or not keys:
        return "", told
    grid = model.event_table().grid
    codes, prior = grid.codes.numpy(), grid.prior.exp().numpy()
    given = np.stack(
        [
            np.where(codes[:, j] == k, prior, 0)
            for j, f in enumerate(model.config.fields)
            for k in range(f.codebook_size)
        ]
    )
    total = given.sum(1, keepdims=True)
    given = np.where(total > 0, given / np.maximum(total, 1e-30), prior)  # of no column: anybody's
    try:
        found = model.affinity(given, keys)
    except ConfigError:  # the model puts no loss on reactions
        return "", told
    for i, item in enumerate(told):
        item["liked"] = [round(float(p), 3) for p in found[:, i]]
    words = model.format.words
    liked = f"share {words[model.format.best_word]}" if words else "times as likely as for anybody"
    return liked, told
