"""What a run's numbers say, in three sentences: do profiles help, what are they, what is odd."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

OTHERS = {
    "untold": "told nothing of them",
    "item": "by how the item fares with all",
    "constant": "by how often each reaction occurs",
}
"""What `training.json` compares with, in words."""

_MEMORISED = 0.85  # of the held-out loss: a training loss below it is learned by heart
_READ = 0.9  # share of events; what is read below it is odd
_UNKNOWN = 0.01  # share of tokens
_LARGEST = 0.5  # share of users
_DROPPED = 0.02  # share of rows


def verdict(
    metrics: Mapping[str, Any],
    training: Mapping[str, Any],
    cards: Mapping[str, Sequence[Mapping[str, Any]]],
    ctr: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """Three sentences, from what is there.

    Args:
        metrics: metrics.json.
        training: training.json of the embedded LM, or empty.
        cards: codes.json.
        ctr: Name -> ctr.json.
    """
    return [_helps(metrics, training, ctr), _codes(metrics, cards), _odd(metrics, training)]


def _helps(
    metrics: Mapping[str, Any],
    training: Mapping[str, Any],
    ctr: Mapping[str, Mapping[str, Any]],
) -> str:
    told = [_by_lm(nll)] if (nll := training.get("nll")) else []
    told += [found for found in map(_by_recommender, ctr.values()) if found][:1]
    fields = metrics.get("fields", {})
    planted = {name: f["nmi"] for name, f in fields.items() if "posterior" in f.get("nmi", {})}
    if planted:
        scores = ", ".join(
            f"{name} {nmi['posterior']:.2f} (at best {nmi['oracle']:.2f})"
            for name, nmi in planted.items()
        )
        told.append(f"Profiles recover what was planted, by NMI: {scores}")
    if not told:
        return (
            "Whether profiles predict new users was not measured here: there were too few users to "
            "hold some out, or the LM was not trained on this log; `userip ctr` measures it."
        )
    return "; ".join(told) + "."


def _by_lm(nll: Mapping[str, float]) -> str:
    """Whether telling of new users helps the LM, and by how much."""
    others = {name: x for name, x in nll.items() if name != "told"}
    best = min(others, key=lambda name: others[name])
    against = ", ".join(f"{x:.3f} {OTHERS.get(name, name)}" for name, x in others.items())
    gain = 1 - nll["told"] / others[best] if others[best] else 0.0
    if gain > 0:
        head = f"Profiles help to predict new users, by {gain:.1%}"
    else:
        head = "Profiles say little of new users"
    return f"{head}: {nll['told']:.3f} nats told of ten of their events, {against}"


def _by_recommender(result: Mapping[str, Any]) -> str | None:
    """What everything known without an LM gains from codes."""
    for backbone in ("lightgbm", *result.get("paired", {})):
        compared = result.get("paired", {}).get(backbone, {})
        against = compared.get("against", {})
        for d, what in (
            (compared.get("all+ids - all"), "all that is known without an LM"),
            (against.get("none"), "no profile"),
        ):
            if d:
                low, high = d["ci95"]
                sure = "" if low > 0 or high < 0 else ", which may be nothing"
                return (
                    f"in {backbone} they change the AUC of {what} by {d['difference']:+.4f} "
                    f"({low:+.4f} to {high:+.4f}{sure}; {result['protocol']}, {result['label']})"
                )
    return None


def _codes(metrics: Mapping[str, Any], cards: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """How many codes are in use, and how many users a name tells of."""
    found = []
    for name, own in cards.items():
        used = sum(c["users"] > 0 for c in own)
        text = f"{used} of {len(own)} codes of {name} are in use"
        field = metrics.get("fields", {}).get(name, {})
        if "perplexity" in field:
            text += f", as evenly as {field['perplexity']:.1f} equal ones"
        traits = [t for c in own for t in c.get("told", ())]
        if traits and "named" in field:
            best = max(traits, key=lambda t: t["low"])
            text += (
                f"; {field['named']:.0%} of users have a code whose name other users bear out,"
                f" most of all {best['what']}, chosen {best['ratio']:.1f} times as often "
                f"({best['low']:.1f} to {best['high']:.1f})"
            )
        found.append(text)
    return ". ".join(found) + "." if found else "No code was told of."


def _odd(metrics: Mapping[str, Any], training: Mapping[str, Any]) -> str:
    """What a sceptic would ask about."""
    odd = []
    held_out = [x for x in training.get("held_out", ()) if x is not None]
    if held_out and training.get("scored"):
        at, least = training["scored"][-1], min(held_out)
        if at < _MEMORISED * least:
            odd.append(
                f"the LM knows its training users by heart ({at:.3f} nats, users held out "
                f"{least:.3f}; the weights are those of the best held-out score)"
            )
    for name, f in metrics.get("fields", {}).items():
        counts = f.get("counts") or []
        if dead := sum(n == 0 for n in counts):
            odd.append(f"{_of(dead, 'code')} of {name} without a user")
        if single := sum(n == 1 for n in counts):
            odd.append(f"{_of(single, 'code')} of {name} with one user")
        if len(counts) > 2 and max(counts) > _LARGEST * sum(counts):
            odd.append(f"one code of {name} has {max(counts) / sum(counts):.0%} of the users")
    data = metrics.get("data", {})
    told = data.get("told") or {}
    read = told.get("told", 0) / (told.get("events") or 1)
    if told and read < _READ:
        odd.append(
            f"only {read:.0%} of the events were read (histories of {told['users_cut']:,} users "
            "are cut: data.max_tokens)"
        )
    if told and told.get("unknown", 0) > _UNKNOWN * max(1, told.get("tokens", 0)):
        odd.append("the LM's tokenizer does not know part of the text")
    dropped = data.get("dropped") or {}
    if dropped.get("rows_bad", 0) > _DROPPED * max(1, dropped.get("rows_read", 0)):
        odd.append(f"{dropped['rows_bad']:,} of {dropped['rows_read']:,} rows were bad")
    if odd:
        return "Odd: " + "; ".join(odd) + "."
    reading = f", and {read:.0%} of the events were read" if told else ""
    return f"Nothing odd: no code is empty, of one user, or of most users{reading}."


def _of(n: int, what: str) -> str:
    return f"{n} {what}" + "s" * (n != 1)
