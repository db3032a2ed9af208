"""A model's folder, which is whole or absent.

    manifest.json           format, version, fingerprint, LM, behaviour format, SHA-256 of files
    config.json             everything that decided the result
    codebooks.safetensors   codewords [K_j, m_j D] of each field
    start.safetensors       shared start [S, D]
    head.safetensors        of an amortised E-step
    columns.parquet         codes of the event table's columns, where not all combinations are
    catalogue.parquet       training items with counts, to sample negatives from
    codes.json              code cards: words and typical items
    tokenizer/              of a model with an event table: the LM's, to do without the LM
    lm/                     the embedded LM, where that is the one
    events/                 the event table, which may grow and is not in the manifest

Nothing is unpickled on loading; checksums, shapes and the LM's fingerprint are verified.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from userip_fast._version import __version__
from userip_fast.codebook.books import Codebook
from userip_fast.core.config import Config, LMConfig
from userip_fast.core.errors import (
    ConfigError,
    DataError,
    FormatError,
    MismatchError,
    UnsupportedError,
)
from userip_fast.core.files import atomic_dir, read_json, read_tensors, write_json, write_tensors
from userip_fast.core.late import Late
from userip_fast.core.profiles import codes_of
from userip_fast.core.segments import Part, Segments
from userip_fast.core.sums import (
    MANIFEST,
    MODEL_FORMATS,
    check_seal,
    check_sums,
    folder_sums,
    sealed,
)
from userip_fast.data import Catalogue
from userip_fast.em import columns
from userip_fast.em.amortised import Head
from userip_fast.em.checkpoints import load_codebooks
from userip_fast.em.counted import Counted, WordFactors
from userip_fast.em.lifts import Calibration, Usual
from userip_fast.em.matching import numbered_like
from userip_fast.lm import FrozenLM, open_lm, stored
from userip_fast.lm.trace import Workload
from userip_fast.model.learned import Learned
from userip_fast.model.table import EVENTS, ByTable
from userip_fast.prompts.format import BehaviourFormat

logger = logging.getLogger("userip_fast")

M = TypeVar("M", bound=ByTable)

_VERSION = 1
_LM, _TOKENIZER = "lm", "tokenizer"  # sub-folders
_CONFIG, _CODEBOOKS, _START = "config.json", "codebooks.safetensors", "start.safetensors"
_HEAD, _CATALOGUE, _CARDS = "head.safetensors", "catalogue.parquet", "codes.json"
_USUAL, _COUNTED, _SHARED = "reactions.parquet", "counted.parquet", "words.parquet"
_COLUMNS = "columns.parquet"
_ALWAYS = (_CONFIG, _CODEBOOKS, _START, _CATALOGUE, _CARDS)
_LM_FILES = ("lm/config.json", "lm/model.safetensors")


def save_model(model: ByTable, path: str | Path) -> None:
    """See `userip_fast.model.fitted.Model.save`."""
    with atomic_dir(path) as tmp:
        write_json(tmp / _CONFIG, model.config.to_dict())
        write_tensors(
            tmp / _CODEBOOKS,
            {f"{j}.{k}": v for j, b in enumerate(model.codebooks) for k, v in b.state().items()},
        )
        _write_start(model, tmp)
        if model.head is not None:
            write_tensors(tmp / _HEAD, model.head.state())
        pq.write_table(model.catalogue.to_table(), tmp / _CATALOGUE)
        write_json(tmp / _CARDS, model.cards)
        if model.has_table:
            _write_table(model, tmp)
        if model.lm.embedded:
            _copy_lm(model.lm, tmp / _LM)
        about = {
            "format": MODEL_FORMATS[0],
            "version": _VERSION,
            "userip_fast": __version__,
            "fingerprint": model.fingerprint,
            "lm": {
                "source": "lm" if model.lm.embedded else model.lm.source,
                "embedded": model.lm.embedded,
                "fingerprint": model.lm.fingerprint,
                "quantization": model.lm.quantization,
                "hidden_size": model.lm.hidden_size,
            },
            "behaviour": model.format.to_dict(),
            "half_events": model.calibration.finite_half,
            "code_prior": model.calibration.code_prior,
            **_joint_prior(model.calibration),
            "files": folder_sums(tmp, but=[EVENTS]),
        }
        write_json(tmp / MANIFEST, sealed(about))


def _joint_prior(how: Calibration) -> dict[str, list[float]]:
    """What serving, which has no torch, is told of a prior that is no product."""
    return {} if how.log_prior is None else {"log_prior": how.log_prior.tolist()}


def _write_start(model: ByTable, root: Path) -> None:
    """The start, and how events count."""
    how = model.calibration
    write_tensors(root / _START, {"start": model.start, **how.state()})
    shared = how.counted and how.counted.shared
    for name, told in ((_USUAL, how.usual), (_COUNTED, how.counted), (_SHARED, shared)):
        if told is not None:
            pq.write_table(told.to_arrow(), root / name)
    if how.columns is not None:
        pq.write_table(columns.to_arrow(how.columns), root / _COLUMNS)


def _write_table(model: ByTable, root: Path) -> None:
    """The event table, and the tokenizer, with which alone the posterior does without the LM."""
    table = model.event_table()
    table.find()
    if table.parts:
        into, words, codes = root / EVENTS, len(table.words), len(table.grid.codes)
        kept = Segments([into], model.fingerprint, words, codes, writes=into)
        kept.add(Part.concat(table.parts))
    if model.config.em.estep == "posterior":
        stored.keep_tokenizer(model.lm.tokenizer, root / _TOKENIZER)


def _copy_lm(lm: FrozenLM, to: Path) -> None:
    """The files of the embedded LM, if they are still what was loaded from them."""
    try:
        shutil.copytree(lm.source, to)
        if not stored.is_of(to, lm.tokenizer, lm.fingerprint):
            raise FormatError("its files were altered")
    except (FileNotFoundError, FormatError, UnsupportedError) as e:
        raise FormatError(
            f"the embedded LM in {lm.source} is not what was loaded from there ({e}); run "
            "the same command with --resume: the LM is made again, what was learned is kept"
        ) from e


def load_model(
    cls: type[M], path: str | Path, *, lm: str | None, device: str | None, verify: bool
) -> M:
    """See `userip_fast.model.fitted.Model.load`."""
    root = Path(path)
    manifest = read_json(root / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") not in MODEL_FORMATS:
        raise FormatError(f"{root}: not a userip_fast model")
    if manifest.get("version") != _VERSION:
        raise FormatError(
            f"{root}: model version {manifest.get('version')!r}, this program reads {_VERSION}"
        )
    check_seal(root / MANIFEST, manifest)
    try:
        about, files = manifest["lm"], manifest["files"]
        needed = [*_ALWAYS, *_LM_FILES * bool(about["embedded"])]
        # A model with a table may never need its LM, which is then checked when it is opened.
        late = f"{_TOKENIZER}/tokenizer_config.json" in files and not verify
        check_sums(root, files, needed, but=[EVENTS, *[_LM] * late])
        with _of_file(root / _CONFIG):
            config = Config.from_dict(read_json(root / _CONFIG))
        if config.em.engine == "graph":  # was asked for where it was fitted
            config = config.override({"em.engine": "auto"})
        codebooks = load_codebooks(root / _CODEBOOKS, len(config.fields))
        start, calibration = _read_start(root, config, files)
        head = None
        if config.em.estep == "amortised" and config.em.recipe != "paper":
            head = Head.from_state(read_tensors(root / _HEAD))
        with _of_file(root / _CATALOGUE):
            catalogue = Catalogue.from_table(_read_table(root / _CATALOGUE))
        with _of_file(root / MANIFEST):
            fmt = BehaviourFormat.from_dict(manifest["behaviour"])
        _check_shapes(root, config, codebooks, int(about["hidden_size"]))
        source = root / _LM if about["embedded"] else Path(lm or about["source"])
        how = _lm_config(config.lm, about["quantization"], device, verify)

        def opened() -> FrozenLM:
            if late:
                check_sums(root, files, needed, but=[EVENTS])
            return _checked_lm(root, about, source, how, Workload.of(config))

        model_lm = _late_lm(root, about, source, opened) if late else opened()
    except (KeyError, TypeError) as e:
        raise FormatError(f"{root}: the manifest lacks or garbles {e}") from e
    cards = _cards(read_json(root / _CARDS), root / _CARDS)
    model = cls(
        config,
        fmt,
        model_lm,
        codebooks,
        start,
        catalogue,
        cards,
        head=head,
        calibration=calibration,
    )
    model._home = root
    return model


def _read_start(root: Path, config: Config, files: Mapping[str, Any]) -> tuple[Tensor, Calibration]:
    """As `_write_start` wrote it."""
    found = read_tensors(root / _START)
    start = found["start"]
    if start.dtype != torch.float32 or not start.isfinite().all():
        raise FormatError(f"{root / _START}: must be fp32 and finite")
    sizes = [f.codebook_size for f in config.fields]
    some, combinations = None, math.prod(sizes)
    if _COLUMNS in files:
        with _of_file(root / _COLUMNS):
            some = torch.from_numpy(codes_of(_read_table(root / _COLUMNS), sizes))
        combinations = len(some)
    with _of_file(root / _START):
        how = Calibration.from_state(found, start, combinations)
    how = replace(how, columns=some)
    if _USUAL in files:
        with _of_file(root / _USUAL):
            usual = Usual.from_arrow(_read_table(root / _USUAL))
        how = replace(how, usual=usual, neutral=start)
    if _COUNTED in files:
        with _of_file(root / _COUNTED):
            words = len(how.usual.counts[0]) if how.usual else 1
            counted = Counted.from_arrow(_read_table(root / _COUNTED), words, combinations)
        if _SHARED in files:
            with _of_file(root / _SHARED):
                shared = WordFactors.from_arrow(_read_table(root / _SHARED), words, combinations)
            counted = replace(counted, shared=shared)
        how = replace(how, counted=counted)
    return start, how


def _check_shapes(root: Path, config: Config, codebooks: list[Codebook], hidden: int) -> None:
    for f, book in zip(config.fields, codebooks):
        want = (f.codebook_size, f.num_virtual_tokens * hidden)
        if tuple(book.codewords.shape) != want:
            raise MismatchError(
                f"{root}: codebook of field {f.name!r} is {tuple(book.codewords.shape)}, "
                f"its template says {want}"
            )


def _lm_config(
    config: LMConfig, quantization: object, device: str | None, verify: bool
) -> LMConfig:
    """As at fit; what of it was quantised how, the manifest says."""
    known = quantization if quantization in ("none", "nf4", "nf4-double") else config.quantization
    return replace(
        config,
        quantization=known,
        device=device or config.device,
        verify=verify or config.verify,
    )


def _late_lm(root: Path, about: Mapping[str, Any], source: Path, opened: Any) -> Any:
    """Stands for the LM until something of it is asked that is not known without."""
    return Late(
        opened,
        tokenizer=stored.kept_tokenizer(root / _TOKENIZER),
        fingerprint=str(about["fingerprint"]),
        embedded=bool(about["embedded"]),
        source=str(source),
        quantization=str(about["quantization"]),
        hidden_size=int(about["hidden_size"]),
    )


def _checked_lm(
    root: Path, about: Mapping[str, Any], source: Path, config: LMConfig, work: Workload
) -> FrozenLM:
    """The LM at `source`, if it is the one that the manifest of the model in `root` is `about`."""
    lm = open_lm(str(source), config, work)
    lm.embedded = bool(about["embedded"])
    expected = str(about["fingerprint"])
    if not lm.is_known_as(expected):
        raise MismatchError(
            f"{root}: the LM at {source} is not the one the codebooks were learned with "
            f"(fingerprint {lm.fingerprint[:12]}, expected {expected[:12]})"
        )
    if not expected.startswith(stored.FULL):
        logger.warning(
            "%s: saved when one row of each tensor was all that the LM was known by; that "
            "much of it is the same. A new fit has it known by every byte",
            root,
        )
        # The model's own fingerprint follows from it, and banks and checkpoints from that.
        lm.fingerprint = expected
    if lm.hidden_size != about["hidden_size"]:
        raise MismatchError(
            f"{root}: the LM has hidden size {lm.hidden_size}, the codebooks {about['hidden_size']}"
        )
    return lm


@contextmanager
def _of_file(path: Path) -> Iterator[None]:
    """What is wrong with the content of a file is a FormatError that names it."""
    try:
        yield
    except (ConfigError, DataError, FormatError) as e:
        raise FormatError(str(e) if str(path) in str(e) else f"{path}: {e}") from e


def _read_table(path: Path) -> pa.Table:
    """A table of a model folder; FormatError where it cannot be read or names a column twice."""
    try:
        with pq.ParquetFile(path) as file:  # a path alone could be a folder, or be given columns
            table = file.read()
    except (OSError, ValueError, pa.ArrowException) as e:
        raise FormatError(f"{path}: cannot be read as Parquet ({e})") from e
    if len(set(table.column_names)) < table.num_columns:
        raise FormatError(f"{path}: names a column twice, {table.column_names}")
    return table


def _cards(cards: Any, path: Path) -> dict[str, list[dict[str, Any]]]:
    """Code cards as they were written; FormatError where they are something else."""
    kinds = {"code": int, "users": int}
    lists = {"words": str, "items": str, "lift": float}
    traits = {"what": str, "ratio": float, "low": float, "high": float}

    def sound(card: Any) -> bool:
        return (
            isinstance(card, dict)
            and all(isinstance(card.get(n), kind) for n, kind in kinds.items())
            and all(
                isinstance(card.get(n), list) and all(isinstance(x, kind) for x in card[n])
                for n, kind in lists.items()
            )
            and isinstance(told := card.get("told", []), list)
            and all(
                isinstance(t, dict) and all(isinstance(t.get(n), k) for n, k in traits.items())
                for t in told
            )
            and isinstance(went := card.get("reactions", {}), dict)
            and all(isinstance(x, float) for x in went.values())
        )

    if not isinstance(cards, dict) or not all(
        isinstance(own, list) and all(map(sound, own)) for own in cards.values()
    ):
        raise FormatError(f"{path}: does not hold the code cards that were written")
    return cards


@dataclass(frozen=True)
class OldCodebooks:
    """What `orders_like` compares with: of the model in folder `root`."""

    root: Path
    codebooks: list[Codebook]
    lm: str


def read_codebooks(path: str | Path) -> OldCodebooks:
    """Codebooks of the model folder at `path`, and the fingerprint of its LM.

    Raises:
        FormatError: There is no model.
    """
    root = Path(path)
    manifest = read_json(root / MANIFEST)
    try:
        fields = len(read_json(root / _CONFIG)["fields"])
        books = load_codebooks(root / _CODEBOOKS, fields)
        return OldCodebooks(root, books, str(manifest["lm"]["fingerprint"]))
    except (KeyError, TypeError) as e:
        raise FormatError(f"{root}: the manifest lacks or garbles {e}") from e


def orders_like(old: OldCodebooks, model: Learned) -> list[Tensor]:
    """Per field the order of the codes of `model` that matches those of an earlier model.

    Raises:
        MismatchError: It has another LM or other codebooks, so that codewords do not compare.
    """
    shapes = [
        [book.codewords.shape for book in books] for books in (old.codebooks, model.codebooks)
    ]
    if not model.lm.is_known_as(old.lm) or shapes[0] != shapes[1]:
        raise MismatchError(
            f"like: {old.root} has another LM or other fields; codes do not compare"
        )
    return numbered_like(model.codebooks, old.codebooks)
