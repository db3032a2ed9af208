"""How many codes, and which fields: judged on users held out, by likelihood, use and stability.

Every choice learns a mixture of soft prompts once per seed; a seed draws its own start and trains
on its own part of the training users. All are judged on the same other users, whom the embedded LM
has not seen either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from userip_fast.core.config import Config
from userip_fast.core.errors import ConfigError
from userip_fast.core.fields import ProfileField
from userip_fast.core.progress import progress
from userip_fast.data import Interactions
from userip_fast.em.crowd import APART_USERS
from userip_fast.em.matching import agreement
from userip_fast.em.steps import Profiles
from userip_fast.em.table import has_table
from userip_fast.lm import FrozenLM
from userip_fast.model.learned import make_trainer
from userip_fast.model.prepare import prepare
from userip_fast.prompts.packing import Int64

Float64 = NDArray[np.float64]
_JUDGES = 4  # every fourth user judges
_SHARE = 0.8  # of the training users that one seed sees
_SIZES = (4, 8, 16, 32, 64, 128, 256)
_USERS_PER_CODE = 20


@dataclass(frozen=True)
class Choice:
    """What so many codes per field are worth. Values are means over seeds.

    Attributes:
        codes: Field -> number of codes.
        elbo: Of the users who judge, nats per user.
        gain: By how much that is more than with one code per field, that is without profiles.
        perplexity: Field -> codes in even use.
        stability: Field -> share of users with the same code under two seeds, codes matched; None
            for one seed.
        forward_equivalents: Passes through the LM per user, to infer.
    """

    codes: dict[str, int]
    elbo: float
    gain: float
    perplexity: dict[str, float]
    stability: dict[str, float] | None
    forward_equivalents: float

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def sizes_for(users: int) -> list[int]:
    """Numbers of codes worth trying on a log of so many users: 4, 8, ... 256, as long as a code of
    those who train has twenty of them; 4 in any case."""
    training = users * (_JUDGES - 1) // _JUDGES
    return [k for k in _SIZES if k == _SIZES[0] or k * _USERS_PER_CODE <= training]


def tune(
    data: Interactions,
    config: Config,
    sizes: Sequence[int] | None = None,
    *,
    levels: int = 1,
    lm: FrozenLM | None = None,
    seeds: int = 2,
    show: bool = True,
    each: Callable[[Choice], None] = lambda choice: None,
) -> list[Choice]:
    """Tries `sizes` codes in every field, and the config's own sizes without each field in turn;
    and further levels: fields of the same prompt, which begin at what those before leave.

    A field is left out by giving it one code, so that the LM reads the same prompt.

    Args:
        data: Histories. All users are used where an event table serves, else the first 4/3
            `em.fit_users` (None: 1,024) in hash order.
        config: LM, fields and EM; the E-step is the posterior.
        sizes: Numbers of codes, 2 or more; None takes `sizes_for` the users.
        levels: How many fields stand for each of the config's, at most; the further ones are named
            `FIELD_2`, ...
        lm: The frozen LM; None loads the config's.
        seeds: Runs per choice.
        show: Whether to show progress.
        each: Called with every choice as it is judged, so that an interrupt need not lose it.

    Returns:
        The choices, likeliest first; the one without profiles among them.

    Raises:
        ConfigError: There is nothing to try.
        DataError: There are fewer users than codes.
    """
    em = replace(config.em, estep="posterior")
    config = replace(config, em=em)
    if sizes is None:
        serves = has_table(_with_codes(config, [_SIZES[0]] * len(config.fields)))
        most = data.num_users if serves else _most_users(config)
        sizes = sizes_for(min(data.num_users, most))
    if not sizes or min(sizes) < 2 or seeds < 1 or levels < 1:
        raise ConfigError(
            "tune: sizes must be 2 or more, seeds and levels 1 or more; got "
            f"{list(sizes)}, {seeds} and {levels}"
        )
    tried = _tried([f.codebook_size for f in config.fields], sizes, levels)
    config = replace(config, fields=_levels(config.fields, levels))
    largest = [max(codes[j] for codes in tried) for j in range(len(config.fields))]
    if not has_table(_with_codes(config, largest)):
        data = data.head_users(min(data.num_users, _most_users(config)))
    index = np.arange(data.num_users)
    training = data.select_users(index[index % _JUDGES > 0])
    # The LM learns from the training users alone: who judges is new to it.
    model, _ = prepare(training, _with_codes(config, largest), lm=lm, show=show)
    judges = model.source(data.select_users(index[index % _JUDGES == 0]))

    choices: list[Choice] = []
    with progress("tuning", len(tried) * seeds, "fits", show) as bar:
        for codes in tried:
            found = []
            for seed in range(em.seed, em.seed + seeds):
                own_config = replace(_with_codes(config, list(codes)), em=replace(em, seed=seed))
                trainer = make_trainer(own_config, model.lm, show=False)
                part = model.source(training.select_users(_part(training.num_users, seed)))
                fitted = trainer.fit(part)
                # Likelihoods compare as they are, each event counting whole.
                if (table := fitted.table) is not None:
                    table.calibration = replace(table.calibration, half_events=math.inf)
                profiles = trainer.infer(judges, fitted.codebooks, fitted.start, table=table)
                found.append(_joined(profiles))
                bar.advance(1)
            choices.append(_judge(config, list(codes), found, choices))
            each(choices[-1])
    return sorted(choices, key=lambda c: -c.elbo)


def _tried(own: list[int], sizes: Sequence[int], levels: int) -> list[tuple[int, ...]]:
    """Codes of every field and level: none, each size at one level and more, the fields' own, and
    these without each field in turn. Fields stand level by level."""
    none, rest = [1] * len(own), levels - 1
    wanted = [none * levels]
    for k in sizes:
        wanted += [[k] * (len(own) * n) + none * (levels - n) for n in range(1, levels + 1)]
    wanted.append(own + none * rest)
    if len(own) > 1:
        without = ([1 if i == j else k for i, k in enumerate(own)] for j in range(len(own)))
        wanted += [codes + none * rest for codes in without]
    return list(dict.fromkeys(map(tuple, wanted)))


def _levels(fields: Sequence[ProfileField], levels: int) -> tuple[ProfileField, ...]:
    """The fields, and those of further levels behind them. Words that say what a trait may be are
    the first level's: the next ones begin at what it leaves."""
    more = [
        replace(f, name=f"{f.name}_{level}", candidates=())
        for level in range(2, levels + 1)
        for f in fields
    ]
    return (*fields, *more)


def _most_users(config: Config) -> int:
    """Users that are read one by one, at most, so that those who train are `em.fit_users`."""
    return (config.em.fit_users or APART_USERS) * _JUDGES // (_JUDGES - 1)


@dataclass(frozen=True)
class _Judged:
    """What the judges' profiles say: [U] fp64, [U, J] int64, [U]."""

    elbo: Float64
    code_ids: Int64
    cost: Float64


def _joined(parts: Iterable[Profiles]) -> _Judged:
    every = list(parts)
    assert all(p.elbo is not None and p.code_ids is not None for p in every)
    return _Judged(
        np.concatenate([p.elbo.double().numpy() for p in every]),  # type: ignore[union-attr]
        np.concatenate([p.code_ids.numpy() for p in every]),  # type: ignore[union-attr]
        np.concatenate([p.forward_equivalents.double().numpy() for p in every]),
    )


def _judge(config: Config, codes: list[int], found: list[_Judged], before: list[Choice]) -> Choice:
    elbo = float(np.mean([p.elbo.mean() for p in found]))
    ids = [p.code_ids for p in found]
    names = [f.name for f in config.fields]
    stability = None
    if len(ids) > 1:
        stability = {
            name: float(
                np.mean([agreement(a[:, j], b[:, j], codes[j]) for a, b in combinations(ids, 2)])
            )
            for j, name in enumerate(names)
        }
    return Choice(
        codes=dict(zip(names, codes)),
        elbo=elbo,
        gain=elbo - (before[0].elbo if before else elbo),
        perplexity={
            name: float(np.mean([_perplexity(z[:, j], codes[j]) for z in ids]))
            for j, name in enumerate(names)
        },
        stability=stability,
        forward_equivalents=float(np.mean([p.cost.mean() for p in found])),
    )


def _with_codes(config: Config, codes: list[int]) -> Config:
    fields = zip(config.fields, codes)
    return replace(config, fields=tuple(replace(f, codebook_size=k) for f, k in fields))


def _part(users: int, seed: int) -> Int64:
    """Some of the training users, in order."""
    count = max(1, round(_SHARE * users))
    return np.sort(np.random.default_rng(seed).choice(users, count, replace=False))


def _perplexity(z: Int64, k: int) -> float:
    p = np.bincount(z, minlength=k) / max(len(z), 1)
    return float(np.exp(-(p * np.log(np.maximum(p, 1e-300))).sum()))
