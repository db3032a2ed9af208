"""`UserProfiler`: the engine as an estimator of scikit-learn.

    from sklearn.pipeline import make_pipeline

    profiler = UserProfiler([taste], history="log.parquet", items="items.parquet", rating="rating")
    model = make_pipeline(profiler, LGBMClassifier()).fit(rows, rows["clicked"])

A sample is a row of X, and X is one of three things:

- **A table with a column of users** (a frame, a path, whatever `read_interactions` takes), where
  `history` is a log: a row gets the profile of its user in that log. Rows to learn from should be
  later than the log, or a profile has seen what it is to predict.
- **A log**, where `history` is None: a row gets the profile of its user in X itself.
- **A matrix** [users, items] of ratings, dense or sparse, where 0 and NaN say that there was no
  event; a row is a user.

scikit-learn is no dependency of this package: this module alone needs it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from userip_fast.core.config import Config
from userip_fast.core.errors import ConfigError, DataError, UnavailableError
from userip_fast.core.fields import TEMPLATES, ProfileField
from userip_fast.data import Data, Interactions, InteractionStream, TextTemplate, read_interactions
from userip_fast.data.arrow import to_numpy
from userip_fast.data.filelist import TableLike, is_path
from userip_fast.data.memory import as_arrow
from userip_fast.data.read import DEFAULT_TEXT
from userip_fast.data.sources import read_source
from userip_fast.jobs.fit import fit
from userip_fast.jobs.run_folder import Run
from userip_fast.lm import FrozenLM
from userip_fast.model.fitted import Model

try:
    from scipy.sparse import coo_array
    from sklearn.base import BaseEstimator, TransformerMixin
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as e:
    raise UnavailableError(
        "UserProfiler is an estimator of scikit-learn 1.6 or later, which is not installed "
        f"(extra sklearn): {e}"
    ) from e


_Found = tuple[NDArray[np.int64], list[NDArray[np.float32]] | None]


class UserProfiler(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Learns profile codebooks from histories; gives each row the codes of its user.

    Args:
        fields: Profile fields, or the name of a template such as "movies"; None is "generic".
        lm: "default" for the embedded LM, or a folder, GGUF file, hub id or "small".
        history: Log of the users' histories, if X has only their keys; None: X is the log. A path
            is better than a frame, which `clone` copies.
        items: Item table of a log; of a matrix, one text per column.
        user, item, rating, time, text, on_bad: As for `read_interactions`.
        config: Further settings by dotted name, such as `{"em.rounds": 4}`. Unlike `fit`, the
            default is the posterior E-step on independent events, which `affinity` needs.
        out: Run folder; None keeps nothing on disk.
        seed: A fit repeats with its seed.
        show: Whether to show progress.

    Attributes:
        model_: The fitted `Model`.
        n_features_in_: Columns of a matrix.
    """

    def __init__(
        self,
        fields: Sequence[ProfileField] | str | None = None,
        lm: str | FrozenLM = "default",
        *,
        history: TableLike | None = None,
        items: TableLike | None = None,
        user: str = "user_id",
        item: str = "item_id",
        rating: str | None = None,
        time: str | None = None,
        text: str = DEFAULT_TEXT,
        on_bad: str = "error",
        config: Mapping[str, Any] | None = None,
        out: str | None = None,
        seed: int = 0,
        show: bool = True,
    ) -> None:
        self.fields = fields
        self.lm = lm
        self.history = history
        self.items = items
        self.user = user
        self.item = item
        self.rating = rating
        self.time = time
        self.text = text
        self.on_bad = on_bad
        self.config = config
        self.out = out
        self.seed = seed
        self.show = show

    def fit(self, X: Any, y: Any = None) -> UserProfiler:  # noqa: N803
        """Learns codebooks on the users of `history`, or else of X; `y` is not looked at.

        Raises:
            DataError, ConfigError, UnsupportedError, UnavailableError: As `userip_fast.fit`.
        """
        fields = self._fields()
        config = Config().override({"em.seed": self.seed, **(self.config or {})})
        data, _ = self._read(X, reset=True, fewest=max(f.codebook_size for f in fields))
        self.model_ = fit(data, self.lm, fields, config, self.out, show=self.show)
        self._history = None
        if self.history is not None:
            self._history = (data.users(0, data.num_users).user_keys, self._infer(data))
        return self

    def transform(self, X: Any) -> NDArray[np.int64]:  # noqa: N803
        """[n, J] codes of the rows' users; K_j, as in a bank, where a user has no history."""
        (codes, _), rows = self._found(X)
        unknown = [len(book) for book in self.model_.codebooks]
        return np.vstack([codes, np.array([unknown], codes.dtype)])[rows]

    def predict_proba(
        self,
        X: Any,  # noqa: N803
    ) -> NDArray[np.float32] | list[NDArray[np.float32]]:
        """[n, K] p(code | history) of the rows' users, the prior without one; with several fields a
        list of these, as scikit-learn has it for several outputs.

        Raises:
            ConfigError: The E-step gives no probabilities.
        """
        (_, found), rows = self._found(X)
        if found is None:
            raise ConfigError("predict_proba: em.estep=gradient gives codes alone; fit another")
        made = []
        for p, book in zip(found, self.model_.codebooks):
            none = np.full(len(book), 1 / len(book), np.float32)
            if book.log_prior is not None:
                none = book.log_prior.exp().numpy().astype(np.float32)
            made.append(np.vstack([p, none / none.sum()])[rows])
        return made[0] if len(made) == 1 else made

    def affinity(self, X: Any, items: Sequence[Any]) -> NDArray[np.float32]:  # noqa: N803
        """[n, m] how well the rows' users would like `items`, by key (of a matrix, by column).

        Raises:
            ConfigError, DataError: As `Model.affinity`.
        """
        check_is_fitted(self)
        data, rows = self._read(X, reset=False)
        model = self.model_
        users = data.users(0, data.num_users)
        keys = users.item_keys.take(pa.array(users.item_index)).to_pylist()
        told: list[Any] = [None] * len(keys)
        if model.format.scale is not None:
            ratings = users.rating
            told = [users.constant_rating] * len(keys) if ratings is None else ratings.tolist()
        elif model.format.words:
            told = [model.format.words[model.format.best_word]] * len(keys)
        spans = list(zip(users.offsets[:-1].tolist(), users.offsets[1:].tolist()))
        texts = dict(zip(users.item_keys.to_pylist(), users.item_text.to_pylist()))
        histories = [*(keys[a:b] for a, b in spans), []]
        p = model.profile(histories, [*(told[a:b] for a, b in spans), []], texts)
        return np.asarray(model.affinity(p, items, texts))[rows]

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[np.object_]:
        """Names of the fields."""
        return np.array([f.name for f in self._fields()], object)

    def _fields(self) -> tuple[ProfileField, ...]:
        named = "generic" if self.fields is None else self.fields
        if not isinstance(named, str):
            return tuple(named)
        if named not in TEMPLATES:
            raise ConfigError(f"fields must be fields or one of {sorted(TEMPLATES)}, is {named!r}")
        return TEMPLATES[named]

    def _found(self, X: Any) -> tuple[_Found, NDArray[np.int64]]:  # noqa: N803
        """Codes and probabilities of some users, and each row's user among them, or -1."""
        check_is_fitted(self)
        if self._history is not None and not isinstance(X, Interactions | InteractionStream):
            users, found = self._history
            return found, _rows_of(self._keys(X), users)
        data, rows = self._read(X, reset=False)
        return self._infer(data), rows

    def _infer(self, data: Data) -> _Found:
        model = self.model_
        found = list(model.infer_blocks(model.source(data, self.on_bad), show=self.show))
        codes = np.concatenate([p.code_ids.numpy() for p in found])  # type: ignore[union-attr]
        if any(p.log_resp is None for p in found):
            return codes, None
        probabilities = [
            np.concatenate([p.log_resp[j].exp().numpy() for p in found])  # type: ignore[index]
            for j in range(codes.shape[1])
        ]
        return codes, probabilities

    def _read(
        self,
        X: Any,  # noqa: N803
        *,
        reset: bool,
        fewest: int = 1,
    ) -> tuple[Data, NDArray[np.int64]]:
        """Histories, and each row's user among them, -1 where there is none."""
        if isinstance(X, Interactions | InteractionStream):
            return X, np.arange(X.num_users)
        if _is_matrix(X):
            return self._read_matrix(X, reset, fewest)
        table = X if is_path(X) else as_arrow(X, self._columns(), "X")
        keys = self._keys(table)
        data = read_interactions(
            table if self.history is None else self.history,
            self.items,
            user=self.user,
            item=self.item,
            rating=self.rating,
            time=self.time,
            text=self.text,
            on_bad=self.on_bad,
            seed=self.seed,
        )
        return data, _rows_of(keys, data.user_keys)

    def _columns(self) -> list[str]:
        """Those of X that are asked for."""
        if self.history is not None:
            return [self.user]
        named = [self.user, self.item, self.rating, self.time]
        own = TextTemplate(self.text).columns if self.items is None else ()
        return list(dict.fromkeys([*(c for c in named if c is not None), *own]))

    def _keys(self, X: Any) -> pa.Array:  # noqa: N803
        skip = self.on_bad == "skip"
        rows = read_source(X, [self.user], what="X", as_text={self.user}, skip=skip)
        return rows.keys(self.user)

    def _read_matrix(
        self,
        X: Any,  # noqa: N803
        reset: bool,
        fewest: int,
    ) -> tuple[Data, NDArray[np.int64]]:
        if self.history is not None:
            raise DataError(f"X must be a table with a column {self.user!r}, as history is a log")
        matrix = validate_data(
            self,
            X,
            accept_sparse="csr",
            ensure_all_finite="allow-nan",
            ensure_min_samples=fewest,
            reset=reset,
        )
        entries = coo_array(matrix)
        there = (entries.data != 0) & ~np.isnan(entries.data)
        if not there.any():
            raise DataError("X: every entry is 0 or NaN, so that no user has an event")
        users, items = matrix.shape
        texts = [f"item {j}" for j in range(items)] if self.items is None else self.items
        if not isinstance(texts, Sequence) or len(texts) != items:
            raise DataError(f"items must be a text for each of the {items} columns of X")
        user, item = (axis[there].astype(np.int64) for axis in entries.coords)
        values = entries.data[there].astype(np.float64)
        data = read_interactions(
            pa.table({"user": user, "item": item, "rating": values, "column": item}),
            pa.table({"item": np.arange(items), "title": list(texts)}),
            user="user",
            item="item",
            rating="rating",
            time="column",  # an order of events that does not depend on the row
            on_bad=self.on_bad,
            seed=self.seed,
        )
        return data, _rows_of(pa.array(np.arange(users)), data.user_keys)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.input_tags.allow_nan = True
        tags.transformer_tags.preserves_dtype = []
        return tags

    def __getstate__(self) -> dict[str, Any]:
        """As scikit-learn's; the model by its folder in `out`, or else by that folder's files."""
        state = dict(super().__getstate__())
        model = state.pop("model_", None)
        state.pop("_folder", None)
        if model is None:
            return state
        if self.out is not None:
            return state | {"_saved": (str(Run(Path(self.out).resolve()).model), model.fingerprint)}
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder, "model")
            model.save(root)
            files = {
                file.relative_to(root).as_posix(): file.read_bytes()
                for file in sorted(root.rglob("*"))
                if file.is_file()
            }
        return state | {"_saved": files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        saved = state.pop("_saved", None)
        super().__setstate__(state)
        if isinstance(saved, tuple):
            root, fingerprint = saved
            self.model_ = Model.load(root)
            if self.model_.fingerprint != fingerprint:
                raise DataError(f"{root}: the model was fitted anew since the estimator was saved")
        elif saved is not None:
            self._folder = tempfile.TemporaryDirectory()  # the model may open its LM there later
            for name, content in saved.items():
                path = Path(self._folder.name, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            self.model_ = Model.load(self._folder.name)


def _is_matrix(X: Any) -> bool:  # noqa: N803
    """Whether X is an array, sparse or not, and no table with names."""
    if is_path(X) and not (isinstance(X, list | tuple) and not X):
        return False
    return (
        isinstance(X, np.ndarray | list | tuple)
        or hasattr(X, "tocsr")
        or (
            hasattr(X, "__array__") and not hasattr(X, "columns") and not hasattr(X, "column_names")
        )
    )


def _rows_of(keys: pa.Array, users: pa.Array) -> NDArray[np.int64]:
    """Each key's place among `users`, -1 where it is not there."""
    if keys.null_count < len(keys) and keys.type != users.type:
        raise DataError(f"the users of X are {keys.type}, those of the history {users.type}")
    found = pc.index_in(keys.cast(users.type), value_set=users)
    return to_numpy(pc.fill_null(found, -1)).astype(np.int64)
