"""Host time of `soft_prompt_attention` on a GPU, measured without one: what a call costs before the
device has anything to do.

    python benchmarks/bench_host_time.py [--out FILE]

Triton compiles the kernels for sm_90 and goes its usual way up to the driver, which is a stand-in
that launches nothing, so the driver's own few microseconds a launch are left out; tensors are the
CPU's, so that allocating them is another allocator's work. Contenders take turns; processor time of
one thread, medians.

- `operator`: through torch's dispatcher, as under torch.compile: an operator with registered
  autograd (what every call cost before).
- `direct`: by `torch.autograd.Function`, as outside of it (`userip_fast.ops._operator`).
- `in a layer`: the step of `userip_fast.lm.halves`, inside a layer's own autograd function, with
  the pack's work lists made by an earlier layer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as userip_fast.ops._triton

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from userip_fast.ops import _operator, soft_prompt_attention
from userip_fast.ops.isa import cpu_name
from userip_fast.ops.soft_prompt_attention import packed
from userip_fast.ops.soft_prompt_attention.context import Context

OP = sys.modules["userip_fast.ops.soft_prompt_attention"]
CALLS, TURNS = 200, 7
USERS, ROWS, HEADS, KV_HEADS, DIM, FIELDS = 8, 32, 4, 2, 64, 2


class Nothing:
    """A driver of Triton for a device that is not there."""

    launches = 0

    def __init__(self) -> None:
        self.utils = self

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        def launch(*args: Any) -> None:
            Nothing.launches += 1

        return launch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}

    def load_binary(self, *args: Any) -> tuple[int, int, int, int, int]:
        return 0, 0, 64, 0, 1024  # module, function, registers, spills, threads

    def unload_module(self, module: int) -> None:
        pass


def inputs() -> tuple[list[torch.Tensor], Context]:
    """q, k, v, and what they are read in."""
    rows, prefix = USERS * ROWS, 16
    qkv = [torch.zeros(rows, h, DIM, dtype=torch.bfloat16) for h in (HEADS, KV_HEADS, KV_HEADS)]
    prefix_kv = [torch.zeros(prefix, KV_HEADS, DIM, dtype=torch.bfloat16) for _ in range(2)]
    segment = torch.full((rows,), FIELDS, dtype=torch.int32)
    cu = torch.arange(0, rows + 1, ROWS, dtype=torch.int32)
    position = torch.arange(rows, dtype=torch.int32)
    mask = (segment, segment[:prefix] * 0, cu, position, position[:prefix])
    return qkv, Context(*prefix_kv, *mask, None, FIELDS, 0.1, max_seqlen=ROWS)


def contenders() -> dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """Name: (forward, backward of what forward gave)."""
    qkv, context = inputs()
    q, leaves = qkv[0], [x.clone().requires_grad_() for x in qkv]
    d_out = torch.zeros_like(q)

    def forward(watch: bool) -> torch.Tensor:
        _operator.watched = (lambda x: True) if watch else watched
        return soft_prompt_attention(
            *leaves, *context[:7], num_fields=FIELDS, scale=0.1, max_seqlen=ROWS, impl="triton"
        )

    def backward(out: torch.Tensor) -> Any:
        return torch.autograd.grad(out, leaves, d_out)

    watched = _operator.watched
    lists: dict[Any, Any] = {}

    def layer() -> Any:
        return packed.forward(*qkv, context, "triton", lists)

    def layer_backward(out: Any) -> Any:
        return packed.backward(d_out, *qkv, *out, context, "triton", lists)

    return {
        "operator": (lambda: forward(True), backward),
        "direct": (lambda: forward(False), backward),
        "in a layer": (layer, layer_backward),
    }


def measure() -> dict[str, dict[str, float]]:
    """Name: microseconds of forward and backward, and launches of both."""
    every = contenders()
    found: dict[str, dict[str, list[float]]] = {n: {"forward": [], "backward": []} for n in every}
    launches = {}
    for turn in range(TURNS + 1):  # the first compiles
        for name in list(every)[:: 1 if turn % 2 else -1]:
            forward, backward = every[name]
            before, spent = Nothing.launches, [0, 0]
            for _ in range(CALLS if turn else 3):
                a = time.thread_time_ns()
                out = forward()
                b = time.thread_time_ns()
                backward(out)
                spent[0] += b - a
                spent[1] += time.thread_time_ns() - b
            if turn:
                launches[name] = (Nothing.launches - before) / CALLS
                for way, ns in zip(("forward", "backward"), spent, strict=True):
                    found[name][way].append(ns / CALLS / 1000)
    return {
        name: {way: round(statistics.median(us), 1) for way, us in ways.items()}
        | {"launches": launches[name]}
        for name, ways in found.items()
    }


def main() -> None:
    """Prints a table, and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    driver.set_active(Nothing())
    OP._why_not_triton = lambda q, v: None  # whose tensors must be on a GPU else
    found = measure()
    print(f"{'':12} {'forward':>9} {'backward':>9}  microseconds, launches")
    for name, row in found.items():
        print(f"{name:12} {row['forward']:9.1f} {row['backward']:9.1f}  {row['launches']:.0f}")
    ratio = {
        way: round(found["operator"][way] / found["direct"][way], 2)
        for way in ("forward", "backward")
    }
    print(f"operator / direct: {ratio}")
    if arguments.out:
        about = {"cpu": cpu_name(), "torch": torch.__version__, "clock": "processor time"}
        arguments.out.write_text(
            json.dumps({**about, "us": found, "ratios": ratio}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
