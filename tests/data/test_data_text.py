"""Item text templates: every rule on its own, and rendering against a plain loop."""

import datetime as dt
import re

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from userip_fast.core.errors import DataError
from userip_fast.data import TextTemplate


def render(template, **columns):
    return TextTemplate(template).render(pa.table(columns)).to_pylist()


def test_columns_are_listed_once_in_order():
    assert TextTemplate("{b} {a}[[ {b}]]{ c }").columns == ("b", "a", "c")


def test_nulls_and_nans_render_empty():
    assert render("{a}/{b}", a=["x", None, "y"], b=[1.5, 2.0, float("nan")]) == [
        "x/1.5",
        "/2",
        "y/",
    ]


def test_optional_group_vanishes_with_its_value():
    years, genres = [1999, None, 2001, 2002], ["War", "Drama", None, " "]
    out = render("{t}[[ ({g})]][[, {y}]]", t=list("abcd"), g=genres, y=years)
    assert out == ["a (War), 1999", "b (Drama)", "c, 2001", "d, 2002"]
    # a group of two columns vanishes where any of them is empty
    assert render("{t}[[ {g} {y}]]", t=list("abcd"), g=genres, y=years)[:3] == [
        "a War 1999",
        "b",
        "c",
    ]


def test_braces_are_escaped_by_doubling():
    assert render("{{{a}}} }}", a=["x"]) == ["{x} }"]


def test_white_space_is_collapsed_and_stripped():
    assert render("  {a}\n {b} ", a=[" x\u00a0\t y"], b=["z\u3000"]) == ["x y z"]


def test_text_is_empty_where_every_column_is():
    assert render("Book: {a}[[ by {b}]].", a=["", None, "x"], b=[None, " ", None]) == [
        "",
        "",
        "Book: x.",
    ]


def test_every_usable_type_has_a_text():
    columns = {
        "flag": [True],
        "day": [dt.date(2020, 1, 2)],
        "tags": [["a", "b"]],
        "kind": pa.array(["k"]).dictionary_encode(),
        "n": pa.array([7], pa.int8()),
    }
    assert render("{flag} {day} {tags} {kind} {n}", **columns) == ["true 2020-01-02 a, b k 7"]
    with pytest.raises(DataError, match=r"column 's' of type struct.* has no text form"):
        render("{s}", s=[{"x": 1}])


def test_chunked_columns_and_no_rows():
    assert render("{a}", a=pa.chunked_array([["x"], [], ["y"]])) == ["x", "y"]
    assert render("{a}", a=pa.array([], pa.string())) == []


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("plain", "names no column"),
        ("", "names no column"),
        ("{a} {}", r"'\{\}' names no column"),
        ("{a", r"unmatched '\{' at character 1"),
        ("a} {b}", r"unmatched '\}' at character 2"),
        ("{a}[[ x", "never closed"),
        ("{a} ]]", "closes no optional group"),
        ("{a}[[ x [[ {b}]]]]", "opens inside another"),
        ("{a}[[ x]]", "optional group names no column"),
    ],
)
def test_malformed_templates_are_refused(template, message):
    with pytest.raises(DataError, match=message):
        TextTemplate(template)


def test_unknown_column_names_template_column_and_those_there_are():
    with pytest.raises(DataError, match=r"'\{tilte\}'.*no column 'tilte'; it has \['title'\]"):
        render("{tilte}", title=["x"])


values = st.one_of(st.none(), st.text(max_size=8))


@given(st.lists(st.tuples(values, values), max_size=8), st.text(max_size=5), st.text(max_size=5))
def test_rendering_agrees_with_a_plain_loop(rows, before, between):
    def escape(text):
        return re.sub(r"[{}]", lambda m: m[0] * 2, text).replace("[[", "[").replace("]]", "]")

    def plain(text):
        return text.replace("[[", "[").replace("]]", "]")

    def words(text):
        return " ".join(text.split())

    # a literal that ends in a bracket would join up with the group's own
    between = between.strip("[]")
    template = f"{escape(before)}{{a}}[[{escape(between)}{{b}}]]"
    table = pa.table({"a": pa.array([r[0] for r in rows], pa.string())})
    table = table.append_column("b", pa.array([r[1] for r in rows], pa.string()))
    expected = []
    for a, b in rows:
        a, b = (a or "").strip(), (b or "").strip()
        text = plain(before) + a + (plain(between) + b if b else "")
        expected.append(words(text) if a or b else "")
    assert TextTemplate(template).render(table).to_pylist() == expected
