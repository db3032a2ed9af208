"""Settings: frozen dataclasses, checked when made, equal in YAML, JSON, flags and Python.

Each is declared once, here: name, type, default, rule, and the line of help that makes it a flag
(see `userip_fast.core.settings`). A `Config` is saved with every model.
"""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from userip_fast.core import deprecated
from userip_fast.core.errors import ConfigError
from userip_fast.core.fields import TEMPLATES, ProfileField
from userip_fast.core.settings import (
    MAX_BYTES,
    NOT_NEGATIVE,
    POSITIVE,
    Rule,
    at_least,
    build,
    check,
    parse_yaml,
    require,
    setting,
)

MAX_SEED = 2**32 - 1
"""What every library takes as a seed."""


@dataclass(frozen=True)
class DataConfig:
    """How an interaction log is read and told to the LM (see `userip_fast.read_interactions`)."""

    user: str = setting("user_id", "Column of user keys.")
    item: str = setting("item_id", "Column of item keys.")
    rating: str | None = setting(None, "Column of ratings, if there is one.")
    time: str | None = setting(
        None, "Column of times, if there is one: dates, or numbers since 1970."
    )
    text: str = setting(
        "{title}", "Item text, say '{title}[[ ({genres})]]', of which [[...]] may vanish."
    )
    """`{column}` is that of the items table; a group vanishes where all its columns are empty."""
    filter: str | None = setting(None, "Rows to keep, for example 'not cancelled'.")
    sep: str | None = setting(
        None, "Between the columns of a CSV log, say ';' or '::' (found out)."
    )
    """This and the next three: see `read_interactions`."""
    encoding: str | None = setting(None, "Of text files, say latin-1 (utf-8).")
    header: str | tuple[str, ...] | None = setting(
        None, "Columns A,B,... of a CSV log that has no header line."
    )
    items_header: str | tuple[str, ...] | None = setting(None, "The same for the item table.")
    on_bad: Literal["error", "skip"] = setting(
        "error", "Bad rows: error, which refuses and lists them, or skip."
    )
    min_history: int = setting(1, "Fewest events of a user.", at_least(1))
    behaviour: str = setting(
        "auto",
        "One event, say '{text}: {feedback}'.",
        Rule("holding {text}", lambda x: x == "auto" or "{text}" in x),
    )
    """"auto" is `{text}: {feedback}`, or `{text}` when there is no feedback to tell."""
    separator: str = setting("; ", "Text between events.")
    behaviour_context: Literal["auto", "sequence", "independent"] = setting(
        "auto", "sequence, or independent, as posterior and amortised E-steps have it."
    )
    """Whether events follow each other, or say what they say of the profile each on its own; "auto"
    is independent with the posterior and amortised E-steps, whose work then does not grow with
    users, else sequence."""
    max_tokens: int | None = setting(
        None, "Behaviour tokens per user (256 of a sequence, else all).", at_least(2)
    )
    """The latest whole events that fit are kept."""
    chunk_tokens: int = setting(1024, rule=at_least(2))
    """Tokens the LM reads at once: a longer history is cut between events into sequences that share
    the user's soft rows. At most `max_tokens`, or 256 without it."""
    feedback_words: tuple[str, ...] = setting(
        ("disliked", "okay", "liked"), rule=Rule("non-empty", bool)
    )
    feedback_thresholds: tuple[float, ...] | None = None
    """Lower bounds of the second, third, ... word; None takes terciles of the training ratings."""
    negatives: int | None = setting(
        None, "Items passed over per event of a log without ratings (0).", NOT_NEGATIVE
    )
    """They are sampled, and told as "passed over" beside "chosen"; with 0 a choice is told by its
    text alone."""
    loss: Literal["auto", "feedback", "all"] | tuple[float, float] = setting(
        "auto",
        "feedback, all, or weights TEXT,FEEDBACK such as 0.1,1.",
        Rule(
            "two weights of 0 or more, one positive",
            lambda x: isinstance(x, str) or (min(x) >= 0 and max(x) > 0),
        ),
    )
    """Tokens with loss; a pair is (weight of text tokens, weight of feedback tokens)."""

    def __post_init__(self) -> None:
        check(self, "data.")
        if (cuts := self.feedback_thresholds) is not None:
            require(
                len(cuts) == len(self.feedback_words) - 1 and list(cuts) == sorted(set(cuts)),
                "data.feedback_thresholds",
                f"{len(self.feedback_words) - 1} increasing numbers",
                cuts,
            )

    @property
    def token_limits(self) -> tuple[int, int]:
        """Behaviour tokens of a user, and of a sequence, at most."""
        longest = 256 if self.max_tokens is None else self.max_tokens
        chunk = min(longest, self.chunk_tokens)
        if self.max_tokens is None and self.behaviour_context == "independent":
            return UNLIMITED, chunk
        return longest, chunk


UNLIMITED = 2**31 - 1  # tokens


@dataclass(frozen=True)
class LMConfig:
    """Which frozen LM reads the prompts, and in which form its weights are kept."""

    path: str = setting(
        "default",
        "Folder, GGUF file, hub id, 'small', or a Llama trained on this log.",
        flag="lm",
    )
    """"small" is SmolLM2-135M-Instruct (extra `lm-small`); the small Llama of "default" is trained
    on the training users' text."""
    quantization: Literal["auto", "none", "nf4", "nf4-double"] = setting(
        "auto", "none, nf4 or nf4-double."
    )
    """"auto" is nf4-double, and none of the embedded LM, which is small, and of GGUF files, which
    are rounded already. bitsandbytes quantises where it is installed, else we do: same bits."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; "auto" is float32 on a CPU, bfloat16 on a GPU. On a CPU with bf16 instructions
    "auto" also multiplies in bf16 where no gradient is needed, if that is faster and the LM says
    the same (`userip_fast/lm/bf16.py`)."""
    device: str = setting(
        "auto",
        "cpu, cuda, cuda:1, ...",
        Rule(
            "auto, cpu, cuda or cuda:N",
            lambda x: re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", x) is not None,
        ),
    )
    residency: Literal["auto", "resident", "streamed", "fp8"] = "auto"
    """How the weights lie in memory; "auto" is resident where it fits, or FP8 where that is
    faster on this device and the LM says the same, else streamed."""
    recompute: Literal["auto", "on", "off"] = "auto"
    """Recompute activations in backward; "auto" only where the step does not fit otherwise."""
    fused: Literal["auto", "off"] = "auto"
    """Fused norms, gates and RoPE, where there are kernels and the model's modules allow it."""
    memory_gib: float | None = setting(None, rule=POSITIVE)
    """What weights and step may take together; None: what is free on a GPU, 0.45 of it on a CPU."""
    trust_remote_code: bool = False
    verify: bool = setting(False, "Read every byte of the LM again, whatever sums are kept.")
    """For its fingerprint, instead of trusting sums that are kept by file identity, size and
    times."""
    embedded_hidden: int = 64
    embedded_layers: int = setting(2, rule=at_least(1))
    embedded_heads: int = setting(4, rule=at_least(1))
    embedded_vocab: int = setting(
        1024,
        rule=Rule("at least 300 (256 bytes and special tokens)", lambda x: bool(x >= 300)),
    )
    embedded_tokens: int = setting(4_000_000, rule=at_least(1))
    """Training tokens of the embedded LM, at most: 20 passes over the log are as many as it gets,
    and it ends where users held out are predicted no better. About a minute per million on one CPU
    core for choices (half of it for ratings)."""
    taught_tokens: int = setting(0, rule=at_least(0))
    """Of any other LM: training tokens, at most, of the map by which it is told of users, the LM
    staying as it is; forward and backward, twice for choices. It takes millions of them: 0 tells
    it nothing, and codewords start at words, or at random."""

    def __post_init__(self) -> None:
        check(self, "lm.")
        require(
            self.embedded_hidden % (2 * self.embedded_heads) == 0,
            "lm.embedded_hidden",
            "a multiple of 2 * lm.embedded_heads",
            self.embedded_hidden,
        )


@dataclass(frozen=True)
class EMConfig:
    """The EM loop (method.md in the paper's terms: E-step infers theta, M-step moves codebooks)."""

    recipe: Literal["userip", "paper"] = setting("userip", "userip, or paper, as published.")
    """"paper" is the public code's algorithm: random starts, one joint loss, dense AdamW."""
    estep: Literal["gradient", "posterior", "amortised"] = setting(
        "posterior", "posterior, amortised or gradient, as published."
    )
    """"gradient": soft prompts by descent, then the nearest codeword, as published. "posterior":
    p(code | behaviour) from the LM's likelihoods under codewords. "amortised": codewords as
    "posterior", users by one pass and a head that learned its answers."""
    rounds: int | None = setting(
        None, "EM rounds, at most (8, or 2 of the gradient E-step).", at_least(1)
    )
    """Of one E-step and one M-step."""
    steps: int = setting(6, "Adam steps of an E-step, at most.", at_least(1))
    """Users that stop improving leave earlier."""
    lr: float = setting(0.04, rule=POSITIVE)
    """Adam step size on theta, in units of the RMS of the LM's token embeddings."""
    tolerance: float = setting(1e-3, rule=NOT_NEGATIVE)
    """A user is converged when its NLL per weight falls by less than this for `patience` steps."""
    patience: int = setting(3, rule=at_least(1))
    posterior: Literal["auto", "exact", "ascent", "mean_field"] = "auto"
    """Posterior: score all combinations of codes, or one field after another, given codes of the
    others ("ascent") or their probabilities ("mean_field"). "auto": of independent events an event
    table, of all combinations up to 256 and beyond of those that carry weight; otherwise exact up
    to 4,096, if they are at most twice as many as codes, else ascent."""
    sweeps: int = setting(6, rule=at_least(2))
    """Posterior: sweeps over the fields, at most, of coordinate ascent and then of mean field; two
    at least, as the first scores a field while others are not known yet."""
    prune_share: float = setting(0.34, rule=Rule("in [0, 1)", lambda x: 0 <= x < 1))
    """Posterior: candidates are first scored on this share of the behaviour; 0 is off."""
    prune_nats: float = setting(8.0, rule=POSITIVE)
    """Posterior: candidates that far behind the best, in log probability, are dropped there."""
    start: Literal["auto", "told", "words", "kmeans++", "random"] = "auto"
    """Posterior: first codewords. "told": k-means on the soft rows that tell the embedded LM of
    users. Candidate words, k-means++ on the thetas of the gradient E-step, or random ones around
    the shared start; "auto" is told where the LM can be told, else words where a field has them,
    else random."""
    start_spread: float = setting(0.5, rule=POSITIVE)
    """Posterior: standard deviation of random codewords, in units of the embedding RMS."""
    restarts: int = setting(1, rule=at_least(1))
    """Posterior: random or k-means++ starts tried for two rounds; the likeliest goes on."""
    fit_users: int | None = setting(None, rule=at_least(1))
    """Posterior: the codewords are learned on the first so many users in hash order; None is all
    where an event table serves them, else 1,024."""
    table_readings: int = setting(32_768, rule=at_least(1))
    """Posterior, event table: pairs of an item's text and codes that EM reads a round (of 256 texts
    at least); the most frequent texts are kept. The table of all is read once, at the end."""
    codeword_draws: int = setting(4_096, rule=NOT_NEGATIVE)
    """Posterior, event table: pairs that a gradient step draws among these, by weight; 0 is all."""
    held_out: float = setting(0.1, rule=Rule("in [0, 0.5]", lambda x: 0 <= x <= 0.5))
    """Posterior: share of them who judge each round instead of training (from 50 users on). The
    embedded LM has not learned from a tenth of them, who are these; from more it has."""
    codeword_steps: int = setting(4, rule=at_least(1))
    """Posterior: gradient steps on the codewords per round."""
    codeword_lr: float = setting(0.1, rule=POSITIVE)
    """Posterior: their size, in units of the embedding RMS; halved after a round in vain."""
    gain: float = setting(5e-4, rule=NOT_NEGATIVE)
    """Posterior: a round that raises the objective by less than this share of it is the last; so is
    one in vain after its steps were halved twice."""
    head_users: int = setting(4_096, rule=at_least(1))
    """Amortised: the head learns from the posterior of the first so many users."""
    sure: float = setting(0.8, rule=Rule("in [0, 1]", lambda x: 0 <= x <= 1))
    """Amortised: where the head gives a field's code less, the posterior decides; 0 is nowhere."""
    codebook_update: Literal["kmeans", "ema", "mse"] = "kmeans"
    ema_decay: float = setting(0.9, rule=Rule("in [0, 1)", lambda x: 0 <= x < 1))
    mse_lr: float = setting(0.5, rule=POSITIVE)
    dead_code_threshold: float = setting(1.0, rule=NOT_NEGATIVE)
    """A code with fewer users than this is revived at a user that no code serves well."""
    kmeans_restarts: int = setting(10, rule=at_least(1))
    kmeans_sample: int = setting(65_536, rule=at_least(1))
    """Users (lowest salted hash) whose theta starts the codebooks."""
    block_users: int = setting(4_096, rule=at_least(1))
    pack_tokens: int = setting(8_192, rule=at_least(1))
    """Rows of a pack, at most; on a GPU exactly so many, rounded down to a multiple of 128. Fewer
    where memory does not suffice, which the log says."""
    engine: Literal["auto", "packed", "graph", "reference"] = "auto"
    """"packed", or the same replayed from CUDA graphs ("graph"), or whole padded prompts
    ("reference"); "auto" is graph on a GPU for small packs of small LMs, up to 2 billion weights
    times 8,192 rows, else packed."""
    seed: int = setting(
        0, "A run repeats with its seed.", Rule(f"in [0, {MAX_SEED}]", lambda x: 0 <= x <= MAX_SEED)
    )
    paper_epochs: int = setting(60, rule=at_least(1))
    paper_batch: int = setting(8, rule=at_least(1))
    paper_lr: float = setting(0.01, rule=POSITIVE)
    paper_vq_weight: float = setting(0.5, rule=NOT_NEGATIVE)

    def __post_init__(self) -> None:
        check(self, "em.")

    @property
    def max_rounds(self) -> int:
        """`rounds`, or what None stands for."""
        return self.rounds or (2 if self.estep == "gradient" else 8)


@dataclass(frozen=True)
class Config:
    """Everything that decides a run's result, beside the data itself."""

    data: DataConfig = field(default_factory=DataConfig)
    lm: LMConfig = field(default_factory=LMConfig)
    em: EMConfig = field(default_factory=EMConfig)
    fields: tuple[ProfileField, ...] = TEMPLATES["generic"]

    def __post_init__(self) -> None:
        require(len(self.fields) >= 1, "fields", "at least one profile field", self.fields)
        names = [f.name for f in self.fields]
        require(len(set(names)) == len(names), "fields", "of different names", names)

    @property
    def told(self) -> DataConfig:
        """`data` with the context that "auto" stands for: what reads histories goes by this."""
        if self.data.behaviour_context != "auto":
            return self.data
        apart = self.em.recipe == "userip" and self.em.estep != "gradient"
        context: Literal["sequence", "independent"] = "independent" if apart else "sequence"
        return dataclasses.replace(self.data, behaviour_context=context)

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, ready for JSON."""
        return typing.cast("dict[str, Any]", json.loads(json.dumps(dataclasses.asdict(self))))

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Config:
        """Builds a checked config.

        Raises:
            ConfigError: A key is unknown, or a value has the wrong type or breaks a rule.
        """
        return build(Config, _of_today(values), "config")

    @staticmethod
    def load(path: str | Path) -> Config:
        """Reads a YAML or JSON file.

        Raises:
            ConfigError: It cannot be read (see `parse_yaml`), or as `from_dict`.
        """
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read(MAX_BYTES + 1)
        except (OSError, ValueError) as e:
            raise ConfigError(f"config file {path} cannot be read: {e}") from e
        values = parse_yaml(text, f"config file {path}")
        if not isinstance(values, dict):
            raise ConfigError(
                f"config file {path} must hold a mapping, holds {type(values).__name__}"
            )
        return Config.from_dict(values)

    def override(self, values: Mapping[str, Any]) -> Config:
        """A copy with dotted names replaced, for example `{"em.steps": 20}`.

        Raises:
            ConfigError: As `from_dict`.
        """
        tree = self.to_dict()
        for name, value in values.items():
            node = tree
            *parents, leaf = name.split(".")
            for parent in parents:
                if not isinstance(node.get(parent), dict):
                    raise ConfigError(f"setting {name!r} is unknown: there is no {parent!r}")
                node = node[parent]
            if leaf not in node and not deprecated.gone(name):
                raise ConfigError(f"setting {name!r} is unknown; choose one of {sorted(node)}")
            node[leaf] = value
        return Config.from_dict(tree)


def _of_today(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings as they are called by now; see `userip_fast.core.deprecated`."""
    if not isinstance(values, Mapping) or not isinstance(em := values.get("em"), Mapping):
        return values
    kept = {name: deprecated.setting(f"em.{name}", value) for name, value in em.items()}
    return {**values, "em": {name: value for name, (stays, value) in kept.items() if stays}}
