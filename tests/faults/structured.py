"""Inputs that are well formed and wrong, for `fuzz.py`: structure is changed, then signed again.

A target is made in a folder and gives a function of a `random.Random`, which changes one thing of
something whole (a key, a type, a size, a value), writes it with the sums it would have, and reads
it. So what is behind the sums is met: an input is past the first check unless the message is one
of those that tear and bad sums get.
"""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import tiny
import torch
from safetensors import safe_open

import userip_fast as uf
from userip_fast.bank import redis_export
from userip_fast.cli.flags import settings_of
from userip_fast.core.config import Config, DataConfig, EMConfig, LMConfig
from userip_fast.core.errors import UserIPError
from userip_fast.core.files import read_tensors, sha256_file, write_tensors
from userip_fast.core.sums import MANIFEST, folder_sums, sealed
from userip_fast.data.filters import RowFilter
from userip_fast.data.nete import read_nete
from userip_fast.em.cache import DiskCache
from userip_fast.em.counted import Counted, WordFactors
from userip_fast.em.gradient import GradientEStep
from userip_fast.em.steps import EMState
from userip_fast.em.table import EventTable
from userip_fast.jobs.explain import explain
from userip_fast.jobs.shards import merge_shards, parse_shard
from userip_fast.lm import open_lm
from userip_fast.report.write import report_run

Job = Callable[[Random], Any]
FIRST_CHECK = re.compile(
    "altered|SHA-256 differs|is not in the manifest|cannot be read as JSON|not a userip_fast model"
    "|cannot be read as safetensors|is no run folder|not a pickle"
    "|cannot be parsed|must be NAME:PROMPT|must be I/N|the Redis URL"
)
ODD = (
    None, True, 0, 1, -1, 3, 2**31, 2**63, -(2**70), 0.5, -0.0, 1e308, math.nan, math.inf, "",
    "0", "nan", "é\u202e\x1b[2J", "x" * 5000, "../x", [], {}, [0], [[]], {"a": 1}, [None] * 3,
    [1, "a"],
)  # fmt: skip
CONFIG = Config(
    data=DataConfig(rating="rating", max_tokens=60, behaviour_context="independent"),
    em=EMConfig(estep="posterior", rounds=1, codebook_update="ema", kmeans_restarts=1),
    fields=(uf.ProfileField("taste", "The user's taste is", 1, 3, ("red", "blue")),),
)


# Changes


def changed(value: Any, draw: Random, times: int = 1) -> Any:
    """A copy of nested lists, tuples and dicts with something changed at `times` random places."""
    value = copy.deepcopy(value)
    for _ in range(times):
        value = _changed(value, draw)
    return value


def _changed(value: Any, draw: Random) -> Any:
    if isinstance(value, dict | list) and value and draw.random() < 0.8:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = draw.choice(keys)
        what = draw.random()
        if what < 0.12:
            del value[key]
        elif what < 0.2 and isinstance(value, dict):
            value[draw.choice([f"{key}_", "", "7"])] = value.pop(key)
        elif what < 0.26 and isinstance(value, list):
            value.insert(key, copy.deepcopy(value[draw.choice(keys)]))
        elif what < 0.32:
            value[key] = value[draw.choice(keys)]
        else:
            value[key] = _changed(value[key], draw)
        return value
    if isinstance(value, tuple) and value and draw.random() < 0.8:
        inside = _changed(list(value), draw)
        return tuple(inside) if isinstance(inside, list) else inside
    if isinstance(value, str) and draw.random() < 0.4:
        return draw.choice([value.upper(), value[:-1], value * 2, f"{value}/..", f" {value}"])
    if isinstance(value, int | float) and draw.random() < 0.5:
        return draw.choice([value + 1, value - 1, -value, value * 1000, float(value), str(value)])
    if draw.random() < 0.1:
        return [value]
    return copy.deepcopy(draw.choice(ODD))


def changed_tensors(tensors: dict[str, torch.Tensor], draw: Random) -> dict[str, torch.Tensor]:
    out = dict(tensors)
    name = draw.choice(sorted(out))
    x = out[name]
    kinds = (torch.float64, torch.float16, torch.int64, torch.int8, torch.bool, torch.bfloat16)
    odd = torch.tensor(draw.choice([math.nan, math.inf, 0.0, -1.0, 1e30]))
    noise = draw.choice(["name", "gone", "more", "type", "shape", "size", "value", "scalar"])
    if noise == "name":
        out[draw.choice([name + "x", "x", "1." + name, name.replace("0", "00")])] = out.pop(name)
    elif noise == "gone":
        del out[name]
    elif noise == "more":
        out[draw.choice(["0.x", "9.codewords", "x", "7"])] = x.clone()
    elif noise == "type":
        out[name] = x.to(draw.choice(kinds))
    elif noise == "shape":
        out[name] = draw.choice([x[None], x.flatten(), x.T.contiguous() if x.dim() == 2 else x])
    elif noise == "size":
        axis = draw.randrange(max(1, x.dim()))
        keep = draw.choice([0, 1, 2]) if x.dim() else 0
        out[name] = x.narrow(axis, 0, min(keep, x.shape[axis])) if x.dim() else x
    elif noise == "scalar":
        out[name] = odd
    else:
        flat = x.clone().flatten()
        if len(flat):
            where = torch.tensor([draw.randrange(len(flat)) for _ in range(draw.choice([1, 50]))])
            flat[where] = odd.nan_to_num(0.0).clamp(-1, 1).to(x.dtype) if not (
                x.is_floating_point()
            ) else odd.to(x.dtype)  # fmt: skip
        out[name] = flat.view(x.shape)
    return out


def changed_table(table: pa.Table, draw: Random) -> pa.Table:
    """With a column or some rows changed; column types that readers may not expect."""
    name = draw.choice(table.column_names)
    at, column = table.column_names.index(name), table[name]
    noises = ["gone", "name", "twice", "type", "nulls", "rows", "value", "value", "more"]
    noise = draw.choice(noises)
    if noise == "gone":
        return table.drop_columns([name])
    if noise == "name":
        new = draw.choice([name.upper(), "", "item", "x" * 3000, name + "\x00"])
        return table.rename_columns([new if c == name else c for c in table.column_names])
    if noise == "twice":
        return table.append_column(name, column)
    if noise == "more":
        return table.append_column(draw.choice(["__key", "place", "é"]), column)
    if noise == "nulls":
        keep = pa.array([draw.random() < draw.choice([0, 0.5, 0.9]) for _ in range(len(table))])
        return table.set_column(at, name, pc.if_else(keep, column, pa.scalar(None, column.type)))
    if noise == "rows":
        rows = [draw.randrange(len(table)) for _ in range(draw.choice([0, 1, 2 * len(table)]))]
        return table.take(pa.array(rows, pa.int64()))
    if noise == "value":
        values = column.to_pylist()
        for _ in range(draw.choice([1, 5])):
            values[draw.randrange(len(values))] = draw.choice(ODD)
        kind = draw.choice([None, column.type])
    else:
        values = column.to_pylist()
        kind = draw.choice([
            pa.string(), pa.large_string(), pa.binary(), pa.float16(), pa.float64(), pa.uint64(),
            pa.int8(), pa.bool_(), pa.timestamp("ms"), pa.date32(), pa.decimal128(20, 3),
            pa.dictionary(pa.int8(), pa.string()), pa.list_(pa.int64()),
            pa.struct([("a", pa.int8())]), pa.null(), pa.string_view(), pa.duration("s"),
        ])  # fmt: skip
        if pa.types.is_null(kind):
            values = [None] * len(values)
        elif pa.types.is_list(kind):
            values = [[1]] * len(values)
        elif pa.types.is_struct(kind):
            values = [{"a": 1}] * len(values)
        elif pa.types.is_string(kind) or pa.types.is_large_string(kind) or "view" in str(kind):
            values = [str(v) for v in values]
    try:
        made = pa.array(values, kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        made = pa.array([str(v) for v in values])  # what Arrow itself cannot hold is text
    return table.set_column(at, name, made)


def write_table(table: pa.Table, path: Path) -> None:
    try:
        pq.write_table(table, path)
    except (pa.ArrowException, ValueError):  # a type that Parquet has not
        pq.write_table(table.select([]), path)


def dump(value: Any, path: Path) -> None:
    path.write_text(json.dumps(value))


# Targets


def log_and_items() -> tuple[pa.Table, pa.Table]:
    draw = np.random.default_rng(0)
    user = np.repeat(np.arange(8), 3)
    log = {
        "user_id": user,
        "item_id": draw.integers(0, len(tiny.TEXTS), len(user)),
        "rating": draw.integers(1, 6, len(user)).astype(float),
        "time": 1_500_000_000 + np.arange(len(user)),
    }
    return pa.table(log), pa.table({"item_id": range(len(tiny.TEXTS)), "title": tiny.TEXTS})


def read_log() -> uf.Interactions:
    return uf.read_interactions(*log_and_items(), rating="rating", time="time")


def made_model(folder: Path, config: Config = CONFIG) -> uf.Model:
    """A fitted model with its LM in the folder `folder/model`."""
    lm = open_lm(str(tiny.save("llama", folder / "lm")), LMConfig(device="cpu"))
    lm.embedded = True
    model = uf.fit(read_log(), lm, config=config)
    model.save(folder / "model")
    return model


def finished_blocks(made: uf.Model, folder: Path) -> dict[str, Callable[[], torch.Tensor]]:
    """What a block of the event table and one of descents give, kept in `folder` once found."""
    trainer, em = made.ready_trainer(), made.config.em
    kinds = list(made.event_table()._numbering.number)
    block = trainer.block(made.source(read_log()), 0, 4)
    cache = DiskCache(folder, b"run")

    def table() -> torch.Tensor:
        found = EventTable(trainer.engine, made.format, made.codebooks, em, made.calibration)
        found.cache = cache
        found.read(kinds)
        return found.values

    def descents() -> torch.Tensor:
        estep = GradientEStep(trainer.engine, made.start, replace(em, steps=2), cache=cache)
        theta = estep.run(block, None, EMState()).theta
        assert theta is not None
        return theta

    return {"table": table, "descents": descents}


def model(folder: Path) -> Job:
    """Any file of a model folder; then what a loaded model is asked for."""
    made = made_model(folder)
    # So few users are no judges of counts: some are put there.
    factors = np.random.default_rng(0).normal(size=(2, 3, 3)).astype(np.float16)
    shared = WordFactors(["red", "reel"], factors)
    counted = Counted(tiny.TEXTS[:2], factors, shared)
    made.calibration = replace(made.calibration, counted=counted)
    made.keep_table(None)
    root = folder / "counted"
    made.save(root)
    assert {"counted.parquet", "words.parquet"} <= {p.name for p in root.iterdir()}
    whole = {p: p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
    files = [p for p in whole if p.parent == root or p.name == "config.json"]
    items, rated = [0, 3, 1], [5, 1, 3]

    def job(draw: Random) -> None:
        path = draw.choice(files)
        try:
            if path.suffix == ".json":
                dump(changed(json.loads(whole[path]), draw, draw.choice([1, 1, 2])), path)
            elif path.suffix == ".parquet":
                write_table(changed_table(pq.read_table(path), draw), path)
            else:
                write_tensors(path, changed_tensors(read_tensors(path), draw))
            if path.name != MANIFEST:
                files_now = folder_sums(root, ["events"])
                about = {**json.loads(whole[root / MANIFEST]), "files": files_now}
            else:
                about = json.loads(path.read_text())
            if isinstance(about, dict):
                dump(sealed(about), root / MANIFEST)
            loaded = uf.Model.load(root)
            loaded.bank_fields()
            p = loaded.profile(items, rated)
            assert abs(float(p.sum()) - 1) < 1e-3, "probabilities that are none were served"
            codes = loaded.infer(read_log())
            sizes = [f.codebook_size for f in loaded.config.fields]
            assert (codes <= np.array(sizes)).all()
        finally:
            for p, data in whole.items():
                p.write_bytes(data)

    return job


def lm_folder(folder: Path) -> Job:
    """config.json, tokenizer files and weights of an external LM."""
    root = tiny.save("llama", folder / "lm")
    whole = {p: p.read_bytes() for p in sorted(root.iterdir())}

    def job(draw: Random) -> None:
        path = draw.choice(list(whole))
        try:
            if path.suffix == ".json":
                dump(changed(json.loads(whole[path]), draw), path)
            elif path.suffix == ".safetensors":
                tensors = changed_tensors(read_tensors(path), draw)
                write_tensors(path, tensors, {"format": "pt"})
            open_lm(str(root), LMConfig(device="cpu"))
        finally:
            path.write_bytes(whole[path])

    return job


def work(folder: Path) -> Job:
    """Manifest, items and parts of a sorted log, signed again."""
    log, items = log_and_items()
    pq.write_table(log, folder / "log.parquet")
    pq.write_table(items, folder / "items.parquet")
    paths, root = (folder / "log.parquet", folder / "items.parquet"), folder / "work" / "histories"

    def stream() -> uf.InteractionStream:
        return uf.stream_interactions(*paths, work=folder / "work", rating="rating", time="time")

    stream()
    whole = {p: p.read_bytes() for p in root.iterdir()}

    def job(draw: Random) -> None:
        path = draw.choice(list(whole))
        about = json.loads(whole[root / "manifest.json"])
        try:
            if path.name == "manifest.json":
                key, about = about["key"], changed(about, draw)
                if isinstance(about, dict):  # with another key it would be read anew
                    about["key"] = key
            elif path.name == "items.parquet":
                write_table(changed_table(pq.read_table(path), draw), path)
                about["items_sha256"] = sha256_file(path)
            else:
                table = pa.ipc.open_file(whole[path]).read_all()
                table = changed_table(table, draw)
                with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as w:
                    w.write_table(table)
                about["parts"][0]["sha256"] = sha256_file(path)
            dump(sealed(about) if isinstance(about, dict) else about, root / "manifest.json")
            found = stream()
            users = found.users(0, found.num_users)
            users.user_keys.to_pylist()
            users.item_text.take(pa.array(users.item_index)).to_pylist()
            found.item_counts().sum()
        finally:
            shutil.rmtree(root)
            root.mkdir()
            for p, data in whole.items():
                p.write_bytes(data)

    return job


def shards(folder: Path) -> Job:
    """Two shards, one of which says or holds something else, signed again."""
    from userip_fast.bank.parquet import _SCHEMA_KEY, _digest, bank_table

    fields = [{"name": "a", "codebook_size": 4, "code_names": None}]

    def shard(i: int) -> pa.Table:
        about = {"userip_fast": "0", "shard": [i, 2], "data": "d"}
        keys = pa.array(np.arange(5) + 5 * i)
        codes = np.arange(5, dtype=np.uint8)[:, None] % 4
        return bank_table(keys, codes, fields=fields, model_fingerprint="m", metadata=about)

    def job(draw: Random) -> None:
        here = folder / "shards"
        shutil.rmtree(here, ignore_errors=True)
        here.mkdir()
        for i in range(2):
            pq.write_table(shard(i), here / f"shard-{i:05d}-of-00002.parquet")
        i = draw.randrange(2)
        table = shard(i)
        about = json.loads(table.schema.metadata[_SCHEMA_KEY])
        if draw.random() < 0.5:
            digest = about.pop("sha256")
            about = changed(about, draw)
            if isinstance(about, dict):
                about["sha256"] = digest
        else:
            table = changed_table(table, draw)
            try:
                codes = table["a"].to_numpy()[:, None]
                with np.errstate(invalid="ignore"):  # codes that are no numbers have one too
                    about["sha256"] = _digest(table["user_id"], codes, None)
            except Exception:  # what has no digest is written without
                about.pop("sha256")
        table = table.replace_schema_metadata({_SCHEMA_KEY: json.dumps(about)})
        write_table(table, here / f"shard-{i:05d}-of-00002.parquet")
        bank = merge_shards(here, folder / "bank")
        codes = bank.codes()
        sizes = [f["codebook_size"] for f in bank.fields]
        assert (codes <= np.array(sizes)).all()
        bank.verify()

    return job


def tables(folder: Path) -> Job:
    """Logs and item tables, in memory, as Parquet and as CSV."""
    log, items = log_and_items()

    def job(draw: Random) -> None:
        given: list[Any] = [log, items]
        at = draw.randrange(2)
        given[at] = changed_table(given[at], draw)
        form = draw.choice(["memory", "parquet", "csv"])
        if form == "parquet":
            write_table(given[at], folder / "t.parquet")
            given[at] = folder / "t.parquet"
        elif form == "csv":
            try:
                pacsv.write_csv(given[at], folder / "t.csv")
                given[at] = folder / "t.csv"
            except pa.ArrowException:  # lists and the like, which CSV has not
                pass
        rule = draw.choice(["error", "skip"])
        read = uf.read_interactions(*given, rating="rating", time="time", on_bad=rule)
        assert read.num_users > 0

    return job


def times(folder: Path) -> Job:
    """Times of one or two forms, as text, numbers and Arrow's own."""
    log, items = log_and_items()
    n = len(log)

    def text(draw: Random) -> str:
        date = f"{draw.choice([1969, 1970, 2024, 2020, 9999])}-{draw.choice([1, 2, 12, 13]):02}-"
        date += f"{draw.choice([1, 29, 31, 99]):02}"
        clock = f"{draw.choice('T ')}{draw.choice([0, 12, 24]):02}:{draw.choice([0, 59, 61]):02}:00"
        zone = draw.choice(["", "Z", "+01:00", " UTC", "+99:99"])
        return draw.choice([date, date + clock + draw.choice(["", ".123", "."]) + zone])

    def job(draw: Random) -> None:
        forms: list[Callable[[], Any]] = [
            lambda: text(draw),
            lambda: draw.randrange(10**9, 2 * 10**9),
            lambda: draw.randrange(10**12, 2 * 10**12),
            lambda: draw.uniform(1e9, 2e9),
            lambda: draw.choice([None, 0, -1, 1e300, math.nan, 2**62]),
        ]
        use = draw.sample(forms, draw.choice([1, 1, 2]))
        values = [draw.choice(use)() for _ in range(n)]
        try:
            column = pa.array(values)
            if draw.random() < 0.3:
                column = column.cast(pa.timestamp(draw.choice(["s", "ms", "us", "ns"])))
        except (pa.ArrowException, TypeError):
            column = pa.array([str(v) for v in values])
        given = log.set_column(3, "time", column)
        read = uf.read_interactions(
            given, items, rating="rating", time="time", on_bad=draw.choice(["error", "skip"])
        )
        assert read.ordered

    return job


def users_table(folder: Path) -> Job:
    """Traits of users for `userip explain`."""
    made, data = made_model(folder), read_log()
    bank = made.infer(data, folder / "bank")
    n = data.num_users
    users = pa.table(
        {"user_id": data.user_keys, "age": np.arange(n) * 1.5, "town": ["a", "b"] * (n // 2)}
    )

    def job(draw: Random) -> None:
        explain(made, data, changed_table(users, draw), bank=bank, permutations=2)

    return job


def nete(folder: Path) -> Job:
    """Review pickles in every protocol, and the indexes of a fold."""
    records = [
        {"user": f"u{i % 3}", "item": f"i{i % 4}", "rating": 1 + i % 5, "price": 2.5,
         "template": ("room", "clean", "a clean room", 1)}
        for i in range(12)
    ]  # fmt: skip
    indexes = {"train": list(range(8)), "validation": [8, 9], "test": [10, 11]}
    (folder / "1").mkdir()

    def job(draw: Random) -> None:
        found, about = records, indexes
        if draw.random() < 0.7:
            found = changed(records, draw, draw.choice([1, 1, 3]))
        else:
            about = {**indexes, "train": changed(indexes["train"], draw)}
        protocol = draw.randrange(pickle.HIGHEST_PROTOCOL + 1)
        (folder / "reviews.pickle").write_bytes(pickle.dumps(found, protocol))
        for name, rows in about.items():
            line = " ".join(map(str, rows)) if isinstance(rows, list) else str(rows)
            (folder / "1" / f"{name}.index").write_text(line, errors="replace")
        rule = draw.choice(["error", "skip"])
        read_nete(folder, fold=draw.choice([None, 1]), on_bad=rule)

    return job


def run_folder(folder: Path) -> Job:
    """What `userip report` reads; ctr.json also as older versions wrote it."""
    metric = {"mean": 0.7, "std": 0.01, "seeds": [0.7, 0.71], "ci95": [0.69, 0.71]}
    against = {"none": {"difference": 0.02, "ci95": [0.01, 0.03], "p": 0.01}}
    ctr = {
        "auc": {"none": {"dcn": metric}, "kmeans": None, "ids": {"dcn": metric}},
        "reasons": {"kmeans": "no column"}, "protocol": "cold", "label": "rating>=4",
        "paired": {"dcn": {"best_cluster": None, "against": against}},
        "settings": {"features": ["none", "kmeans", "ids"], "backbones": ["dcn"]},
        "floor": {"item_rate": 0.61}, "warnings": ["few"],
        "codes": {"0": {"perplexity": [3.2], "dead": [1], "largest": [0.4], "bits": {},
                        "generosity_share": [0.75]}},
    }  # fmt: skip
    card = {"code": 0, "users": 3, "words": ["elf"], "items": ["rings"], "lift": [4.25],
            "told": [{"what": "war", "ratio": 2.0, "low": 1.5, "high": 2.5}],
            "reactions": {"bad": 0.5, "good": 0.5}}  # fmt: skip
    read = {"events": 9, "told": 8, "users_cut": 1, "tokens": 30, "unknown": 0}
    scale = {"words": ["bad", "good"], "thresholds": [3.0]}
    nll = {"told": 0.9, "untold": 1.1, "item": 1.0}
    told = {"code": 0, "typical": ["a"], "avoided": [],
            "examples": [{"user": 1, "p": 0.5, "behaviour": "a"}]}  # fmt: skip
    trait = {"users": 3, "bits": 0.1, "chance_bits": 0.1, "p": 0.5}
    whole: dict[str, Any] = {
        "metrics.json": {"data": {"users": 3, "items": 2, "events": 9, "told": read}, "seed": 0,
                         "run": {"userip_fast": "1", "date": "2026-01-02T03:04:05+00:00"},
                         "fields": {"a": {"codes": 2, "perplexity": 1.5, "counts": [3, 0],
                                          "named": 0.5}}},
        "metrics.jsonl": {"round": 0, "nll_per_weight": 2.5, "fields": {}, "elbo": -2.0},
        "model/manifest.json": {"behaviour": {"template": "{text}", "text": "{t}",
                                              "scale": scale}},
        "model/codes.json": {"a": [card, {**card, "code": 1}]},
        "model/lm/training.json": {"tokens": [1, 2], "loss": [3.0, 2.0], "scored": [3.0, 2.0],
                                   "held_out": [1.0, 0.9], "nll": nll},
        "confusion.json": {"a": {"traits": ["x", "y"], "counts": [[3, 0, 1], [0, 5, 0]]}},
        "explain.json": {"fields": {"a": {"codes": [told]}}, "associations": {"a": {"t": trait}}},
        "ctr.json": ctr,
        "cold/ctr.json": {k: v for k, v in ctr.items() if k not in ("floor", "codes", "warnings")},
    }  # fmt: skip
    (folder / "model" / "lm").mkdir(parents=True)
    (folder / "cold").mkdir()
    for name, value in whole.items():
        dump(value, folder / name)
    write_tensors(folder / "model" / "codebooks.safetensors", {"0.codewords": torch.rand(2, 4)})
    dump(CONFIG.to_dict(), folder / "model" / "config.json")

    def job(draw: Random) -> None:
        name = draw.choice(list(whole))
        try:
            dump(changed(whole[name], draw, draw.choice([1, 1, 2])), folder / name)
            report_run(folder)
        finally:
            dump(whole[name], folder / name)

    return job


class StandIn:
    """As much of a Redis client as a reader uses, over a dict."""

    def __init__(self, values: dict[str, bytes]) -> None:
        self.values, self.queue = values, []

    def get(self, key: str) -> bytes | None:
        return self.values.get(key)

    def pipeline(self, transaction: bool) -> StandIn:
        return StandIn(self.values)

    def getrange(self, key: str, start: int, end: int) -> None:
        self.queue.append(self.values.get(key, b"")[start : end + 1])

    def mget(self, keys: list[str]) -> None:
        self.queue.append([self.values.get(k) for k in keys])

    def execute(self) -> list[Any]:
        return self.queue


def redis_values(folder: Path) -> Job:
    fields = [{"name": n, "codebook_size": k, "code_names": None} for n, k in (("a", 4), ("b", 9))]
    about = {"digest": "d" * 64, "fields": fields, "dtype": "|u1", "key_type": "int64", "users": 3,
             "model_fingerprint": "m", "probabilities": True, "best": True}  # fmt: skip
    profile = np.float16([0.25] * 4 + [0.125] * 8 + [0]).tobytes()

    def job(draw: Random) -> None:
        users = {f"n:v:u:{k}": bytes([k, 8 - k]) + profile for k in range(3)}
        users |= {f"n:v:t:{k}": b"[[7, 0.5], [8, 0.25]]" for k in range(3)}
        told = json.dumps(about if draw.random() < 0.4 else changed(about, draw)).encode()
        if told == json.dumps(about).encode():
            key = draw.choice(list(users))
            size, top = draw.choice([0, 2, 27, 28, 28, 28, 29, 30]), draw.choice([5, 256])
            users[key] = bytes(draw.randrange(top) for _ in range(size))
        name = draw.choice([b"v"] * 8 + [b"w", b"\xff"])
        client = StandIn({"n:current": name, "n:v:about": told, **users})
        with mock.patch.object(redis_export, "connect", return_value=client):
            bank = redis_export.RedisBank("redis://h", "n")
            asked = [0, 1, 2, 9], "code"
            read = draw.choice([bank.lookup, bank.lookup_profiles, bank.top_items])
            found = read(*asked)
        sizes = [f["codebook_size"] for f in bank.fields]
        if read == bank.lookup:
            assert found.shape == (4, len(sizes))
            assert (found <= np.array(sizes)).all()
        elif read == bank.lookup_profiles:
            assert found.shape == (4, sum(sizes))
            assert ((found >= 0) & (found <= 1)).all()
        else:
            assert all(isinstance(s, float) for own in found for _, s in own)

    return job


def block_cache(folder: Path) -> Job:
    """Finished blocks of an inference, of an event table and of descents, signed again."""
    config = replace(
        CONFIG,
        data=replace(CONFIG.data, behaviour_context="sequence"),
        em=replace(CONFIG.em, block_users=4),
    )
    made, data = made_model(folder, config), read_log()
    kept: list[Path] = []

    def keep(cache: DiskCache) -> None:
        kept.extend(sorted(cache.folder.rglob("*.safetensors")))

    with mock.patch.object(DiskCache, "clear", keep):
        want = made.infer(data, folder / "bank").codes()
    independent = made_model(folder / "independent")
    others = finished_blocks(independent, folder / "blocks")
    shapes = {name: find().shape for name, find in others.items()}
    kept += sorted((folder / "blocks").rglob("*.safetensors"))
    whole = {p: p.read_bytes() for p in kept}

    def job(draw: Random) -> None:
        path = draw.choice(kept)
        for p, content in whole.items():
            p.parent.mkdir(parents=True, exist_ok=True)
            p.write_bytes(content)
        sign_again(path, changed_tensors(read_tensors(path), draw))
        if path.parent.name in others:
            assert others[path.parent.name]().shape == shapes[path.parent.name]
            return
        codes = made.infer(data, folder / "bank").codes()
        assert codes.shape == want.shape
        assert (codes <= 3).all()

    return job


def sign_again(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Other tensors in the place of a file's, with its metadata and their own sum."""
    with safe_open(path, "pt") as file:
        about = file.metadata()
    write_tensors(path, tensors, {k: v for k, v in about.items() if k != "sha256"})


def row_filters(folder: Path) -> Job:
    table = log_and_items()[0].append_column("title", pa.array(["a"] * 24))
    names = ["rating", "user_id", "title", "time", "nothing"]
    values = ["3", "-1", "2.5", "'a'", "True", "10**9", "9" * 400, "1e999", "''", "nan"]

    def term(draw: Random, depth: int) -> str:
        kind = draw.random()
        if depth and kind < 0.3:
            join = draw.choice(["and", "or"])
            return f"({term(draw, depth - 1)} {join} {term(draw, depth - 1)})"
        if depth and kind < 0.4:
            return f"not {term(draw, depth - 1)}"
        name, value = draw.choice(names), draw.choice(values)
        if kind < 0.6:
            many = ", ".join(draw.choice(values) for _ in range(draw.choice([0, 1, 3])))
            return f"{name} {draw.choice(['in', 'not in'])} [{many}]"
        if kind < 0.7:
            return f"{value} <= {name} < {draw.choice(values)}"
        other = draw.choice([value] * 4 + [draw.choice(names)])
        return f"{name} {draw.choice(['==', '!=', '<', '<=', '>', '>='])} {other}"

    return lambda draw: RowFilter(term(draw, draw.choice([0, 1, 2, 6]))).mask(table)


def field_flags(folder: Path) -> Job:
    def field(draw: Random) -> str:
        number = draw.choice(["0", "1", "-1", "1.5", "", "999999999", "٣"])
        parts = [
            draw.choice(["a", "b", "hobby", "", "a b", "é", "x" * 99]),
            draw.choice(["The user's hobby is", "", "is: ", "[[a]]", "{x}", "\x1b[2J"]),
            draw.choice(["2", "16", "4", "3", "5", number]),
            draw.choice(["1", "2", "3", "1", "1", number]),
            draw.choice(["", "red blue", "red red", "a", " "]),
        ]
        return ":".join(parts[: draw.choice([2] + [3] * 4 + [4, 5, 5, 5, 5])])

    def job(draw: Random) -> None:
        specs = [field(draw) for _ in range(draw.choice([1, 2, 3]))]
        settings_of({"config": None, "set": None, "template": None, "field": specs})

    return job


def shard_flags(folder: Path) -> Job:
    def job(draw: Random) -> None:
        count = draw.choice([1, 2, 8, 8, 99_999, 99_999, 100_000])
        index = draw.choice([0, count - 1, draw.randrange(count), draw.randrange(count + 1)])
        form = draw.choice(["{}/{}"] * 12 + ["-{}/{}", "{}//{}", " {}/{}", "{}/{}\n", "{:.1f}/{}"])
        index, count = parse_shard(form.format(index, count))
        assert 0 <= index < count

    return job


def redis_urls(folder: Path) -> Job:
    import redis

    def job(draw: Random) -> None:
        url = draw.choice(["redis", "rediss", "unix"] * 4 + ["http", ""])
        url += draw.choice(["://"] * 12 + [":", "//", ""])
        url += draw.choice(["", "", "user:hunter2@", ":hunter2@", "us/er:hunter2@"])
        url += draw.choice(["localhost", "[::1]", "127.0.0.1"] * 3 + ["[::", "", "a b", "é"])
        url += draw.choice(["", ":6379"] * 4 + [":0", ":99999", ":x"])
        url += draw.choice(["/0", "/path/sock"] * 2 + ["", "/x", "/-1"])
        url += draw.choice(["", "?db=1", "?db=x", "?password=hunter2", "?timeout=x", "#hunter2"])
        assert "hunter2" not in redis_export.redacted(url)
        with mock.patch.object(redis.Redis, "ping"):  # nothing is contacted
            try:
                redis_export.connect(url)
            except UserIPError as e:
                if "hunter2" in str(e):
                    raise RuntimeError("a secret was told") from e
                raise

    return job


TARGETS: dict[str, tuple[int, Callable[[Path], Job]]] = {
    # Name -> how many inputs of others one costs, and what makes it.
    "model folders, signed": (8, model),
    "LM folders": (8, lm_folder),
    "WORK folders, signed": (1, work),
    "shards, signed": (1, shards),
    "logs and item tables": (1, tables),
    "times": (1, times),
    "users tables": (2, users_table),
    "NETE pickles": (1, nete),
    "run folders": (4, run_folder),
    "Redis values": (1, redis_values),
    "block caches, signed": (8, block_cache),
    "row filters, by grammar": (1, row_filters),
    "field flags, by grammar": (1, field_flags),
    "shard flags, by grammar": (1, shard_flags),
    "Redis URLs, by grammar": (1, redis_urls),
}
