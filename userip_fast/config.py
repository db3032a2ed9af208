"""Settings: frozen dataclasses, checked when made, equal in YAML, JSON, flags and Python.

A `Config` is saved with every model. Files and flags give nested dictionaries; `Config.from_dict`
refuses unknown keys and coerces by field type (PyYAML reads `1e-2` as a string).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from userip_fast.errors import ConfigError, shown
from userip_fast.prompts import TEMPLATES, ProfileField

T = TypeVar("T")


MAX_SEED = 2**32 - 1
"""What every library takes as a seed."""

_MAX_BYTES, _MAX_DEPTH = 1 << 20, 32


def _require(ok: bool, name: str, rule: str, value: object) -> None:
    if not ok:
        raise ConfigError(f"{name} must be {rule}, is {shown(value)}")


def parse_yaml(text: str, what: str) -> Any:
    """YAML of up to 1 MiB and 32 levels, without aliases, which could stand for any amount.

    Raises:
        ConfigError: It is not YAML, or beyond these bounds; `what` says where it is from.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("aliases (*name) are not read: write the value out")
            self.depth += 1
            if self.depth > _MAX_DEPTH:
                raise yaml.YAMLError(f"more than {_MAX_DEPTH} levels deep")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    if len(text) > _MAX_BYTES:
        raise ConfigError(f"{what} is larger than {_MAX_BYTES:,} characters")
    try:
        loader = Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        why = " ".join(str(e).split())  # an error of PyYAML is a little drawing
        raise ConfigError(f"{what} cannot be read as YAML: {why[:200]}") from e


@dataclass(frozen=True)
class DataConfig:
    """How an interaction log is read and told to the LM (see `userip_fast.read_interactions`)."""

    user: str = "user_id"
    item: str = "item_id"
    rating: str | None = None
    time: str | None = None
    text: str = "{title}"
    """Item text; `{column}` of the items table, `[[ ({genres})]]` vanishes when empty."""
    filter: str | None = None
    sep: str | None = None
    """What separates columns of CSV files; this and the next three: see `read_interactions`."""
    encoding: str | None = None
    header: str | tuple[str, ...] | None = None
    items_header: str | tuple[str, ...] | None = None
    on_bad: Literal["error", "skip"] = "error"
    min_history: int = 1
    behaviour: str = "auto"
    """One event. "auto" is `{text}: {feedback}`, or `{text}` when there is no feedback to tell."""
    separator: str = "; "
    behaviour_context: Literal["auto", "sequence", "independent"] = "auto"
    """Whether events follow each other, or say what they say of the profile each on its own; "auto"
    is independent with the posterior and amortised E-steps, whose work then does not grow with
    users, else sequence."""
    max_tokens: int | None = None
    """Behaviour tokens per user; the latest whole events that fit are kept. None is 256 of a
    sequence, and all of independent events."""
    chunk_tokens: int = 1024
    """Tokens the LM reads at once: a longer history is cut between events into sequences that share
    the user's soft rows. At most `max_tokens`, or 256 without it."""
    feedback_words: tuple[str, ...] = ("disliked", "okay", "liked")
    feedback_thresholds: tuple[float, ...] | None = None
    """Lower bounds of the second, third, ... word; None takes terciles of the training ratings."""
    negatives: int | None = None
    """Sampled negatives per event of a log without ratings, told as "passed over" beside "chosen".
    None is 0: a choice is told by its text alone."""
    loss: Literal["auto", "feedback", "all"] | tuple[float, float] = "auto"
    """Tokens with loss; a pair is (weight of text tokens, weight of feedback tokens)."""

    def __post_init__(self) -> None:
        _require(self.min_history >= 1, "data.min_history", "at least 1", self.min_history)
        if self.max_tokens is not None:
            _require(self.max_tokens >= 2, "data.max_tokens", "at least 2", self.max_tokens)
        _require((self.negatives or 0) >= 0, "data.negatives", "0 or more", self.negatives)
        _require(self.chunk_tokens >= 2, "data.chunk_tokens", "at least 2", self.chunk_tokens)
        _require(bool(self.feedback_words), "data.feedback_words", "non-empty", self.feedback_words)
        if self.behaviour != "auto":
            _require("{text}" in self.behaviour, "data.behaviour", "holding {text}", self.behaviour)
        if self.feedback_thresholds is not None:
            cuts = self.feedback_thresholds
            _require(
                len(cuts) == len(self.feedback_words) - 1 and list(cuts) == sorted(set(cuts)),
                "data.feedback_thresholds",
                f"{len(self.feedback_words) - 1} increasing numbers",
                cuts,
            )
        if isinstance(self.loss, tuple):
            _require(
                min(self.loss) >= 0 and max(self.loss) > 0,
                "data.loss",
                "two weights of 0 or more, one positive",
                self.loss,
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

    path: str = "default"
    """"default" pre-trains a small Llama on the training users' text; else a folder, a GGUF
    file, a hub id, or "small": SmolLM2-135M-Instruct (extra `lm-small`)."""
    quantization: Literal["auto", "none", "nf4", "nf4-double"] = "auto"
    """"auto" is nf4-double, and none of the embedded LM, which is small, and of GGUF files, which
    are rounded already. bitsandbytes quantises where it is installed, else we do: same bits."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; "auto" is float32 on a CPU, bfloat16 on a GPU. On a CPU with bf16 instructions
    "auto" also multiplies in bf16 where no gradient is needed, if that is faster and the LM says
    the same (`userip_fast/lm/bf16.py`)."""
    device: str = "auto"
    residency: Literal["auto", "resident", "streamed", "fp8"] = "auto"
    """How the weights lie in memory; "auto" is resident where it fits, or FP8 where that is
    faster on this device and the LM says the same, else streamed."""
    recompute: Literal["auto", "on", "off"] = "auto"
    """Recompute activations in backward; "auto" only where the step does not fit otherwise."""
    fused: Literal["auto", "off"] = "auto"
    """Fused norms, gates and RoPE, where there are kernels and the model's modules allow it."""
    memory_gib: float | None = None
    """What weights and step may take together; None: what is free on a GPU, 0.45 of it on a CPU."""
    trust_remote_code: bool = False
    verify: bool = False
    """Read every byte of the LM's files for its fingerprint, instead of trusting sums that are kept
    by file identity, size and times."""
    embedded_hidden: int = 64
    embedded_layers: int = 2
    embedded_heads: int = 4
    embedded_vocab: int = 1024
    embedded_tokens: int = 4_000_000
    """Training tokens of the embedded LM, at most: 20 passes over the log are as many as it gets,
    and it ends where users held out are predicted no better. About a minute per million on one CPU
    core for choices (half of it for ratings)."""
    taught_tokens: int = 0
    """Of any other LM: training tokens, at most, of the map by which it is told of users, the LM
    staying as it is; forward and backward, twice for choices. It takes millions of them: 0 tells
    it nothing, and codewords start at words, or at random."""

    def __post_init__(self) -> None:
        _require(
            re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", self.device) is not None,
            "lm.device",
            "auto, cpu, cuda or cuda:N",
            self.device,
        )
        _require(self.embedded_heads >= 1, "lm.embedded_heads", "at least 1", self.embedded_heads)
        _require(
            self.embedded_hidden % (2 * self.embedded_heads) == 0,
            "lm.embedded_hidden",
            "a multiple of 2 * lm.embedded_heads",
            self.embedded_hidden,
        )
        _require(
            self.memory_gib is None or self.memory_gib > 0,
            "lm.memory_gib",
            "positive",
            self.memory_gib,
        )
        _require(self.taught_tokens >= 0, "lm.taught_tokens", "at least 0", self.taught_tokens)
        for name in ("embedded_layers", "embedded_tokens"):
            _require(getattr(self, name) >= 1, f"lm.{name}", "at least 1", getattr(self, name))
        _require(
            self.embedded_vocab >= 300,
            "lm.embedded_vocab",
            "at least 300 (256 bytes and special tokens)",
            self.embedded_vocab,
        )


@dataclass(frozen=True)
class EMConfig:
    """The EM loop (method.md in the paper's terms: E-step infers theta, M-step moves codebooks)."""

    recipe: Literal["userip", "paper"] = "userip"
    """"paper" is the public code's algorithm: random starts, one joint loss, dense AdamW."""
    estep: Literal["gradient", "posterior", "amortised"] = "posterior"
    """"gradient": soft prompts by descent, then the nearest codeword, as published. "posterior":
    p(code | behaviour) from the LM's likelihoods under codewords. "amortised": codewords as
    "posterior", users by one pass and a head that learned its answers."""
    rounds: int | None = None
    """E-step + M-step sweeps, at most; None is 2 (gradient) or 8."""
    steps: int = 6
    """Adam steps of an E-step, at most; users that stop improving leave earlier."""
    lr: float = 0.04
    """Adam step size on theta, in units of the RMS of the LM's token embeddings."""
    tolerance: float = 1e-3
    """A user is converged when its NLL per weight falls by less than this for `patience` steps."""
    patience: int = 3
    refine_steps: int = 0
    """Further Adam steps from the codeword of the nearest code, once there are codebooks."""
    posterior: Literal["auto", "exact", "ascent", "mean_field"] = "auto"
    """Posterior: score all combinations of codes, or one field after another, given codes of the
    others ("ascent") or their probabilities ("mean_field"); "auto" is exact up to 256 combinations
    of independent events, whose table then serves all users, and up to 4,096 otherwise, if they are
    at most twice as many as codes, else ascent."""
    sweeps: int = 6
    """Posterior: sweeps over the fields, at most, of coordinate ascent and then of mean field."""
    prune_share: float = 0.34
    """Posterior: candidates are first scored on this share of the behaviour; 0 is off."""
    prune_nats: float = 8.0
    """Posterior: candidates that far behind the best, in log probability, are dropped there."""
    start: Literal["auto", "told", "words", "behaviour", "kmeans++", "random"] = "auto"
    """Posterior: first codewords. "told": k-means on the soft rows that tell the embedded LM of
    users. Candidate words, k-means on the mean embedding of each user's behaviour, k-means++ on the
    thetas of the gradient E-step, or random ones around the shared start; "auto" is told where the
    LM can be told, else words where a field has them, else random."""
    start_spread: float = 0.5
    """Posterior: standard deviation of random codewords, in units of the embedding RMS."""
    restarts: int = 1
    """Posterior: random or k-means++ starts tried for two rounds; the likeliest goes on."""
    fit_users: int | None = None
    """Posterior: the codewords are learned on the first so many users in hash order; None is all
    where an event table serves them, else 1,024."""
    table_readings: int = 32_768
    """Posterior, event table: pairs of an item's text and codes that EM reads a round (of 256 texts
    at least); the most frequent texts are kept. The table of all is read once, at the end."""
    codeword_draws: int = 4_096
    """Posterior, event table: pairs that a gradient step draws among these, by weight; 0 is all."""
    held_out: float = 0.1
    """Posterior: share of them who judge each round instead of training (from 50 users on). The
    embedded LM has not learned from a tenth of them, who are these; from more it has."""
    codeword_steps: int = 4
    """Posterior: gradient steps on the codewords per round."""
    codeword_lr: float = 0.1
    """Posterior: their size, in units of the embedding RMS; halved after a round in vain."""
    gain: float = 5e-4
    """Posterior: a round that raises the objective by less than this share of it is the last; so is
    one in vain after its steps were halved twice."""
    head_users: int = 4_096
    """Amortised: the head learns from the posterior of the first so many users."""
    sure: float = 0.8
    """Amortised: where the head gives a field's code less, the posterior decides; 0 is nowhere."""
    commitment: float = 0.0
    """beta of beta * ||theta - C[z]||^2 / (D rms^2), in the refining steps."""
    codebook_update: Literal["kmeans", "ema", "mse"] = "kmeans"
    ema_decay: float = 0.9
    mse_lr: float = 0.5
    dead_code_threshold: float = 1.0
    """A code with fewer users than this is revived at a user that no code serves well."""
    kmeans_restarts: int = 10
    kmeans_sample: int = 65_536
    """Users (lowest salted hash) whose theta starts the codebooks."""
    block_users: int = 4_096
    pack_tokens: int = 8_192
    """Rows of a pack, at most; on a GPU exactly so many, rounded down to a multiple of 128. Fewer
    where memory does not suffice, which the log says."""
    engine: Literal["auto", "packed", "graph", "reference"] = "auto"
    """"packed", or the same replayed from CUDA graphs ("graph"), or whole padded prompts
    ("reference"); "auto" is graph on a GPU for small packs of small LMs, up to 2 billion weights
    times 8,192 rows, else packed."""
    seed: int = 0
    paper_epochs: int = 60
    paper_batch: int = 8
    paper_lr: float = 0.01
    paper_vq_weight: float = 0.5

    def __post_init__(self) -> None:
        for name in ("rounds", "fit_users"):
            if (value := getattr(self, name)) is not None:
                _require(value >= 1, f"em.{name}", "at least 1", value)
        for name in (
            "steps",
            "restarts",
            "table_readings",
            "head_users",
            "codeword_steps",
            "patience",
            "kmeans_restarts",
            "kmeans_sample",
            "block_users",
            "pack_tokens",
            "paper_epochs",
            "paper_batch",
        ):
            _require(getattr(self, name) >= 1, f"em.{name}", "at least 1", getattr(self, name))
        for name in ("lr", "paper_lr", "mse_lr", "codeword_lr", "start_spread", "prune_nats"):
            _require(getattr(self, name) > 0, f"em.{name}", "positive", getattr(self, name))
        for name in (
            "tolerance",
            "refine_steps",
            "commitment",
            "dead_code_threshold",
            "paper_vq_weight",
            "gain",
            "codeword_draws",
        ):
            _require(getattr(self, name) >= 0, f"em.{name}", "0 or more", getattr(self, name))
        _require(0 <= self.ema_decay < 1, "em.ema_decay", "in [0, 1)", self.ema_decay)
        _require(0 <= self.sure <= 1, "em.sure", "in [0, 1]", self.sure)
        _require(0 <= self.prune_share < 1, "em.prune_share", "in [0, 1)", self.prune_share)
        _require(0 <= self.held_out <= 0.5, "em.held_out", "in [0, 0.5]", self.held_out)
        _require(0 <= self.seed <= MAX_SEED, "em.seed", f"in [0, {MAX_SEED}]", self.seed)
        # The first sweep scores a field while others are not known yet.
        _require(self.sweeps >= 2, "em.sweeps", "at least 2", self.sweeps)

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
        _require(len(self.fields) >= 1, "fields", "at least one profile field", self.fields)
        names = [f.name for f in self.fields]
        _require(len(set(names)) == len(names), "fields", "of different names", names)

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
        return build(Config, values, "config")

    @staticmethod
    def load(path: str | Path) -> Config:
        """Reads a YAML or JSON file.

        Raises:
            ConfigError: It cannot be read (see `parse_yaml`), or as `from_dict`.
        """
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read(_MAX_BYTES + 1)
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
            if leaf not in node:
                raise ConfigError(f"setting {name!r} is unknown; choose one of {sorted(node)}")
            node[leaf] = value
        return Config.from_dict(tree)


def build(cls: type[T], values: Any, where: str) -> T:
    """A dataclass from a mapping: unknown keys refused, values coerced to the annotated types."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must be a mapping, is {shown(values)}")
    hints = typing.get_type_hints(cls)
    if unknown := sorted(set(map(str, values)) - set(hints)):
        raise ConfigError(
            f"{where}: unknown key {shown(unknown[0])}; choose one of {sorted(hints)}"
        )
    try:
        return cls(**{k: _coerce(hints[k], v, f"{where}.{k}") for k, v in values.items()})
    except TypeError as e:
        raise ConfigError(f"{where}: {e}") from e


def _coerce(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        errors = []
        for option in args:
            if option is not type(None):
                try:
                    return _coerce(option, value, where)
                except ConfigError as e:
                    errors.append(str(e))
        raise ConfigError("; ".join(errors))
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where} must be one of {list(args)}, is {shown(value)}")
        return value
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ConfigError(f"{where} must be a list, is {shown(value)}")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(kinds) != len(value):
            raise ConfigError(f"{where} must have {len(kinds)} entries, is {shown(value)}")
        return tuple(_coerce(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value)))
    if dataclasses.is_dataclass(hint):
        return (
            value
            if isinstance(value, typing.cast(type, hint))
            else build(typing.cast("type[Any]", hint), value, where)
        )
    try:
        if hint is bool:
            if isinstance(value, bool):
                return value
            return {"true": True, "false": False}[str(value).lower()]
        if hint is int:
            number = int(value) if isinstance(value, str) else value
            if isinstance(number, bool) or int(number) != number:
                raise ValueError
            return int(number)
        if hint is float:
            if isinstance(value, bool):
                raise ValueError
            number = float(value)
            if math.isfinite(number):
                return number
            raise ConfigError(f"{where} must be finite, is {number}")
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError, OverflowError):
        raise ConfigError(f"{where} must be {hint.__name__}, is {shown(value)}") from None
    if not isinstance(value, hint):
        raise ConfigError(f"{where} must be {hint.__name__}, is {shown(value)}")
    return value
