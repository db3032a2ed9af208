"""What a fit leaves: codebooks, start and how events count, with the LM and format they belong to.

`Learned` holds it, and the trainer that learned it or infers with it. `table.py` adds what an
event table answers, `files.py` keeps it on disk, `fitted.py` is the whole.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from userip_fast.codebook.books import Codebook
from userip_fast.core.config import Config
from userip_fast.core.errors import ConfigError
from userip_fast.core.late import Late
from userip_fast.data import Catalogue
from userip_fast.em.amortised import Head
from userip_fast.em.lifts import PLAIN, Calibration
from userip_fast.em.trainer import FitResult, Trainer
from userip_fast.lm import FrozenLM, make_engine
from userip_fast.lm.engine import Engine, check_positions
from userip_fast.prompts.format import BehaviourFormat
from userip_fast.prompts.layout import Layout, PromptTemplate


@dataclass
class Learned:
    """See the module.

    Attributes:
        cards: Field -> code cards, as `CodeCard.to_dict` gives them.
    """

    config: Config
    format: BehaviourFormat
    lm: FrozenLM
    codebooks: list[Codebook]
    start: Tensor
    catalogue: Catalogue
    cards: dict[str, list[dict[str, Any]]]
    trainer: Trainer | None = None
    head: Head | None = None
    calibration: Calibration = PLAIN

    @property
    def template(self) -> PromptTemplate:
        return PromptTemplate(self.config.fields)

    @property
    def layout(self) -> Layout:
        return self.template.layout(self.lm.tokenizer)

    @property
    def fingerprint(self) -> str:
        """Digest of what decides a code id: LM, prompts, behaviour format, start and codebooks."""
        digest = hashlib.sha256(self.lm.fingerprint.encode())
        fields = [(f.name, f.prompt, f.num_virtual_tokens) for f in self.config.fields]
        digest.update(json.dumps([fields, self.format.to_dict()], sort_keys=True).encode())
        learned = [x for b in self.codebooks for x in (b.codewords, b.log_prior) if x is not None]
        learned += self.head.state().values() if self.head else ()
        if not self.calibration.plain:
            learned += self.calibration.state().values()
            for told in (self.calibration.usual, self.calibration.counted):
                digest.update(b"" if told is None else told.digest)
        if self.calibration.columns is not None:
            learned.append(self.calibration.columns)
        for tensor in (self.start, *learned):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def block_key(self, trainer: Trainer) -> bytes:
        """What the profiles of a block depend on beside its users."""
        return trainer.settings_key(self.start) + self.fingerprint.encode()

    def ready_trainer(self, show: bool = False) -> Trainer:
        """The trainer that `fit` left, or one for inferring: making one tries the LM."""
        trainer = self.trainer or make_trainer(self.config, self.lm, show)
        if not isinstance(self.lm, Late) or self.lm.is_made:
            self.trainer = trainer
        trainer.show, trainer.head, trainer.calibration = show, self.head, self.calibration
        return trainer

    def take(self, found: FitResult) -> None:
        """Goes on with what a fit of its trainer found."""
        self.codebooks, self.start = found.codebooks, found.start
        self.head, self.calibration = found.head, found.calibration

    def renumber(self, orders: list[Tensor]) -> None:
        """Gives the codes of each field other numbers: entry k is the code that becomes k."""
        self.codebooks = [b.reordered(order) for b, order in zip(self.codebooks, orders)]
        self.head = self.head and self.head.reordered(orders)
        self.calibration = self.calibration.reordered(orders)


def make_trainer(config: Config, lm: FrozenLM, show: bool) -> Trainer:
    """The EM loop for a loaded LM: prompts checked against its context, packs cut to its memory.
    For one that is opened later, all of that is done then."""
    layout = PromptTemplate(config.fields).layout(lm.tokenizer)
    if isinstance(lm, Late) and not lm.is_made:

        def engine() -> Engine:
            lm.made()
            return make_trainer(config, lm, show).engine

        later: Any = Late(engine, lm=lm, layout=layout)
        return Trainer(later, config, show)
    check_positions(lm, layout, config.told.token_limits[1])
    if lm.plan is not None:
        tokens = min(config.em.pack_tokens, lm.plan.pack_tokens)
        config = replace(config, em=replace(config.em, pack_tokens=tokens))
    made = make_engine(config.em.engine, lm, layout, config.em.pack_tokens)
    return Trainer(made, config, show)


def check_probabilities(config: Config, wanted: bool) -> None:
    """Raises ConfigError when codes have no probabilities to keep."""
    if wanted and (config.em.estep == "gradient" or config.em.recipe == "paper"):
        raise ConfigError(
            "probabilities, profiles: a nearest codeword has none; choose em.estep=posterior"
        )
