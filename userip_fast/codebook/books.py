"""A field's codebook: K codewords, and how they are learned, kept alive and judged.

Codewords start from data (k-means++ and Lloyd), follow it by exponential moving averages of counts
and sums (van den Oord et al., arXiv 1711.00937, appendix A.1), and dead ones are put back where the
data is badly covered. Everything random is seeded; given the seed, results are bitwise repeatable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from userip_fast.core.errors import MismatchError
from userip_fast.ops import assign_codes, assign_codes_with_stats

_INIT_ROWS_PER_CODE = 64  # k-means++ looks at a seeded sample of at most this many rows per code


@dataclass(frozen=True)
class UsageStats:
    """How evenly codes are used.

    Attributes:
        counts: [K] int64, vectors per code.
        perplexity: exp of the entropy of the counts: K when all are used alike, 1 when one is.
        dead: Codes that nobody uses.
    """

    counts: Tensor
    perplexity: float
    dead: int

    @classmethod
    def of(cls, counts: Tensor) -> UsageStats:
        """From counts [K] int64."""
        p = counts.double() / counts.sum().clamp(min=1)
        entropy = -(p * p.clamp(min=1e-300).log()).sum()
        return cls(counts, float(entropy.exp()), int((counts == 0).sum()))


class Codebook:
    """K codewords of dimension D in fp32, with EMA statistics once `ema_update` was called.

    Args:
        codewords: [K, D] fp32, finite; copied.

    Attributes:
        log_prior: [K] fp32, log share of users who have each code, once it was learned.
    """

    def __init__(self, codewords: Tensor) -> None:
        if codewords.dim() != 2 or 0 in codewords.shape or codewords.dtype != torch.float32:
            raise ValueError(
                f"Codebook: codewords must be fp32 [K, D] with K and D at least 1, got "
                f"{codewords.dtype} {tuple(codewords.shape)}"
            )
        if not bool(codewords.isfinite().all()):
            raise ValueError("Codebook: codewords hold NaN or Inf")
        self.codewords = codewords.detach().clone()
        self.ema_counts: Tensor | None = None  # [K] fp32
        self.ema_sums: Tensor | None = None  # [K, D] fp32
        self.log_prior: Tensor | None = None

    def __len__(self) -> int:
        return self.codewords.shape[0]

    @property
    def dim(self) -> int:
        """D."""
        return self.codewords.shape[1]

    @classmethod
    def kmeans(
        cls,
        x: Tensor,
        k: int,
        *,
        seed: int,
        iterations: int = 25,
        tolerance: float = 1e-6,
    ) -> Codebook:
        """Codewords by Lloyd's algorithm; a code left without vectors restarts at a far one.

        Args:
            x: [N, D] fp32, bf16 or fp16, N >= k.
            k: Codebook size.
            seed: Of the start (k-means++ on a sample where N > 64 k); the result repeats with it.
            iterations: At most so many rounds.
            tolerance: Stops once a round lowers the total squared distance by less than this share.

        Source: k-means++, Arthur and Vassilvitskii, SODA 2007.
        """
        if x.dim() != 2 or not 1 <= k <= x.shape[0]:
            raise ValueError(
                f"Codebook.kmeans: x must be [N, D] with N >= k = {k} >= 1, got {tuple(x.shape)}"
            )
        generator = torch.Generator().manual_seed(seed)
        book = cls(_kmeans_plus_plus(x, k, generator))
        previous = float("inf")
        for _ in range(iterations):
            _, distance, counts, sums = assign_codes_with_stats(x, book.codewords)
            used = counts > 0
            book.codewords[used] = sums[used] / counts[used].unsqueeze(1)
            if not bool(used.all()):
                book._move_to_far(x, (~used).nonzero().flatten(), distance, generator)
                continue
            inertia = float(distance.double().sum())
            if previous - inertia <= tolerance * inertia:
                break
            previous = inertia
        return book

    def assign(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """code_ids [N] int64 and squared distances [N] of `x` [N, D]; see `ops.assign_codes`."""
        return assign_codes(x, self.codewords)

    def ema_update(self, counts: Tensor, sums: Tensor, decay: float) -> None:
        """Moves used codewords towards their vectors' mean by exponential moving averages.

        Args:
            counts: [K], vectors per code (or summed responsibilities).
            sums: [K, D], their sum.
            decay: In [0, 1): weight of the past; 0 is a Lloyd step.
        """
        if counts.shape != (len(self),) or sums.shape != self.codewords.shape:
            raise ValueError(
                f"Codebook.ema_update: counts must be [{len(self)}] and sums "
                f"{tuple(self.codewords.shape)}, got {tuple(counts.shape)} and {tuple(sums.shape)}"
            )
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"Codebook.ema_update: decay must be in [0, 1), is {decay}")
        if self.ema_counts is None or self.ema_sums is None:
            # Each codeword enters with the weight of one vector, so that a first batch cannot be
            # outvoted by, nor wholly erase, where the codeword started.
            self.ema_counts = torch.ones_like(self.codewords[:, 0])
            self.ema_sums = self.codewords.clone()
        self.ema_counts.mul_(decay).add_(counts.float(), alpha=1 - decay)
        self.ema_sums.mul_(decay).add_(sums.float(), alpha=1 - decay)
        used = counts > 0
        self.codewords[used] = self.ema_sums[used] / self.ema_counts[used].unsqueeze(1)

    def usage(self, ids: Tensor) -> UsageStats:
        """Usage of the codes by `ids` [N]."""
        return UsageStats.of(torch.bincount(ids.flatten(), minlength=len(self)))

    def state(self) -> dict[str, Tensor]:
        """Everything that `from_state` needs, as tensors."""
        out = {"codewords": self.codewords}
        if self.ema_counts is not None and self.ema_sums is not None:
            out |= {"ema_counts": self.ema_counts, "ema_sums": self.ema_sums}
        if self.log_prior is not None:
            out["log_prior"] = self.log_prior
        return out

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Codebook:
        """The codebook that `state` was taken from.

        Raises:
            MismatchError: A tensor is missing, unknown, or does not fit the others.
        """
        names = set(state) - {"log_prior"}
        if names not in ({"codewords"}, {"codewords", "ema_counts", "ema_sums"}):
            raise MismatchError(
                "Codebook.from_state: wants codewords, and optionally log_prior, and ema_counts "
                f"with ema_sums; got {sorted(state)}"
            )
        book = cls(state["codewords"])
        if "ema_counts" in state:
            counts, sums = state["ema_counts"], state["ema_sums"]
            if counts.shape != (len(book),) or sums.shape != book.codewords.shape:
                raise MismatchError(
                    f"Codebook.from_state: ema_counts {tuple(counts.shape)} and ema_sums "
                    f"{tuple(sums.shape)} do not fit codewords {tuple(book.codewords.shape)}"
                )
            book.ema_counts, book.ema_sums = counts.float().clone(), sums.float().clone()
        if "log_prior" in state:
            if state["log_prior"].shape != (len(book),):
                raise MismatchError(
                    f"Codebook.from_state: log_prior {tuple(state['log_prior'].shape)} does not "
                    f"fit codewords {tuple(book.codewords.shape)}"
                )
            book.log_prior = state["log_prior"].float().clone()
        return book

    def reordered(self, order: Tensor) -> Codebook:
        """The same codes under other numbers: code k is the old code `order[k]`."""
        return Codebook.from_state({name: x[order] for name, x in self.state().items()})

    def _move_to_far(
        self, x: Tensor, codes: Tensor, distance: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Puts `codes` on vectors drawn with probability proportional to `distance`."""
        weight = distance.double().cpu()
        codes = codes[: int((weight > 0).sum())]
        if len(codes) == 0:
            return codes
        # Weighted draw without repetition as the top of log weight + Gumbel noise; unlike
        # torch.multinomial it has no limit of 2^24 vectors.
        uniform = torch.rand(len(weight), generator=generator, dtype=torch.float64)
        rows = (weight.log() - uniform.log().neg().log()).topk(len(codes)).indices
        self.codewords[codes] = x[rows.to(x.device)].float()
        if self.ema_counts is not None and self.ema_sums is not None:
            self.ema_counts[codes] = 1.0
            self.ema_sums[codes] = self.codewords[codes]
        return codes


class ResidualCodebook:
    """Levels of codebooks, each for what the ones before left: prod(K_l) ids from sum(K_l) rows.

    Args:
        levels: Codebooks of one dimension, first level first.

    Source: residual quantisation, arXiv 2107.03312 (SoundStream), section III-C.
    """

    def __init__(self, levels: Sequence[Codebook]) -> None:
        if not levels or len({book.dim for book in levels}) != 1:
            raise ValueError(
                f"ResidualCodebook: levels must be at least one codebook, all of one dimension; "
                f"got dimensions {[book.dim for book in levels]}"
            )
        self.levels = list(levels)

    @classmethod
    def kmeans(
        cls, x: Tensor, sizes: Sequence[int], *, seed: int, iterations: int = 25
    ) -> ResidualCodebook:
        """Trains level after level on the residuals; holds one copy of `x` [N, D] in fp32."""
        levels: list[Codebook] = []
        residual = x.float()
        for level, k in enumerate(sizes):
            book = Codebook.kmeans(residual, k, seed=seed + level, iterations=iterations)
            residual = residual - book.codewords[book.assign(residual)[0]]
            levels.append(book)
        return cls(levels)

    def assign(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """code_ids [N, levels] int64, greedily level by level, and squared distances [N]."""
        ids = []
        residual = x.float()
        distance = residual.new_zeros(len(x))
        for book in self.levels:
            chosen, distance = book.assign(residual)
            residual = residual - book.codewords[chosen]
            ids.append(chosen)
        return torch.stack(ids, 1), distance

    def decode(self, code_ids: Tensor) -> Tensor:
        """[N, D] fp32, the vectors that `code_ids` [N, levels] stand for."""
        if code_ids.dim() != 2 or code_ids.shape[1] != len(self.levels):
            raise ValueError(
                f"ResidualCodebook.decode: code_ids must be [N, {len(self.levels)}], got "
                f"{tuple(code_ids.shape)}"
            )
        out = self.levels[0].codewords.new_zeros(len(code_ids), self.levels[0].dim)
        for level, book in enumerate(self.levels):
            out += book.codewords[code_ids[:, level]]
        return out


def _kmeans_plus_plus(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """[k, D] fp32 rows of x, each drawn in proportion to its squared distance from those before."""
    if x.shape[0] > _INIT_ROWS_PER_CODE * k:
        rows = torch.randperm(x.shape[0], generator=generator)[: _INIT_ROWS_PER_CODE * k]
        x = x[rows.to(x.device)]
    out = x.new_empty((k, x.shape[1]), dtype=torch.float32)
    weight = torch.ones(x.shape[0], dtype=torch.float64)
    for i in range(k):
        total = weight.cumsum(0)
        if float(total[-1]) == 0.0:  # fewer distinct rows than k: the rest are duplicates
            total = torch.ones_like(weight).cumsum(0)
        at = torch.rand(1, generator=generator, dtype=torch.float64) * total[-1]
        row = int(torch.searchsorted(total, at, right=True).clamp(max=len(total) - 1))
        out[i] = x[row].float()
        distance = assign_codes(x, out[i : i + 1])[1].double().cpu()
        weight = distance if i == 0 else torch.minimum(weight, distance)
    return out
