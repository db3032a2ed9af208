"""The recommenders: torch-rechub's models, trained one way for every feature.

Source: torch-rechub (MIT), https://github.com/datawhalechina/torch-rechub. The linear model is its
`LR` layer on one weight per value.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from userip_fast.ctr.config import CTRConfig
from userip_fast.errors import UnavailableError
from userip_fast.packing import Int64

NEEDS_RECHUB = (
    "the CTR evaluation trains torch-rechub's models: pip install 'userip-fast[ctr]' "
    "(torch-rechub>=0.9)"
)


@dataclass(frozen=True)
class Column:
    """A categorical input. `values` [N] or [N, L] int64 in [0, size); with L, the mean over the
    non-zero ones is taken."""

    name: str
    size: int
    values: Int64


def train_and_predict(
    backbone: str,
    train: Sequence[Column],
    train_label: NDArray[np.float32],
    valid: Sequence[Column],
    valid_label: NDArray[np.float32],
    test: Sequence[Column],
    config: CTRConfig,
    seed: int,
) -> NDArray[np.float32]:
    """Probabilities of the test rows, of the epoch with the least log loss on `valid`.

    Adam on binary cross-entropy, in batches of rows shuffled by the seed.
    """
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(seed)
        model = build(backbone, train, config)
        optimizer = torch.optim.Adam(
            model.parameters(), lr=config.lr, weight_decay=config.weight_decay
        )
        x, y = _inputs(train), torch.from_numpy(train_label)
        valid_x, valid_y = _inputs(valid), torch.from_numpy(valid_label)
        test_x = _inputs(test)
        best, waited, found = float("inf"), 0, np.zeros(len(test[0].values), np.float32)
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
                best, waited, found = now, 0, _predict(model, test_x, config).numpy()
            else:
                waited += 1
                if waited >= config.patience:
                    break
        return found


@contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices this small lose more by meeting at a barrier than they win by a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def build(backbone: str, columns: Sequence[Column], config: CTRConfig) -> nn.Module:
    """An untrained model that maps {column name: values} to probabilities [B].

    Raises:
        UnavailableError: torch-rechub is not installed.
    """
    try:
        basic = importlib.import_module("torch_rechub.basic.features")
        initializers = importlib.import_module("torch_rechub.basic.initializers")
        ranking: Any = importlib.import_module("torch_rechub.models.ranking")
    except ImportError as e:
        raise UnavailableError(f"{NEEDS_RECHUB}; {e}") from e
    dim = 1 if backbone == "lr" else config.embed_dim
    init = initializers.RandomNormal(0, 0.0 if backbone == "lr" else 0.03)
    features = [
        basic.SparseFeature(c.name, c.size, dim, initializer=init)
        if c.values.ndim == 1
        else basic.SequenceFeature(c.name, c.size, dim, "mean", padding_idx=0, initializer=init)
        for c in columns
    ]
    mlp = {"dims": [16, 16], "activation": "relu", "dropout": 0.2}
    if backbone == "dcn":
        return _as_module(ranking.DCN(features, n_cross_layers=3, mlp_params=mlp))
    if backbone == "dcnv2":
        return _as_module(
            ranking.DCNv2(features, n_cross_layers=3, mlp_params=mlp, use_low_rank_mixture=False)
        )
    if backbone == "deepfm":
        return _as_module(ranking.DeepFM(features, features, mlp_params=mlp))
    if backbone == "autoint":
        autoint = importlib.import_module("torch_rechub.models.ranking.autoint").AutoInt
        return _as_module(autoint(features, [], num_layers=2, num_heads=2, mlp_params=mlp))
    return _Linear(features)


class _Linear(nn.Module):
    """Logistic regression: a weight per value, a bias, no products."""

    def __init__(self, features: list[Any]) -> None:
        super().__init__()
        layers = importlib.import_module("torch_rechub.basic.layers")
        self.features = features
        self.embedding = layers.EmbeddingLayer(features)
        self.linear = layers.LR(len(features))
        nn.init.ones_(self.linear.fc.weight)  # weights of values start at zero

    def forward(self, x: Mapping[str, Tensor]) -> Tensor:
        return torch.sigmoid(self.linear(self.embedding(x, self.features, squeeze_dim=True))[:, 0])


def _as_module(model: Any) -> nn.Module:
    assert isinstance(model, nn.Module)
    return model


def _inputs(columns: Sequence[Column]) -> dict[str, Tensor]:
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
