"""Text that others wrote, as tokens of text: no title can give the LM an order.

Tokenizers look for their control tokens (`<s>`, `<|endoftext|>`, `[CLS]`) in the text itself, and a
flag against that knows the special ones among the added tokens alone. So text is read by a copy of
the tokenizer in which every control token bears a name that nobody can know. Everything else, ids
included, is the same; so are added tokens that are words or runs of spaces.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from userip_fast.core.errors import UnsupportedError

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # what a piece that is not in the vocabulary falls to
_KNOWN: WeakKeyDictionary[Any, TextTokenizer] = WeakKeyDictionary()


def text_tokenizer(tokenizer: Any) -> TextTokenizer:
    """The reader of text that goes with a tokenizer, made once."""
    if tokenizer not in _KNOWN:
        _KNOWN[tokenizer] = TextTokenizer(tokenizer)
    return _KNOWN[tokenizer]


class TextTokenizer:
    """See the module.

    Attributes:
        unknown: Id of the token for what the vocabulary lacks, -1 where there is none.

    Args:
        tokenizer: A fast Hugging Face tokenizer.

    Raises:
        UnsupportedError: It is not a fast one: it cannot tell character offsets.
    """

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers import Tokenizer

        if not getattr(tokenizer, "is_fast", False):
            raise UnsupportedError(
                f"tokenizer {type(tokenizer).__name__} cannot tell character offsets; "
                "use a fast tokenizer"
            )
        self.unknown = -1 if tokenizer.unk_token_id is None else int(tokenizer.unk_token_id)
        self._name = type(tokenizer).__name__
        special = set(tokenizer.all_special_tokens)
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        control = {
            t["content"]
            for t in rules["added_tokens"]
            if t["special"] or t["content"] in special or _bracketed(t["content"])
            if not _BYTE.fullmatch(t["content"])
        }
        _rename(rules, control | special)
        self._backend = Tokenizer.from_str(json.dumps(rules))
        self._backend.no_padding()
        self._backend.no_truncation()
        ids = (tokenizer.convert_tokens_to_ids(t) for t in sorted(control))
        self._control = np.array([i for i in ids if i != self.unknown], np.int64)

    def __call__(self, text: str) -> list[int]:
        """Ids of one text."""
        return list(self.encode([text])[0].ids)

    def encode(self, texts: Sequence[str]) -> list[Any]:
        """Encodings of texts, with `ids` and character `offsets`.

        Raises:
            UnsupportedError: The tokenizer makes a control token of a text all the same.
        """
        found: list[Any] = self._backend.encode_batch(list(texts), add_special_tokens=False)
        ids = np.fromiter((i for e in found for i in e.ids), np.int64)
        if np.isin(ids, self._control).any():
            raise UnsupportedError(f"{self._name} reads control tokens out of plain text")
        return found


def _bracketed(token: str) -> bool:
    return len(token) > 2 and token[0] in "<[{" and token[-1] in ">]}"


def _rename(rules: dict[str, Any], control: set[str]) -> None:
    """Gives control tokens other names, in the added tokens and in the model's vocabulary."""
    nonce = secrets.token_hex(8)  # a title cannot hold what it does not know
    model = rules["model"]
    vocab = model["vocab"]
    if isinstance(vocab, list) or model["type"] == "WordLevel":
        # A vocabulary that matches whole pieces of text, without merges that would have to exist.
        pieces = vocab if isinstance(vocab, dict) else [piece for piece, _ in vocab]
        control = control | {p for p in pieces if _bracketed(p) and not _BYTE.fullmatch(p)}

    def name(token: str) -> str:
        return f"\ue000{nonce}{token}" if token in control else token

    for token in rules["added_tokens"]:
        token["content"] = name(token["content"])
    if isinstance(vocab, list):
        model["vocab"] = [[name(piece), score] for piece, score in vocab]
    else:
        model["vocab"] = {name(token): i for token, i in vocab.items()}
    if model.get("unk_token"):
        model["unk_token"] = name(model["unk_token"])
    if "merges" in model:
        pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        model["merges"] = [m for m in pairs if "".join(m) not in control and not {*m} & control]
