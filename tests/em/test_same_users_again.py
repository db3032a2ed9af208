"""A fitted model that meets its own users again reads the history it is given, not the old one."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import tiny

import userip_fast as uf
from userip_fast.core.config import Config, DataConfig, EMConfig


def read(shift):
    random = np.random.default_rng(0)
    user = np.repeat(np.arange(12), 4)
    item = (random.integers(0, len(tiny.TEXTS), len(user)) + shift) % len(tiny.TEXTS)
    log = {"user_id": user, "item_id": item, "rating": random.integers(1, 6, len(user))}
    items = pa.table({"item_id": range(len(tiny.TEXTS)), "title": tiny.TEXTS})
    return uf.read_interactions(pa.table(log), items, rating="rating")


@pytest.mark.parametrize("recipe", ["userip", "paper"])
def test_infer_reads_the_new_history_of_a_training_user(recipe, tmp_path):
    em = EMConfig(recipe=recipe, steps=3, lr=0.2, paper_epochs=2)
    fields = (uf.ProfileField("taste", "The user's taste is", 1, 4),)
    config = Config(data=DataConfig(max_tokens=100), em=em, fields=fields)
    fitted = uf.fit(read(0), tiny.frozen("llama"), config=config)
    fresh = replace(fitted, trainer=None)  # has no memory of the fit
    nll = {}
    for shift in (0, 3):
        for name, model in (("fitted", fitted), ("fresh", fresh)):
            record = {}
            model.infer(read(shift), tmp_path / f"{name}{shift}", log=record.update)
            nll[name, shift] = record["nll_per_weight"]
    assert nll["fitted", 3] == nll["fresh", 3]
    assert nll["fitted", 3] != nll["fitted", 0]
