"""What the LM reads for kinds of event: each text once, for all words that may follow it.

An event of independent behaviour is read up to the token before its last loss token; what comes
later, nothing with loss sees. So kinds that differ in their last word alone (a text, and how it was
liked) ask different questions of one row, and a kind whose tokens begin another's asks along that
one's way. A *reading* is a run of tokens that begins no other; every kind belongs to one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from userip_fast.lm.engine import Engine
from userip_fast.prompts.packing import Behaviour, Int64, Pack, iter_packs, ragged_arange

_PAIRS = 1 << 14  # pairs of a reading and codes that are packed together


@dataclass(frozen=True)
class Readings:
    """R readings of E kinds of event, whose loss tokens are L in all.

    Attributes:
        behaviour: Of R readings, each in the place of a user.
        reading: [E] int64, the reading that tells of a kind.
        offsets: [E + 1] int64; kind e has loss tokens `offsets[e]:offsets[e + 1]`.
        row: [L] int64, the token of the reading whose row predicts it.
        target, weight: [L] int64 and float32, token id and loss weight.
    """

    behaviour: Behaviour
    reading: Int64
    offsets: Int64
    row: Int64
    target: Int64
    weight: npt.NDArray[np.float32]

    @classmethod
    def of(cls, kinds: Behaviour) -> Readings:
        """Readings of events, each in the place of a user of `kinds`; their order is free."""
        loss = np.flatnonzero(kinds.weight > 0)
        owner = np.searchsorted(kinds.offsets, loss, side="right") - 1
        within = loss - kinds.offsets[owner]  # at least 1: an event's first token has no loss
        tokens = np.minimum(kinds.lengths, 1)  # read of a kind
        np.maximum.at(tokens, owner, within)
        read = [kinds.ids[a : a + n] for a, n in zip(kinds.offsets[:-1].tolist(), tokens.tolist())]
        # In this order what begins others stands right before one of them.
        spelt = [ids.astype(">i4").tobytes() for ids in read]
        order = sorted(range(len(spelt)), key=spelt.__getitem__)
        reading = np.empty(len(spelt), np.int64)
        longest: list[int] = []
        for i, following in zip(reversed(order), [None, *reversed(order)]):
            if following is None or not spelt[following].startswith(spelt[i]):
                longest.append(i)
            reading[i] = len(longest) - 1
        chosen = np.asarray(longest, np.int64)
        behaviour = kinds.head(tokens).select(chosen)
        return cls(
            replace(behaviour, weight=np.zeros_like(behaviour.weight)),
            reading,
            np.searchsorted(owner, np.arange(kinds.num_users + 1)),
            within - 1,
            kinds.ids[loss].astype(np.int64),
            kinds.weight[loss],
        )

    @property
    def num_kinds(self) -> int:
        return len(self.reading)

    @property
    def num_readings(self) -> int:
        return self.behaviour.num_users

    def passes(
        self, engine: Engine, reading: Int64, tokens: int
    ) -> Iterator[tuple[Pack, slice, Int64, Int64]]:
        """Packs of readings [N], any of them any number of times, and what is asked of them.

        Yields:
            The pack, whose NLL is that of A answers; which of the N it has; [A] the place of each
            answer's reading in the pack, ascending; and [A] the answer's kind.
        """
        order = np.argsort(self.reading, kind="stable")
        first = np.searchsorted(self.reading[order], np.arange(self.num_readings + 1))
        asked = np.diff(self.offsets)
        size = self.behaviour.pack_rows(engine.layout.num_soft)  # a reading is one sequence
        done = 0
        for start in range(0, len(reading), _PAIRS):
            for pack in iter_packs(
                self.behaviour,
                reading[start : start + _PAIRS],
                engine.layout,
                engine.lm.device,
                tokens,
            ):
                here = slice(done, done + pack.num_users)
                done += pack.num_users
                count = np.diff(first)[pack.users]
                place = np.repeat(np.arange(pack.num_users), count)
                kind = order[ragged_arange(first[pack.users], count)]
                loss = ragged_arange(self.offsets[kind], asked[kind])
                begin = np.cumsum(size[pack.users]) - size[pack.users] + engine.layout.num_soft
                ends = np.concatenate([[0], np.cumsum(asked[kind])])

                def to(x: npt.NDArray[np.generic]) -> Tensor:
                    return torch.from_numpy(x).to(engine.lm.device)

                rows = np.repeat(begin[place], asked[kind]) + self.row[loss]
                distinct, which = np.unique(rows, return_inverse=True)
                asking = replace(
                    pack,
                    loss_rows=to(rows),
                    target=to(self.target[loss]),
                    loss_weight=to(self.weight[loss]),
                    cu_rows=to(ends),
                    distinct=(to(distinct), to(which)),
                )
                yield asking, here, place, kind


def log_likelihoods(
    engine: Engine,
    readings: Readings,
    soft: Tensor,
    tokens: int,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> Tensor:
    """[E, Z] fp32, log p(loss tokens of a kind | codes), weighted; no gradient.

    Args:
        soft: [Z, S, D] soft rows of each combination of codes, on the LM's device.
        tokens: Rows of a pack.
        on_rows: Told how many rows were read, pack by pack.
    """
    out = torch.empty(readings.num_kinds, len(soft))
    pairs = np.arange(readings.num_readings * len(soft))
    reading, codes = np.divmod(pairs, len(soft))
    with torch.no_grad():
        for pack, here, place, kind in readings.passes(engine, reading, tokens):
            z = torch.from_numpy(codes[here])
            nll = engine.nll(pack, soft[z.to(soft.device)]).cpu()
            out[torch.from_numpy(kind), z[torch.from_numpy(place)]] = -nll
            on_rows(int(pack.cu_seqlens[-1]))
    return out


def pair_log_likelihoods(
    engine: Engine,
    readings: Readings,
    soft: Callable[[Int64], Tensor],
    reading: Int64,
    tokens: int,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> tuple[Int64, Int64, npt.NDArray[np.float32]]:
    """Log p of each kind of the readings of N pairs, each pair with soft rows of its own.

    Args:
        soft: Soft rows [n, S, D] of pairs [n], on the LM's device.
        reading: [N] the reading of each pair.
        tokens, on_rows: As in `log_likelihoods`.

    Returns:
        [A] pair, kind and log likelihood of each answer.
    """
    pairs, kinds, values = [], [], []
    with torch.no_grad():
        for pack, here, place, kind in readings.passes(engine, reading, tokens):
            own = np.arange(here.start, here.stop)
            pairs.append(own[place])
            kinds.append(kind)
            values.append(-engine.nll(pack, soft(own)).cpu().numpy())
            on_rows(int(pack.cu_seqlens[-1]))
    return np.concatenate(pairs), np.concatenate(kinds), np.concatenate(values)


def gradients(
    engine: Engine,
    readings: Readings,
    soft: Tensor,
    reading: Int64,
    codes: Int64,
    factor: Tensor,
    weight: Tensor,
    tokens: int,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> tuple[Tensor, float]:
    """[Z, S, D] fp64 gradient of a weighted NLL with respect to `soft`, and the NLL.

        sum over pairs i of factor[i] * sum over kinds e of reading[i] of weight[e, codes[i]] * NLL

    A weight may be negative: what is expected, against what is observed.
    Gradients of single pairs are added in their order in fp64.

    Args:
        reading, codes, factor: [N] pairs of a reading and a row of `soft` [Z, S, D]; fp64 factor.
        weight: [E, Z] fp64 of kinds under codes.
        tokens, on_rows: As in `log_likelihoods`; forward and backward count a row each.
    """
    out = torch.zeros(soft.shape, dtype=torch.float64)
    total = 0.0
    for pack, here, place, kind in readings.passes(engine, reading, tokens):
        z = torch.from_numpy(codes[here])
        at = torch.from_numpy(place)
        w = weight[torch.from_numpy(kind), z[at]]
        # In fp32 only shares of a pair's weight: it may be that of a million users.
        mass = torch.zeros(pack.num_users, dtype=torch.float64).index_add_(0, at, w.abs())
        share = (w / mass.clamp_min(1e-300)[at]).float().to(soft.device)
        rows = soft[z.to(soft.device)].requires_grad_()
        nll = (engine.nll(pack, rows) * share).double()
        (grad,) = torch.autograd.grad(nll.sum(), rows)
        mass *= factor[here]
        out.index_add_(0, z, grad.cpu().double() * mass[:, None, None])
        total += float(nll.detach().cpu() @ mass[at])
        on_rows(2 * int(pack.cu_seqlens[-1]))
    return out, total
