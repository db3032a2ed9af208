"""Review logs in the layout of NETE, PETER and PEPLER, read without running what a pickle says.

The layout (as the data sets' own notes and github.com/lileipisces/PEPLER `utils.py` describe it): a
folder with `reviews.pickle`, a list of dicts `user`, `item`, `rating`, `template` = (feature,
adjective, sentence, sentiment) and perhaps more scalars (brand, price, ...); and folders `1`, `2`,
... that each hold `train.index`, `validation.index` and `test.index`: positions in that list, from
0, in one line with spaces between.
"""

from __future__ import annotations

import io
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from userip_fast.core.errors import DataError
from userip_fast.data.build import build_interactions, read_items
from userip_fast.data.filelist import TableLike
from userip_fast.data.filters import RowFilter
from userip_fast.data.histories import Rules
from userip_fast.data.interactions import Interactions
from userip_fast.data.rows import Columns
from userip_fast.data.sources import Part, Source
from userip_fast.data.text import TextTemplate
from userip_fast.data.textfiles import TextForm

_TEMPLATE = ("feature", "adjective", "sentence", "sentiment")
_NUM_FEATURES = 3


def read_nete(
    folder: str | os.PathLike[str],
    items: TableLike | None = None,
    *,
    fold: int | str | None = None,
    split: str = "train",
    text: str | None = None,
    filter: str | None = None,
    on_bad: str = "error",
    min_history: int = 1,
    seed: int = 0,
    form: TextForm | None = None,
) -> Interactions:
    """Reads reviews as rated interactions, without times.

    Args:
        folder: The folder with `reviews.pickle`, or that file.
        items: Item table with a column `item`; None: an item's columns are those of its first
            review (other keys of the dicts included), and `features`, the three features named most
            often in the reviews read (the train part, where a fold is given), joined by ", ".
        fold: A folder of `split` indexes beside the pickle; None reads every review.
        split: "train", "validation" or "test".
        text: Item text; default "{features}", with `items` "{title}".
        filter, on_bad, min_history, seed: As for `read_interactions`.
        form: How the item table is written, if it is a text file.

    Raises:
        DataError: As for `read_interactions`; or the pickle asks for anything but plain containers
            and scalars, does not hold records as above, or an index does not fit it.
    """
    rules = Rules(on_bad, min_history, seed)
    path = Path(folder)
    file = path if path.suffix == ".pickle" else path / "reviews.pickle"
    records = load_plain_pickle(file)
    if not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
        raise DataError(f"{file}: must hold a list of dicts")
    rows = described = np.arange(len(records))
    if fold is not None:
        rows = _read_index(file.parent / str(fold) / f"{split}.index", len(records))
        described = _read_index(file.parent / str(fold) / "train.index", len(records))
    table = _table(file, records)
    if items is None:
        table = table.append_column("features", _features(table, described))
    log = Source(str(file), table, (Part(str(file), 0, 1),), True)
    template = TextTemplate(text or ("{features}" if items is None else "{title}"))
    catalogue = None
    if items is None:
        template.check(table.column_names, log.name)
    else:
        catalogue = read_items(items, "item", template, form, rules.skip)
    return build_interactions(
        log,
        catalogue,
        columns=Columns("user", "item", "rating", None),
        template=template,
        predicate=RowFilter(filter) if filter is not None else None,
        rules=rules,
        rows=rows,
    )


def _table(file: Path, records: list[dict[Any, Any]]) -> pa.Table:
    """Records as columns; a key that a record lacks is null there."""
    names = dict.fromkeys(name for record in records for name in record)
    for name in ("user", "item", "rating"):
        if name not in names:
            raise DataError(f"{file}: no record has {name!r}; they have {list(names)}")
    columns: dict[str, list[Any]] = {
        str(name): [record.get(name) for record in records] for name in names
    }
    templates = columns.pop("template", None)
    if templates is not None:
        for row, value in enumerate(templates):
            if not isinstance(value, tuple | list) or len(value) != len(_TEMPLATE):
                raise DataError(
                    f"{file}, row {row + 1}: template must be {_TEMPLATE}, is {value!r}"
                )
        parts = zip(_TEMPLATE, zip(*templates, strict=True), strict=True)
        columns |= {name: list(values) for name, values in parts}
    for name, values in columns.items():
        for row, value in enumerate(values):
            if not isinstance(value, str | int | float | None):
                raise DataError(
                    f"{file}, row {row + 1}: {name!r} must be text or a number, "
                    f"is {type(value).__name__}"
                )
    arrays = {}
    for name, values in columns.items():
        try:
            arrays[name] = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as e:
            raise DataError(f"{file}: {name!r} mixes types or exceeds int64 ({e})") from e
    return pa.table(arrays)


def _features(table: pa.Table, rows: NDArray[np.int64]) -> pa.Array:
    """[n] the features named most often for each row's item among `rows`; ties alphabetical."""
    if "feature" not in table.column_names:
        return pa.nulls(table.num_rows, pa.string())
    named = table.select(["item", "feature"]).take(rows).drop_null()
    counts = named.group_by(["item", "feature"]).aggregate([([], "count_all")])
    counts = counts.sort_by([("count_all", "descending"), ("feature", "ascending")])
    best: dict[Any, list[str]] = {}
    for item, feature in zip(
        counts["item"].to_pylist(), counts["feature"].to_pylist(), strict=True
    ):
        features = best.setdefault(item, [])
        if len(features) < _NUM_FEATURES:
            features.append(str(feature))
    texts = pa.array([", ".join(features) for features in best.values()], pa.string())
    place = pc.index_in(table["item"], value_set=pa.array(list(best), table["item"].type))
    return texts.take(place.combine_chunks())


def _read_index(file: Path, n: int) -> NDArray[np.int64]:
    try:
        index = np.array(file.read_text(encoding="ascii").split(), np.int64)
    except (OSError, ValueError, OverflowError) as e:
        raise DataError(f"{file}: cannot be read as whole numbers with spaces between ({e})") from e
    if len(index) == 0 or index.min() < 0 or index.max() >= n:
        raise DataError(f"{file}: positions must be in [0, {n}), as reviews.pickle has {n} records")
    if len(np.unique(index)) < len(index):
        raise DataError(f"{file}: a position is given twice")
    return np.sort(index)


_SCALAR = re.compile(r"[iuf][1248]|b1|U[1-9][0-9]{0,2}")
_MOST = 4096  # bytes of a scalar, which a few bytes of a pickle can ask for again and again


class _Type:
    """What stands for numpy's dtype while a scalar is unpickled; only plain kinds are read."""

    def __init__(self, code: object, *_: object) -> None:
        if not isinstance(code, str) or not _SCALAR.fullmatch(code):
            raise pickle.UnpicklingError(f"it asks for a numpy scalar of type {code!r:.80}")
        self.code = code

    def __setstate__(self, state: object) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if order not in ("<", ">", "|"):
            raise pickle.UnpicklingError("it garbles the type of a numpy scalar")
        self.code = f"{order}{self.code}"


def _scalar(kind: object, data: object) -> Any:
    """A numpy scalar as Python's own number, boolean or text."""
    if not isinstance(kind, _Type) or not isinstance(data, bytes):
        raise pickle.UnpicklingError("it garbles a numpy scalar")
    if np.dtype(kind.code).itemsize != len(data):
        raise pickle.UnpicklingError("it garbles the size of a numpy scalar")
    return np.frombuffer(data, kind.code)[0].item()


def _encode(text: object, encoding: object) -> bytes:
    """How protocols below 3 write bytes."""
    if not isinstance(text, str) or len(text) > _MOST or encoding != "latin1":
        raise pickle.UnpicklingError("it encodes text otherwise than as bytes")
    return text.encode("latin1")


# What scalars of numpy are made by, and by what of ours: nothing of numpy is called.
_MAKERS: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _Type,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("_codecs", "encode"): _encode,
}

# Opcodes of plain containers and scalars, by how their argument is laid out (`pickletools.opcodes`
# describes them all). Whatever is not here, buffers and extension codes among it, is refused.
_FIXED = {
    **dict.fromkeys(b".(0)]}lduast\x85\x86\x87eN\x88\x89\x94", 0),  # containers, None, bools
    **dict.fromkeys(b"Rb", 0),  # to call and to set a state, of `_MAKERS`
    **dict.fromkeys(b"K\x80", 1),
    b"M"[0]: 2,
    b"J"[0]: 4,
    **dict.fromkeys(b"G\x95", 8),
}
_PREFIXED = {
    b"C"[0]: 1,
    b"B"[0]: 4,
    b"\x8c"[0]: 1,
    b"U"[0]: 1,
    b"\x8a"[0]: 1,
    b"X"[0]: 4,
    b"T"[0]: 4,
    b"\x8d"[0]: 8,
}
_LINE = frozenset(b"ILFVS")
_MEMO = {b"q"[0]: 1, b"h"[0]: 1, b"r"[0]: 4, b"j"[0]: 4}
_MEMO_LINE = frozenset(b"pg")
_CLASS, _CLASS_ON_STACK = b"c"[0], b"\x93"[0]
_OF_SCALARS = frozenset(b"CBc\x93")


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _MAKERS:
            return _MAKERS[module, name]
        raise pickle.UnpicklingError(f"it asks for the class {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it asks for a persistent object")


def load_plain_pickle(path: str | os.PathLike[str]) -> Any:
    """Loads a pickle of lists, tuples, dicts, text, numbers, bools and None.

    No class is ever looked up: scalars of numpy, which records from a frame hold, are made by three
    functions of ours, and nothing else can be called. The opcodes are walked first: only those
    of plain values may occur, and no memo index may exceed the file's size, so that a small file
    cannot ask for much memory.

    Raises:
        DataError: The file asks for a class (named) or anything else that is not plain, or is torn.
    """
    try:
        data = Path(path).read_bytes()
        has_scalars = _walk(data)
        found = _PlainUnpickler(io.BytesIO(data), encoding="utf-8").load()
        if has_scalars:
            _check_plain(found)
        return found
    except (OSError, EOFError, IndexError, KeyError, TypeError, AttributeError, ValueError) as e:
        raise DataError(f"{path}: not a pickle of plain values ({e})") from e
    except (pickle.UnpicklingError, MemoryError, OverflowError, RecursionError) as e:
        raise DataError(
            f"{path}: only lists, tuples, dicts, text, numbers, bools and None are read from a "
            f"pickle; {e or 'it asks for too much memory'}"
        ) from e


def _check_plain(found: Any) -> None:
    """Refuses what scalars of numpy are made of where it stands for itself."""
    waiting, seen = [found], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, list | tuple | dict):
            if id(value) not in seen:
                seen.add(id(value))
                waiting += [*value, *value.values()] if isinstance(value, dict) else value
        elif not isinstance(value, str | int | float | None):
            raise pickle.UnpicklingError(f"it holds {type(value).__name__}")


def _walk(data: bytes) -> bool:
    """Checks opcodes up to the end, or to a class that `find_class` refuses.

    Returns:
        Whether there may be scalars of numpy, and what they are made of.
    """
    at, size, has_scalars = 0, len(data), False
    find: Callable[[bytes, int], int] = data.find
    while at < size:
        op = data[at]
        at += 1
        has_scalars |= op in _OF_SCALARS
        if (fixed := _FIXED.get(op)) is not None:
            at += fixed
            if op == 0x2E:  # STOP
                return has_scalars
        elif (width := _PREFIXED.get(op)) is not None:
            at += width + int.from_bytes(data[at : at + width], "little")
        elif (width := _MEMO.get(op)) is not None:
            if int.from_bytes(data[at : at + width], "little") > size:
                raise pickle.UnpicklingError("a memo index exceeds the file's size")
            at += width
        elif op in _LINE or op in _MEMO_LINE:
            end = find(b"\n", at)
            if end < 0:
                break
            if op in _MEMO_LINE and int(data[at:end]) > size:
                raise pickle.UnpicklingError("a memo index exceeds the file's size")
            at = end + 1
        elif op == _CLASS:
            end = find(b"\n", find(b"\n", at) + 1)
            module, _, name = data[at:end].decode("ascii", "replace").partition("\n")
            if end < 0 or (module, name) not in _MAKERS:
                return has_scalars
            at = end + 1
        elif op == _CLASS_ON_STACK:
            pass  # by names that were put there; `find_class` judges them
        else:
            raise pickle.UnpicklingError(f"it uses the opcode 0x{op:02x}")
    raise pickle.UnpicklingError("it ends too early")
