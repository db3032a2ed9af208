"""What codes mean: their items, users who stand for them, and traits that nobody told the model.

Association with a users table is measured, never learned: the codes are fixed before the table is
read. Shared information between code and trait is compared with what chance gives: the same codes
on permuted users.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from userip_fast.bank import FeatureBank
from userip_fast.core.errors import DataError, MismatchError
from userip_fast.core.files import write_json
from userip_fast.core.progress import progress
from userip_fast.data import Events, Interactions
from userip_fast.data.filelist import TableLike
from userip_fast.data.sources import read_source
from userip_fast.model.fitted import Model
from userip_fast.prompts.behaviour import BehaviourSource
from userip_fast.prompts.packing import Int64

_MOST_VALUES = 64  # of a trait column
_QUANTILES = 4  # parts that a numerical trait of more values is cut into
_FEW_NUMBERS = 8


def explain(
    model: Model,
    data: Interactions,
    users: TableLike | None = None,
    *,
    bank: FeatureBank | None = None,
    traits: Sequence[str] | None = None,
    permutations: int = 1000,
    items: int = 3,
    examples: int = 2,
    out: str | os.PathLike[str] | None = None,
    seed: int = 0,
    show: bool = True,
) -> dict[str, Any]:
    """Explains the codes of a model on the users of `data`.

    Args:
        users: Table of users with the log's key column, that the codes never saw; None for none.
        bank: Of this model, with the users' codes; None infers them all.
        traits: Its columns; None takes those with 2 to 64 values, and numbers: of more than 8
            values they are cut into quartiles.
        permutations: For the p of an association; its least value is 1 / (permutations + 1).
        items, examples: Per code.
        out: Run folder that gets `explain.json`, for `userip report`.

    Returns:
        `fields`: per field its codes with words, users, items that are typical (most met),
        contrastive (most over-represented) and avoided (most under-represented), and users who
        stand for the code, the surest first where the model tells probabilities. `associations`:
        field -> trait -> users, `bits` of mutual information, `chance_bits` (mean of the
        permutations), `p`.

    Raises:
        DataError: The users table has no such column, or no user of the data; or the bank has none.
        MismatchError: The bank is of another model.
    """
    codes, sure = _codes_of(model, data, show) if bank is None else _codes_in(bank, model, data)
    source = BehaviourSource(model.format.events(data, model.catalogue), model.format)
    result = examples_of(model, source, codes, sure, items=items, examples=examples)
    if users is not None:
        columns = _traits(users, data, model.config.data.user, traits)
        random = np.random.default_rng(seed)
        total = len(model.config.fields) * len(columns)
        with progress("associations", total, "traits", show) as bar:
            for j, f in enumerate(model.config.fields):
                known = codes[:, j] < f.codebook_size
                found = result["associations"][f.name] = {}
                for name, values in columns.items():
                    trait = np.where(known, values, -1)
                    found[name] = association(codes[:, j], trait, permutations, random)
                    bar.advance(1)
    if out is not None:
        write_json(Path(out) / "explain.json", result)
    return result


def examples_of(
    model: Model,
    source: BehaviourSource,
    codes: Int64,
    sure: np.ndarray[Any, Any] | None,
    *,
    items: int = 3,
    examples: int = 2,
) -> dict[str, Any]:
    """As `explain`, without associations.

    Args:
        codes: [U, J] of the users of `source`.
        sure: [U, J] their probabilities, if there are any.
    """
    told = source.rendered()
    fields = {}
    best = _best_feedback(source.events)
    for j, f in enumerate(model.config.fields):
        cards = {c["code"]: c for c in model.cards.get(f.name, [])}
        listed = []
        for k in range(f.codebook_size):
            who = np.flatnonzero(codes[:, j] == k)
            typical, contrastive, avoided = _items(source.events, best, who, items)
            order = who if sure is None else who[np.argsort(-sure[who, j], kind="stable")]
            listed.append(
                {
                    "code": k,
                    "users": len(who),
                    "words": list(cards.get(k, {}).get("words", [])),
                    "typical": typical,
                    "contrastive": contrastive,
                    "avoided": avoided,
                    "examples": [
                        {
                            "user": source.events.user_keys[int(u)].as_py(),
                            "p": None if sure is None else float(sure[u, j]),
                            "behaviour": _behaviour(source, told, int(u)),
                        }
                        for u in order[:examples]
                    ],
                }
            )
        fields[f.name] = {"codes": listed}
    return {"fields": fields, "associations": {}}


def association(
    codes: Int64, values: Int64, permutations: int, random: np.random.Generator
) -> dict[str, Any]:
    """Mutual information of code and trait, against permuted users.

    Args:
        codes: [U].
        values: [U], -1 for users whose trait is not known; they are left out.
    """
    known = values >= 0
    x, y = codes[known], values[known]
    found = _bits(x, y)
    chance = np.array([_bits(x, random.permutation(y)) for _ in range(permutations)])
    return {
        "users": int(known.sum()),
        "bits": found,
        "chance_bits": float(chance.mean()),
        "p": float((1 + (chance >= found - 1e-12).sum()) / (1 + permutations)),
    }


def _bits(x: Int64, y: Int64) -> float:
    if not len(x):
        return 0.0
    table = np.zeros((x.max() + 1, y.max() + 1))
    np.add.at(table, (x, y), 1 / len(x))
    free = table.sum(1, keepdims=True) * table.sum(0, keepdims=True)
    there = table > 0
    return float((table[there] * np.log2(table[there] / free[there])).sum())


def _codes_of(
    model: Model, data: Interactions, show: bool
) -> tuple[Int64, np.ndarray[Any, Any] | None]:
    """[U, J] codes, and how sure the model is of each where its E-step tells."""
    em = model.config.em
    tells = em.recipe == "userip" and em.estep != "gradient"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bank"
        bank = model.infer(data, out, on_bad="skip", probabilities=tells, show=show)
        assert isinstance(bank, FeatureBank)
        return _codes_in(bank, model, data)


def _codes_in(
    bank: FeatureBank, model: Model, data: Interactions
) -> tuple[Int64, np.ndarray[Any, Any] | None]:
    """[U, J] codes that a bank has, K_j of users it lacks; and probabilities, if it has them."""
    if bank.model_fingerprint != model.fingerprint:
        raise MismatchError(
            f"the bank is of another model (fingerprint {bank.model_fingerprint[:12]}, the model's "
            f"is {model.fingerprint[:12]}); infer one with this model"
        )
    codes = np.array(bank.lookup(data.user_keys, on_unknown="code"), np.int64)
    rows = bank.rows(data.user_keys)
    if (rows < 0).all():
        raise DataError(
            "the bank has none of the users of this log; explain the log it was made of, or infer "
            "the codes of this one"
        )
    if bank.probabilities is None:
        return codes, None
    sure = np.zeros(codes.shape)
    sure[rows >= 0] = bank.probabilities[rows[rows >= 0]]
    return codes, sure


def _best_feedback(events: Events) -> np.ndarray[Any, Any]:
    """[N] events with the best feedback."""
    if events.level is None:
        return np.ones(events.num_events, bool)
    best = 0 if events.words[0] == "chosen" else len(events.words) - 1
    return np.asarray(events.level == best)


def _items(
    events: Events, kept: np.ndarray[Any, Any], who: Int64, count: int
) -> tuple[list[str], list[str], list[str]]:
    """Texts of the items most met by some users, most over-represented, and most missed."""
    user = np.repeat(np.arange(events.num_users), np.diff(events.offsets))[kept]
    item = events.item_index[kept].astype(np.int64)
    base = np.bincount(item, minlength=len(events.item_keys)).astype(np.float64)
    own = np.bincount(item[np.isin(user, who)], minlength=len(base)).astype(np.float64)
    expected = base / max(base.sum(), 1.0) * own.sum()
    score = (own - expected) / np.sqrt(expected + 1e-9)
    text = events.item_text

    def texts(order: Int64, good: np.ndarray[Any, Any]) -> list[str]:
        chosen = [int(i) for i in order if good[i]]
        return list(dict.fromkeys(text[i].as_py() for i in chosen[: 4 * count]))[:count]

    return (
        texts(np.argsort(-own, kind="stable"), own > 0),
        texts(np.argsort(-score, kind="stable"), (own > 1) & (score > 0)),
        texts(np.argsort(score, kind="stable"), (base > 1) & (score < 0)),
    )


def _behaviour(source: BehaviourSource, told: list[str], user: int, events: int = 5) -> str:
    a, b = source.events.offsets[user : user + 2]
    shown = [told[k] for k in source.kinds[a : min(b, a + events)]]
    more = f" ... {b - a - events} more" if b - a > events else ""
    return "".join(shown).removeprefix(source.format.separator) + more


def _traits(
    users: TableLike, data: Interactions, key: str, names: Sequence[str] | None
) -> dict[str, Int64]:
    """Trait -> [U] value number of each user of the data, -1 where it is not known."""
    source = read_source(users, None, what="users", as_text={key})
    source.require(key)
    table = source.table
    try:
        keys = pc.cast(table[key].combine_chunks(), data.user_keys.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as e:
        raise DataError(
            f"{source.name}: {key} must hold keys of users, of type {data.user_keys.type} ({e})"
        ) from e
    row = np.asarray(pc.fill_null(pc.index_in(data.user_keys, value_set=keys), -1)).astype(np.int64)
    if (row < 0).all():
        raise DataError(f"{source.name}: holds none of the users of the data")
    found: dict[str, Int64] = {}
    for name in names if names is not None else [c for c in table.column_names if c != key]:
        source.require(name)
        kind = table.schema.field(name).type
        if pa.types.is_nested(kind) or pa.types.is_null(kind):
            if names is None:
                continue
            raise DataError(f"{source.name}: {name} is {kind}; a trait has text or a number a user")
        column = _cut(table[name].combine_chunks()).dictionary_encode()
        if names is None and not 2 <= len(column.dictionary) <= _MOST_VALUES:
            continue
        code = np.asarray(pc.fill_null(column.indices, -1)).astype(np.int64)
        found[name] = np.where(row >= 0, code[row], -1)
    return found


def _cut(column: pa.Array) -> pa.Array:
    """A trait's values; numbers of more than `_FEW_NUMBERS` values as the quantile they lie in."""
    numeric = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
    if not numeric or len(pc.unique(pc.drop_null(column))) <= _FEW_NUMBERS:
        return column
    x = np.asarray(pc.cast(column, pa.float64()).to_numpy(zero_copy_only=False))
    known = np.isfinite(x)
    cuts = np.quantile(x[known], np.arange(1, _QUANTILES) / _QUANTILES)
    part = np.searchsorted(cuts, np.where(known, x, 0.0), side="right")
    return pa.array(part, mask=~known)
