"""What is well formed, signed and wrong is refused by name, or made again: found by the fuzz."""

import json
import re
import shutil
from decimal import Decimal
from pathlib import Path
from random import Random
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import structured
import tiny
import torch

import userip_fast as uf
from userip_fast.bank.checks import check_fields
from userip_fast.bank.parquet import bank_table
from userip_fast.core.config import LMConfig
from userip_fast.core.errors import ConfigError, DataError, FormatError, UnsupportedError
from userip_fast.core.files import sha256_file
from userip_fast.core.sums import folder_sums, sealed
from userip_fast.jobs.explain import explain
from userip_fast.jobs.shards import merge_shards
from userip_fast.lm import open_lm


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return structured.made_model(folder), folder / "model"


def sign(root: Path) -> None:
    about = json.loads((root / "manifest.json").read_text())
    structured.dump(
        sealed({**about, "files": folder_sums(root, ["events"])}), root / "manifest.json"
    )


def twice(path: Path, column: str) -> None:
    table = pq.read_table(path)
    pq.write_table(table.append_column(column, table[column]), path)


def filled(path: Path, name: str, value: object) -> None:
    table = pq.read_table(path)
    at = table.column_names.index(name)
    kind = table[name].type if value is None else None
    pq.write_table(table.set_column(at, name, pa.array([value] * len(table), kind)), path)


def behaviour(root: Path, **values: object) -> None:
    about = json.loads((root / "manifest.json").read_text())
    structured.dump({**about, "behaviour": about["behaviour"] | values}, root / "manifest.json")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: structured.dump(7, m / "codes.json"), "code cards"),
        (lambda m: structured.dump({"taste": [{"code": 0}]}, m / "codes.json"), "code cards"),
        (lambda m: twice(m / "catalogue.parquet", "item"), "a column twice"),
        (lambda m: filled(m / "catalogue.parquet", "count", "x"), "text and counts are"),
        (lambda m: behaviour(m, text_weight="x"), "text_weight must be float"),
        (lambda m: behaviour(m, scale={"words": 3, "thresholds": []}), "behaviour"),
        (lambda m: behaviour(m, chunk_tokens=10**9), "a format that was saved"),
    ],
)
def test_a_model_that_holds_something_else_is_refused(made, tmp_path, change, named):
    root = tmp_path / "model"
    shutil.copytree(made[1], root)
    change(root)
    sign(root)
    with pytest.raises((FormatError, DataError), match=named):
        uf.Model.load(root).profile([0], [5])


def test_a_tokenizer_with_ids_that_are_text_is_refused_by_name(tmp_path):
    root = tiny.save("llama", tmp_path / "lm")
    about = json.loads((root / "tokenizer.json").read_text())
    about["added_tokens"] = "x"
    structured.dump(about, root / "tokenizer.json")
    with pytest.raises(UnsupportedError, match="LM '"):
        open_lm(str(root), LMConfig(device="cpu"))
    whole = open_lm(str(tiny.save("llama", tmp_path / "whole")), LMConfig(device="cpu"))
    with (
        mock.patch("userip_fast.lm.stored.fingerprint", side_effect=TypeError("'>' of str")),
        pytest.raises(UnsupportedError, match="cannot be used: TypeError"),
    ):
        open_lm(whole.source, LMConfig(device="cpu"))


def lists(values: list[int], lengths: list[int], kind: pa.DataType) -> pa.Array:
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int64())
    return pa.LargeListArray.from_arrays(offsets, pa.array(values, kind))


@pytest.mark.parametrize(
    ("name", "values", "named"),
    [
        ("item", lists([0] * 23 + [6], [3] * 8, pa.int32()), "must be below 6"),
        ("item", lists([0] * 24, [3] * 8, pa.int64()), "item: large_list<item: int64>"),
        ("item", pa.array(["x"] * 8), "item: string"),
        ("events", pa.array([2, 4] * 4), "as many values"),
        ("time", lists([0] * 24, [2, 4] * 4, pa.int64()), "as many values"),
        ("user", pa.array([1, None] * 4), "4 nulls"),
    ],
)
def test_a_part_of_work_that_holds_something_else_is_refused(tmp_path, name, values, named):
    structured.work(tmp_path)
    root = tmp_path / "work" / "histories"
    (path,) = root.glob("*.arrow")
    table = pa.ipc.open_file(path.read_bytes()).read_all()
    table = table.set_column(table.column_names.index(name), name, values)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    about = json.loads((root / "manifest.json").read_text())
    about["parts"][0]["sha256"] = sha256_file(path)
    structured.dump(sealed(about), root / "manifest.json")
    with pytest.raises(FormatError, match=named):
        uf.data.InteractionStream(root).users(0, 8)


@pytest.mark.parametrize(
    "change", [{"ratings": [[1], [2**70]]}, {"parts": 3}, {"ordered": 1}, {"events": -1}]
)
def test_a_manifest_of_work_that_says_something_else_is_refused(tmp_path, change):
    structured.work(tmp_path)
    path = tmp_path / "work" / "histories" / "manifest.json"
    structured.dump(sealed({**json.loads(path.read_text()), **change}), path)
    with pytest.raises(FormatError, match="is damaged"):
        uf.data.InteractionStream(path.parent)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("code", [-1, 4, 2**40, 0.5, float("nan"), Decimal(-1), None, "x", [1]])
def test_what_is_no_code_in_a_shard_is_refused(tmp_path, code):
    fields = [{"name": "a", "codebook_size": 4, "code_names": None}]
    table = bank_table(
        pa.array([1]), np.array([[1]]), fields=fields, model_fingerprint="m",
        metadata={"shard": [0, 1]},
    )  # fmt: skip
    about = json.loads(table.schema.metadata[b"userip_fast.bank"])
    del about["sha256"]  # which no such table has
    told = {b"userip_fast.bank": json.dumps(about)}
    table = table.set_column(1, "a", pa.array([code])).replace_schema_metadata(told)
    pq.write_table(table, tmp_path / "shard-00000-of-00001.parquet")
    with pytest.raises((FormatError, DataError), match=r"shard-00000|code_ids"):
        merge_shards(tmp_path, tmp_path / "bank")


@pytest.mark.filterwarnings("error")
def test_codes_of_several_types_and_beyond_them_are_refused(tmp_path):
    fields = [{"name": n, "codebook_size": 4, "code_names": None} for n in "ab"]
    table = bank_table(
        pa.array([1]), np.array([[1, 2]]), fields=fields, model_fingerprint="m",
        metadata={"shard": [0, 1]},
    )  # fmt: skip
    for column, code in ((1, pa.array([2**63], pa.uint64())), (2, pa.array([-1], pa.int64()))):
        table = table.set_column(column, "ab"[column - 1], code)
    pq.write_table(table, tmp_path / "shard-00000-of-00001.parquet")
    with pytest.raises(FormatError, match="shard-00000"):
        merge_shards(tmp_path, tmp_path / "bank")


@pytest.mark.parametrize("said", [[0, 8], [1, 8], None, "0/1", [0, 1, 1]])
def test_a_shard_that_was_made_as_another_one_is_refused(tmp_path, said):
    fields = [{"name": "a", "codebook_size": 4, "code_names": None}]
    about = {} if said is None else {"shard": said}
    table = bank_table(
        pa.array([1]), np.array([[1]]), fields=fields, model_fingerprint="m", metadata=about
    )
    pq.write_table(table, tmp_path / "shard-00000-of-00001.parquet")
    shown = re.escape("/".join(map(str, said))) if said in ([0, 8], [1, 8]) else "none"
    with pytest.raises(FormatError, match=f"shard-00000-of-00001.*says that it is shard {shown};"):
        merge_shards(tmp_path, tmp_path / "bank")
    assert not (tmp_path / "bank").exists()


@pytest.mark.parametrize("fields", ["a", {"a": 1}, ["a"], [{"name": "a", "codebook_size": 2,
                                                            "code_names": 7}]])  # fmt: skip
def test_fields_of_another_form_are_refused(fields):
    with pytest.raises(ConfigError, match="must be a"):
        check_fields(fields)


def test_users_tables_with_other_keys_and_nested_traits(made):
    model, data = made[0], structured.read_log()
    with pytest.raises(DataError, match="must hold keys of users"):
        explain(model, data, pa.table({"user_id": ["x"], "a": ["y"]}))
    nested = pa.table({"user_id": data.user_keys, "a": [{"b": 1}] * 8, "c": ["x", "y"] * 4})
    found = explain(model, data, nested, permutations=2)
    assert list(found["associations"]["taste"]) == ["c"]
    with pytest.raises(DataError, match="a is struct"):
        explain(model, data, nested, traits=["a"], permutations=2)


def test_text_as_views_reads_as_other_text():
    log, items = structured.log_and_items()
    views = items.set_column(1, "title", items["title"].cast(pa.string_view()))
    read = uf.read_interactions(log, views, filter="rating > 1")
    assert read.item_text.equals(uf.read_interactions(log, items).item_text)


def test_a_finished_block_of_another_form_is_computed_again(tmp_path, caplog):
    job = structured.block_cache(tmp_path)
    for i in range(40):
        job(Random(i))
    for scope in ("profiles", "table", "descents"):
        assert f"passed over and computed again: {scope}" in caplog.text


DAMAGE = {
    "flipped": lambda data: data[:-3] + bytes([data[-3] ^ 4]) + data[-2:],
    "truncated": lambda data: data[: len(data) // 2],
    "emptied": lambda data: b"",
    "without its sum": lambda data: data.replace(b"sha256", b"sha257"),
    "of another entry": lambda data: re.sub(rb'("entry":"\w+ )\w{8}', rb"\g<1>01234567", data),
}


@pytest.mark.parametrize("scope", ["table", "descents"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_block_is_made_again_with_a_word(made, tmp_path, caplog, scope, damage):
    find = structured.finished_blocks(made[0], tmp_path)[scope]
    want = find()
    (file,) = (tmp_path / scope).iterdir()
    whole = file.read_bytes()
    assert torch.equal(find(), want)
    assert not caplog.records
    file.write_bytes(DAMAGE[damage](whole))
    assert torch.equal(find(), want)
    assert f"a finished block is passed over and computed again: {file}: " in caplog.text
    caplog.clear()
    assert torch.equal(find(), want)
    assert not caplog.records
