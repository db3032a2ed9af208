"""How an event table is to be read once its codebooks are there: what counting adds to it, how much
an event of a long history says, and which one of the codes a user is given.

All are chosen by users whom the embedded LM, M-steps, counts and the groups that codewords begin
at never saw; then these are counted too.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from userip_fast.core.prefetch import Prefetch
from userip_fast.em.columns import Grid
from userip_fast.em.counted import Counted, WordFactors, expected
from userip_fast.em.free import WORD_PRIORS
from userip_fast.em.lifts import PLAIN, Calibration, Usual, log_norm
from userip_fast.em.shared_words import SharedWords
from userip_fast.em.table import EventTable, Kind
from userip_fast.ops import profile_posterior
from userip_fast.prompts.behaviour import Source, Told
from userip_fast.prompts.format import BehaviourFormat
from userip_fast.prompts.packing import Int64

TABLE_RECIPE = 7
"""Changes with what a fit makes of the same data, LM and settings."""
CHUNK = 4_096  # users whose sums are added before they join the others': part of the result
_HALF_EVENTS = (math.inf, 100.0, 30.0, 10.0, 3.0, 1.0)
_CODE_PRIORS = (1.0, 0.5, 0.2, 0.05)  # the least still names the usual code where nothing is told
_PRIORS = (1000.0, 100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1)
_WORD_ROUNDS = 10  # of scaling, for words compete
_PRIOR_ROUNDS = 10  # of EM, which is for shares alone
_EARLY = (2, 5, 10, 20)  # events of judges that are told to predict as many more
_JUDGES = 8_192  # at most

logger = logging.getLogger("userip_fast.em")


def calibrate(
    source: Source,
    judging: npt.NDArray[np.bool_],
    table: EventTable,
    counts: Mapping[Kind, int],
    usual: Usual | None,
    groups: tuple[Tensor, Tensor] | None = None,
) -> tuple[Calibration, Tensor]:
    """The calibration under which first events of judges predict their later ones best, and [Z] the
    codes' log prior.

    Whose events are counted for a code is what the table says, or what the groups say that codes
    began at: an LM that was told nothing tells no users apart, and counts then are all there is.
    Words that texts share may be counted too, before the texts.

    Args:
        judging: [U] which of the source's first users judge; the others are counted first, and
            once these have chosen, so are they.
        table: Of their kinds of event, not calibrated: lifts, or likelihoods.
        counts: How often each kind occurred.
        usual: Reactions to items, where events tell of them and are told by lifts.
        groups: log p(kind | code) [E, Z] and log prior [Z] of what codes began at, if known.
    """
    counted = table.calibration.neutral is not None
    reader = _Reader(table, counts, usual, source.format)
    plain, values = reader.read(reader.plain)
    ways = [_Way("codes", values, table.grid.log_prior)]
    if groups is not None:
        ways.append(_Way("groups", *groups, shares=True))
    judges, others = _Judges(), _Judges()
    tokenizer = table.engine.lm.tokenizer
    for first, told in chunks(source, tokenizer, len(judging)):
        rows, judge = table.rows_told(told), judging[first : first + len(told.offsets) - 1]
        judges.add(rows, told.offsets, judge)
        others.add(rows, told.offsets, ~judge)
        for way in ways if counted else ():
            way.count(rows, told.offsets, ~judge)
    best = _Best(judges)
    best.consider(plain, values, table.grid.log_prior, "the LM alone")
    choice: tuple[_Way, float | None, float] | None = None
    word_priors = WORD_PRIORS if reader.shared.words else (None,)
    for way, pooled in itertools.product(ways, word_priors if counted and judges.count else ()):
        made = reader.factors(way.events, pooled, _PRIORS)
        for prior, (found, log_factors) in zip(_PRIORS, made):
            how, own = reader.read(replace(plain, counted=found), log_factors)
            name = f"counts of {way.name} above {prior:g}"
            name += f", of words above {pooled:g}" if pooled else ""
            if best.consider(how, own, way.usual, name):
                choice = way, pooled, prior
    logger.info(
        "judges choose %s; each of n events counts 1 / (1 + n / %g)",
        best.name,
        best.how.half_events,
    )
    if judges.count and len(table.grid.sizes) > 1 and best.how.columns is None:
        joint = _joint_prior(source, tokenizer, table, judging, best)
        name = f"{best.name}, fields together"
        best.consider(replace(best.how, log_prior=joint), best.values, joint, name)
    share = best.code_prior(table.grid, others)
    best.how = replace(best.how, code_prior=share)
    if choice is None:
        return best.how, best.log_prior
    # What they chose by not being counted, they join.
    way, pooled, prior = choice
    for first, told in chunks(source, tokenizer, len(judging)):
        judge = judging[first : first + len(told.offsets) - 1]
        way.count(table.rows_told(told), told.offsets, judge)
    ((found, log_factors),) = reader.factors(way.events, pooled, [prior])
    return reader.read(replace(best.how, counted=found), log_factors)[0], way.usual


class _Reader:
    """Reads a table under calibrations, with what was counted.

    Attributes:
        plain: The table's calibration, but for its norm and what counting tells.
        shared: Words of its texts.
    """

    def __init__(
        self,
        table: EventTable,
        counts: Mapping[Kind, int],
        usual: Usual | None,
        fmt: BehaviourFormat,
    ) -> None:
        self.table, self.texts, self.format = table, table.texts, fmt
        how = table.calibration
        self.plain = Calibration(how.neutral, usual=usual, columns=how.columns)
        asked = [(text, word) for text in table.texts for word in table.words]
        self.events = torch.tensor([counts.get(kind, 0) for kind in asked], dtype=torch.float64)
        self.shared = SharedWords.among([] if how.neutral is None else table.texts)

    def read(self, how: Calibration, more: Tensor | None = None) -> tuple[Calibration, Tensor]:
        """`how` with its norm, and values [E, Z].

        Args:
            more: [E, Z] fp32 what counting tells beyond the LM, in the place of `how.counted`.
        """
        told, weight = self.table.values, self.format.feedback_weight
        if more is not None:
            told = told + (more if how.usual is None else weight * more)
        if how.neutral is not None and how.usual is None:
            how = replace(how, log_norm=log_norm(told, self.events))
        return how, replace(how, counted=None).values(told, self.texts, weight)

    def factors(
        self, n: Tensor, pooled: float | None, priors: Sequence[float]
    ) -> Iterator[tuple[Counted, Tensor]]:
        """By each prior the factors of `n` [E, Z] counted events, and [E, Z] what they tell.

        Args:
            pooled: The prior of factors of words; None for none of these.
        """
        by = None if pooled is None else self._by_words(n, pooled)
        of_words = None if by is None else by.log_of(self.texts)
        e = self._expected(n, of_words)
        for prior in priors:
            found = Counted.of(self.texts, n, e, len(self.table.words), prior, by)
            own = torch.from_numpy(found.log_factors).float().flatten(0, 1)
            yield found, own if of_words is None else own + of_words

    def _by_words(self, n: Tensor, prior: float) -> WordFactors:
        shape = len(self.shared.words), len(self.table.words), n.shape[1]
        log_factors = np.zeros((shape[0], shape[1] * shape[2]))
        for _ in range(_WORD_ROUNDS):
            e = self._expected(n, torch.from_numpy(self.shared.spread(log_factors)).view(n.shape))
            observed, told = (x.view(len(self.texts), -1).numpy() for x in (n, e))
            log_factors = self.shared.scaled(log_factors, observed, told, prior)
        return WordFactors(self.shared.words, log_factors.reshape(shape).astype(np.float16))

    def _expected(self, n: Tensor, more: Tensor | None) -> Tensor:
        return expected(n, self.read(self.plain, more)[1], self.events, self.format)


class _Way:
    """A way to tell whose events are whose, and what was counted by it.

    Args:
        values, log_prior: log p(kind | code) [E, Z] and [Z] of an E-step.
        shares: Whether codes are as usual as they are found to be, or as `log_prior` says.

    Attributes:
        events: [E, Z] fp64, by kind and code.
        users: [Z] fp64.
    """

    def __init__(self, name: str, values: Tensor, log_prior: Tensor, shares: bool = False) -> None:
        self.name, self.values, self.log_prior, self.shares = name, values, log_prior, shares
        self.events = torch.zeros(values.shape, dtype=torch.float64)
        self.users = torch.zeros(len(log_prior), dtype=torch.float64)

    def count(self, rows: Int64, offsets: Int64, whose: npt.NDArray[np.bool_]) -> None:
        """Adds the events of those users, of all whose events are `rows`."""
        kinds, ends = torch.from_numpy(rows), torch.from_numpy(offsets)
        log_resp, _ = profile_posterior(self.values, kinds, ends, self.log_prior)
        resp = log_resp.double().exp() * torch.from_numpy(whose)[:, None]
        user = torch.from_numpy(np.repeat(np.arange(len(whose)), np.diff(offsets)))
        add_by_kind(self.events, kinds, user, resp)
        self.users += torch.from_numpy(resp.numpy().sum(0))  # in order of users

    @property
    def usual(self) -> Tensor:
        """[Z] log prior of the codes that were counted."""
        return _log_mean(self.users) if self.shares else self.log_prior


def _joint_prior(
    source: Source,
    tokenizer: object,
    table: EventTable,
    judging: npt.NDArray[np.bool_],
    best: _Best,
) -> Tensor:
    """[Z] log shares of combinations of codes among users who do not judge, by EM with all else as
    it is."""
    log_prior = best.log_prior
    for _ in range(_PRIOR_ROUNDS):
        users = torch.zeros(len(log_prior), dtype=torch.float64)
        for first, told in chunks(source, tokenizer, len(judging)):
            rows = torch.from_numpy(table.rows_told(told))
            ends, weights = torch.from_numpy(told.offsets), best.how.weights(told.offsets)
            log_resp, _ = profile_posterior(best.values, rows, ends, log_prior, weights)
            whose = ~judging[first : first + len(log_resp)]
            users += torch.from_numpy(log_resp.double().exp().numpy()[whose].sum(0))
        log_prior = _log_mean(users)
    return log_prior


class _Best:
    """What judges are told best by, of what was considered."""

    def __init__(self, judges: _Judges) -> None:
        self.judges, self.most, self.name = judges, -math.inf, ""
        self.how, self.values, self.log_prior = PLAIN, torch.zeros(0), torch.zeros(0)

    def consider(self, how: Calibration, values: Tensor, log_prior: Tensor, name: str) -> bool:
        """One way to read the table, each with all `half_events`; whether it is the best so far."""
        before = self.most
        for half in _HALF_EVENTS:
            option = replace(how, half_events=half)
            if (worth := self.judges.told(option, values, log_prior)) > self.most:
                self.most, self.name = worth, name
                self.how, self.values, self.log_prior = option, values, log_prior
        return self.most > before

    def code_prior(self, grid: Grid, others: _Judges) -> float:
        """That of `Calibration` by which codes alone tell judges' later events best.

        Args:
            others: Users who tell what those of a code are like.
        """
        if not self.judges.count:
            return 1.0

        def worth(share: float) -> float:
            return self.judges.told_by_codes(
                self.how, self.values, self.log_prior, grid, share, others
            )

        best = max(_CODE_PRIORS, key=worth)  # the first of equals
        logger.info("judges choose codes by %g of the prior", best)
        return best


def _log_mean(resp: Tensor) -> Tensor:
    """[Z] log shares of codes from sums of responsibilities, one user more per code."""
    return ((resp + 1) / (resp.sum() + len(resp))).log()


class _Judges:
    """The first events of users, which are to predict their next ones.

    Attributes:
        count: How many users.
    """

    def __init__(self) -> None:
        self.count = 0
        self._rows: list[Int64] = []
        self._lengths: list[Int64] = []

    def add(self, rows: Int64, offsets: Int64, judge: npt.NDArray[np.bool_]) -> None:
        """Takes in those of the users, whose events are `rows`, who judge."""
        own = np.flatnonzero(judge)[: _JUDGES - self.count]
        lengths = np.minimum(np.diff(offsets)[own], 2 * max(_EARLY))
        self._rows += [rows[a : a + n] for a, n in zip(offsets[own].tolist(), lengths.tolist())]
        self._lengths.append(lengths)
        self.count += len(own)

    def told(self, how: Calibration, values: Tensor, log_prior: Tensor) -> float:
        """Nats of the later events, each on its own; 0 where nobody judges."""
        total = 0.0
        for n in _EARLY:
            log_resp, later = self._posterior(n, how, values, log_prior)
            total += _predicted(log_resp.double(), values[later], n)
        return total

    def told_by_codes(
        self,
        how: Calibration,
        values: Tensor,
        log_prior: Tensor,
        grid: Grid,
        code_prior: float,
        others: _Judges,
    ) -> float:
        """The same where only the codes are known that users are given by their early events, and
        what `others` of the same codes are like."""
        total = 0.0
        for n in _EARLY:
            mine, later = self._posterior(n, how, values, log_prior)
            theirs, _ = others._posterior(n, how, values, log_prior)
            found = [grid.likeliest(r, code_prior, log_prior)[1] for r in (mine, theirs)]
            _, code = np.unique(torch.cat(found).numpy(), axis=0, return_inverse=True)
            code = code.ravel()
            usual = log_prior.exp().numpy()
            sums = np.tile(usual, (int(code.max(initial=-1)) + 1, 1))  # one usual user more
            np.add.at(sums, code[len(mine) :], theirs.double().exp().numpy())
            sums /= sums.sum(1, keepdims=True)
            like = torch.from_numpy(np.log(sums[code[: len(mine)]]))
            total += _predicted(like, values[later], n)
        return total

    def _posterior(
        self, n: int, how: Calibration, values: Tensor, log_prior: Tensor
    ) -> tuple[Tensor, Int64]:
        """[U, Z] log responsibilities by the first `n` events of users with as many again, and
        the rows of these [U n]."""
        rows = np.concatenate([np.zeros(0, np.int64), *self._rows])
        lengths = np.concatenate([np.zeros(0, np.int64), *self._lengths])
        place = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        known = (np.repeat(lengths, lengths) >= 2 * n) & (place < 2 * n)
        early, later = known & (place < n), known & (place >= n)
        offsets = np.arange(int(early.sum()) // n + 1) * n
        log_resp, _ = profile_posterior(
            values,
            torch.from_numpy(rows[early]),
            torch.from_numpy(offsets),
            log_prior,
            how.weights(offsets),
        )
        return log_resp, rows[later]


def _predicted(like: Tensor, values: Tensor, n: int) -> float:
    """Nats of n events each [U n, Z] of users who are `like` codes, log p [U, Z]; events of all
    numbers alike."""
    each = like.repeat_interleave(n, 0) + values.double()
    return float(each.logsumexp(1).sum()) / n


def chunks(source: Source, tokenizer: object, users: int) -> Iterator[tuple[int, Told]]:
    """What the first users of `source` are told to have done, and where each chunk begins."""

    def told(first: int) -> tuple[int, Told]:
        return first, source.told(tokenizer, first, min(first + CHUNK, users))

    with Prefetch(range(0, users, CHUNK), told) as found:
        yield from found


def add_by_kind(into: Tensor, kinds: Tensor, user: Tensor, resp: Tensor) -> None:
    """Adds to `into` [E, Z] the sums of `resp` [U, Z] over the events [N] of each kind, in order of
    users; kinds without events cost nothing."""
    ordered, order = torch.sort(kinds, stable=True)
    there, count = torch.unique_consecutive(ordered, return_counts=True)
    offsets = torch.cat([count.new_zeros(1), count.cumsum(0)])
    into[there] += F.embedding_bag(user[order], resp, offsets, mode="sum", include_last_offset=True)
