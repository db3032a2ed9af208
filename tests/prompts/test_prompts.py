import itertools

import numpy as np
import pytest
import tiny
import torch

from userip_fast.core.errors import ConfigError, UnsupportedError
from userip_fast.core.fields import TEMPLATES, ProfileField
from userip_fast.prompts.layout import PromptTemplate, tokenize_events
from userip_fast.prompts.packing import (
    SLACK,
    PackStream,
    build_behaviour,
    iter_packs,
    make_pack,
    ragged_arange,
)


def test_layout_interleaves_names_and_soft_rows():
    tok = tiny.tokenizer()
    template = PromptTemplate((ProfileField("a", "red rod", 2), ProfileField("b", "", 1)))
    layout = template.layout(tok)
    name = tok("red rod", add_special_tokens=False)["input_ids"]
    n = len(name)
    assert layout.prefix_ids.tolist() == [tok.bos_token_id, *name]
    assert layout.prefix_segment.tolist() == [-1] + [0] * n
    assert layout.prefix_position.tolist() == list(range(n + 1))
    assert layout.soft_segment.tolist() == [0, 0, 1]
    assert layout.soft_position.tolist() == [n + 1, n + 2, n + 3]
    assert layout.field_slices == (slice(0, 2), slice(2, 3))
    assert layout.behaviour_start == n + 4


def test_a_tokenizer_without_bos_has_no_bos_row():
    layout = PromptTemplate((ProfileField("a", ""),)).layout(tiny.tokenizer(bos=False))
    assert len(layout.prefix_ids) == 0
    assert layout.soft_position.tolist() == [0]


def test_templates_are_valid_and_a_template_needs_a_field():
    for fields in TEMPLATES.values():
        PromptTemplate(fields)
    with pytest.raises(ConfigError, match="at least one"):
        PromptTemplate(())


@pytest.mark.parametrize("word", ["liked", "passed over"])
def test_feedback_tokens_spell_the_word(word):
    tok = tiny.tokenizer()
    texts = ["red rod", "liked things: liked", "ünïcode 茶", ""]
    table = tokenize_events(tok, texts, [word] * 4, "{text}: {feedback}!", "; ")
    for e, text in enumerate(texts):
        ids = table.ids[table.offsets[e] : table.offsets[e + 1]]
        flags = table.is_feedback[table.offsets[e] : table.offsets[e + 1]]
        assert tok.decode(ids) == f"; {text}: {word}!"
        assert tok.decode(ids[flags]).strip() == word
        assert flags.sum() < len(flags)


def test_words_never_merge_across_the_feedback():
    """A tokenizer that would join feedback and text in one token gets them apart."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {c: i for i, c in enumerate("; abgod:")}
    merges = [("o", "d"), ("b", "g"), ("bg", "o")]
    for a, b in merges:
        vocab[a + b] = len(vocab)
    tok = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab, merges)))
    assert len(tok("bgo")["input_ids"]) == 1
    table = tokenize_events(tok, ["ab"], ["good"], "{text}{feedback}", "")
    assert tok.convert_ids_to_tokens(table.ids.tolist()) == ["a", "b", "g", "o", "od"]
    assert table.is_feedback.tolist() == [False, False, True, True, True]


def test_tokenizing_refuses_what_it_cannot_do():
    class Slow:
        is_fast = False

    with pytest.raises(UnsupportedError, match="character offsets"):
        tokenize_events(Slow(), ["a"], None, "{text}", "; ")
    with pytest.raises(ConfigError, match="has no place for feedback"):
        tokenize_events(tiny.tokenizer(), ["a"], ["liked"], "{text}", "; ")
    with pytest.raises(ConfigError, match="needs feedback"):
        tokenize_events(tiny.tokenizer(), ["a"], None, "{text}: {feedback}", "; ")


def behaviour(max_tokens, context="sequence", **weights):
    layout = tiny.template().layout(tiny.tokenizer())
    table = tokenize_events(tiny.tokenizer(), tiny.TEXTS, None, "{text}", "; ")
    kinds = np.array([0, 1, 2, 3, 3, 0])
    offsets = np.array([0, 4, 5, 6])
    args = {"text_weight": 1.0, "feedback_weight": 0.0, **weights}
    return (
        table,
        layout,
        build_behaviour(
            table, kinds, offsets, layout, max_tokens=max_tokens, context=context, **args
        ),
    )


def test_the_latest_whole_events_that_fit_are_kept():
    table, layout, everything = behaviour(1000)
    size = np.diff(table.offsets)
    assert everything.lengths.tolist() == [size[:4].sum(), size[3], size[0]]
    assert everything.position[: everything.lengths[0]].tolist() == list(
        range(layout.behaviour_start, layout.behaviour_start + everything.lengths[0])
    )
    _, _, cut = behaviour(int(size[2] + size[3]))
    assert cut.events.tolist() == [2, 1, 1]
    first = cut.ids[: cut.offsets[1]]
    assert first.tolist() == table.ids[table.offsets[2] : table.offsets[4]].tolist()
    _, _, nothing = behaviour(int(size[3]) - 1)
    assert nothing.events[1] == 0


def test_independent_events_restart_and_have_their_own_segments():
    table, layout, b = behaviour(1000, "independent")
    size = np.diff(table.offsets)
    first = slice(0, b.offsets[1])
    assert b.segment[first].tolist() == np.repeat(2 + np.arange(4), size[:4]).tolist()
    starts = np.cumsum(np.append(0, size[:3]))
    assert (b.position[first][starts] == layout.behaviour_start).all()
    assert (b.weight[first][starts] == 0).all()


def test_total_weight_and_select():
    _, _, b = behaviour(1000)
    assert b.total_weight.tolist() == [
        float(b.weight[b.offsets[u] : b.offsets[u + 1]].sum()) for u in range(3)
    ]
    some = b.select(np.array([2, 0]))
    assert some.lengths.tolist() == b.lengths[[2, 0]].tolist()
    assert some.ids[: some.offsets[1]].tolist() == b.ids[b.offsets[2] :].tolist()


def test_ragged_arange():
    assert ragged_arange(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    assert ragged_arange(np.zeros(0, np.int64), np.zeros(0, np.int64)).tolist() == []


def test_a_pack_holds_soft_rows_then_behaviour_and_predicts_from_the_row_before():
    layout = tiny.template(2, 2).layout(tiny.tokenizer())
    b = tiny.behaviour(layout, text_weight=0.0)
    pack = make_pack(b, np.array([1, 3]), layout, torch.device("cpu"), pad_to=64)
    assert pack.num_tokens % 64 == 0
    cu = pack.cu_seqlens.tolist()
    for n, user in enumerate([1, 3]):
        rows = slice(cu[n], cu[n + 1])
        plan = pack.plan[rows].tolist()
        assert plan[:4] == [-1 - (4 * n + s) for s in range(4)]
        ids = b.ids[b.offsets[user] : b.offsets[user + 1]]
        assert plan[4:] == ids.tolist()
        assert pack.segment[rows][:4].tolist() == [0, 0, 1, 1]
        loss = slice(int(pack.cu_rows[n]), int(pack.cu_rows[n + 1]))
        follow = pack.plan[pack.loss_rows[loss] + 1].tolist()
        assert follow == pack.target[loss].tolist()
        weights = b.weight[b.offsets[user] : b.offsets[user + 1]]
        assert pack.target[loss].tolist() == ids[weights > 0].tolist()
    assert (pack.plan[cu[-1] :] == SLACK).all()
    assert pack.loss_rows.min() >= 4  # never a soft row


def test_iter_packs_covers_users_in_order_within_the_budget():
    layout = tiny.template().layout(tiny.tokenizer())
    b = tiny.behaviour(layout, users=23)
    users = np.random.default_rng(0).permutation(23)
    packs = list(iter_packs(b, users, layout, torch.device("cpu"), 120))
    assert np.concatenate([p.users for p in packs]).tolist() == users.tolist()
    assert len(packs) > 2
    assert all(p.num_tokens <= 120 or p.num_users == 1 for p in packs)


def long_history(context="sequence", chunk_tokens=20, users=6):
    """Users of 1 to 30 events, and how many tokens each event has."""
    layout = tiny.template(2, 2).layout(tiny.tokenizer())
    table = tokenize_events(tiny.tokenizer(), tiny.TEXTS, None, "{text}", "; ")
    random = np.random.default_rng(3)
    offsets = np.concatenate([[0], np.cumsum(random.permutation([1, 2, 7, 19, 30, 30][:users]))])
    kinds = random.integers(0, len(tiny.TEXTS), offsets[-1])
    built = build_behaviour(
        table, kinds, offsets, layout, max_tokens=150, chunk_tokens=chunk_tokens, context=context,
        text_weight=1.0, feedback_weight=0.0,
    )  # fmt: skip
    return layout, built, np.diff(table.offsets)[kinds], offsets


@pytest.mark.parametrize("context", ["sequence", "independent"])
def test_long_histories_are_cut_between_events(context):
    layout, b, size, offsets = long_history(context)
    _, whole, _, _ = long_history(context, None)
    assert b.ids.tolist() == whole.ids.tolist()  # cut, nothing lost
    assert b.weight.tolist() == whole.weight.tolist()
    assert not len(whole.cuts)
    first, of_user = b.sequences
    for u in range(b.num_users):
        events = size[offsets[u] : offsets[u + 1]][-b.events[u] :]
        ends = {int(b.offsets[u] + n) for n in np.cumsum(events)} | {int(b.offsets[u])}
        own = first[of_user[u] : of_user[u + 1] + 1]
        assert own[0] == b.offsets[u]
        assert own[-1] == b.offsets[u + 1]
        assert set(own.tolist()) <= ends
        assert np.diff(own).max() <= 20
        # the event after a cut would not have fitted before it
        event_end = np.cumsum(events) + b.offsets[u]
        for start, cut in itertools.pairwise(own[:-1].tolist()):
            assert event_end[event_end > cut].min() - start > 20
    starts = b.position[first[:-1]]
    assert (starts == layout.behaviour_start).all()
    assert (b.weight[first[:-1]] == 0).all()
    assert len(first) - 1 > b.num_users + 3


def test_an_event_longer_than_a_sequence_ends_the_history():
    _, b, size, offsets = long_history(chunk_tokens=5)
    for u in range(b.num_users):
        events = size[offsets[u] : offsets[u + 1]]
        too_long = np.flatnonzero(events > 5)
        assert b.events[u] == len(events) - (too_long[-1] + 1 if len(too_long) else 0)


def test_sequences_share_soft_rows_and_survive_selection():
    layout, b, *_ = long_history()
    users = np.array([4, 0, 3])
    pack = make_pack(b, users, layout, torch.device("cpu"))
    again = make_pack(b.select(users), np.arange(3), layout, torch.device("cpu"))
    for name in ("plan", "segment", "position", "cu_seqlens", "loss_rows", "target", "cu_rows",
                 "sequence_user"):  # fmt: skip
        assert torch.equal(getattr(pack, name), getattr(again, name)), name
    assert pack.num_tokens == b.pack_rows(4)[users].sum()
    starts = pack.cu_seqlens[:-1].long()
    assert len(starts) > 3
    for s in range(4):
        assert pack.plan[starts + s].tolist() == (-1 - (pack.sequence_user * 4 + s)).tolist()
    counts = torch.bincount(pack.sequence_user, minlength=3)
    assert counts.tolist() == np.diff(b.sequences[1])[users].tolist()
    split, user = b.by_sequence()
    assert split.num_users == len(user) == len(b.sequences[0]) - 1
    assert np.bincount(user, weights=split.total_weight) == pytest.approx(b.total_weight)


def test_waiting_users_take_the_places_of_those_that_leave():
    layout = tiny.template().layout(tiny.tokenizer())
    b = tiny.behaviour(layout, users=40)
    rows, budget = b.pack_rows(layout.num_soft), 200
    need = np.random.default_rng(1).integers(1, 6, 40)
    stream, taken, fill = PackStream(b, np.arange(40), layout, torch.device("cpu"), budget), [], []
    taken = np.zeros(40, int)
    while (pack := stream.next()) is not None:
        assert pack.num_tokens == rows[pack.users].sum() <= budget
        taken[pack.users] += 1
        waits = len(stream.waiting)
        if waits:
            fill.append(pack.num_tokens)
            assert pack.num_tokens + rows[stream.waiting[0]] > budget  # as full as it can be
        done = taken[pack.users] >= need[pack.users]
        stream.leave(done)
        if not done.any():
            assert stream.next() is pack
    assert taken.tolist() == need.tolist()
    assert len(fill) > 5


def test_packs_of_a_gpu_keep_their_shape():
    layout = tiny.template().layout(tiny.tokenizer())
    b = tiny.behaviour(layout, users=60)
    stream = PackStream(b, np.arange(60), layout, torch.device("cpu"), 300)
    stream.multiple, stream.budget = 128, 256  # as on a CUDA device
    sizes = []
    while (pack := stream.next()) is not None:
        sizes.append(pack.num_tokens)
        assert (pack.plan[pack.cu_seqlens[-1] :] == SLACK).all()
        stream.leave(np.ones(pack.num_users, bool))
    assert len(sizes) > 4
    assert set(sizes[:-1]) == {256}
    assert sizes[-1] % 128 == 0
