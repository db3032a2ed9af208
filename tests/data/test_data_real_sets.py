"""The four public data sets, with the counts that are known of them."""

import numpy as np
import pytest

import userip_fast as uf
from userip_fast.core.errors import DataError
from userip_fast.data import Catalogue, FeedbackScale, Negatives, make_events, split_by_time


def read(shared_dir, name, **options):
    folder = shared_dir / "data" / name
    return uf.read_interactions(
        folder / "interactions.parquet", folder / "items.parquet", rating="rating", **options
    )


def test_completejourney(shared_dir):
    name = "completejourney-sample"
    with pytest.raises(
        DataError, match=r"(?s)282 bad row\(s\).*222 x unknown item.*60 x empty text"
    ):
        read(shared_dir, name, time="timestamp")
    text = "{title}[[ ({product_type})]]"  # 74 events of items without a product_type
    data = read(shared_dir, name, time="timestamp", on_bad="skip", text="{title}")
    assert data.report.counts == {"unknown item": 222, "empty text": 60}
    assert data.num_events == 75_000 - 282
    assert (data.num_users, data.report.short_users) == (2_374, 3)
    assert data.constant_rating == 1
    grouped = read(shared_dir, name, time="timestamp", on_bad="skip", text=text)
    assert grouped.num_events == data.num_events
    without = data.items["product_type"].is_null().combine_chunks()
    assert np.asarray(without)[data.item_index].sum() == 74 - 60
    assert grouped.item_text.filter(without) == data.item_text.filter(without)
    assert grouped.item_text != data.item_text


def test_online_retail(shared_dir):
    data = read(shared_dir, "online-retail-ii", time="timestamp", filter="not cancelled")
    assert data.report.rows_filtered == 17_641
    assert data.num_events == 805_888 - 17_641
    assert data.rating is None
    assert "constant rating counts as no rating" in data.rating_note
    assert (data.num_users, data.report.short_users) == (5_853, 23)
    events = make_events(data, Negatives(Catalogue.from_interactions(data)))
    assert events.num_events == 2 * data.num_events
    assert (events.level == 1).sum() == data.num_events


def test_movietweetings(shared_dir):
    data = read(shared_dir, "movietweetings-142k", time="timestamp", text="{title}[[ ({genres})]]")
    assert (data.num_users, data.num_items, data.num_events) == (21_081, 12_611, 141_695)
    assert (data.history_lengths == 1).sum() == 9_154
    assert data.report.counts == {}
    past, future = split_by_time(data, 0.8)
    assert past.time.max() < future.time.min()
    assert past.num_events + future.num_events == data.num_events
    counts = np.bincount(FeedbackScale.fit(data.rating).level(data.rating))
    assert counts.min() > 0.2 * data.num_events


def test_goodbooks(shared_dir):
    data = read(shared_dir, "goodbooks-10k-sample")
    assert (data.num_users, data.num_items, data.num_events) == (2_672, 10_000, 298_176)
    assert not data.ordered
    with pytest.raises(DataError, match="no time column"):
        split_by_time(data, 0.8)
    scale = FeedbackScale.fit(data.rating)
    assert (scale.words, scale.thresholds) == (("disliked", "okay", "liked"), (4.0, 5.0))
