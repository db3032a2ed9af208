"""Item first, then profile, then word: is it cheaper, and does an LM read it as well?

    python benchmarks/item_first.py --data DATA [--users 4000] [--steps 800] [--seeds 2]

A prototype in plain transformers, of reactions alone. Today a reading is the profile's soft rows,
an item's text, and the word for how it went, so that each code reads all of the text. With the item
first the text is read once, its K/V serve all codes, and a code costs its soft rows, which see the
text; the last of them tells the word.

For each order a Llama of the embedded LM's size is trained from the same weights on the same
batches: an item liked or not, given soft rows W v, where v folds in up to 30 of the user's other
events (none in 15 % of cases) by an SVD of the training users. New users are told by their first
ten events. AUC of their later ones: `told` v; `item`, of whose user nothing is told; `codes`, the
mean over 16 codes (k-means of the training users' v) under the posterior that the ten events give,
each whole or counting a quarter; `counts`, the item's own rate. Differences come with a 95 %
interval over users. The table of these items and codes is timed, item first from kept K/V, which
must say what a whole reading does. The last line is JSON.

With --frozen SmolLM2-135M stands in the Llama's place, item first, of which nothing is trained but
W (and the bias of its one soft row): its word is added to the item's own rate, and stands beside
that rate and the user's generosity alone. Of choices benchmarks/real_lm.py asks the same.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _frozen_reader import FrozenReader
from _whose_choice import NO, YES, small
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import userip_fast as uf
from userip_fast.codebook.books import Codebook

FIRST, MOST, RANK, ROWS, CODES = 10, 30, 32, 2, 16
ORDERS = ("profile first", "item first")


class Log:
    """Users who rated, each event liked or not: training users, and new ones to judge by."""

    def __init__(self, data: str, users: int, text: str) -> None:
        log = uf.read_interactions(
            f"{data}/interactions.parquet", f"{data}/items.parquet", rating="rating",
            time="timestamp", text=text, on_bad="skip",
        )  # fmt: skip
        log = log.select_users(np.flatnonzero(log.history_lengths >= FIRST + 2)[:users])
        self.offsets, self.item = log.offsets, log.item_index.astype(np.int64)
        # By each item's usual rating nothing is told: the threshold is the log's median.
        self.liked = (log.rating > np.median(log.rating)).astype(np.float64)
        self.new = np.arange(log.num_users) % 4 == 0
        self.user = np.repeat(np.arange(log.num_users), np.diff(self.offsets))
        self.texts = texts = log.item_text.to_pylist()
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        special = ["<pad>", "disliked", "liked"]
        bpe.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                vocab_size=2000, special_tokens=special, initial_alphabet=alphabet,
                show_progress=False,
            ),
        )  # fmt: skip
        self.ids = [bpe.encode(t).ids for t in texts]
        self.vocab = bpe.get_vocab_size()

        learn = ~self.new[self.user]
        n = np.bincount(self.item[learn], minlength=len(texts))
        likes = np.bincount(self.item[learn], self.liked[learn], len(texts))
        self.rate = (likes + 10 * self.liked[learn].mean()) / (n + 10)
        self.usual = np.log(self.rate / (1 - self.rate))
        # How each training user differs from what is usual of an item.
        matrix = np.zeros((log.num_users, len(texts)), np.float32)
        matrix[self.user[learn], self.item[learn]] = (self.liked - self.rate[self.item])[learn]
        torch.manual_seed(0)
        _, _, v = torch.svd_lowrank(torch.from_numpy(matrix[~self.new]), q=RANK, niter=4)
        self.vectors = v.numpy()
        mine = [np.flatnonzero(self.user == u) for u in np.flatnonzero(~self.new)[:500]]
        self.vectors /= self.fold(mine)[:, :RANK].square().mean().sqrt().item()

    def fold(self, events: list[NDArray[np.int64]]) -> Tensor:
        """[n, RANK + 1] what events say: a direction, and how generous they are."""
        out = np.zeros((len(events), RANK + 1), np.float32)
        for row, some in zip(out, events):
            if len(some):
                apart = self.liked[some] - self.rate[self.item[some]]
                row[:RANK] = (apart @ self.vectors[self.item[some]]) / np.sqrt(len(some))
                row[RANK] = 2 * apart.sum() / np.sqrt(len(some))
        return torch.from_numpy(out)


class Reader(nn.Module):
    """A Llama that reads items and profiles in one order or the other."""

    rate, close = 3e-3, 1e-3

    def __init__(self, log: Log, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.ids = log.ids
        config = LlamaConfig(
            hidden_size=128, intermediate_size=344, num_hidden_layers=3, num_attention_heads=4,
            vocab_size=log.vocab, max_position_embeddings=256, tie_word_embeddings=True,
            attn_implementation="sdpa",
        )  # fmt: skip
        self.lm = LlamaForCausalLM(config)
        self.told = nn.Linear(RANK + 1, ROWS * 128)
        nn.init.normal_(self.told.weight, std=0.01)
        nn.init.normal_(self.told.bias, std=0.02)
        self.read = 0  # tokens

    def forward(self, items: list[int], v: Tensor, order: str) -> Tensor:
        """[n] log odds that an item is liked."""
        ids = [self.ids[i] for i in items]
        soft = self.told(v).view(len(ids), ROWS, -1)
        longest = max(map(len, ids))
        text = torch.zeros(len(ids), longest, dtype=torch.int64)
        there = torch.ones(len(ids), ROWS + longest)
        first = order == ORDERS[0]
        for i, own in enumerate(ids):  # short texts begin later, so that the last row is the answer
            text[i, longest - len(own) :] = torch.tensor(own)
            there[i, (ROWS if first else 0) :][: longest - len(own)] = 0
        embedded = self.lm.model.embed_tokens(text)
        rows = torch.cat([soft, embedded] if first else [embedded, soft], dim=1)
        place = (there.cumsum(1) - 1).clamp_min(0).long()
        self.read += int(there.sum())
        out = self.lm.model(
            inputs_embeds=rows, attention_mask=there, position_ids=place, use_cache=False
        )
        return self.odds(out.last_hidden_state[:, -1])

    def odds(self, hidden: Tensor) -> Tensor:
        """[n] from the last row's hidden state: of two words the other says nothing."""
        words = self.lm.lm_head.weight[1:3]
        return hidden @ (words[1] - words[0])

    @torch.no_grad()
    def table(self, items: list[int], v: Tensor, order: str) -> Tensor:
        """[items, codes] log odds."""
        ids = [self.ids[i] for i in items]
        out = torch.empty(len(ids), len(v))
        by_length: dict[int, list[int]] = {}
        for i, own in enumerate(ids):
            by_length.setdefault(len(own), []).append(i)
        soft = self.told(v).view(len(v), ROWS, -1)
        for length, alike in by_length.items():  # of equal length: nothing is padded
            for a in range(0, len(alike), 32):
                some = alike[a : a + 32]
                text = torch.tensor([ids[i] for i in some])
                if order == ORDERS[0]:
                    rows = torch.cat(
                        [
                            soft.repeat(len(some), 1, 1),
                            self.lm.model.embed_tokens(text).repeat_interleave(len(v), 0),
                        ],
                        dim=1,
                    )
                    self.read += rows.shape[0] * rows.shape[1]
                    hidden = self.lm.model(inputs_embeds=rows, use_cache=False).last_hidden_state
                else:
                    cache = DynamicCache()
                    self.lm.model(text, past_key_values=cache, use_cache=True)
                    cache.batch_repeat_interleave(len(v))
                    rows = soft.repeat(len(some), 1, 1)
                    self.read += text.numel() + rows.shape[0] * ROWS
                    place = torch.arange(length, length + ROWS).expand(len(rows), -1)
                    hidden = self.lm.model(
                        inputs_embeds=rows, past_key_values=cache, position_ids=place
                    ).last_hidden_state
                out[some] = self.odds(hidden[:, -1]).view(len(some), len(v))
        return out


class Frozen(nn.Module):
    """SmolLM2-135M, of which nothing is trained, told by one soft row; the item first alone.

    Its log odds of " yes" over " no" are added to those of the item's own rate.
    """

    rate, close = 1e-2, 0.2  # bfloat16

    def __init__(self, log: Log) -> None:
        super().__init__()
        lm, tokenizer = small()
        yes, no, colon = (tokenizer.encode(w, add_special_tokens=False)[0] for w in (YES, NO, ":"))
        self.lm = FrozenReader(lm, (yes, no))
        self.rms = float(self.lm.embedding.square().mean().sqrt())
        self.told = nn.Linear(RANK + 1, self.lm.dim)
        nn.init.normal_(self.told.weight, std=0.05)
        self.told.bias.data.copy_(self.lm.embedding[colon] / self.rms)
        items = np.unique(log.item)
        self.row = np.full(len(log.texts), -1)
        self.row[items] = np.arange(len(items))
        self.usual = torch.from_numpy(log.usual).float()
        began = time.process_time()
        asked = [f"Movie: {log.texts[i]}\nViewer:" for i in items]
        self.kept = self.lm.read([tokenizer.encode(x, add_special_tokens=False) for x in asked])
        self.cost = {"tokens": self.kept.tokens, "seconds": time.process_time() - began}
        self.read = 0

    def forward(self, items: list[int], v: Tensor, order: str) -> Tensor:
        return self._odds(items, v[:, None])[:, 0]

    @torch.no_grad()
    def table(self, items: list[int], v: Tensor, order: str) -> Tensor:
        by = sorted(range(len(items)), key=lambda i: np.diff(self.kept.offsets)[self.row[items[i]]])
        out = torch.empty(len(items), len(v))
        for a in range(0, len(by), 32):
            some = by[a : a + 32]
            out[some] = self._odds([items[i] for i in some], v.expand(len(some), -1, -1))
        return out

    def _odds(self, items: list[int], v: Tensor) -> Tensor:
        self.read += v.shape[0] * v.shape[1]
        soft = self.rms * self.told(v)[..., None, :]
        return self.lm.odds(self.kept, self.row[items], soft) + self.usual[items][:, None]


def others(log: Log, events: NDArray[np.int64], random: np.random.Generator) -> list[Any]:
    """Of each event's user some other events, of every seventh none."""
    told = []
    for e in events.tolist():
        a, b = log.offsets[log.user[e]], log.offsets[log.user[e] + 1]
        few = 0 if random.random() < 0.15 else random.integers(1, MOST + 1)
        told.append(random.permutation(np.delete(np.arange(a, b), e - a))[:few])
    return told


def train(reader: Reader | Frozen, log: Log, order: str, steps: int, batch: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    events = np.flatnonzero(~log.new[log.user])
    rates = {"lr": reader.rate, "betas": (0.9, 0.95), "weight_decay": 0.01}
    learned = [p for p in reader.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(learned, **rates)
    for step in range(steps):
        shrink = min(1, (step + 1) / 50) * 0.5 * (1 + np.cos(np.pi * step / steps))
        for group in adam.param_groups:
            group["lr"] = reader.rate * shrink
        some = random.choice(events, batch)
        told = others(log, some, random)
        odds = reader(log.item[some].tolist(), log.fold(told), order)
        loss = F.binary_cross_entropy_with_logits(odds, torch.from_numpy(log.liked[some]).float())
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        adam.step()


def generous(log: Log, items: NDArray[np.int64], v: Tensor) -> NDArray[Any]:
    """Log odds by the item's own rate and how generous the user is, without a text."""
    random = np.random.default_rng(0)
    some = random.choice(np.flatnonzero(~log.new[log.user]), 20_000)
    told = log.fold(others(log, some, random))[:, RANK:].numpy()
    x = np.column_stack([log.usual[log.item[some]], told])
    model = LogisticRegression().fit(x, log.liked[some])
    return np.asarray(model.decision_function(np.column_stack([log.usual[items], v[:, RANK:]])))


def auc(score: NDArray[Any], liked: NDArray[Any], weight: NDArray[Any] | None = None) -> float:
    """Area under the curve; events may count several times."""
    weight = np.ones(len(score)) if weight is None else weight
    order = np.argsort(score, kind="stable")
    _, tie = np.unique(score[order], return_inverse=True)
    w, y = weight[order], liked[order]
    bad = np.bincount(tie, w * (1 - y))
    below = np.cumsum(bad) - bad / 2
    return float((np.bincount(tie, w * y) * below).sum() / ((w * y).sum() * bad.sum()))


def resampled(found: dict[str, Any], a: NDArray[Any], b: NDArray[Any], seed: int) -> list[float]:
    """AUC of `a` less that of `b`, of users drawn again and again."""
    random, user, out = np.random.default_rng(seed), found["user"], []
    those = np.unique(user)
    for _ in range(200):
        drawn = random.choice(those, len(those))
        weight = np.bincount(drawn, minlength=those[-1] + 1)[user]
        out.append(auc(a, found["liked"], weight) - auc(b, found["liked"], weight))
    return out


def interval(d: list[float]) -> list[float]:
    """Mean, and the ends of its 95 % interval."""
    return [round(float(x), 4) for x in (np.mean(d), *np.quantile(d, [0.025, 0.975]))]


def judged(
    reader: Reader | Frozen, log: Log, order: str, codes: Tensor
) -> tuple[dict[str, Any], Any]:
    """Scores [later events] of new users, by name; and the table's tokens and time."""
    new = np.flatnonzero(log.new)
    early = [np.arange(log.offsets[u], log.offsets[u] + FIRST) for u in new]
    later = [np.arange(log.offsets[u] + FIRST, log.offsets[u + 1])[:MOST] for u in new]
    at, count = np.concatenate(later), np.asarray(list(map(len, later)))
    v, out = log.fold(early).repeat_interleave(torch.from_numpy(count), 0), {}
    with torch.no_grad():
        for name, told in ("told", v), ("item", torch.zeros_like(v)):
            out[name] = np.concatenate(
                [
                    reader(log.item[at[a : a + 512]].tolist(), told[a : a + 512], order)
                    for a in range(0, len(at), 512)
                ]
            )
    items, row = np.unique(log.item[np.concatenate([*early, at])], return_inverse=True)
    few = len(new) * FIRST
    reader.read, began, cpu = 0, time.perf_counter(), time.process_time()
    table = reader.table(items.tolist(), codes, order)
    cost = {
        "items": len(items),
        "tokens": reader.read,
        "seconds": time.perf_counter() - began,
        "processor_seconds": time.process_time() - cpu,
    }
    with torch.no_grad():  # a whole reading of some says the same
        for k in (0, CODES - 1):
            whole = reader(items[:64].tolist(), codes[k].expand(64, -1), order)
            torch.testing.assert_close(table[:64, k], whole, rtol=reader.close, atol=reader.close)
    went = torch.from_numpy(2 * log.liked[np.concatenate(early)] - 1).float()
    seen = F.logsigmoid(table[row[:few]] * went[:, None]).view(len(new), FIRST, -1).sum(1)
    for name, power in ("codes", 1.0), ("codes, a quarter", 0.25):
        p = (power * seen).softmax(1).repeat_interleave(torch.from_numpy(count), 0)
        out[name] = (p * table[row[few:]].sigmoid()).sum(1).numpy()
    out["counts"] = log.rate[log.item[at]]
    out["counts, generosity"] = generous(log, log.item[at], v)
    return {"scores": out, "liked": log.liked[at], "user": np.repeat(new, count)}, cost


def frozen(log: Log, args: argparse.Namespace) -> None:
    """What a frozen LM tells when it is told of users by one soft row; the last line is JSON."""
    torch.set_num_threads(1)
    reader = Frozen(log)
    mine = [np.arange(log.offsets[u], log.offsets[u + 1]) for u in np.flatnonzero(~log.new)]
    codes = Codebook.kmeans(log.fold(mine), CODES, seed=0).codewords
    began = time.process_time()
    train(reader, log, ORDERS[1], args.steps, args.batch, 0)
    training = {"rows": reader.read, "processor_seconds": time.process_time() - began}
    found, cost = judged(reader, log, ORDERS[1], codes)
    scores = found["scores"]
    apart = resampled(found, scores["told"], scores["counts, generosity"], 0)
    result = {
        "texts": reader.cost, "training": training, "table": cost,
        "auc": {name: auc(score, found["liked"]) for name, score in scores.items()},
        "told - counts, generosity": interval(apart),
    }  # fmt: skip
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="folder of interactions and items")
    parser.add_argument("--text", default="{title} ({genres})")
    parser.add_argument("--users", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--frozen", action="store_true", help="SmolLM2-135M, item first alone")
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    log = Log(args.data, args.users, args.text)
    if args.frozen:
        frozen(log, args)
        return
    result: dict[str, Any] = {k: v for k, v in vars(args).items() if k != "data"}
    apart: dict[str, list[Any]] = {}
    for seed in range(args.seeds):
        start, found = Reader(log, seed), {}
        users = np.flatnonzero(~log.new)
        mine = [np.arange(log.offsets[u], log.offsets[u + 1]) for u in users]
        codes = Codebook.kmeans(log.fold(mine), CODES, seed=seed).codewords
        for order in ORDERS:
            reader, began = copy.deepcopy(start), time.process_time()
            train(reader, log, order, args.steps, args.batch, seed)
            took, tokens = time.process_time() - began, reader.read
            found[order], cost = judged(reader, log, order, codes)
            one = {
                "auc": {
                    k: auc(s, found[order]["liked"]) for k, s in found[order]["scores"].items()
                },
                "table": cost,
                "training": {"tokens": tokens, "processor_seconds": took},
            }
            result[f"seed {seed}, {order}"] = one
            print(seed, order, one, flush=True)
        before, after = (found[order] for order in ORDERS)
        for name, score in after["scores"].items():
            if not name.startswith("counts"):
                own = resampled(after, score, before["scores"][name], seed)
                apart.setdefault(name, []).extend(own)
    result["item first - profile first"] = {name: interval(d) for name, d in apart.items()}
    costs = [[result[f"seed {s}, {o}"]["table"] for o in ORDERS] for s in range(args.seeds)]
    for what in "tokens", "processor_seconds":
        result[f"ratios.{what}"] = float(np.median([a[what] / b[what] for a, b in costs]))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
