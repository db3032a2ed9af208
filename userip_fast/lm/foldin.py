"""What the embedded LM is told of a user: a linear map of a fold-in vector, as soft rows.

    v = scaled sum of the vectors of the user's events      one vector per kind of event
    theta[s] = v @ weight[s] + bias[s]                       learned with the LM's own weights

The vectors are the right singular vectors of the training users' matrix of kinds of events (zeros
and ones, common kinds weighing less), as in a collaborative filter; the LM learns to read them. So
a soft row can say of a taste what no mean of words says, and a user's soft rows cost no pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor

from userip_fast.core.errors import FormatError
from userip_fast.core.files import read_tensors, write_tensors

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Kind = tuple[str, str]
"""An item's text, and the word for how it went."""

RANK = 32
_COMMON = 10.0  # events of a kind at which its weight begins to fall
_SURE = 10.0  # events at which half of a vector's squared length is there
FOLDIN_FILES = _TENSORS, _KINDS = "foldin.safetensors", "foldin.parquet"


def kind_vectors(
    users: Int64, kinds: Int64, num_kinds: int, seed: int, rank: int = RANK
) -> Float32:
    """[num_kinds, rank] vectors of kinds, from events [N] of users; 0 where a kind never occurs.

    Args:
        users: [N] whose event it is, numbered from 0.
        kinds: [N] its kind.
        seed: Of the randomised singular value decomposition (Halko et al., 2011).
    """
    pairs = np.stack(np.divmod(np.unique(users * num_kinds + kinds), max(1, num_kinds)))
    counts = np.bincount(pairs[1], minlength=num_kinds)
    scale = 1 / np.sqrt(counts + _COMMON)
    num_users = int(users.max(initial=-1)) + 1
    rank = min(rank, num_users, int((counts > 0).sum()))
    out = np.zeros((num_kinds, max(1, rank)), np.float32)
    if rank == 0:
        return out
    values = torch.from_numpy(scale[pairs[1]])
    shape = num_users, num_kinds
    matrix = torch.sparse_coo_tensor(torch.from_numpy(pairs), values, shape, check_invariants=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        over = min(rank + 8, num_users, num_kinds)
        v = torch.svd_lowrank(matrix, over, niter=4)[2][:, :rank].numpy() * scale[:, None]
    v[counts == 0] = 0
    # Signs are arbitrary: the largest entry of a direction is positive.
    v *= np.sign(v[np.abs(v).argmax(0), np.arange(rank)] + 1e-300)
    return np.asarray(v / max(float(v[counts > 0].std()), 1e-30), np.float32)


def fold_in(sums: Float32, events: npt.NDArray[Any]) -> Float32:
    """[U, r] vectors of users, from the sums [U, r] over `events` [U] of theirs: one length per
    coordinate, shrunk where few events speak."""
    length = np.linalg.norm(sums, axis=1) + 1e-6
    sure = np.sqrt(events / (events + _SURE) * sums.shape[1])
    return np.asarray(sums * (sure / length)[:, None], np.float32)


@dataclass(frozen=True)
class FoldIn:
    """See the module.

    Attributes:
        kinds: [E] the kinds of event that have a vector.
        vectors: [E, r] fp32.
        weight: [S, r, D] fp32, the map to the prompt's soft rows.
        bias: [S, D] fp32: what stands in the soft rows of a user of whom nothing is told.
    """

    kinds: list[Kind]
    vectors: Tensor
    weight: Tensor
    bias: Tensor

    def theta(self, kinds: list[Kind], of: Int64, offsets: Int64) -> Tensor:
        """[U, S, D] fp32 soft rows of users.

        Args:
            kinds: Any; those without a vector say nothing.
            of: [N] which of `kinds` the users' events are, one user after another.
            offsets: [U + 1], where each user's events begin.
        """
        return self._rows(self._sums(kinds, of, offsets), np.diff(offsets))

    def theta_of_groups(self, kinds: list[Kind], of: Int64, offsets: Int64, resp: Tensor) -> Tensor:
        """[K, S, D] fp32, the same of users who did all that a group's users did, by the users'
        shares [U, K] in the groups."""
        sums = resp.double().T.numpy() @ self._sums(kinds, of, offsets).astype(np.float64)
        return self._rows(sums.astype(np.float32), resp.double().T.numpy() @ np.diff(offsets))

    def _rows(self, sums: Float32, events: npt.NDArray[Any]) -> Tensor:
        v = torch.from_numpy(fold_in(sums, events))
        return torch.einsum("ur,srd->usd", v, self.weight) + self.bias

    def _sums(self, kinds: list[Kind], of: Int64, offsets: Int64) -> Float32:
        """[U, r] sums of the users' vectors."""
        at = {kind: i for i, kind in enumerate(self.kinds)}
        row = np.asarray([at.get(kind, len(at)) for kind in kinds], np.int64)[of]
        table = torch.cat([self.vectors, self.vectors.new_zeros(1, self.vectors.shape[1])])
        if not len(row):
            return np.zeros((len(offsets) - 1, table.shape[1]), np.float32)
        return F.embedding_bag(
            torch.from_numpy(row), table, torch.from_numpy(offsets), mode="sum",
            include_last_offset=True,
        ).numpy()  # fmt: skip

    def save(self, folder: Path) -> None:
        """Writes it beside an LM's own files."""
        tensors = {"vectors": self.vectors, "weight": self.weight, "bias": self.bias}
        write_tensors(folder / _TENSORS, tensors)
        columns = list(zip(*self.kinds)) or [(), ()]
        names = ("text", "word")
        table = pa.table({n: pa.array(c, pa.large_string()) for n, c in zip(names, columns)})
        pq.write_table(table, folder / _KINDS)

    @classmethod
    def load(cls, folder: Path) -> FoldIn | None:
        """What lies beside an LM's files; None where nothing does.

        Raises:
            FormatError: It does not fit together.
        """
        if not (folder / _TENSORS).is_file():
            return None
        tensors = read_tensors(folder / _TENSORS)
        try:
            table = pq.read_table(folder / _KINDS)
            kinds = list(zip(table["text"].to_pylist(), table["word"].to_pylist()))
            made = cls(kinds, tensors["vectors"], tensors["weight"], tensors["bias"])
            rows, rank = made.vectors.shape
            soft, dims = made.bias.shape
            fits = rows == len(kinds) and made.weight.shape == (soft, rank, dims)
        except (OSError, KeyError, ValueError, pa.ArrowException) as e:
            raise FormatError(f"{folder / _TENSORS}: cannot be read with {_KINDS} ({e})") from e
        if not fits or not all(t.isfinite().all() for t in tensors.values()):
            raise FormatError(f"{folder / _TENSORS}: shapes do not fit, or values are not finite")
        return made
