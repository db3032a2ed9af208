"""What an EM step moves and launches, counted without a GPU.

    python benchmarks/trace_em_step.py [--shapes llama-2-7b ...] [--check] [--write]

The real packed step (forward and gradient of one pack) runs on torch's `meta` device, and every
operator is counted as it is dispatched: kernels launched, bytes read and written beside the matrix
products, copies, casts, and waits for the device. Two and three layers of the architecture are
traced; their difference is a layer, the rest of two layers is what a step does once. Operators of
ours say how many kernels they launch (`LAUNCHES`). Bytes are those of each operand and result once,
as if nothing stayed in a cache; attention is listed apart, since its kernels read operands twice.

`--write` commits the table as `benchmarks/results/trace_em_step.json`; `--check` compares with it
and fails where anything rose. The last line is the JSON.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from userip_fast.lm.trace import Architecture, Workload
from userip_fast.ops.linear_cross_entropy import _CHUNK_BYTES

COMMITTED = Path(__file__).with_name("results") / "trace_em_step.json"
WORK = Workload(pack_tokens=8192, user_tokens=302, soft_rows=2, prefix_rows=32)
MODES = ("bf16", "fp8")
# Kernels of our operators where they are not one; a pack's three work lists are added to a step.
LAUNCHES = {
    "packed_attention_backward": 2,
    "soft_prompt_attention_backward": 2,
    "prepend_soft_prompts_backward": 6,
    "select_backward": 2,  # of torch: zeros, and a copy into them
}
WORK_LISTS = 3
_GEMM = {"mm", "addmm", "bmm", "linear", "matmul", "_scaled_mm"}
_NOTHING = {
    "empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach",
    "_unsafe_view", "_reshape_alias", "alias",
}  # fmt: skip
_COPY = {"copy_", "clone", "cat", "stack", "_to_copy", "contiguous"}
_FILL = {"zero_", "zeros", "zeros_like", "new_zeros", "fill_", "full", "ones_like", "masked_fill"}
_GATHER = {"index_select", "embedding", "index", "gather", "prepend_soft_prompts"}
_WAIT = {"_local_scalar_dense", "nonzero", "item"}


def shapes() -> dict[str, Any]:
    """The architectures that are traced, by their published configurations."""
    from transformers import LlamaConfig, Qwen3Config

    return {
        "llama-2-7b": LlamaConfig(),
        "qwen3-0.6b": Qwen3Config(
            hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, head_dim=128,
            num_attention_heads=16, num_key_value_heads=8, vocab_size=151936,
            tie_word_embeddings=True,
        ),
        "llama-3-70b": LlamaConfig(
            hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, vocab_size=128256,
            num_attention_heads=64, num_key_value_heads=8, rope_theta=500000.0,
        ),
    }  # fmt: skip


@dataclass
class Traffic:
    """Counts of one stretch of work; bytes without matrix products and attention."""

    launches: int = 0
    bytes: int = 0
    gemm_launches: int = 0
    gemm_bytes: int = 0
    attention_bytes: int = 0
    copies: int = 0
    copy_bytes: int = 0
    casts: int = 0
    cast_bytes: int = 0
    waits: int = 0
    operators: Counter[str] = field(default_factory=Counter)

    def plus(self, other: Traffic, times: int = 1) -> Traffic:
        """These and `times` the others."""
        out = Traffic()
        for name, value in vars(self).items():
            if name != "operators":
                setattr(out, name, value + times * getattr(other, name))
        names = dict.fromkeys([*self.operators, *other.operators])
        counts = {n: self.operators[n] + times * other.operators[n] for n in names}
        out.operators = Counter({n: count for n, count in counts.items() if count})
        return out

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "operators": dict(self.operators)}


class Counting(TorchDispatchMode):
    """Adds what is dispatched inside it to `now`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = Traffic()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self._count(func, (args, kwargs), out)
        return out

    def _count(self, func: Any, inputs: Any, out: Any) -> None:
        name, now = func.overloadpacket.__name__, self.now
        read = [x for x in tree_leaves(inputs) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if name in _WAIT or (any(x.device.type != "meta" for x in made) and read):
            now.waits += 1
        if name in _NOTHING or func.is_view:
            return
        changes = "userip_fast" in str(func) or func._schema.is_mutable
        if not changes and made and all(any(x is y for y in read) for x in made):
            return  # such as `contiguous` of what is: nothing is launched
        size = sum(map(_bytes, made)) + sum(map(_bytes, read))
        if func._schema.is_mutable:  # what is written is an argument, and its result the same
            size -= sum(map(_bytes, made))
            size += _bytes(read[0]) if "userip_fast" in str(func) else 0
            size -= _bytes(read[0]) if name in _FILL else 0
        if name in _GATHER:
            size = 2 * sum(map(_bytes, made))
        if name == "select_backward":
            size += sum(map(_bytes, made))
        launches = LAUNCHES.get(name, 1)
        if name == "linear_cross_entropy":  # chunk by chunk: two products, one kernel, a copy
            chunk = _CHUNK_BYTES // (read[1].dtype.itemsize * read[1].shape[0])
            launches = 4 * -(-read[0].shape[0] // chunk) + 1
        now.operators[name] += launches
        now.launches += launches
        if name in _GEMM:
            now.gemm_launches += launches
            now.gemm_bytes += size
            return
        if "attention" in name:
            now.attention_bytes += size
            return
        now.bytes += size
        wide, narrow = ({x.dtype.itemsize for x in side} for side in (read, made))
        if name == "cast_rows" or (name == "_to_copy" and wide != narrow):
            now.casts += launches
            now.cast_bytes += size
        elif name in _COPY or name in _FILL:
            now.copies += launches
            now.copy_bytes += size


def _bytes(x: Tensor) -> int:
    """Of its values, those that a broadcast repeats once."""
    count = x.dtype.itemsize
    for size, stride in zip(x.shape, x.stride()):
        count *= size if stride else min(size, 1)
    return count


def trace(config: Any, mode: str, work: Workload = WORK) -> dict[str, Any]:
    """A layer's and a step's counts: {"layer": {"forward", "backward", "both"}, "step": ...}."""
    architecture = Architecture(config, torch.bfloat16, "cuda", four_bit=False, fused=True)
    if mode == "fp8":
        architecture.settle("fp8")
    passes = [_passes(architecture, model, work) for model in architecture.models]
    two, three = passes
    layer = {way: three[way].plus(two[way], -1) for way in two}
    step = {way: two[way].plus(layer[way], architecture.num_layers - 2) for way in two}
    for counts in (layer, step):
        counts["both"] = counts["forward"].plus(counts["backward"])
    return {
        "layer": {way: x.as_dict() for way, x in layer.items()},
        "step": {way: x.as_dict() for way, x in step.items()},
    }


def _passes(architecture: Architecture, model: Any, work: Workload) -> dict[str, Traffic]:
    with architecture.step_on_meta(model, work) as (nll, theta), Counting() as counting:
        loss = nll().sum()
        forward, counting.now = counting.now, Traffic()
        forward.launches += WORK_LISTS
        torch.autograd.grad(loss, theta)
    return {"forward": forward, "backward": counting.now}


def rises(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """What is larger now than it was, as lines; both as `main` prints them."""
    out = []
    for name, modes in before.items():
        for mode, found in modes.items():
            for of in ("layer", "step"):
                old, new = found[of]["both"], now[name][mode][of]["both"]
                out += [
                    f"{name}, {mode}, a {of}: {key} {old[key]:,} -> {new[key]:,}"
                    for key in old
                    if key != "operators" and new[key] > old[key]
                ]
    return out


def table(found: dict[str, Any]) -> str:
    """Per layer, both ways."""
    lines = [
        "| shape | mode | launches (GEMM) | GB beside GEMM and attention | attention GB "
        "| casts, GB | copies, GB | waits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, modes in found.items():
        for mode, of in modes.items():
            x = of["layer"]["both"]
            lines.append(
                f"| {name} | {mode} | {x['launches']} ({x['gemm_launches']}) "
                f"| {x['bytes'] / 1e9:.2f} | {x['attention_bytes'] / 1e9:.2f} "
                f"| {x['casts']}, {x['cast_bytes'] / 1e9:.2f} "
                f"| {x['copies']}, {x['copy_bytes'] / 1e9:.2f} | {x['waits']} |"
            )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=shapes(), default=list(shapes()))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--check", action="store_true", help="fail where a count rose")
    parser.add_argument("--write", action="store_true", help="commit the counts as JSON")
    parser.add_argument("--operators", action="store_true", help="print a layer's operators")
    args = parser.parse_args(argv)
    configs = shapes()
    found = {n: {m: trace(configs[n], m) for m in args.modes} for n in args.shapes}
    print(f"Counted on the meta device, T = {WORK.pack_tokens}, a layer both ways:\n")
    print(table(found))
    if args.operators:
        for name, modes in found.items():
            for mode, of in modes.items():
                for way in ("forward", "backward"):
                    print(name, mode, way, dict(of["layer"][way]["operators"]))
    worse: list[str] = []
    if args.check:
        before = json.loads(COMMITTED.read_text())
        worse = rises(found, {n: {m: before[n][m] for m in args.modes} for n in args.shapes})
        print("\n".join(["", *worse] if worse else ["", "nothing rose"]))
    if args.write:
        COMMITTED.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))
    return 1 if worse else 0


if __name__ == "__main__":
    raise SystemExit(main())
