"""How large the steps are: as users have it on a GPU, or tiny, to try the same code on a CPU."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from bench_soft_prompt_attention import CUDA_SHAPES, Shape


@dataclass(frozen=True)
class Setting:
    """See the module.

    Attributes:
        lm, small_lm: Names in `_random_lm.shapes`.
        mean_tokens, rows: Behaviour of a user on average, rows of a pack.
        few_rows: Rows of a small pack, which launches bind.
        steps: EM steps that are timed; passes: forward passes.
        codes: Codes of each of two fields. kinds: Of event, for the event table.
        memory_gb: In which the streamed model has to do.
        attention: Shapes. assign: (codes, dims) and the bytes of x.
        table_users: Users of 30 events.
        seconds: A comparison takes so long, at least.
        compiled: Whether peers are compiled (FlexAttention, torch's matmul and argmax).
    """

    name: str
    device: str
    dtype: torch.dtype
    lm: str
    small_lm: str
    mean_tokens: int
    rows: int
    few_rows: int
    steps: int
    passes: int
    codes: int
    kinds: int
    memory_gb: float
    attention: tuple[Shape, ...]
    assign: tuple[tuple[int, int], ...]
    assign_bytes: int
    table_users: int
    seconds: float
    compiled: bool
    tolerance: float = field(default=0.0)

    @property
    def impl(self) -> str:
        """Of the layers as a stack, which on a CPU is not chosen unasked."""
        return "auto" if self.device == "cuda" else "reference"


REAL = Setting(
    name="real", device="cuda", dtype=torch.bfloat16, lm="llama-2-7b", small_lm="qwen2.5-0.5b",
    mean_tokens=300, rows=8192, few_rows=1024, steps=5, passes=10, codes=16, kinds=100,
    memory_gb=12.0, attention=tuple(CUDA_SHAPES),
    assign=((16, 256), (16, 4096), (64, 256), (64, 4096)), assign_bytes=1 << 32,
    table_users=2_000_000, seconds=0.5, compiled=True, tolerance=0.1,
)  # fmt: skip

STAND_IN = Setting(
    name="stand-in", device="cpu", dtype=torch.float32, lm="tiny", small_lm="tiny",
    mean_tokens=20, rows=128, few_rows=64, steps=2, passes=2, codes=3, kinds=5,
    memory_gb=1.0, attention=(Shape(5, 20, 2, 4, 2, 16),),
    assign=((4, 16), (6, 16)), assign_bytes=1 << 14, table_users=200, seconds=0.01,
    compiled=False, tolerance=1e-3,
)  # fmt: skip
