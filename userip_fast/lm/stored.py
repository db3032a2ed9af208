"""An LM as files: where they lie, which they are, and a fingerprint of everything in them.

The fingerprint of a stored LM covers every byte that decides what it computes: all weight files,
the configuration (but for what only tells of its origin), code it brings along, and the tokenizer's
vocabulary, merges and scores, with the ids of a few sentences for its other rules. It does not
depend on dtype, quantisation or device at load.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from userip_fast.errors import UnsupportedError
from userip_fast.files import read_json
from userip_fast.sums import kept_sum

FULL = "v2:"
"""How a fingerprint of every byte begins. Earlier ones had no prefix: see `sampled_fingerprint`."""

_ORIGIN = ("transformers_version", "_name_or_path", "torch_dtype", "dtype")
_SENTENCES = ("The user's hobby is", " Caf\u00e9 \ufb01n \u2460 na\u0131ve \u4e2d", "  123\t3.14\n")


def folder_of(path: str) -> Path:
    """The folder an LM lies in; of a hub id, that of its cached snapshot."""
    if Path(path).is_dir():
        return Path(path)
    from transformers.utils import cached_file

    return Path(str(cached_file(path, "config.json"))).parent


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads the weights from.

    Raises:
        UnsupportedError: There are none.
        FormatError: Their index is not JSON.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.exists():
            return [folder / part for part in sorted(set(read_json(index)["weight_map"].values()))]
    raise UnsupportedError(f"LM {str(folder)!r}: there is no model.safetensors in the folder")


def fingerprint(folder: Path, tokenizer: Any, *, again: bool = False) -> str:
    """See the module.

    Args:
        folder: See `folder_of`.
        tokenizer: The tokenizer that was loaded from it.
        again: Whether to read the weights again even where their sums are kept.
    """
    config = read_json(folder / "config.json")
    digest = _tokenizer_digest(tokenizer)
    decides = {k: v for k, v in config.items() if k not in _ORIGIN}
    digest.update(json.dumps(decides, sort_keys=True).encode())
    code = sorted(folder.glob("*.py")) if "auto_map" in config else []
    for file in (*weight_files(folder), *code):
        digest.update(kept_sum(file, again=again).encode())
    return FULL + digest.hexdigest()


def is_of(folder: Path, tokenizer: Any, expected: str) -> bool:
    """Whether the LM in `folder` is the one of a fingerprint, of either kind.

    Before it says no, it reads everything again: a kept sum may be wrong.
    """
    if not expected.startswith(FULL):
        return sampled_fingerprint(folder, tokenizer) == expected
    return any(fingerprint(folder, tokenizer, again=again) == expected for again in (False, True))


def model_fingerprint(model: Any, tokenizer: Any) -> str:
    """The same of a model that was handed over: every byte of its tensors as they are."""
    digest = _tokenizer_digest(tokenizer)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_bytes(tensor.detach()))
    return FULL + digest.hexdigest()


def sampled_fingerprint(folder: Path, tokenizer: Any) -> str:
    """What models before version 2 of the fingerprint hold: of safetensors, one row a tensor."""
    from safetensors import safe_open

    digest = hashlib.sha256()
    for line in _vocabulary(tokenizer):
        digest.update(line)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as stored:
            for name in sorted(stored.keys()):
                part = stored.get_slice(name)
                shape = tuple(part.get_shape())
                sample = part[:1] if shape and shape[0] else torch.zeros(0)
                digest.update(f"{name} {shape} {sample.dtype}".encode())
                digest.update(_bytes(sample))
    return digest.hexdigest()


def _tokenizer_digest(tokenizer: Any) -> Any:
    digest = hashlib.sha256()
    for line in _vocabulary(tokenizer):
        digest.update(line)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        model = json.loads(backend.to_str())["model"]
        merges = [m.split(" ") if isinstance(m, str) else m for m in model.get("merges", ())]
        scores = model["vocab"] if isinstance(model.get("vocab"), list) else []
        digest.update(json.dumps([merges, scores]).encode())
    for sentence in _SENTENCES:
        ids = tokenizer(sentence, add_special_tokens=False)["input_ids"]
        digest.update(json.dumps([*ids, tokenizer.bos_token_id]).encode())
    return digest


def _vocabulary(tokenizer: Any) -> Iterator[bytes]:
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]):
        yield f"{index}\t{token}\n".encode()


def _bytes(x: Tensor) -> bytes:
    return x.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
