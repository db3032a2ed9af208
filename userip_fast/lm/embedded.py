"""The embedded default LM: a small Llama pre-trained on the training users' own behaviour text.

It exists so that the whole pipeline is real on a laptop. Text, field names, segments and positions
are exactly those that the E-step scores. What stands in a soft row during pre-training decides what
the LM can read there later: words of the user's profile where they are known (the demo's planted
world), else a learned map of what the user did besides (`foldin`), so that the LM learns what a
taste predicts. The training is in `pretraining`, what it is on in `lessons`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from userip_fast.core.config import LMConfig
from userip_fast.core.errors import FormatError
from userip_fast.core.files import atomic_dir, one_writer, read_json, write_json
from userip_fast.core.quiet import quiet_libraries
from userip_fast.core.sums import (
    MANIFEST,
    cache_folder,
    check_seal,
    check_sums,
    folder_sums,
    sealed,
)
from userip_fast.lm.foldin import FOLDIN_FILES, FoldIn
from userip_fast.lm.pretraining import teach, train
from userip_fast.prompts.layout import Layout, PromptTemplate
from userip_fast.prompts.packing import Behaviour, Int64

if TYPE_CHECKING:
    from userip_fast.lm.frozen import FrozenLM
    from userip_fast.prompts.behaviour import Told

logger = logging.getLogger("userip_fast.lm")

_FORMAT, _VERSION = "userip_fast.lm", 1
RECIPE = 5  # raise with any change that makes cached models stale
_BOS = "<s>"
_NEEDED = ("config.json", "model.safetensors")

BehaviourOf = Callable[[Any, Layout], "tuple[Behaviour, Told]"]
"""Builds the users' behaviour, and its events as kinds, once the tokenizer is there."""

SlotIds = Callable[[Any], Int64]
"""Token ids [U, S] that stand in the soft rows during pre-training, given the tokenizer."""


def embedded_lm(
    texts: Sequence[str],
    template: PromptTemplate,
    behaviour_of: BehaviourOf,
    config: LMConfig,
    *,
    content_key: str,
    slot_ids: SlotIds | None = None,
    seed: int = 0,
    show: bool = False,
) -> Path:
    """Folder of the embedded LM for these users, trained unless it is in the cache, undamaged.

    Of processes that want the same one, one trains it; the others wait for it.

    Args:
        texts: Event texts as they are tokenised (with separator), for the tokenizer.
        template: The profile fields.
        behaviour_of: Builds the training users' behaviour with the trained tokenizer.
        config: Sizes and number of training tokens.
        content_key: Digest of the training users' behaviour; with config and template it names the
            cache entry.
        slot_ids: Fills the soft rows, and is part of the entry's name; None tells there of each
            user's own behaviour.
        seed: Of weights and batches.
        show: Whether to show progress.
    """
    sizes = {k: v for k, v in vars(config).items() if k.startswith("embedded_")}
    prompts = [(f.prompt, f.num_virtual_tokens, f.candidates) for f in template.fields]
    of_entry: list[Any] = [RECIPE, sizes, prompts, content_key, seed]
    tokenizer, slots = None, None
    if slot_ids is not None:  # which a tokenizer alone can tell
        tokenizer = _train_tokenizer(texts, template, config.embedded_vocab)
        slots = slot_ids(tokenizer)
        of_entry.append([slots.shape, hashlib.sha256(slots.astype("<i8").tobytes()).hexdigest()])
    key = json.dumps(of_entry, sort_keys=True)

    def make(tmp: Path) -> dict[str, Any]:
        known = tokenizer or _train_tokenizer(texts, template, config.embedded_vocab)
        layout = template.layout(known)
        behaviour, told = behaviour_of(known, layout)
        model, foldin, training = train(known, layout, behaviour, told, slots, config, seed, show)
        model.save_pretrained(tmp)
        known.save_pretrained(tmp)
        if foldin is not None:
            foldin.save(tmp)
        return training

    return _cached("lm", key, _NEEDED, make)


def taught(
    lm: FrozenLM,
    template: PromptTemplate,
    behaviour_of: BehaviourOf,
    tokens: int,
    *,
    content_key: str,
    seed: int = 0,
    show: bool = False,
) -> FoldIn | None:
    """The language in which `lm`, which stays as it is, is told of these users: trained unless it
    is in the cache, undamaged (see `userip_fast.lm.pretraining.teach`).

    Args:
        tokens: To train on, at most.
        template, behaviour_of, content_key, seed, show: As in `embedded_lm`.
    """
    prompts = [(f.prompt, f.num_virtual_tokens) for f in template.fields]
    key = json.dumps([RECIPE, lm.fingerprint, str(lm.dtype), prompts, content_key, tokens, seed])

    def make(tmp: Path) -> dict[str, Any]:
        layout = template.layout(lm.tokenizer)
        behaviour, told = behaviour_of(lm.tokenizer, layout)
        foldin, training = teach(lm, layout, behaviour, told, tokens, seed, show)
        foldin.save(tmp)
        return training

    return FoldIn.load(_cached("taught", key, FOLDIN_FILES, make))


def _cached(
    kind: str, key: str, needed: Sequence[str], make: Callable[[Path], dict[str, Any]]
) -> Path:
    """The entry of the cache that `key` names: undamaged, or made by `make` in a folder, which
    returns how training went."""
    folder = cache_folder() / kind / hashlib.sha256(key.encode()).hexdigest()[:24]
    if _usable(folder, needed, logger.debug):
        return folder
    with one_writer(folder, "another process, which trains the same LM"):
        if _usable(folder, needed, logger.warning):
            return folder  # the other one has trained it
        with quiet_libraries(), atomic_dir(folder) as tmp:
            training = make(tmp)
            _warn(training["nll"])
            write_json(tmp / "training.json", training)
            about = {"format": _FORMAT, "version": _VERSION, "files": folder_sums(tmp)}
            write_json(tmp / MANIFEST, sealed(about))
    return folder


def _usable(folder: Path, needed: Sequence[str], tell: Callable[..., None]) -> bool:
    """Whether the entry is there and undamaged; what is damaged is told."""
    if not folder.exists():
        return False
    try:
        check_embedded(folder, needed)
    except FormatError as e:
        tell("cached LM: %s; it is trained again", e)
        return False
    return True


def _warn(nll: dict[str, float] | None) -> None:
    if nll is None:
        return
    others = {name: x for name, x in nll.items() if name != "told"}
    logger.info(
        "the LM predicts new users at %.4f nats; %s", nll["told"],
        ", ".join(f"{name} {x:.4f}" for name, x in others.items()),
    )  # fmt: skip
    if nll["told"] >= (least := min(others.values())):
        logger.warning(
            "what the LM is told of new users does not help it to predict them (%.4f nats; without "
            "knowing them %.4f): profiles will say little; there may be too few users",
            nll["told"], least,
        )  # fmt: skip


def check_embedded(folder: Path, needed: Sequence[str] = _NEEDED) -> None:
    """Checks that an embedded LM's folder is whole and as it was written.

    Raises:
        FormatError: It is not, and which file.
    """
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise FormatError(f"{folder / MANIFEST}: is not that of an embedded LM")
    check_seal(folder / MANIFEST, manifest)
    check_sums(folder, manifest.get("files"), needed)


def _train_tokenizer(texts: Sequence[str], template: PromptTemplate, vocab: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[_BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Field names and candidate words are worth a token each, however rare they are in the log.
    words = [w for f in template.fields for w in (f.prompt, *(" " + c for c in f.candidates))]
    bpe.train_from_iterator([*texts, *(words * 1000)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=_BOS)
