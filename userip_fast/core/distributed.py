"""Several processes, each with its share of the users: `torchrun ... -m userip_fast fit ...`.

A process owns whole virtual shards, next to each other, so its users are a range in hash order.
What crosses processes are sums per shard (as safetensors bytes; nothing is pickled), which every
process then adds in shard order. Codebooks are therefore the same to the bit for any number of
processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from userip_fast.core.errors import ConfigError
from userip_fast.core.keys import NUM_SHARDS


@dataclass(frozen=True)
class Processes:
    """This process among all. The default is the only one."""

    rank: int = 0
    world: int = 1

    def owned_shards(self) -> tuple[int, int]:
        """First virtual shard of this process, and the one after its last."""
        return self.rank * NUM_SHARDS // self.world, (self.rank + 1) * NUM_SHARDS // self.world

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Everyone's `data`, in order of rank, to everyone."""
        if self.world == 1:
            return [data]
        mine = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(data)]))
        longest = max(int(n) for n in sizes)
        padded = torch.zeros(max(1, longest), dtype=torch.uint8)
        padded[: len(mine)] = mine[: len(padded)]
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded)
        return [p[: int(n)].numpy().tobytes() for p, n in zip(parts, sizes)]

    def gather(self, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Everyone's tensors, in order of rank, to everyone."""
        if self.world == 1:
            return [tensors]
        from safetensors.torch import load, save

        plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        return [load(part) for part in self.gather_bytes(save(plain))]

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Process 0 runs the body before the others do, say to fill a cache they share."""
        if self.rank > 0:
            self.barrier()
        try:
            yield
        finally:
            if self.rank == 0:
                self.barrier()

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def start_processes() -> Processes:
    """The process group that torchrun describes in the environment, over gloo; else this process.

    Raises:
        ConfigError: There are more processes than virtual shards.
    """
    if not dist.is_available() or "TORCHELASTIC_RUN_ID" not in os.environ:
        return Processes()
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    found = Processes(dist.get_rank(), dist.get_world_size())
    if found.world > NUM_SHARDS:
        raise ConfigError(
            f"{found.world} processes: users are spread over {NUM_SHARDS} virtual shards, so start "
            f"at most {NUM_SHARDS}"
        )
    return found
