"""An LM as files: where they lie, which they are, and a fingerprint of everything in them.

The fingerprint of a stored LM covers every byte that decides what it computes: all weight files,
the configuration (but for what only tells of its origin), code it brings along, and the tokenizer's
vocabulary, merges and scores, with the ids of a few sentences for its other rules. It does not
depend on dtype, quantisation or device at load.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch

from userip_fast.core.errors import FormatError, UnsupportedError, UserIPError
from userip_fast.core.files import read_json, tensor_bytes
from userip_fast.core.quiet import quiet_libraries
from userip_fast.core.sums import kept_sum
from userip_fast.lm import attention
from userip_fast.lm.limits import is_out_of_memory

logger = logging.getLogger("userip_fast.lm")

FULL = "v2:"
"""How a fingerprint of every byte begins. Earlier ones had no prefix: see `sampled_fingerprint`."""

_ORIGIN = ("transformers_version", "_name_or_path", "torch_dtype", "dtype")
_SENTENCES = ("The user's hobby is", " Caf\u00e9 \ufb01n \u2460 na\u0131ve \u4e2d", "  123\t3.14\n")


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_MERGE = (
    "merge the adapter into its base first: AutoPeftModelForCausalLM.from_pretrained(PATH)"
    ".merge_and_unload().save_pretrained(MERGED), and the base's tokenizer into the same folder"
)


def check_path(path: str) -> None:
    """Refuses what is neither a folder with a whole LM in it nor a hub id.

    What could be a mistyped folder is not looked for on the hub: a hub id is OWNER/NAME, and OWNER
    is no folder here.

    Raises:
        UnsupportedError: See above; the text says what to do.
    """
    folder = Path(path)
    if folder.is_dir():
        if (folder / "adapter_config.json").exists():
            raise UnsupportedError(f"LM {path!r} holds an adapter, not a whole LM; {_MERGE}")
        if not (folder / "config.json").exists():
            raise UnsupportedError(
                f"LM {path!r} is a folder without config.json; name the folder that "
                "save_pretrained wrote"
            )
        weight_files(folder)
    elif folder.exists():
        raise UnsupportedError(f"LM {path!r} is a file; name the folder it lies in")
    elif not _HUB_ID.fullmatch(path) or folder.parent.is_dir():
        raise UnsupportedError(
            f"LM {path!r}: there is no such folder. (A hub id is OWNER/NAME, say "
            "openai-community/gpt2, and OWNER is not a folder here.)"
        )
    elif not _is_cached(path) and _hub_is_away():
        raise UnsupportedError(
            f"LM {path!r}: there is no such folder; it is not in the Hugging Face hub's cache "
            "either, and the hub cannot be reached"
        )
    elif _hub_file(path, "adapter_config.json"):
        raise UnsupportedError(f"LM {path!r} is an adapter, not a whole LM; {_MERGE}")


def _is_cached(path: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(path, "config.json"), str)


def _hub_is_away() -> bool:
    """Whether the hub's name leads nowhere, which its client takes a minute of retries to say."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or getproxies().get("https"):
        return False  # it answers at once, or somebody else looks the name up
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return True
    return False


def _hub_file(path: str, name: str) -> str | None:
    from transformers.utils import cached_file

    found = cached_file(
        path,
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else str(found)


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
            try:
                parts = sorted(set(read_json(index)["weight_map"].values()))
                return [folder / part for part in parts]
            except (KeyError, TypeError, AttributeError) as e:
                raise FormatError(f"{index}: is not an index of weight files") from e
    raise UnsupportedError(
        f"LM {str(folder)!r} holds neither model.safetensors nor pytorch_model.bin"
    )


def fingerprint(folder: Path, tokenizer: Any, *, again: bool = False) -> str:
    """See the module.

    Args:
        folder: See `folder_of`; or a GGUF file.
        tokenizer: The tokenizer that was loaded from it.
        again: Whether to read the weights again even where their sums are kept.
    """
    digest = _tokenizer_digest(tokenizer)
    if folder.is_file():  # it holds the configuration too
        digest.update(kept_sum(folder, again=again).encode())
        return FULL + digest.hexdigest()
    config = read_json(folder / "config.json")
    decides = {k: v for k, v in config.items() if k not in _ORIGIN}
    digest.update(json.dumps(decides, sort_keys=True).encode())
    code = sorted(folder.glob("*.py")) if "auto_map" in config else []
    for file in (*weight_files(folder), *code):
        digest.update(kept_sum(file, again=again).encode())
    return FULL + digest.hexdigest()


def quantization_of(path: str, packed: Any) -> str:
    """In which form of bitsandbytes' an LM is stored."""
    method = str(entry(packed, "quant_method", "bitsandbytes"))
    method = method.rpartition(".")[2].lower()  # of an enumeration too
    if "bitsandbytes" not in method and method != "bits_and_bytes":
        raise UnsupportedError(
            f"LM {path!r} is stored as {method}, which is not read; take the model that it was "
            "made from (it is kept in 4 bits by lm.quantization), or save it dequantised"
        )
    if not entry(packed, "load_in_4bit", False):
        return "int8"
    nested = "-double" if entry(packed, "bnb_4bit_use_double_quant", False) else ""
    return str(entry(packed, "bnb_4bit_quant_type", "fp4")) + nested


def entry(mapping: Any, key: str, default: Any) -> Any:
    """A key of a mapping, or an attribute of what stands in for one."""
    if isinstance(mapping, Mapping):
        return mapping.get(key, default)
    return getattr(mapping, key, default)


@contextmanager
def told(what: str) -> Iterator[None]:
    """Whatever goes wrong in a library's code, on what others wrote, is told in one line.

    Raises:
        UnsupportedError: `what`, and why.
    """
    try:
        yield
    except UserIPError:
        raise
    except Exception as e:
        if is_out_of_memory(e):
            raise
        logger.debug("%s", what, exc_info=True)
        why = f"{type(e).__name__}: {first_line(e)}"
        if attention.NAME in str(e):
            why = "its class does not call attention through transformers' attention interface"
        raise UnsupportedError(f"{what}: {why}") from e


def first_line(error: Exception) -> str:
    """Of its text, which in a library's error may be pages."""
    return next(iter(str(error).strip().splitlines()), "")


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
        digest.update(tensor_bytes(tensor.cpu()))
    return FULL + digest.hexdigest()


@quiet_libraries()
def keep_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes a tokenizer by itself, unless it would not be the same when it is read again."""
    try:
        tokenizer.save_pretrained(folder)
        same = _tokenizer_digest(kept_tokenizer(folder)).digest()
        if same == _tokenizer_digest(tokenizer).digest():
            return
    except OSError:
        raise
    except Exception:  # of a library's code, or of the LM's own
        logger.debug("the tokenizer is not kept", exc_info=True)
    shutil.rmtree(folder, ignore_errors=True)


@quiet_libraries()
def kept_tokenizer(folder: Path) -> Any:
    """What `keep_tokenizer` wrote.

    Raises:
        UnsupportedError: It cannot be read.
    """
    from transformers import AutoTokenizer

    with told(f"tokenizer {str(folder)!r} cannot be loaded"):
        return AutoTokenizer.from_pretrained(str(folder))


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
                digest.update(tensor_bytes(sample))
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
