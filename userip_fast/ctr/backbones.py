"""The recommenders: torch-rechub's models and LightGBM, trained one way for every feature.

Sources: torch-rechub (MIT), https://github.com/datawhalechina/torch-rechub; LightGBM (MIT),
https://github.com/microsoft/LightGBM. The linear model is torch-rechub's `LR` layer on one weight
per value.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from userip_fast.core.errors import UnavailableError
from userip_fast.ctr.config import DIN, CTRConfig
from userip_fast.ctr.inputs import Column, History, Input, Number

_INSTALL = "(extra ctr): pip install"
_FEW = 256  # values that LightGBM may split by one by one
_MULTI_HOT = 64

Labels = NDArray[np.float32]


def train_and_predict(
    backbone: str,
    train: Sequence[Input],
    train_label: Labels,
    valid: Sequence[Input],
    valid_label: Labels,
    test: Sequence[Input],
    config: CTRConfig,
    seed: int,
) -> NDArray[np.float32]:
    """Probabilities of the test rows, of the epoch or tree with the least log loss on `valid`."""
    if backbone == "lightgbm":
        return _boosted(train, train_label, valid, valid_label, test, seed)
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(seed)
        model = build(backbone, train, config)
        optimizer = torch.optim.Adam(
            model.parameters(), lr=config.lr, weight_decay=config.weight_decay
        )
        x, y = _tensors(train), torch.from_numpy(train_label)
        valid_x, valid_y = _tensors(valid), torch.from_numpy(valid_label)
        test_x = _tensors(test)
        best, waited, kept = float("inf"), 0, {}
        for _ in range(config.epochs):
            model.train()
            for rows in torch.split(torch.randperm(len(y)), config.batch):
                p = model({k: v[rows] for k, v in x.items()})
                loss = nn.functional.binary_cross_entropy(p, y[rows])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            p = _predict(model, valid_x, config)
            now = float(nn.functional.binary_cross_entropy(p.double(), valid_y.double()))
            if now < best - 1e-5:
                best, waited = now, 0
                kept = {k: v.clone() for k, v in model.state_dict().items()}
            else:
                waited += 1
                if waited >= config.patience:
                    break
        model.load_state_dict(kept)
        return _predict(model, test_x, config).numpy()


def check_installed(backbones: Sequence[str]) -> None:
    """Raises UnavailableError, with what to install, before hours pass."""
    if set(backbones) - {"lightgbm"}:
        _rechub("basic.features")
    if "lightgbm" in backbones:
        _lightgbm()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices this small lose more by meeting at a barrier than they win by a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def build(backbone: str, columns: Sequence[Input], config: CTRConfig) -> nn.Module:
    """An untrained model that maps {column name: values} to probabilities [B].

    Raises:
        UnavailableError: torch-rechub is not installed.
    """
    basic, initializers = _rechub("basic.features"), _rechub("basic.initializers")
    ranking = _rechub("models.ranking")
    dim = 1 if backbone == "lr" else config.embed_dim
    init = initializers.RandomNormal(0, 0.0 if backbone == "lr" else 0.03)

    def feature(c: Input) -> Any:
        if isinstance(c, Number):
            return basic.DenseFeature(c.name)
        if isinstance(c, History):
            size = next(o.size for o in columns if isinstance(o, Column) and o.name == c.of)
            return basic.SequenceFeature(
                c.name, size, dim, "concat", shared_with=c.of, padding_idx=0, initializer=init
            )
        if c.values.ndim == 1:
            return basic.SparseFeature(c.name, c.size, dim, initializer=init)
        return basic.SequenceFeature(c.name, c.size, dim, "mean", padding_idx=0, initializer=init)

    features = [feature(c) for c in columns if not isinstance(c, History)]
    sparse = [f for f in features if not isinstance(f, basic.DenseFeature)]
    dense = [f for f in features if isinstance(f, basic.DenseFeature)]
    mlp = {"dims": [16, 16], "activation": "relu", "dropout": 0.2}
    if backbone == "dcn":
        return _as_module(ranking.DCN(features, n_cross_layers=3, mlp_params=mlp))
    if backbone == "dcnv2":
        return _as_module(
            ranking.DCNv2(features, n_cross_layers=3, mlp_params=mlp, use_low_rank_mixture=False)
        )
    if backbone == "deepfm":
        return _as_module(ranking.DeepFM(features, sparse, mlp_params=mlp))
    if backbone == "autoint":
        autoint = _rechub("models.ranking.autoint").AutoInt
        return _as_module(autoint(sparse, dense, num_layers=2, num_heads=2, mlp_params=mlp))
    if backbone == DIN:
        histories = [feature(c) for c in columns if isinstance(c, History)]
        return _din(ranking.DIN, features, histories)
    return _Linear(features, sparse, dense)


def _din(base: Any, features: list[Any], histories: list[Any]) -> nn.Module:
    """torch-rechub's DIN, which leaves numbers out where there are categories too: with both."""
    target = next(f for f in features if f.name == histories[0].shared_with)

    class DIN(base):  # type: ignore[misc]
        def forward(self, x: Mapping[str, Tensor]) -> Tensor:
            history = self.embedding(x, self.history_features)
            own = self.embedding(x, self.target_features)[:, 0]
            read = [layer(history[:, i], own) for i, layer in enumerate(self.attention_layers)]
            rest = self.embedding(x, self.features, squeeze_dim=True)
            return torch.sigmoid(self.mlp(torch.cat([*read, own, rest], dim=1))[:, 0])

    return _as_module(
        DIN(
            features=[f for f in features if f is not target],
            history_features=histories,
            target_features=[target],
            mlp_params={"dims": [16, 16], "dropout": 0.2},
            attention_mlp_params={"dims": [16], "activation": "relu", "use_softmax": False},
        )
    )


class _Linear(nn.Module):
    """Logistic regression: a weight per value and per number, a bias, no products."""

    def __init__(self, features: list[Any], sparse: list[Any], dense: list[Any]) -> None:
        super().__init__()
        layers = _rechub("basic.layers")
        self.features = features
        self.embedding = layers.EmbeddingLayer(features)
        self.linear = layers.LR(len(features))
        with torch.no_grad():  # weights of values start at zero, and so do those of numbers
            self.linear.fc.weight[:, : len(sparse)] = 1.0
            self.linear.fc.weight[:, len(sparse) :] = 0.0

    def forward(self, x: Mapping[str, Tensor]) -> Tensor:
        return torch.sigmoid(self.linear(self.embedding(x, self.features, squeeze_dim=True))[:, 0])


def _boosted(
    train: Sequence[Input],
    train_label: Labels,
    valid: Sequence[Input],
    valid_label: Labels,
    test: Sequence[Input],
    seed: int,
) -> NDArray[np.float32]:
    """Gradient boosting on numbers, and on categories of few values.

    Of several values at once the most frequent are columns of their own; ids of items and users are
    left out, for the statistics stand for them.
    """
    lightgbm = _lightgbm()
    data = lightgbm.Dataset(
        _matrix(train), train_label, feature_name=_names(train),
        categorical_feature=[c.name for c in train if _is_category(c)],
    )  # fmt: skip
    model = lightgbm.train(
        {
            "objective": "binary", "learning_rate": 0.05, "num_leaves": 15, "min_data_in_leaf": 50,
            "feature_fraction": 0.7, "bagging_fraction": 0.8, "bagging_freq": 1, "max_bin": 127,
            "cat_smooth": 20.0, "seed": seed, "deterministic": True, "force_row_wise": True,
            "num_threads": torch.get_num_threads(), "verbosity": -1,
        },
        data,
        num_boost_round=400,
        valid_sets=[data.create_valid(_matrix(valid), valid_label)],
        callbacks=[lightgbm.early_stopping(25, verbose=False)],
    )  # fmt: skip
    return np.asarray(model.predict(_matrix(test)), np.float32)


def _is_category(c: Input) -> bool:
    return isinstance(c, Column) and c.values.ndim == 1 and c.size <= _FEW + 1


def _names(columns: Sequence[Input]) -> list[str]:
    names = []
    for c in columns:
        if isinstance(c, Number) or _is_category(c):
            names.append(c.name)
        elif isinstance(c, Column) and c.values.ndim == 2:
            names += [f"{c.name}_{v}" for v in range(1, min(c.size, _MULTI_HOT + 1))]
    return names


def _matrix(columns: Sequence[Input]) -> NDArray[np.float32]:
    parts = []
    for c in columns:
        if isinstance(c, Number) or _is_category(c):
            parts.append(c.values.astype(np.float32)[:, None])
        elif isinstance(c, Column) and c.values.ndim == 2:
            hot = np.zeros((len(c.values), max(c.size, _MULTI_HOT + 1)), np.float32)
            np.put_along_axis(hot, c.values, 1.0, axis=1)
            parts.append(hot[:, 1 : min(c.size, _MULTI_HOT + 1)])
    return np.concatenate(parts, axis=1)


def _rechub(module: str) -> Any:
    try:
        return importlib.import_module(f"torch_rechub.{module}")
    except ImportError as e:
        raise UnavailableError(
            f"the CTR evaluation trains torch-rechub's models {_INSTALL} 'torch-rechub>=0.9'; {e}"
        ) from e


def _lightgbm() -> Any:
    try:
        return importlib.import_module("lightgbm")
    except (ImportError, OSError) as e:  # its library may lack OpenMP
        raise UnavailableError(f"backbone lightgbm needs LightGBM {_INSTALL} lightgbm; {e}") from e


def _as_module(model: Any) -> nn.Module:
    assert isinstance(model, nn.Module)
    return model


def _tensors(columns: Sequence[Input]) -> dict[str, Tensor]:
    return {c.name: torch.from_numpy(np.ascontiguousarray(c.values)) for c in columns}


@torch.no_grad()
def _predict(model: nn.Module, x: Mapping[str, Tensor], config: CTRConfig) -> Tensor:
    model.eval()
    size = len(next(iter(x.values())))
    parts = [
        model({k: v[a : a + 8 * config.batch] for k, v in x.items()})
        for a in range(0, size, 8 * config.batch)
    ]
    return torch.cat(parts)
