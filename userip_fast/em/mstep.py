"""The M-step on thetas: addable statistics, and codebooks from them.

Sums are kept per virtual shard (256, by key hash) and added in shard order; within a shard users
come in hash order. So codebooks do not depend on block size, pack order or the number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from userip_fast.codebook.books import Codebook
from userip_fast.core.config import EMConfig
from userip_fast.core.errors import DataError
from userip_fast.core.keys import NUM_SHARDS, shard_of
from userip_fast.em.gradient import assign
from userip_fast.em.steps import Profiles
from userip_fast.prompts.layout import ProfileField

_SAMPLE_SALT = np.uint64(0x9E3779B97F4A7C15)


@dataclass
class ShardSums:
    """Running sums of one shard: per field counts [K_j] and sums [K_j, m D] in fp64."""

    counts: list[Tensor]
    sums: list[Tensor]
    scalars: Tensor  # users, NLL, weight, squared distance; fp64


@dataclass
class Stats:
    """What an M-step needs of any number of users; `a + b` adds two.

    Attributes:
        shards: Shard -> sums.
        sample_rank, sample_theta: The users with the lowest salted hashes, [n] uint64 ascending and
            [n, S, D]; they start codebooks and revive dead codes.
        sample_size: Their number, at most.
    """

    sample_size: int
    shards: dict[int, ShardSums] = field(default_factory=dict)
    sample_rank: npt.NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    sample_theta: Tensor | None = None

    def __add__(self, other: Stats) -> Stats:
        """Adds `other`; where both have a shard, its users come after this one's in hash order."""
        shards = dict(self.shards)
        for shard, b in other.shards.items():
            if shard in shards:
                a = shards[shard]
                b = ShardSums(
                    [x + y for x, y in zip(a.counts, b.counts)],
                    [x + y for x, y in zip(a.sums, b.sums)],
                    a.scalars + b.scalars,
                )
            shards[shard] = b
        out = Stats(self.sample_size, shards, self.sample_rank, self.sample_theta)
        if other.sample_theta is not None:
            out._merge_sample(other.sample_rank, other.sample_theta)
        return out

    def add_(
        self, profiles: Profiles, codebooks: list[Codebook] | None, slices: tuple[slice, ...]
    ) -> None:
        """Adds users one after another, so that where a block ends leaves no trace in the sums."""
        assert profiles.theta is not None, "this M-step needs theta"
        theta = profiles.theta
        rank = _mix(profiles.hashes)
        self._merge_sample(rank, theta)
        shard = shard_of(profiles.hashes)
        bounds = np.flatnonzero(np.diff(shard, prepend=-1, append=-1).astype(bool))
        for a, b in pairwise(bounds.tolist()):
            self._add_shard(int(shard[a]), slice(a, b), profiles, codebooks, slices)

    def _add_shard(
        self,
        shard: int,
        users: slice,
        profiles: Profiles,
        codebooks: list[Codebook] | None,
        slices: tuple[slice, ...],
    ) -> None:
        assert profiles.theta is not None
        books = codebooks or []
        if shard not in self.shards:
            self.shards[shard] = ShardSums(
                [torch.zeros(len(c), dtype=torch.int64) for c in books],
                [torch.zeros(len(c), c.dim, dtype=torch.float64) for c in books],
                torch.zeros(4, dtype=torch.float64),
            )
        sums = self.shards[shard]
        distance = torch.zeros(users.stop - users.start, dtype=torch.float64)
        for j, book in enumerate(books):
            assert profiles.code_ids is not None
            x = profiles.theta[users, slices[j]].flatten(1)
            codes = profiles.code_ids[users, j]
            sums.counts[j] += torch.bincount(codes, minlength=len(book))
            sums.sums[j].index_add_(0, codes, x.double())  # in order of rows on a CPU
            distance += (x - book.codewords[codes]).double().square().sum(1)
        values = torch.stack(
            [
                torch.ones_like(distance),
                profiles.nll[users].double(),
                profiles.weight[users],
                distance,
            ],
            dim=1,
        )
        zero = torch.zeros(len(values), dtype=torch.int64)
        sums.scalars.unsqueeze(0).index_add_(0, zero, values)

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything, by name, to cross processes."""
        out = {
            f"{shard}.{name}.{j}": x
            for shard, sums in self.shards.items()
            for name, parts in (("counts", sums.counts), ("sums", sums.sums))
            for j, x in enumerate(parts)
        }
        out |= {f"{shard}.scalars.0": sums.scalars for shard, sums in self.shards.items()}
        if self.sample_theta is not None:
            rank = torch.from_numpy(self.sample_rank.view(np.int64))
            out |= {"sample_rank": rank, "sample_theta": self.sample_theta}
        return out

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], sample_size: int) -> Stats:
        """The inverse of `to_tensors`."""
        out = cls(sample_size)
        shards = sorted({int(n.split(".")[0]) for n in tensors if n.endswith(".scalars.0")})
        for shard in shards:
            fields = sum(n.startswith(f"{shard}.counts.") for n in tensors)
            out.shards[shard] = ShardSums(
                [tensors[f"{shard}.counts.{j}"] for j in range(fields)],
                [tensors[f"{shard}.sums.{j}"] for j in range(fields)],
                tensors[f"{shard}.scalars.0"],
            )
        if "sample_theta" in tensors:
            out.sample_rank = tensors["sample_rank"].numpy().view(np.uint64)
            out.sample_theta = tensors["sample_theta"]
        return out

    def _merge_sample(self, rank: npt.NDArray[np.uint64], theta: Tensor) -> None:
        if self.sample_theta is not None:
            rank = np.concatenate([self.sample_rank, rank])
            theta = torch.cat([self.sample_theta, theta])
        keep = np.argsort(rank, kind="stable")[: self.sample_size]
        self.sample_rank = rank[keep]
        self.sample_theta = theta[torch.from_numpy(keep)]

    def total(self) -> ShardSums:
        """All shards, added in shard order."""
        parts = [self.shards[s] for s in range(NUM_SHARDS) if s in self.shards]
        out = ShardSums(
            [c.clone() for c in parts[0].counts],
            [s.clone() for s in parts[0].sums],
            parts[0].scalars.clone(),
        )
        for part in parts[1:]:
            for j in range(len(out.counts)):
                out.counts[j] += part.counts[j]
                out.sums[j] += part.sums[j]
            out.scalars += part.scalars
        return out


def _mix(hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A second hash, so that a sample is not the first shard."""
    x = (hashes ^ _SAMPLE_SALT) * np.uint64(0xBF58476D1CE4E5B9)
    return x ^ (x >> np.uint64(31))


class ThetaMStep:
    """Codebooks from thetas: k-means++ at first, then Lloyd means, EMA, or gradient steps on the
    mse.

    Source: the mse codebook loss of arXiv 2408.06577; EMA, arXiv 1711.00937, appendix A.1.
    """

    def __init__(
        self, fields: tuple[ProfileField, ...], slices: tuple[slice, ...], config: EMConfig
    ) -> None:
        self.fields, self.slices, self.config = fields, slices, config
        self.codebooks: list[Codebook] | None = None
        self.revived = 0

    def stats(self, profiles: Profiles, into: Stats | None = None) -> Stats:
        """Statistics of `profiles`, added to `into` where given."""
        out = into or Stats(self.config.kmeans_sample)
        out.add_(profiles, self.codebooks, self.slices)
        return out

    def apply(self, stats: Stats) -> list[Codebook]:
        """The next codebooks.

        Raises:
            DataError: A codebook is larger than the number of users it would be learned from.
        """
        assert stats.sample_theta is not None
        sample = [stats.sample_theta[:, s].flatten(1) for s in self.slices]
        self.revived = 0
        if self.codebooks is None:
            check_codebook_sizes(self.fields, len(sample[0]))
            self.codebooks = [
                _best_kmeans(x, f.codebook_size, self.config.seed + j, self.config.kmeans_restarts)
                for j, (f, x) in enumerate(zip(self.fields, sample))
            ]
            return self.codebooks
        total = stats.total()
        books = [Codebook.from_state(book.state()) for book in self.codebooks]
        for j, book in enumerate(books):
            counts, sums = total.counts[j], total.sums[j]
            if self.config.codebook_update == "mse":
                # One gradient step on the mean over users of ||theta - C[z]||^2 / (m D): see L_vq.
                share = counts[:, None] / counts.sum()
                mean = sums / counts.clamp_min(1)[:, None]
                book.codewords += (
                    (self.config.mse_lr * len(book) * share * (mean - book.codewords))
                    .clamp(-1e30, 1e30)
                    .float()
                )
            else:
                decay = self.config.ema_decay if self.config.codebook_update == "ema" else 0.0
                book.ema_update(counts, sums, decay)
            dead = counts < self.config.dead_code_threshold
            if dead.any():
                # Revived from the sample: where the codewords, moved or not, serve users worst.
                self.revived += _revive(book, dead, sample[j], self.config.seed + j)
        self.codebooks = books
        return books


def _best_kmeans(x: Tensor, k: int, seed: int, restarts: int) -> Codebook:
    """The best of several starts by total squared distance: Lloyd stops in poor optima."""
    best, least = None, float("inf")
    for i in range(restarts):
        book = Codebook.kmeans(x, k, seed=seed + 7919 * i, iterations=100)
        inertia = float(book.assign(x)[1].double().sum())
        if inertia < least:
            best, least = book, inertia
    assert best is not None
    return best


def _revive(book: Codebook, dead: Tensor, x: Tensor, seed: int) -> int:
    """Moves dead codes onto sampled vectors, drawn by squared distance to the live codes."""
    live = Codebook(book.codewords[~dead]) if not bool(dead.all()) else book
    _, distance = live.assign(x)
    count = min(int(dead.sum()), int((distance > 0).sum()))
    if count == 0:
        return 0
    generator = torch.Generator().manual_seed(seed)
    rows = torch.multinomial(distance.double(), count, generator=generator)
    codes = dead.nonzero().flatten()[:count]
    book.codewords[codes] = x[rows]
    return count


def check_codebook_sizes(fields: tuple[ProfileField, ...], users: int) -> None:
    """Raises DataError when a codebook has more codes than there are users."""
    for f in fields:
        if f.codebook_size > users:
            raise DataError(
                f"codebook_size of field {f.name!r} is {f.codebook_size}, more than the {users} "
                "users it would be learned from; choose a smaller one or bring more users"
            )


__all__ = ["ShardSums", "Stats", "ThetaMStep", "assign", "check_codebook_sizes"]
