"""A planted world: users whose traits are known, so that inferred codes can be compared with the
truth.

Each user has a hobby and a spending level, drawn uniformly, and makes a few purchases. A purchase
is an adjective and a noun: the noun is likely one of the hobby's, the adjective likely one of the
level's, else any. The words that name the traits never occur in a purchase. Given the generator,
the Bayes-optimal labelling is exact and is what no method can beat by more than luck.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

HOBBIES = {
    "fishing": "rod reel lure hook net wader tackle bait float line",
    "baking": "whisk flour tin oven yeast icing mixer rack sieve apron",
    "cycling": "helmet pedal saddle chain pump jersey tyre bell brake spoke",
    "painting": "easel brush canvas palette varnish sketchbook pigment frame gouache primer",
    "gardening": "spade seeds hose trowel compost pruner planter mulch rake fertiliser",
    "camping": "tent lantern stove hammock cooler tarp compass thermos mattress rope",
    "music": "guitar tuner amplifier strings metronome keyboard drum microphone capo violin",
    "gaming": "console joystick headset controller monitor cartridge dice boardgame puzzle cards",
}
LEVELS = {
    "frugal": "cheap used basic discounted",
    "modest": "plain simple standard practical",
    "comfortable": "quality sturdy branded stylish",
    "lavish": "luxury designer handmade exclusive",
}

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class World:
    """Purchases of users with known traits.

    Attributes:
        interactions, items: Arrow tables as a user would hand them to `read_interactions`.
        hobby, level: [U] planted traits of user 0 .. U - 1 (the user's key is its index plus
        `first`). hobby_posterior, level_posterior: [U, 8] and [U, 4], exact given the generator.
    """

    interactions: pa.Table
    items: pa.Table
    hobby: Int64
    level: Int64
    hobby_posterior: npt.NDArray[np.float64]
    level_posterior: npt.NDArray[np.float64]


def make_world(
    users: int,
    *,
    seed: int,
    first: int = 0,
    purchases: int = 8,
    hobby_signal: float = 0.67,
    level_signal: float = 0.7,
) -> World:
    """Draws `users` users with `purchases` purchases each.

    Args:
        seed: Of traits and purchases.
        first: Key of the first user.
        hobby_signal: Probability that a noun comes from the hobby's own list, else from all lists.
        level_signal: The same for adjective and level.
    """
    random = np.random.default_rng(seed)
    nouns = [w for words in HOBBIES.values() for w in words.split()]
    adjectives = [w for words in LEVELS.values() for w in words.split()]
    noun_p = _distributions(HOBBIES, nouns, hobby_signal)  # [8, nouns]
    adjective_p = _distributions(LEVELS, adjectives, level_signal)  # [4, adjectives]

    hobby = random.integers(len(HOBBIES), size=users)
    level = random.integers(len(LEVELS), size=users)
    noun = _draw(random, noun_p[hobby], purchases)
    adjective = _draw(random, adjective_p[level], purchases)
    return World(
        interactions=pa.table(
            {
                "user_id": np.repeat(np.arange(first, first + users), purchases),
                "item_id": (adjective * len(nouns) + noun).ravel(),
                "time": np.tile(np.arange(purchases), users),
            }
        ),
        items=pa.table(
            {
                "item_id": np.arange(len(nouns) * len(adjectives)),
                "title": [f"{a} {n}" for a in adjectives for n in nouns],
            }
        ),
        hobby=hobby,
        level=level,
        hobby_posterior=_posterior(noun_p, noun),
        level_posterior=_posterior(adjective_p, adjective),
    )


def _distributions(
    groups: dict[str, str], words: list[str], signal: float
) -> npt.NDArray[np.float64]:
    out = np.full((len(groups), len(words)), (1 - signal) / len(words))
    for row, own in enumerate(groups.values()):
        for word in own.split():
            out[row, words.index(word)] += signal / len(own.split())
    return out


def _draw(random: np.random.Generator, p: npt.NDArray[np.float64], count: int) -> Int64:
    u = random.random((len(p), count, 1))
    return np.asarray(np.minimum((u > p.cumsum(1)[:, None, :]).sum(2), p.shape[1] - 1))


def _posterior(p: npt.NDArray[np.float64], seen: Int64) -> npt.NDArray[np.float64]:
    log = np.log(p)[:, seen].sum(2).T
    likelihood = np.exp(log - log.max(1, keepdims=True))
    return np.asarray(likelihood / likelihood.sum(1, keepdims=True))
