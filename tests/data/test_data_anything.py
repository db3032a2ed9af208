"""Whatever is tabular goes in: the right values are read, or one clear line says why not."""

import datetime as dt
import gzip
import json
import logging
import os
from itertools import accumulate

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

import userip_fast as uf
from userip_fast.core.errors import DataError

try:
    import polars as _polars  # which sets an environment variable, so not in a test
except ImportError:
    _polars = None

ROWS = [
    (3, "x", 1.0, 60, "Café"),
    (1, "y", 2.5, 50, "Why; not, | yes"),
    (2, "x", 3.0, 40, "Café"),
    (1, "x", 4.0, 30, "Café"),
    (3, "z", 5.0, 20, "Zed"),
]
NAMES = ["user_id", "item_id", "rating", "time", "title"]
TABLE = pa.table(dict(zip(NAMES, map(list, zip(*ROWS)))))
ROLES = {"rating": "rating", "time": "time"}
WANT = {
    1: [("x", 4.0, 30), ("y", 2.5, 50)],
    2: [("x", 3.0, 40)],
    3: [("z", 5.0, 20), ("x", 1.0, 60)],
}


def lines(sep=",", header=NAMES, rows=ROWS, quote='"'):
    def field(value):
        text = str(value)
        return f"{quote}{text}{quote}" if sep in text or ";" in text else text

    made = [sep.join(map(field, row)) for row in ([header] if header else []) + list(rows)]
    return "".join(line + "\n" for line in made)


def json_lines(rows=ROWS):
    return "".join(json.dumps(dict(zip(NAMES, row)), ensure_ascii=False) + "\n" for row in rows)


def put(name, content):
    """A case of one file."""

    def make(folder):
        data = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(data)
        return folder / name

    return make


def zstd(text):
    return pa.compress(text.encode(), "zstd", asbytes=True)


def parts(*names):
    """A case of several files of the same log."""

    def make(folder):
        cuts = np.array_split(np.arange(len(ROWS)), len(names))
        for name, cut in zip(names, cuts):
            part = TABLE.take(pa.array(cut))
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".parquet"):
                pq.write_table(part, folder / name)
            elif name.endswith(".gz"):
                (folder / name).write_bytes(
                    gzip.compress(lines(rows=[ROWS[i] for i in cut]).encode())
                )
            else:
                (folder / name).write_text(lines(rows=[ROWS[i] for i in cut]))
        return folder

    return make


def listed(*names):
    def make(folder):
        parts(*names)(folder)
        return [str(folder / names[0]), *(folder / name for name in names[1:])]

    return make


def hive(folder):
    ds.write_dataset(TABLE, folder / "log", format="parquet", partitioning=["item_id"],
                     partitioning_flavor="hive")  # fmt: skip
    return folder / "log"


def memory(make):
    return lambda folder: make()


def pandas():
    return pytest.importorskip("pandas").DataFrame(TABLE.to_pydict())


def polars():
    if _polars is None:
        pytest.skip("polars is not installed")
    return _polars.DataFrame(TABLE.to_pydict())


def duckdb():
    db = pytest.importorskip("duckdb")
    values = ", ".join(f"({u}, '{i}', {r}, {t}, '{title}')" for u, i, r, t, title in ROWS)
    return db.sql(f"SELECT * FROM (VALUES {values}) AS log({', '.join(NAMES)})")


def hugging_face():
    return pytest.importorskip("datasets").Dataset.from_dict(TABLE.to_pydict())


class OnlyAStream:
    """What any library may hand over."""

    def __arrow_c_stream__(self, requested_schema=None):
        return TABLE.__arrow_c_stream__(requested_schema)


RECBOLE = ["user_id:token", "item_id:token", "rating:float", "time:float", "title:token_seq"]
HEADLESS = {"header": NAMES}

# name -> (how to make it, options, what is said of it); all are read as WANT
READ = {
    "csv": (put("log.csv", lines()), {}, None),
    "csv of Windows": (put("log.csv", lines().replace("\n", "\r\n")), {}, None),
    "csv with a mark": (put("log.csv", "\ufeff" + lines()), {}, None),
    "csv after blank lines": (put("log.csv", "\n\n" + lines()), {}, None),
    "csv without a last new line": (put("log.csv", lines().rstrip("\n")), {}, None),
    "csv of any name": (put("dump.2024", lines()), {}, "read as CSV"),
    "csv without a suffix": (put("log", lines(sep="\t")), {}, "columns are separated by tabs"),
    "csv.gz": (put("log.csv.gz", gzip.compress(lines().encode())), {}, None),
    "csv.gz of two members": (
        put(
            "log.csv.gz",
            b"".join(map(gzip.compress, [lines().encode()[:40], lines().encode()[40:]])),
        ),
        {},
        None,
    ),
    "csv.zst": (put("log.csv.zst", zstd(lines())), {}, None),
    "gzip of any name": (put("dump", gzip.compress(lines().encode())), {}, "read as CSV"),
    "gzip named csv": (put("log.csv", gzip.compress(lines().encode())), {}, None),
    "tsv": (put("log.tsv", lines("\t")), {}, None),
    "tsv.gz": (put("log.tsv.gz", gzip.compress(lines("\t").encode())), {}, None),
    "tabs named csv": (put("log.csv", lines("\t")), {}, "columns are separated by tabs"),
    "commas named tsv": (put("log.tsv", lines(",")), {}, "columns are separated by commas"),
    "semicolons": (put("log.csv", lines(";")), {}, "columns are separated by semicolons"),
    "bars": (put("log.csv", lines("|")), {}, "columns are separated by vertical bars"),
    "colons": (put("log.dat", lines("::", quote="")), {}, "columns are separated by '::'"),
    "Hive's": (put("log.csv", lines("\x01")), {}, r"columns are separated by '\x01'"),
    "sep": (put("log.csv", lines("~")), {"sep": "~"}, None),
    "sep of several": (put("log.csv", lines("~~", quote="")), {"sep": "~~"}, None),
    "sep spelt out": (put("log.csv", lines("\t")), {"sep": "\\t"}, None),
    "latin-1": (put("log.csv", lines().encode("latin-1")), {"encoding": "latin-1"}, None),
    "cp1252, semicolons": (
        put("log.csv", lines(";").encode("cp1252")),
        {"encoding": "cp1252"},
        "semicolons",
    ),
    "utf-16": (put("log.csv", lines().encode("utf-16")), {}, "the encoding is utf-16"),
    "utf-16, tabs, any name": (put("log.txt", lines("\t").encode("utf-16")), {}, "utf-16"),
    "no header": (put("log.csv", lines(header=None)), HEADLESS, None),
    "no header, names in one": (
        put("log.csv", lines(header=None)),
        {"header": ",".join(NAMES)},
        None,
    ),
    "no header, colons": (put("log.dat", lines("::", None, quote="")), HEADLESS, "'::'"),
    "names with spaces": (put("log.csv", lines(header=[f" {n}" for n in NAMES])), {}, None),
    "RecBole's inter": (put("ml.inter", lines("\t", RECBOLE)), {}, None),
    "RecBole's header in a csv": (put("log.csv", lines(",", RECBOLE)), {}, None),
    "json lines": (put("log.jsonl", json_lines()), {}, None),
    "json lines with a mark": (put("log.jsonl", "\ufeff" + json_lines()), {}, None),
    "json lines named json": (put("log.json", json_lines()), {}, None),
    "json lines of any name": (put("log.txt", json_lines()), {}, "read as JSON lines"),
    "json.gz": (put("log.json.gz", gzip.compress(json_lines().encode())), {}, None),
    "jsonl.zst": (put("log.jsonl.zst", zstd(json_lines())), {}, None),
    "json lines in latin-1": (
        put("log.jsonl", json_lines().encode("latin-1")),
        {"encoding": "latin-1"},
        None,
    ),
    "a json list": (
        put("log.json", json.dumps([dict(zip(NAMES, row)) for row in ROWS], indent=1)),
        {},
        None,
    ),
    "parquet": (lambda f: pq.write_table(TABLE, f / "log.parquet") or f / "log.parquet", {}, None),
    "parquet of any name": (lambda f: pq.write_table(TABLE, f / "log") or f / "log", {}, None),
    "folder of parquet": (parts("a.parquet", "b/c.parquet"), {}, None),
    "folder of csv, some packed": (parts("a.csv", "b.csv.gz"), {}, None),
    "folder with what tools leave": (
        lambda f: (f / "state.json").write_text("{}") and parts("a.parquet", "b.parquet")(f),
        {},
        None,
    ),
    "utf-16-le with a mark": (
        put("log.csv", ("\ufeff" + lines()).encode("utf-16-le")),
        {"encoding": "utf-16-le"},
        None,
    ),
    "hive folders": (hive, {}, None),
    "list of csv": (listed("a.csv", "b.csv", "c.csv.gz"), {}, None),
    "list of parquet": (listed("a.parquet", "b.parquet"), {}, None),
    "list of folders": (
        lambda f: [parts("p/a.parquet", "q/b.parquet")(f) / name for name in "pq"],
        {},
        None,
    ),
    "Arrow table": (memory(lambda: TABLE), {}, None),
    "Arrow batch": (memory(lambda: TABLE.combine_chunks().to_batches()[0]), {}, None),
    "Arrow reader": (memory(lambda: TABLE.to_reader(2)), {}, None),
    "Arrow data set": (lambda f: ds.dataset(parts("a.parquet", "b.parquet")(f)), {}, None),
    "Arrow stream interface": (memory(OnlyAStream), {}, None),
    "pandas": (memory(pandas), {}, None),
    "pandas, a key in the index": (memory(lambda: pandas().set_index("user_id")), {}, None),
    "pandas, objects": (memory(lambda: pandas().astype(object)), {}, None),
    "pandas, categories": (memory(lambda: pandas().astype({"item_id": "category"})), {}, None),
    "pandas, mixed index and column": (
        memory(lambda: pandas().assign(junk=[1, "a", None, 2.5, {}]).set_index("junk", drop=False)),
        {},
        None,
    ),
    "polars": (memory(polars), {}, None),
    "polars, lazy": (memory(lambda: polars().lazy()), {}, None),
    "DuckDB": (memory(duckdb), {}, None),
    "Hugging Face": (memory(hugging_face), {}, None),
    "Hugging Face, chosen rows": (
        memory(lambda: hugging_face().select([4, 3, 2, 1, 0]).shuffle(seed=1)),
        {},
        None,
    ),
    "Hugging Face, iterable": (memory(lambda: hugging_face().to_iterable_dataset()), {}, None),
}


def histories(data):
    item = data.item_keys.take(pa.array(data.item_index)).to_pylist()
    seconds = (data.time // 1_000_000).tolist()
    rows = list(zip(item, data.rating.tolist(), seconds, strict=True))
    ends = list(accumulate(data.history_lengths.tolist()))
    keys = data.user_keys.to_pylist()
    return {k: rows[a:b] for k, a, b in zip(keys, [0, *ends], ends)}


@pytest.mark.parametrize("case", READ)
def test_it_is_read(case, tmp_path, caplog):
    make, options, said = READ[case]
    data = uf.read_interactions(make(tmp_path), **ROLES, **options)
    assert histories(data) == WANT
    assert data.user_keys.type == pa.int64()
    texts = dict(zip(data.item_keys.to_pylist(), data.item_text.to_pylist()))
    assert texts == {"x": "Café", "y": "Why; not, | yes", "z": "Zed"}
    told = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert any(said in line for line in told) if said else told == []


def csv_of(*rows, header="user_id,item_id,rating,time,title"):
    return "".join(line + "\n" for line in (header, "1,x,4.0,30,T", *rows, "2,x,3.0,40,T"))


def jsonl_of(*rows):
    good = [
        json.dumps(dict(zip(NAMES, (u, "x", r, t, "T"))))
        for u, r, t in ((1, 4.0, 30), (2, 3.0, 40))
    ]
    return "\n".join([good[0], *rows, good[1]])


def frame(**columns):
    good = {"user_id": [1, 9, 2], "item_id": ["x"] * 3, "rating": [4.0, 3.5, 3.0],
            "time": [30, 35, 40], "title": ["T"] * 3}  # fmt: skip
    return lambda: pytest.importorskip("pandas").DataFrame(good | columns)


# name -> (how to make it, rule, row, value shown): a row is bad, and the others are read
SKIPPED = {
    r"\N as a rating": (
        put("log.csv", csv_of(r"1,x,\N,50,T")),
        "rating is not a number",
        2,
        r"'\\N'",
    ),
    "a word as a rating": (
        put("log.csv", csv_of("1,x,good,50,T")),
        "rating is not a number",
        2,
        "'good'",
    ),
    "a rating that is empty": (
        put("log.csv", csv_of("1,x,,50,T")),
        "rating is not a number",
        2,
        "None",
    ),
    r"\N as a time": (put("log.csv", csv_of(r"1,x,2,\N,T")), "time is not valid", 2, r"'\\N'"),
    "a word as a time": (put("log.csv", csv_of("1,x,2,soon,T")), "time is not valid", 2, "'soon'"),
    r"\N as a user": (put("log.csv", csv_of(r"\N,x,2,50,T")), "null key", 2, "None"),
    "the header again": (put("log.csv", csv_of(",".join(NAMES))), "header again", 2, "'user_id'"),
    "too few values": (put("log.csv", csv_of("1,x")), "row without 5 values", 2, "'1,x'"),
    "too many values": (
        put("log.csv", csv_of("1,x,2,50,T,U")),
        "row without 5 values",
        2,
        "'1,x,2,50,T,U'",
    ),
    "a word after a short row": (
        put("log.csv", csv_of("1,x,2,45,T", "1,x", "1,x,bad,50,T")),
        "rating is not a number",
        4,
        "'bad'",
    ),
    "not UTF-8": (
        put("log.csv", csv_of("1,x,2,50,Café").encode("latin-1")),
        "text is not UTF-8",
        2,
        r"b'Caf\xe9'",
    ),
    "30 February": (
        put(
            "log.csv",
            csv_of("1,x,2,2020-02-30,T")
            .replace(",30,", ",2020-01-01,")
            .replace(",40,", ",2020-01-02,"),
        ),
        "time is not valid",
        2,
        "'2020-02-30'",
    ),
    "a bad row of a packed file": (
        put("log.csv.gz", gzip.compress(csv_of("1,x,good,50,T").encode())),
        "rating is not a number",
        2,
        "'good'",
    ),
    "a line that is no JSON": (
        put("log.jsonl", jsonl_of("{torn")),
        "row is not a JSON object",
        2,
        "'{torn'",
    ),
    "a list among JSON lines": (
        put("log.jsonl", jsonl_of("[1]")),
        "row is not a JSON object",
        2,
        "'[1]'",
    ),
    "a word as a JSON rating": (
        put(
            "log.jsonl",
            jsonl_of('{"user_id":1,"item_id":"x","rating":"good","time":5,"title":"T"}'),
        ),
        "rating is not a number",
        2,
        "'good'",
    ),
    "a mixed column of pandas": (
        memory(frame(rating=[4.0, "good", 3.0])),
        "rating is not a number",
        2,
        "'good'",
    ),
    "a gap of pandas": (
        memory(frame(rating=[4.0, None, 3.0])),
        "rating is not a number",
        2,
        "None",
    ),
    "a word among times as text": (
        memory(frame(time=["1970-01-01T00:00:30Z", "soon", "1970-01-01 00:00:40+00:00"])),
        "time is not valid",
        2,
        "'soon'",
    ),
}


@pytest.mark.parametrize("case", SKIPPED)
def test_one_bad_value_costs_one_row(case, tmp_path):
    make, rule, row, value = SKIPPED[case]
    source = make(tmp_path)
    data = uf.read_interactions(source, **ROLES, on_bad="skip")
    assert {1, 2} <= set(data.user_keys.to_pylist())
    assert data.user_keys.type == pa.int64()
    example = next(e for e in data.report.examples if e.rule == rule)
    assert data.report.counts[rule] == 1
    assert (example.row, example.value) == (row, value)
    assert data.report.rows_read == data.num_events + data.report.rows_bad
    with pytest.raises(DataError) as found:
        uf.read_interactions(source, **ROLES)
    message = str(found.value)
    assert "row " in message
    assert "--on-bad skip" in message
    if "a word after" not in case:
        assert f"row {row}" in message
        assert rule in message
        assert value in message


def test_a_filter_skips_what_is_no_number(tmp_path):
    path = put("log.csv", csv_of("1,x,bad,50,T", "1,x,1.0,60,T"))(tmp_path)
    data = uf.read_interactions(path, filter="rating > 2", on_bad="skip")
    assert data.report.counts == {"not a number": 1}
    assert (data.report.rows_read, data.report.rows_filtered, data.num_events) == (4, 1, 2)


@pytest.mark.parametrize(
    "form",
    ["%Y-%m-%dT%H:%M:%S.123Z", "%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%S.123456789",
     "%Y-%m-%d %H:%M:%S+00:00", "%Y-%m-%dT%H:%M:%S+0000", "%Y-%m-%d %H:%M:%S UTC"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "pandas"])
def test_times_by_iso_8601_are_read_everywhere(form, kind, tmp_path):
    times = [
        dt.datetime.fromtimestamp(1_600_000_000 + t, dt.UTC).strftime(form) for *_, t, _ in ROWS
    ]
    rows = [(*row[:3], time, row[4]) for row, time in zip(ROWS, times)]
    table = TABLE.set_column(3, "time", pa.array(times))
    if kind == "pandas":
        source = pytest.importorskip("pandas").DataFrame(table.to_pydict())
    elif kind == "parquet":
        pq.write_table(table, source := tmp_path / "log.parquet")
    else:
        text = lines(rows=rows) if kind == "csv" else json_lines(rows)
        source = put(f"log.{kind}", text)(tmp_path)
    data = uf.read_interactions(source, **ROLES)
    want = {k: [(i, r, t + 1_600_000_000) for i, r, t in rows] for k, rows in WANT.items()}
    assert histories(data) == want


def fifo(folder):
    os.mkfifo(folder / "log.csv")
    return folder / "log.csv"


def bomb():
    return zstd("user_id,item_id,title\n" + " " * (1100 << 20))


REFUSED = {
    "nothing": (memory(lambda: []), {}, "names no file"),
    "None": (memory(lambda: None), {}, "must be files or a table .*is NoneType"),
    "a number": (memory(lambda: 7), {}, "must be files or a table .*is int"),
    "a list of numbers": (memory(lambda: [7]), {}, "must be files or a table .*is list"),
    "two kinds": (
        listed("a.csv", "b.parquet"),
        {},
        r"a\.csv and 1 more holds files of more than one",
    ),
    "no header": (
        put("log.csv", lines(header=None)),
        {},
        "has no column 'user_id'.*header=.*--header",
    ),
    "too many names": (
        put("log.csv", lines(header=None)),
        {"header": "a,b"},
        "has 5 value.*names 2",
    ),
    "names twice": (
        put("log.csv", lines(header=None)),
        {"header": "a,a"},
        "header must name every",
    ),
    "another separator": (
        put("log.csv", lines("~")),
        {},
        r"say what separates them: sep \(--sep\)",
    ),
    "latin-1": (
        put("log.csv", lines().encode("latin-1")),
        {},
        "row 1, column 'title': text is not UTF-8.*--encoding",
    ),
    "no such encoding": (
        put("log.csv", lines()),
        {"encoding": "klingon"},
        "encoding must be .*'klingon'",
    ),
    "an encoding of no text": (
        put("log.csv", lines()),
        {"encoding": "hex"},
        "encoding must be .*'hex'",
    ),
    "the wrong encoding": (
        put("log.csv", lines().encode("utf-8")),
        {"encoding": "ascii"},
        "cannot be read",
    ),
    "no separator": (put("log.csv", lines()), {"sep": ""}, "sep must be 1 to 8"),
    "a new line": (put("log.csv", lines()), {"sep": "\n"}, "sep must be 1 to 8"),
    "torn gzip": (put("log.csv.gz", gzip.compress(lines().encode())[:30]), {}, "cannot be read"),
    "not gzip": (put("log.csv.gz", b"\x1f\x8bno"), {}, "cannot be read"),
    "packed Parquet": (
        put("log.parquet.gz", gzip.compress(b"PAR1")),
        {},
        "cannot be read: .*unpack",
    ),
    "a picture": (put("log.png", b"\x89PNG\r\n\0\0"), {}, "is of an unknown kind; known are"),
    "a workbook": (put("log.xlsx", b"PK\x03\x04\0\0"), {}, "is of an unknown kind; known are"),
    "an empty gzip": (put("log.csv.gz", gzip.compress(b"")), {}, "cannot be read: it is empty"),
    "JSON of another form": (put("log.json", '{\n "a": [\n1\n]}'), {}, "has no column 'user_id'"),
    "keys of two kinds": (
        put(
            "log.jsonl",
            '{"user_id":1,"item_id":1,"title":"t"}\n{"user_id":"a","item_id":1,"title":"t"}',
        ),
        {},
        "'user_id' holds values of more than one kind, as",
    ),
    "keys of two kinds in pandas": (
        memory(frame(user_id=[1, "a", 2])),
        {},
        "'user_id' holds values of more",
    ),
    "floats of pandas": (memory(frame(user_id=[1, None, 2])), {}, r"is double.*astype\('Int64'\)"),
    "a pipe": (fifo, {}, "is no regular file; write what it gives to one"),
    "a device": (memory(lambda: "/dev/null"), {}, "is no regular file"),
    "a zstd bomb": (lambda f: put("log.csv.zst", bomb())(f), {}, "beyond what is read"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_in_one_line(case, tmp_path):
    make, options, message = REFUSED[case]
    with pytest.raises(DataError, match=message) as found:
        uf.read_interactions(make(tmp_path), **options)
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 2000


def test_the_table_is_large():
    assert len(READ) + len(SKIPPED) + len(REFUSED) >= 100


def test_a_recbole_folder_is_log_and_items(tmp_path):
    put("ml.inter", lines("\t", RECBOLE[:4], [row[:4] for row in ROWS]))(tmp_path)
    items = [("x", "Ex"), ("y", "Why"), ("z", "Zed")]
    put("ml.item", lines("\t", ["item_id:token", "title:token_seq"], items))(tmp_path)
    put("ml.user", lines("\t", ["user_id:token", "age:float"], [(1, 30)]))(tmp_path)
    data = uf.read_interactions(tmp_path, tmp_path, **ROLES)
    assert histories(data) == WANT
    assert data.item_text.to_pylist() == ["Ex", "Why", "Zed"]


def test_the_items_may_be_written_otherwise(tmp_path):
    log = put("ratings.dat", lines("::", None, [row[:4] for row in ROWS]))(tmp_path)
    names = {"header": NAMES[:4], "sep": "::"}
    items = put("movies.dat", 'x::Ex, "1"\ny::Why\nz::Zed\n')(tmp_path)
    data = uf.read_interactions(log, items, **ROLES, **names, items_header="item_id,title")
    assert histories(data) == WANT
    assert data.item_text.to_pylist() == ['Ex, "1"', "Why", "Zed"]
    items = put("movies.csv", "item_id;title\nx;Ex\ny;Why\nz;Zed\n")(tmp_path)
    assert histories(uf.read_interactions(log, items, **ROLES, **names)) == WANT


def test_movielens_as_it_is_downloaded(tmp_path):
    log = put("ratings.dat", "1::1193::5::978300760\n2::661::3::978302109\n")(tmp_path)
    movies = "661::James (1996)::Animation|Children's|Musical\n1193::Café, Le::Drama\n"
    items = put("movies.dat", movies.encode("latin-1"))(tmp_path)
    data = uf.read_interactions(
        log,
        items,
        **ROLES,
        text="{title}[[ ({genres})]]",
        header="user_id,item_id,rating,time",
        items_header="item_id,title,genres",
        encoding="latin-1",
    )
    assert data.item_text.to_pylist() == [
        "James (1996) (Animation|Children's|Musical)", "Café, Le (Drama)",
    ]  # fmt: skip
    assert sorted(data.time.tolist()) == [978300760 * 10**6, 978302109 * 10**6]


def test_items_of_every_kind(tmp_path):
    items = {"item_id": ["x", "y", "z"], "title": ["Ex", "Why", "Zed"]}
    pd = pytest.importorskip("pandas")
    for given in (pd.DataFrame(items), pa.table(items).to_reader(), ds.dataset(pa.table(items))):
        data = uf.read_interactions(TABLE, given, **ROLES)
        assert data.item_text.to_pylist() == ["Ex", "Why", "Zed"]


def test_keys_that_were_integers_once_get_a_hint(tmp_path, caplog):
    log = put("log.csv", "user_id,item_id\n1,13.0\n2,14.0\n")(tmp_path)
    items = put("items.csv", "item_id,title\n13,a\n14,b\n")(tmp_path)
    with pytest.raises(DataError, match=r"(?s)unknown item \('13.0'\).*astype\('Int64'\)"):
        uf.read_interactions(log, items)
    assert "keys in column 'item_id' are written '13.0'" in caplog.text


def test_bad_rows_of_several_files_are_listed_in_their_order(tmp_path):
    put("a.csv", csv_of("1,x,no,50,T", "1,x"))(tmp_path)
    put("b.csv", csv_of("1,x,nay,50,T"))(tmp_path)
    data = uf.read_interactions(tmp_path, **ROLES, on_bad="skip")
    found = [(e.file[-5:], e.row, e.value) for e in data.report.examples]
    assert found == [("a.csv", 2, "'no'"), ("a.csv", 3, "'1,x'"), ("b.csv", 2, "'nay'")]


def test_a_list_is_streamed_with_items_in_memory(tmp_path):
    paths = listed("a.parquet", "b.parquet")(tmp_path)
    items = {"item_id": ["x", "y", "z"], "title": ["Ex", "Why", "Zed"]}
    read = {"work": tmp_path / "work", **ROLES}
    data = uf.stream_interactions(paths, pa.table(items), **read)
    assert histories(data.users(0, 3)) == WANT
    again = uf.stream_interactions(paths, pa.table(items).to_reader(1), **read)
    assert again.key == data.key
    other = uf.stream_interactions(paths, pa.table(items | {"title": list("abc")}), **read)
    assert other.item_text.to_pylist() == list("abc")
    with pytest.raises(DataError, match="a Table is in memory; only Parquet files are read"):
        uf.stream_interactions(TABLE, **read)


def test_bad_text_in_a_stream_is_skipped_as_in_memory(tmp_path):
    table = TABLE.set_column(
        3, "time", pa.array(["1970-01-01T00:00:20Z", "soon", *["1970-01-02"] * 3])
    )
    pq.write_table(table, tmp_path / "log.parquet")
    read = {"rating": "rating", "time": "time", "on_bad": "skip"}
    data = uf.read_interactions(tmp_path / "log.parquet", **read)
    stream = uf.stream_interactions(tmp_path / "log.parquet", work=tmp_path / "work", **read)
    assert stream.report == data.report
    assert data.report.counts == {"time is not valid": 1}
    assert histories(stream.users(0, 9)) == histories(data)
