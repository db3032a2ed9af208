"""The columns of an event table: combinations of codes.

All of them up to `ALL`, and however many with `em.posterior=exact`. Beyond, of several fields that
have `MOST` codes together at most:

1. Lines propose. A line is the codes of one field with the other fields at their mean codeword; a
   user's posterior over each field's line gives q(z) = prod_j q_j(z_j). Combinations become columns
   in the order of q, summed over half of the users, until they have all but 0.3 % of q for all but
   0.3 % of the other half, who judge.
2. Drawn columns say what is missing to these. They are drawn from q of the first half, mixed with
   the prior so that none is out of reach. With p(z) the probability that a draw is z, the mean over
   D draws of

       [z is no column] joint[u, z] / p(z)

   is expected to be the sum of joint[u, z] over all that is no column. What was drawn stays.
3. The columns' own posteriors propose, beside the lines, until nothing is added and less than 1 %
   is missing, on average and for 99 % of users; up to `MOST` columns. At last both halves propose
   for both. Where half of all combinations are columns by then, all are.

What is no column has no probability, so that evidence is a bound from below. The prior is a product
over fields. Everything is seeded by the codebooks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from userip_fast.codebook.books import Codebook
from userip_fast.core.config import EMConfig
from userip_fast.core.profiles import joint
from userip_fast.em.scorer import log_prior as log_shares
from userip_fast.em.scorer import soft_tables, with_mean
from userip_fast.em.steps import books_digest
from userip_fast.lm.engine import Engine
from userip_fast.ops import profile_posterior
from userip_fast.prompts.packing import Int64

Float64 = npt.NDArray[np.float64]

ALL = 256
"""So many combinations of codes are all columns."""
MOST = 1_024
"""Columns, at most, where not all combinations are."""
PROPOSERS = 4_096
"""Users, at most, whose posteriors propose columns."""
_FOUND = 0.997  # of q, for that share of users; more than is asked, as q is no posterior
_MISSING, _USERS = 0.01, 0.99  # of the posterior, at most, for that share of users
_DROPPED = 1e-6
_ROUNDS = 8
_PROPOSED = 1 << 17  # draws that combinations are picked from
_ROWS = 1 << 13  # that are drawn by together
_DRAWS = 1_024  # that say what is missing
_PRIOR_DRAWS = 1 / 16  # share of them

logger = logging.getLogger("userip_fast.em")


def has_all(config: EMConfig, sizes: Sequence[int]) -> bool:
    """Whether all combinations of so many codes of each field are columns."""
    return config.posterior == "exact" or (config.posterior == "auto" and math.prod(sizes) <= ALL)


def has_some(config: EMConfig, sizes: Sequence[int]) -> bool:
    """Whether those that carry weight are: of several fields, as long as lines are few."""
    few = len(sizes) > 1 and sum(sizes) <= MOST
    return config.posterior == "auto" and math.prod(sizes) > ALL and few


class Grid:
    """Combinations of the codes of J codebooks: all, the last field's running fastest, or some.

    Args:
        codes: [Z, J] int64, which; code K_j stands for the field's mean codeword. None for all.
        log_prior: [Z] fp64 of all; None for the product of the fields' own.

    Attributes:
        codes: [Z, J] int64.
        log_prior: [Z] fp64; a product over some adds up to less than one.
    """

    def __init__(
        self,
        codebooks: list[Codebook],
        engine: Engine,
        codes: Tensor | None = None,
        log_prior: Tensor | None = None,
    ) -> None:
        self._codebooks, self._engine, self._all = codebooks, engine, codes is None
        self.sizes = [len(book) for book in codebooks]
        if codes is None:
            ranges = [torch.arange(k) for k in self.sizes]
            codes = torch.cartesian_prod(*ranges).view(-1, len(ranges))
        self.codes = codes
        if log_prior is None:
            self._priors = [log_shares(book) for book in codebooks]
            priors = [torch.cat([p, torch.zeros(1).double()]) for p in self._priors]
            self.log_prior = torch.stack([p[k] for p, k in zip(priors, codes.T)]).sum(0)
        else:
            self._priors = [p[0] for p in self.marginals(log_prior[None])]
            self.log_prior = log_prior

    @cached_property
    def soft(self) -> Tensor:
        """[Z, S, D] fp32, their soft rows on the LM's device."""
        tables = soft_tables([with_mean(book) for book in self._codebooks], self._engine)
        return torch.cat([t[k.to(t.device)] for t, k in zip(tables, self.codes.T)], dim=1)

    @property
    def prior(self) -> Tensor:
        """[Z] fp64, `log_prior` of which some add up to one too."""
        return self.log_prior if self._all else self.log_prior.log_softmax(0)

    def marginals(self, log_resp: Tensor) -> list[Tensor]:
        """Per field [U, K_j] from [U, Z]."""
        if len(self.sizes) == 1:
            return [log_resp]
        fields = range(len(self.sizes))
        if self._all:
            grid = log_resp.view(-1, *self.sizes)
            return [grid.movedim(1 + j, 1).flatten(2).logsumexp(2) for j in fields]
        resp, out = log_resp.double().exp(), []
        for size, k in zip(self.sizes, self.codes.T):
            sums = resp.new_zeros(len(resp), size).index_add_(1, k, resp)
            out.append(sums.log().to(log_resp.dtype))
        return out

    def likeliest(
        self, log_resp: Tensor, code_prior: float = 1.0, log_prior: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Marginals of [U, Z]; each field's likeliest codes [U, J]; and the columns [U] of these,
        or, where they are together none, the likeliest column.

        Args:
            code_prior: See `userip_fast.em.lifts.Calibration`.
            log_prior: [Z] that the responsibilities were found with, if it is not the codebooks'.
        """
        marginals, priors = self.marginals(log_resp), self._priors
        if log_prior is not None:
            priors = [p[0] for p in self.marginals(log_prior[None])]
        spared = [((1 - code_prior) * p).to(log_resp.dtype) for p in priors]
        codes = torch.stack([(r - p).argmax(1) for r, p in zip(marginals, spared)], dim=1)
        if self._all:
            at = torch.zeros(len(codes), dtype=torch.int64)
            for size, k in zip(self.sizes, codes.T):
                at = at * size + k
            return marginals, codes, at
        at = torch.from_numpy(places(codes.numpy(), self.codes.numpy()))
        return marginals, codes, torch.where(at < 0, log_resp.argmax(1), at)

    def joint(self, probabilities: Sequence[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
        """[U, Z], adding up to one, the product of each field's probabilities [U, K_j]."""
        return joint(probabilities, self.codes.numpy())


def places(codes: Int64, among: Int64) -> Int64:
    """[N] rows of `among` [Z, J], all different, that `codes` [N, J] are; -1 for none."""
    _, number = np.unique(np.concatenate([among, codes]), axis=0, return_inverse=True)
    number = number.ravel()
    row = np.full(len(number), -1)
    row[number[: len(among)]] = np.arange(len(among))
    return np.asarray(row[number[len(among) :]], np.int64)


def to_arrow(codes: Tensor) -> pa.Table:
    """Codes [Z, J], ready for Parquet, a column for each field; see
    `userip_fast.core.profiles.codes_of`."""
    return pa.table({str(j): pa.array(k.numpy()) for j, k in enumerate(codes.T)})


def lines(sizes: Sequence[int]) -> Tensor:
    """[sum of K_j, J]: each code of each field, K_j in the others."""
    codes = torch.tensor(sizes).repeat(sum(sizes), 1)
    first = 0
    for j, size in enumerate(sizes):
        codes[first : first + size, j] = torch.arange(size)
        first += size
    return codes


@dataclass(frozen=True)
class Chosen:
    """Columns [Z, J] in ascending order, their values [E, Z], and what is missing of users'
    posteriors, on average, as the last draws say."""

    codes: Tensor
    values: Tensor
    missing: float


def choose(
    codebooks: list[Codebook],
    read: Callable[[Tensor], Tensor],
    kinds: Tensor,
    offsets: Tensor,
    weights: Tensor | None = None,
) -> Chosen:
    """The columns that users need; see the module.

    Args:
        read: Values [E, n] under codes [n, J].
        kinds, offsets, weights: Events of U users, at least one, as `profile_posterior` takes them.
    """
    search = _Search(codebooks, read, kinds, offsets, weights)
    for round_ in range(_ROUNDS):
        added, before = search.propose(), len(search.codes)
        each = search.draw()
        missing, users = float(each.mean()), float((each <= _MISSING).mean())
        logger.debug(
            "round %d: %d columns lack %.3g; %.3g have them", round_, before, missing, users
        )
        if len(search.codes) >= min(MOST, search.combinations):
            break
        if round_ and not added and missing < _MISSING and users >= _USERS:
            break
    search.serve()
    chosen = search.weighty()
    level = logging.INFO if missing < _MISSING else logging.WARNING
    logger.log(
        level,
        "%d of %d combinations of codes are columns; what they lack is %.2g %% of users' "
        "posteriors%s",
        len(chosen),
        search.combinations,
        100 * missing,
        "" if missing < _MISSING else "; fewer codes would be told apart",
    )
    return Chosen(torch.from_numpy(search.codes[chosen]), search.values[:, chosen], missing)


class _Search:
    """Columns found so far: codes [Z, J], values [E, Z], log joint [U, Z] of the users."""

    def __init__(
        self,
        codebooks: list[Codebook],
        read: Callable[[Tensor], Tensor],
        kinds: Tensor,
        offsets: Tensor,
        weights: Tensor | None,
    ) -> None:
        self.read, self.events = read, (kinds, offsets, weights)
        self.sizes = [len(book) for book in codebooks]
        self.combinations = math.prod(self.sizes)
        self.log_priors = [log_shares(book).numpy() for book in codebooks]
        seed = np.frombuffer(books_digest(codebooks), np.uint32)
        self.random = np.random.default_rng(seed.tolist())
        self.users = len(offsets) - 1
        self.judging = np.arange(self.users) % 2 == min(1, self.users - 1)
        self.proposing = ~self.judging | (self.users == 1)
        told = torch.split(read(lines(self.sizes)), self.sizes, dim=1)
        self.lines = [
            np.exp(self._posterior(values, prior)[0].numpy().astype(np.float64))
            for values, prior in zip(told, self.log_priors)
        ]
        self.ways = [self.lines]  # to draw by
        self.codes: Int64 = np.zeros((0, len(self.sizes)), np.int64)
        self.values = torch.empty(len(told[0]), 0)
        self.joint: Float64 = np.zeros((self.users, 0))

    def _posterior(self, values: Tensor, prior: Float64) -> tuple[Tensor, Tensor]:
        kinds, offsets, weights = self.events
        told = values.contiguous(), kinds, offsets, torch.from_numpy(prior), weights
        return profile_posterior(*told)

    def _prior_of(self, codes: Int64) -> Float64:
        return np.asarray(sum(p[k] for p, k in zip(self.log_priors, codes.T)))

    def _add(self, codes: Int64) -> None:
        """Has columns read that are new."""
        if not len(codes):
            return
        values = self.read(torch.from_numpy(codes))
        log_resp, evidence = self._posterior(values, self._prior_of(codes))
        joint = (log_resp.double() + evidence[:, None]).numpy()
        self.codes = np.concatenate([self.codes, codes])
        self.values = torch.cat([self.values, values], dim=1)
        self.joint = np.concatenate([self.joint, joint], axis=1)

    def _resp(self) -> Float64:
        """[U, Z] responsibilities among the columns."""
        p = np.exp(self.joint - self.joint.max(1, keepdims=True))
        return np.asarray(p / p.sum(1, keepdims=True))

    def propose(self) -> int:
        """Adds columns in the order of their weight to those who propose, as far as those who judge
        need them; how many."""
        if len(self.codes):
            self.ways = [self._marginals(), self.lines]
        return self._propose(self.ways[0], self.proposing, self.judging)

    def serve(self) -> None:
        """Adds what all users need; where that is half of all combinations, all."""
        everyone = np.ones(self.users, np.bool_)
        self._propose(self.lines, everyone, everyone)
        for _ in range(_ROUNDS):
            if not self._propose(self._marginals(), everyone, everyone):
                break
        if len(self.codes) * 2 >= self.combinations <= MOST:
            every = torch.cartesian_prod(*map(torch.arange, self.sizes)).numpy()
            self._add(every[places(every, self.codes) < 0])

    def _propose(
        self, q: list[Float64], who: npt.NDArray[np.bool_], whose: npt.NDArray[np.bool_]
    ) -> int:
        users = np.flatnonzero(who)
        drawn = self._drawn(q, np.tile(users, -(-_PROPOSED // len(users))))
        codes, count = _counted(drawn, self.sizes)
        new = places(codes, self.codes) < 0
        codes, count = codes[new], count[new]
        room = max(0, MOST - len(self.codes))
        codes = codes[np.argsort(-count, kind="stable")[:room]]
        weight = _product(q, codes)
        order = np.argsort(-weight[users].sum(0), kind="stable")
        found = np.concatenate([_product(q, self.codes).sum(1, keepdims=True), weight[:, order]], 1)
        # Of how many enough is found, with so many more columns.
        enough = (found.cumsum(1) >= _FOUND)[whose].mean(0) >= _FOUND
        more = codes[order[: int(enough.argmax()) if enough.any() else len(order)]]
        self._add(more)
        return len(more)

    def _marginals(self) -> list[Float64]:
        """Per field [U, K_j], responsibilities among the columns."""
        resp = self._resp()
        found = [np.zeros_like(line) for line in self.lines]
        for q, k in zip(found, self.codes.T):
            for z, code in enumerate(k.tolist()):
                q[:, code] += resp[:, z]
        return found

    def _drawn(self, q: Sequence[Float64], rows: Int64) -> Int64:
        """[N, J] codes, drawn by rows [N] of each field's q."""
        return np.stack([self._pick(p, rows) for p in q], axis=1)

    def _pick(self, p: Float64, rows: Int64) -> Int64:
        running, out = p.cumsum(1), np.empty(len(rows), np.int64)
        for a in range(0, len(rows), _ROWS):
            here = running[rows[a : a + _ROWS]]
            point = self.random.random(len(here)) * here[:, -1]
            out[a : a + _ROWS] = (point[:, None] >= here).sum(1).clip(max=p.shape[1] - 1)
        return out

    def draw(self) -> Float64:
        """What columns lack of the posteriors of those who judge, by columns that are drawn, and
        stay."""
        priors = [np.exp(p)[None] for p in self.log_priors]
        each = round(_DRAWS * (1 - _PRIOR_DRAWS) / len(self.ways))
        users = np.flatnonzero(self.proposing)
        parts = [self._drawn(q, self.random.choice(users, each)) for q in self.ways]
        parts.append(self._drawn(priors, np.zeros(_DRAWS - each * len(self.ways), np.int64)))
        shares = [len(part) / _DRAWS for part in parts]
        codes, times = _counted(np.concatenate(parts), self.sizes)
        new = places(codes, self.codes) < 0
        codes, times, first = codes[new], times[new], len(self.codes)
        if not len(codes):
            return np.zeros(int(self.judging.sum()))
        # As many draws of each way as are expected: with p of all, sums keep their expectation.
        by_way = [_product([p[users] for p in q], codes).mean(0) for q in self.ways]
        by_way.append(np.exp(self._prior_of(codes)))
        p = sum(share * own for share, own in zip(shares, by_way))
        self._add(codes)
        high = self.joint.max(1, keepdims=True)
        there = np.exp(self.joint[:, :first] - high).sum(1)
        lacking = (np.exp(self.joint[:, first:] - high) * (times / (_DRAWS * p))).sum(1)
        return np.asarray((lacking / (there + lacking))[self.judging])

    def weighty(self) -> Int64:
        """The columns that stay, in ascending order of codes."""
        weight = self._resp().mean(0)
        order = np.argsort(weight, kind="stable")
        dropped = int((weight[order].cumsum() <= _DROPPED).sum())
        kept = order[max(dropped, len(order) - MOST) :]
        return kept[np.lexsort(self.codes[kept].T[::-1])]


def _counted(codes: Int64, sizes: Sequence[int]) -> tuple[Int64, Int64]:
    """The different ones of codes [N, J], in ascending order, and how often each is there."""
    if math.prod(sizes) >= 2**63:
        return np.unique(codes, axis=0, return_counts=True)
    number, count = np.unique(np.ravel_multi_index(tuple(codes.T), sizes), return_counts=True)
    return np.stack(np.unravel_index(number, sizes), axis=1), count


def _product(q: Sequence[Float64], codes: Int64) -> Float64:
    """[U, N] q of codes [N, J], from each field's [U, K_j]."""
    out = np.ones((len(q[0]), len(codes)))
    for p, k in zip(q, codes.T):
        out *= p[:, k]
    return out
