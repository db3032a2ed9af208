"""What an E-step and an M-step exchange.

An E-step reads a block of users and says which codes they have. Nothing here assumes that it found
them by one vector per user: `theta` and `log_resp` are both optional. An M-step turns profiles into
addable statistics, and statistics into codebooks.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from userip_fast.codebook.books import Codebook
from userip_fast.core.errors import FormatError
from userip_fast.core.files import tensor_bytes
from userip_fast.prompts.packing import Behaviour


@dataclass(frozen=True)
class Block:
    """Some users. `hashes` [U] uint64 are their key hashes, in ascending order."""

    behaviour: Behaviour
    hashes: npt.NDArray[np.uint64]

    @property
    def weight(self) -> Tensor:
        """[U] fp64, sum of the loss weights of each user."""
        return torch.from_numpy(self.behaviour.total_weight)

    def select(self, users: npt.NDArray[np.int64]) -> Block:
        """Some of the users, in ascending order."""
        return Block(self.behaviour.select(users), self.hashes[users])

    def digest(self) -> bytes:
        """Of the users and of everything the LM would read of them."""
        b = self.behaviour
        parts = (self.hashes, b.ids, b.segment, b.position, b.weight, b.offsets)
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).digest()


@dataclass(frozen=True)
class Candidates:
    """Profiles that users may have, for an M-step. N of them, users ascending.

    Attributes:
        users: [N] int64 rows of the block.
        codes: [N, J] int64.
        weight: [N] fp64 responsibilities; those of a user sum to one, but for negligible ones left
            out.
    """

    users: Tensor
    codes: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Profiles:
    """What an E-step found for U users. All tensors are on the CPU.

    Attributes:
        hashes: [U] uint64.
        code_ids: [U, J] int64, or None before there are codebooks.
        nll: [U] fp32, weighted NLL in nats at what was found; of a descent, before its last move.
        weight: [U] fp64, sum of loss weights: nll / weight is nats per unit of weight.
        forward_equivalents: [U] fp32, passes through the LM; forward and backward count one each,
            since a frozen LM's backward is as much work as its forward.
        theta: [U, S, D] fp32 soft prompts, or None.
        log_resp: Per field [U, K_j] fp32 log responsibilities, or None.
        elbo: [U] fp64 objective of a posterior E-step, in nats, or None.
        candidates: What an M-step for a mixture of soft prompts needs, or None.
    """

    hashes: npt.NDArray[np.uint64]
    code_ids: Tensor | None
    nll: Tensor
    weight: Tensor
    forward_equivalents: Tensor
    theta: Tensor | None = None
    log_resp: list[Tensor] | None = None
    elbo: Tensor | None = None
    candidates: Candidates | None = None

    def probabilities(self) -> Tensor | None:
        """[U, J] fp32, p(code_ids | behaviour) of each field; None without responsibilities."""
        if self.log_resp is None or self.code_ids is None:
            return None
        chosen = [r.gather(1, z[:, None]) for r, z in zip(self.log_resp, self.code_ids.T)]
        return torch.cat(chosen, dim=1).exp().clamp(max=1.0)

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything but the hashes, by name, for a file."""
        return _flatten(self, "")

    @staticmethod
    def from_tensors(
        tensors: dict[str, Tensor], hashes: npt.NDArray[np.uint64], sizes: Sequence[int]
    ) -> Profiles:
        """The inverse of `to_tensors`.

        Args:
            sizes: [J] codes of each field; none before there are codebooks.

        Raises:
            FormatError: The tensors are not those of `hashes`' users and these fields.
        """
        try:
            found = Profiles(hashes=hashes, **_unflatten(tensors))
        except (KeyError, TypeError) as e:
            raise FormatError(f"profiles: lack or garble {e}") from e
        users = len(hashes)
        wanted: list[tuple[Any, tuple[int, ...], torch.dtype]] = [
            (found.nll, (users,), torch.float32),
            (found.weight, (users,), torch.float64),
            (found.forward_equivalents, (users,), torch.float32),
        ]
        if sizes or found.code_ids is not None:
            wanted.append((found.code_ids, (users, len(sizes)), torch.int64))
        if found.elbo is not None:
            wanted.append((found.elbo, (users,), torch.float64))
        if found.log_resp is not None:
            parts = found.log_resp if len(found.log_resp) == len(sizes) else [None] * len(sizes)
            wanted += [(r, (users, k), torch.float32) for r, k in zip(parts, sizes)]
        for x, shape, dtype in wanted:
            if not isinstance(x, Tensor) or (tuple(x.shape), x.dtype) != (shape, dtype):
                raise FormatError(f"profiles: a tensor is not {dtype} of shape {shape}")
        codes = found.code_ids
        if codes is not None and ((codes < 0) | (codes >= torch.tensor(sizes))).any():
            raise FormatError(f"profiles: a code is not below {tuple(sizes)}")
        return found


def profiles_total(profiles: Profiles) -> npt.NDArray[np.float64]:
    """[4] users, NLL, weight and forward equivalents, summed in fp64."""
    return np.array(
        [
            len(profiles.nll),
            float(profiles.nll.double().sum()),
            float(profiles.weight.sum()),
            float(profiles.forward_equivalents.double().sum()),
        ]
    )


def _flatten(value: Any, name: str) -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, list):
        parts = {str(i): x for i, x in enumerate(value)}
    else:
        parts = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    dot = f"{name}." if name else ""
    out: dict[str, Tensor] = {}
    for part, x in parts.items():
        if isinstance(x, Tensor | list):
            out |= _flatten(x, dot + part)
    return out


def _unflatten(tensors: dict[str, Tensor]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name in tensors:
        head, dot, _ = name.partition(".")
        if not dot:
            out[head] = tensors[name]
        elif head not in out:
            count = sum(n.startswith(f"{head}.") for n in tensors)
            out[head] = [tensors[f"{head}.{i}"] for i in range(count)]
    return out


@dataclass
class EMState:
    """Where the EM loop stands; what is saved in a checkpoint beside the codebooks."""

    round: int = 0


def books_digest(codebooks: list[Codebook] | None) -> bytes:
    """Of all that an E-step reads of the codebooks."""
    digest = hashlib.sha256()
    for book in codebooks or ():
        for name, tensor in sorted(book.state().items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor_bytes(tensor))
    return digest.digest()


class EStep(Protocol):
    """Infers profiles of a block, given the codebooks (None before the first M-step)."""

    def run(self, block: Block, codebooks: list[Codebook] | None, state: EMState) -> Profiles: ...


class MStep(Protocol):
    """Learns codebooks. `Stats` of disjoint users add up, over blocks and over processes."""

    def stats(self, profiles: Profiles) -> Any: ...

    def apply(self, stats: Any) -> list[Codebook]: ...
