"""report.html stands alone, escapes what it is given, and is the same for the same run."""

import json
import sys
import warnings
from html.parser import HTMLParser

import pytest

from userip_fast import pictures
from userip_fast.errors import FormatError
from userip_fast.report import report_run, write_report

METRICS = {
    "data": {
        "users": 2000,
        "dropped": {
            "counts": {"unknown item": 2},
            "examples": [{"file": "a.csv", "row": 7, "rule": "unknown item", "value": "<b>"}],
            "short_examples": [],
        },
    },
    "fields": {
        "genre": {"codes": 4, "perplexity": 3.21987, "dead": 1, "counts": [9, 5, 0, 1]},
        "critic": {"codes": 2, "perplexity": 2.0, "dead": 0, "counts": [7, 8]},
    },
    "seed": 0,
}
RECORDS = [
    {"round": 0, "nll_per_weight": 2.5, "fields": {}},
    {"round": 1, "nll_per_weight": 1.25, "fields": {"genre": {"perplexity": 3.0, "counts": [1]}}},
]
CARDS = {
    "genre": [
        {"code": 0, "users": 3, "words": ["elf", "orc"], "items": ["<Rings>"], "lift": [4.25]},
        {"code": 1, "users": 9, "words": ["kiss"], "items": [], "lift": []},
    ]
}


class Page(HTMLParser):
    """Tags, text, and that every tag that opens closes."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.open, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href", "xlink:href")]
        if tag not in ("meta", "path", "use"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in ("meta", "path", "use"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += f"{data}\n"


def page(tmp_path, name="report.html"):
    write_report(tmp_path / name, METRICS, RECORDS, CARDS)
    return (tmp_path / name).read_text()


def test_tables_plots_and_cards(tmp_path):
    pytest.importorskip("matplotlib")
    found = Page(page(tmp_path))
    assert found.tags.count("svg") == 3  # NLL, and a bar chart per field
    for text in ("2,000", "3.22", "unknown item", "<b>", "<Rings> (x4.2)", "elf, orc", "1.25"):
        assert f"{text}\n" in found.text, text
    assert found.text.index("kiss") < found.text.index("elf, orc")  # most used code first
    assert "Rings" not in found.tags


def test_it_needs_no_other_file(tmp_path):
    found = Page(page(tmp_path))
    assert all(link.startswith("#") for link in found.links)
    assert not {"script", "link", "img"} & set(found.tags)


def test_the_same_run_gives_the_same_bytes(tmp_path):
    assert page(tmp_path, "a.html") == page(tmp_path, "b.html")


def test_without_matplotlib_it_says_so_and_keeps_the_tables(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = Page(page(tmp_path))
    assert "svg" not in found.tags
    assert "matplotlib is not installed" in found.text
    assert "unknown item" in found.text
    assert "elf, orc" in found.text


def test_a_failed_write_leaves_the_old_page(tmp_path):
    before = page(tmp_path)
    with pytest.raises(KeyError):
        write_report(tmp_path / "report.html", METRICS, RECORDS, {"genre": [{"code": 1}]})
    assert (tmp_path / "report.html").read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_numbers_beyond_what_can_be_drawn_are_refused(tmp_path):
    pytest.importorskip("matplotlib")
    told = [{"round": 0, "nll_per_weight": 1e308}, {"round": 1, "nll_per_weight": -1e308}]
    (tmp_path / "metrics.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, told)))
    with pytest.raises(FormatError, match="does not hold what was written"):
        report_run(tmp_path)


def test_words_of_any_script_are_drawn_without_a_word(tmp_path):
    pytest.importorskip("matplotlib")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = pictures.usage("味\x1b[2J\u202e", [3, 1])
    assert "味\\u001b[2J\\u202e" in drawn


def test_nothing_to_show_is_still_a_page(tmp_path):
    write_report(tmp_path / "report.html", {}, [], {})
    assert Page((tmp_path / "report.html").read_text()).tags.count("table") == 0


@pytest.mark.parametrize(("told", "verdict"), [(0.9, "help to predict"), (1.2, "say little")])
def test_it_tells_whether_profiles_help_new_users(tmp_path, told, verdict):
    """And what a card's users choose more than others, with its interval."""
    nll = {"told": told, "untold": 1.1, "item": 1.05, "constant": 1.09}
    training = {"tokens": [1000, 2000], "loss": [3.0, 2.0], "nll": nll}
    curves = {"scored": [1.2, 0.8], "held_out": [1.1, told]}
    trait = {"what": "genres: <War>", "ratio": 2.04, "low": 1.5, "high": 2.7}
    card = {**CARDS["genre"][0], "told": [trait], "reactions": {"liked": 0.25}}
    for more in (training, {**training, **curves}, {"tokens": [1], "loss": [2.0]}):
        path = tmp_path / "report.html"
        write_report(path, METRICS, RECORDS, {"genre": [card]}, {"lm_training": more})
        text = Page(path.read_text()).text
        assert (verdict in text) is ("nll" in more)
        assert "genres: <War> x2.0 (1.5 to 2.7)" in text
        assert "liked 25%" in text
