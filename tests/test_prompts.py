import numpy as np
import pytest
import tiny

from userip_fast.errors import ConfigError, UnsupportedError
from userip_fast.packing import SLACK, build_behaviour, iter_packs, make_pack, ragged_arange
from userip_fast.prompts import TEMPLATES, ProfileField, PromptTemplate, tokenize_events


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
    import torch

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
    import torch

    layout = tiny.template().layout(tiny.tokenizer())
    b = tiny.behaviour(layout, users=23)
    users = np.random.default_rng(0).permutation(23)
    packs = list(iter_packs(b, users, layout, torch.device("cpu"), 120))
    assert np.concatenate([p.users for p in packs]).tolist() == users.tolist()
    assert len(packs) > 2
    assert all(p.num_tokens <= 120 or p.num_users == 1 for p in packs)
