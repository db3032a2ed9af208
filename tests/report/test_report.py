"""report.html stands alone, escapes what it is given, and is the same for the same run."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest

from userip_fast.core.errors import FormatError
from userip_fast.prompts.layout import ProfileField
from userip_fast.report import pictures, svg
from userip_fast.report.cards import code_cards
from userip_fast.report.verdict import verdict
from userip_fast.report.write import report_run, write_report

METRICS = {
    "run": {
        "userip_fast": "1.2.3", "date": "2026-01-02T03:04:05+00:00", "command": "userip fit <x>",
    },
    "data": {
        "users": 2000, "items": 70, "events": 9000, "time_ordered": True,
        "told": {"events": 9000, "told": 8990, "users_cut": 1, "tokens": 40000, "unknown": 0},
        "dropped": {
            "rows_read": 9002, "rows_bad": 2, "counts": {"unknown item": 2},
            "examples": [{"file": "a.csv", "row": 7, "rule": "unknown item", "value": "<b>"}],
            "short_examples": [],
        },
    },
    "fields": {
        "genre": {
            "codes": 4, "perplexity": 3.21987, "dead": 0, "named": 0.25, "counts": [9, 5, 2, 2],
        },
        "critic": {"codes": 2, "perplexity": 2.0, "dead": 0, "counts": [7, 8]},
    },
    "seed": 0,
}  # fmt: skip
RECORDS = [
    {"round": 0, "time": 1.5e9, "nll_per_weight": 2.5, "elbo": -3.0, "elbo_held_out": -3.5,
     "fields": {}},
    {"round": 1, "time": 1.5e9, "nll_per_weight": 1.25, "elbo": -2.5, "elbo_held_out": -3.25,
     "fields": {"genre": {"perplexity": 3.0, "counts": [1]}}},
]  # fmt: skip
TRAIT = {"what": "genres: <War>", "ratio": 2.04, "low": 1.5, "high": 2.7}
CARDS = {
    "genre": [
        {"code": 0, "users": 3, "words": ["elf", "orc"], "items": ["<Rings>"], "lift": [4.25],
         "told": [TRAIT], "reactions": {"disliked": 0.75, "liked": 0.25}},
        {"code": 1, "users": 9, "words": ["kiss"], "items": [], "lift": []},
    ]
}  # fmt: skip
NLL = {"told": 0.9, "untold": 1.1, "item": 1.0, "constant": 1.2}
TRAINING = {"tokens": [1000, 2000], "loss": [3.0, 2.0], "scored": [1.2, 0.88],
            "held_out": [1.1, 0.9], "nll": NLL}  # fmt: skip


def area(mean, low, high):
    return {"dcn": {"mean": mean, "std": 0.01, "seeds": [mean], "ci95": [low, high]}}


CTR = {
    "auc": {"none": area(0.70, 0.69, 0.71), "ids": area(0.72, 0.71, 0.73), "foldin": None},
    "reasons": {"foldin": "no <column>"}, "protocol": "new-users", "label": "rating>=4",
    "settings": {"features": ["none", "foldin", "ids"], "backbones": ["dcn"]},
    "paired": {"dcn": {"best_cluster": None, "against": {
        "none": {"difference": 0.02, "ci95": [0.01, 0.03], "p": 0.01}}}},
    "floor": {"item_rate": 0.61, "popularity": 0.6}, "warnings": ["mind the <gap>"], "codes": {},
}  # fmt: skip
MORE = {
    "behaviour": {"template": "{text}: {feedback}", "text": "{title}",
                  "scale": {"words": ["disliked", "okay", "liked"], "thresholds": [3.0, 4.5]}},
    "fields": (ProfileField("genre", "The reader's <favourite> is", 1, 4, ("war", "love")),),
    "lm_training": TRAINING,
    "codewords": {"genre": np.eye(2)},
    "explain": {"fields": {"genre": {"codes": [
        {"code": 0, "typical": ["Emma"], "avoided": ["It"],
         "examples": [{"user": 7, "p": 0.93, "behaviour": "Emma; It"}]}]}},
        "associations": {
            "genre": {"age": {"users": 5, "bits": 0.5, "chance_bits": 0.1, "p": 0.01}}}},
    "ctr": {"new": CTR},
}  # fmt: skip


class Page(HTMLParser):
    """Tags, text, and that every tag that opens closes."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.open, self.text, self.told = [], [], [], "", ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href", "xlink:href")]
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += f"{data}\n"
            self.told += data


def page(tmp_path, name="report.html", metrics=METRICS, more=MORE):
    write_report(tmp_path / name, metrics, RECORDS, CARDS, more)
    return (tmp_path / name).read_text()


def test_the_whole_page(tmp_path):
    found = Page(page(tmp_path))
    for text in (
        "Profiles of 2,000 users", "userip_fast 1.2.3 · 02 January 2026, 03:04 UTC",
        "userip fit <x>", "2,000 users, 70 items, 9,000 events, in time order", "2 unknown item",
        "8,990 of 9,000 events (100%)", "{title}: {feedback}",
        "disliked below 3, okay below 4.5, liked from 4.5",
        "“The reader's <favourite> is …”, 4 codes; starts at war, love",
        "item's own rate", "users held out", "elf", "code 0 · 3 users (25.0%)", "genres: <War>",
        "1.5 to 2.7", "disliked 75%, okay 0%, liked 25%", "all codes: 19%, 0%, 6%",
        "<Rings> (x4.2)",
        "Emma", "It",
        "user 7, sure by 93%: Emma; It", "0.7000", "n/a: no <column>", "mind the <gap>",
        "Item alone: item rate 0.6100, popularity 0.6000.", "shared bits", "3.22", "1.25",
    ):  # fmt: skip
        assert text in found.told, text
    # LM, EM; usage and map; an interval for the trait; the sceptic's dots.
    assert found.tags.count("svg") == 6
    assert "1.5e+09" not in found.told
    assert found.told.index("kiss") < found.told.index("code 0 · 3 users")  # most used code first


def test_it_needs_no_other_file(tmp_path):
    found = Page(page(tmp_path))
    assert all(link.startswith("#") for link in found.links)
    assert not {"script", "link", "img"} & set(found.tags)
    assert "http" not in page(tmp_path).replace("http-equiv", "")


def test_the_same_run_gives_the_same_bytes(tmp_path):
    assert page(tmp_path, "a.html") == page(tmp_path, "b.html")


def test_a_failed_write_leaves_the_old_page(tmp_path):
    before = page(tmp_path)
    with pytest.raises(KeyError):
        write_report(tmp_path / "report.html", METRICS, RECORDS, {"genre": [{"code": 1}]})
    assert (tmp_path / "report.html").read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_numbers_beyond_what_can_be_drawn_are_refused(tmp_path):
    told = [{"round": 0, "nll_per_weight": 1e308}, {"round": 1, "nll_per_weight": -1e308}]
    (tmp_path / "metrics.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, told)))
    assert report_run(tmp_path).is_file()  # of an empty run there is nothing to draw
    (tmp_path / "metrics.json").write_text('{"seed": 0}')
    with pytest.raises(FormatError, match="does not hold what was written"):
        report_run(tmp_path)


def test_control_characters_are_shown_not_sent():
    drawn = code_cards([{"code": 0, "users": 1, "words": ["味\x1b[2J\u202e"], "items": [],
                         "lift": []}], [])  # fmt: skip
    assert "味\\u001b[2J\\u202e" in drawn
    assert "\\u001b" in pictures.code_map("x", np.eye(2), [1, 2], ["\x1b", "b"])


def test_nothing_to_show_is_still_a_page(tmp_path):
    write_report(tmp_path / "report.html", {}, [], {})
    assert Page((tmp_path / "report.html").read_text()).tags.count("table") == 0


def told(metrics=METRICS, training=TRAINING, cards=CARDS, ctr=None):
    sentences = verdict(metrics, training, cards, {"new": ctr} if ctr else {})
    assert len(sentences) == 3
    return sentences


def test_the_verdict_says_whether_profiles_help_and_by_how_much():
    helps, codes, odd = told()
    assert helps.startswith("Profiles help to predict new users, by 10.0%: 0.900 nats told of ten")
    assert "1.100 told nothing of them, 1.000 by how the item fares with all" in helps
    assert "2 of 2 codes of genre are in use, as evenly as 3.2 equal ones; 25% of users" in codes
    assert "most of all genres: <War>, chosen 2.0 times as often (1.5 to 2.7)" in codes
    assert odd.startswith("Nothing odd")
    assert "100% of the events were read" in odd

    worse = {**TRAINING, "nll": {**NLL, "told": 1.05}}
    assert told(training=worse)[0].startswith("Profiles say little of new users: 1.050 nats")
    assert "was not measured here" in told(training={})[0]
    changed = "in dcn they change the AUC of no profile by +0.0200 (+0.0100 to +0.0300; new-users"
    assert changed in told(ctr=CTR)[0]


@pytest.mark.parametrize(
    ("counts", "reads", "training", "said"),
    [
        ([9, 9, 0, 0], 8990, TRAINING, "2 codes of genre without a user"),
        ([9, 8, 1], 8990, TRAINING, "1 code of genre with one user"),
        ([19, 3, 2], 8990, TRAINING, "one code of genre has 79% of the users"),
        ([9, 9, 9], 4500, TRAINING, "only 50% of the events were read"),
        ([9, 9, 9], 8990, {**TRAINING, "scored": [1.0, 0.5]},
         "by heart (0.500 nats, users held out 0.900"),
    ],
)  # fmt: skip
def test_the_verdict_says_what_is_odd(counts, reads, training, said):
    metrics = {
        **METRICS,
        "fields": {"genre": {"counts": counts}},
        "data": {"told": {**METRICS["data"]["told"], "told": reads}},
    }
    odd = told(metrics, training)[2]
    assert odd.startswith("Odd: ")
    assert said in odd
    assert ";" not in odd.replace("; the weights", "")


@pytest.mark.parametrize("seed", range(5))
def test_labels_lie_over_nothing(seed):
    random = np.random.default_rng(seed)
    n = 24
    dots = [(*random.normal(200, 60, 2), random.uniform(3, 15)) for _ in range(n)]
    labels = ["x" * int(k) for k in random.integers(1, 20, n)]
    inside = (0.0, 0.0, 440.0, 400.0)
    boxes = [(x - r, y - r, x + r, y + r) for x, y, r in dots]
    found = svg.place_labels(dots, labels, inside)
    assert sum(at is not None for at in found) > n // 2
    for at, label in zip(found, labels):
        if at is None:
            continue
        x, y, w, h = *at, svg.width_of(label) / 2, svg.LINE / 2
        own = (x - w, y - h, x + w, y + h)
        assert inside[0] <= own[0]
        assert own[2] <= inside[2]
        assert inside[1] <= own[1]
        assert own[3] <= inside[3]
        for other in boxes:
            assert (
                own[0] >= other[2] or other[0] >= own[2] or own[1] >= other[3] or other[1] >= own[3]
            )
        boxes.append(own)


def test_ticks_are_round_and_between_the_ends():
    for low, high in ((0, 1), (-49.05, -48.6), (0, 384), (1e-9, 3e-9), (5, 5)):
        scale = svg.Scale(low, high, 0, 100)
        ticks = scale.ticks()
        assert 1 <= len(ticks) <= 7
        assert all(scale.low - 1e-12 <= t <= scale.high + 1e-12 for t in ticks)
    assert svg.Scale(0, 1, 0, 100).ticks() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert svg.spread([5, 5, 5], 10, 0, 30) == [5, 15, 25]
    assert svg.spread([29, 28, 1], 10, 0, 30) == [30, 20, 1]
