"""The report and the page to explore in a real Chromium: nothing overflows, overlaps, is too pale
to read or complains, at both widths, in light and dark, on screen and in print."""

from __future__ import annotations

import json

import browser
import numpy as np
import pytest
import small_log
from test_report import CARDS, MORE, TRAIT, page

import userip_fast as uf
from userip_fast.report.show import show_run

pytestmark = pytest.mark.skipif(
    browser.find() is None,
    reason="needs Chromium: none on PATH, and $USERIP_FAST_CHROMIUM names none",
)

MANY = ("war", "romance of the three kingdoms", "poetry", "a very long name of a code of users",
        "science", "horror", "味覚小説", "history", "crime", "fantasy", "children")  # fmt: skip


@pytest.fixture(scope="module")
def chromium():
    with browser.Browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A page of everything, with names and numbers that take room."""
    random = np.random.default_rng(0)
    told = {**TRAIT, "what": "Pneumonoultramicroscopicsilicovolcanoconiosis" * 2}
    cards = [
        {**CARDS["genre"][0], "code": i, "users": 10 * i, "words": [word], "told": [TRAIT, told],
         "reactions": {"disliked": 0.2, "okay": 0.3, "liked": 0.5}}
        for i, word in enumerate(MANY)
    ]  # fmt: skip
    codewords = random.normal(size=(len(MANY), 8)) * [5, 3, 1, 1, 1, 1, 1, 1]
    truth = {"traits": list(MANY[:4]), "counts": random.integers(0, 90, (4, 12)).tolist()}
    more = {**MORE, "codewords": {"genre": codewords}, "confusion": {"genre": truth}}
    folder = tmp_path_factory.mktemp("report")
    CARDS_BEFORE = dict(CARDS)
    try:
        CARDS["genre"] = cards
        page(folder, more=more)
    finally:
        CARDS.update(CARDS_BEFORE)
    return folder / "report.html"


@pytest.fixture(scope="module")
def explore(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("USERIP_FAST_CACHE", str(folder / "cache"))
        log, items = small_log.tables()
        texts = ["<img src=x onerror=alert(1)> " + t for t in items["title"].to_pylist()]
        items = items.set_column(1, "title", [texts])
        data = uf.read_interactions(log, items, rating="rating", time="timestamp")
        config = uf.Config().override(dict(s.split("=") for s in small_log.TINY))
        fields = [uf.ProfileField("taste", "The taste is", codebook_size=3)]
        uf.fit(data, fields=fields, config=config, out=folder / "run", probabilities=True)
        return show_run(folder / "run", users=20, items=10)


OVERFLOW = """(() => {
  const wide = [...document.querySelectorAll("body *")].filter(e => {
    if (e.closest("svg") || e.closest("details:not([open])")) return false;
    const inside = e.parentElement.closest(".scroll");
    return !inside && e.getBoundingClientRect().right > innerWidth + 1;
  });
  const texts = [...document.querySelectorAll("svg text")].filter(t => {
    const b = t.getBoundingClientRect();
    return b.width && (b.right > innerWidth + 1 || b.left < -1);
  });
  return [document.documentElement.scrollWidth - innerWidth,
          [...wide, ...texts].map(e => e.outerHTML.slice(0, 120))];
})()"""

OVERLAPS = """(() => {
  const found = [];
  for (const svg of document.querySelectorAll("svg")) {
    const texts = [...svg.querySelectorAll("text")];
    const boxes = texts.map(t => [t.textContent, t.getBoundingClientRect()]);
    boxes.forEach(([s, a], i) => boxes.slice(i + 1).forEach(([t, b]) => {
      const beside = a.left >= b.right - 1 || b.left >= a.right - 1;
      if (!beside && a.top < b.bottom - 3 && b.top < a.bottom - 3)
        found.push([svg.querySelector("title").textContent, s, t]);
    }));
  }
  return found;
})()"""

# WCAG 2: 4.5 for text, 3 for large or bold text; of text on its first opaque background.
PALE = """(() => {
  const rgb = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = c => {
    const [r, g, b] = c.map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = rgb(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] === 1) return c.slice(0, 3);
    }
    return matchMedia("(prefers-color-scheme: dark)").matches ? [0, 0, 0] : [255, 255, 255];
  };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    if (!walk.currentNode.textContent.trim() || e.closest("title, style, script")) continue;
    const style = getComputedStyle(e), drawn = e.closest("svg");
    let back = behind(e);
    if (e.classList.contains("onheat")) back = rgb(getComputedStyle(
      document.elementsFromPoint(e.getBoundingClientRect().x + 3, e.getBoundingClientRect().y + 5)
        .find(x => x.tagName === "rect") || drawn.querySelector(".heat4")).fill);
    const ink = rgb(drawn ? style.fill : style.color).slice(0, 3);
    const [a, b] = [light(ink), light(back)].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    if (ratio < 4.5) found.push([ratio.toFixed(2), e.textContent.slice(0, 40)]);
  }
  return found;
})()"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("which", ["report", "explore"])
def test_it_can_be_read(chromium, request, which, width, dark):
    tab = chromium.open(request.getfixturevalue(which), width, dark=dark)
    tab.evaluate('document.querySelectorAll("details").forEach(d => d.open = true)')
    if which == "explore":
        tab.evaluate('q.value = "book"; search()')
    assert tab.evaluate(OVERFLOW) == [0, []]
    assert tab.evaluate(OVERLAPS) == []
    assert tab.evaluate(PALE) == []
    assert tab.evaluate('getComputedStyle(document.querySelector("svg text")).fontSize') == "11px"
    assert tab.complaints() == []


def test_it_prints(chromium, report):
    tab = chromium.open(report)
    assert tab.pdf().startswith(b"%PDF")
    chromium.call("Emulation.setEmulatedMedia", tab.session, media="print")
    assert tab.evaluate('getComputedStyle(document.querySelector("nav")).display') == "none"
    assert tab.evaluate(PALE) == []
    assert tab.complaints() == []


def test_the_search_finds_codes_items_and_users(chromium, explore):
    tab = chromium.open(explore)

    def found(words):
        tab.evaluate(f"q.value = {json.dumps(words)}; search()")
        return tab.evaluate("found.innerText")

    assert "Items (10, the first 8)" in found("BOOK img")
    assert "book" in found("book")
    assert "taste, share liked:" in found("book")
    key = uf.FeatureBank.open(explore.parent / "bank").keys()[0].as_py()
    assert f"user {key}\n" in found(str(key))
    assert "taste: code" in found(str(key)) or "taste: " in found(str(key))
    assert "sure by" in found(str(key))
    assert "Codes (3)" in found("taste")
    anchors = tab.evaluate('[...found.querySelectorAll("a")].map(a => !!document.querySelector('
                           'a.getAttribute("href")))')  # fmt: skip
    assert anchors == [True] * 3
    assert "Nothing found among all codes, 10 items and 20 users." in found("nowhere to be found")
    assert found("") == ""
    assert tab.evaluate('document.querySelectorAll("img").length') == 0  # text stays text
    assert tab.complaints() == []


def test_the_checks_find_what_they_are_for(chromium, tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text(
        '<body style="background:#fff"><p style="color:#999">pale</p>'
        '<div style="width:3000px">wide</div><svg width="100" height="20"><title>t</title>'
        '<text x="5" y="15">one</text><text x="8" y="15">two</text></svg>'
        "<script>console.error('no')</script>"
    )
    tab = chromium.open(bad, 390)
    assert tab.evaluate(OVERFLOW)[0] > 0
    assert tab.evaluate(OVERLAPS) == [["t", "one", "two"]]
    assert [found[1] for found in tab.evaluate(PALE)] == ["pale"]
    assert len(tab.complaints()) == 1
