"""What an EM step moves and launches, counted without a GPU.

    python benchmarks/trace_em_step.py [--shapes llama-2-7b ...] [--check] [--write]

The real packed step (forward and gradient of one pack) runs on torch's `meta` device, and every
operator is counted as it is dispatched: kernels launched, bytes read and written beside the matrix
products, copies, casts, and waits for the device. Two and three layers of the architecture are
traced; their difference is a layer, the rest of two layers is what a step does once. Operators of
ours say how many kernels they launch (`LAUNCHES`). Bytes are those of each operand and result once,
as if nothing stayed in a cache; attention is listed apart, since its kernels read operands twice.
In `streamed` decoded layers are counted by the stream, in a step that follows another.

`least` is what a layer cannot do without while products and attention are kernels of their own that
read and write bf16 (FP8 products: e4m3 with a scale a row): see `least`.

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

import _random_lm
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from userip_fast.lm.residency import LayerStream, StreamedLinear
from userip_fast.lm.trace import Architecture, Workload
from userip_fast.ops.linear_cross_entropy import _CHUNK_BYTES

COMMITTED = Path(__file__).with_name("results") / "trace_em_step.json"
WORK = Workload(pack_tokens=8192, user_tokens=302, soft_rows=2, prefix_rows=32)
MODES = ("bf16", "fp8", "streamed")
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
    known = _random_lm.shapes()
    return {name: known[name] for name in ("llama-2-7b", "qwen3-0.6b", "llama-3-70b")}


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
    if mode == "streamed":
        for model in architecture.models:
            _random_lm.to_nf4(model)
    if mode != "bf16":
        architecture.settle(mode)
    passes = [_passes(architecture, model, work) for model in architecture.models]
    two, three = passes
    layer = {way: three[way].plus(two[way], -1) for way in two}
    step = {way: two[way].plus(layer[way], architecture.num_layers - 2) for way in two}
    for counts in (layer, step):
        counts["both"] = counts["forward"].plus(counts["backward"])
    return {
        "layer": {**{way: x.as_dict() for way, x in layer.items()}, "least": least(config, mode)},
        "step": {way: x.as_dict() for way, x in step.items()},
    }


def _passes(architecture: Architecture, model: Any, work: Workload) -> dict[str, Traffic]:
    stream = next((m.stream for m in model.modules() if isinstance(m, StreamedLinear)), None)
    with architecture.step_on_meta(model, work) as (nll, theta):
        torch.autograd.grad(nll().sum(), theta)  # a stream holds what the step before left in it
        with Counting() as counting:
            decoded = 0 if stream is None else stream.decoded
            loss = nll().sum()
            forward, counting.now = counting.now, Traffic()
            forward.launches += WORK_LISTS
            decoded = _count_decoding(forward, stream, decoded)
            torch.autograd.grad(loss, theta)
            _count_decoding(counting.now, stream, decoded)
    return {"forward": forward, "backward": counting.now}


def _count_decoding(now: Traffic, stream: LayerStream | None, before: int) -> int:
    """Adds the layers that were decoded since there were `before` of them; how many there are."""
    if stream is None:
        return before
    weights, layers = stream.layers[0], stream.decoded - before
    now.launches += layers * len(weights)
    now.bytes += layers * sum(w.nbytes + w.numel * stream.dtype.itemsize for w in weights)
    if layers:
        now.operators["nf4_dequantize_into"] += layers * len(weights)
    return stream.decoded


def least(config: Any, mode: str, work: Workload = WORK) -> dict[str, int]:
    """Launches and bytes that a layer cannot do without, both ways, beside products and attention.

    Products take q, k, v together and gate and up together, and are kernels of their own, as is
    attention forward and its two backward; attention turns and norms heads while it loads them. All
    else reads once what it needs and writes once what the products and backward passes read.
    """
    t = work.pack_tokens
    d, f, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    dim = getattr(config, "head_dim", None) or d // heads
    rows_o, rows_kv = heads * dim, config.num_key_value_heads * dim
    # Norms: x, residual -> sum, y; backward: dy, sum, d_sum -> dx. Gated: gate, up -> product;
    # backward: d, gate, up -> d_gate, d_up. Two norms a layer, two bytes a value.
    launches, values = 8 + 3 + 2 * 2 + 2, 2 * (4 + 4) * d + (3 + 5) * f
    if mode != "fp8":
        found = {"launches": launches, "bytes": 2 * t * values}
    else:
        # y, the product and d_gate, d_up come out in one byte; dx in both, for who adds it and for
        # the product. A scale is of a row of all heads, so attention's output and the gradient of
        # q, k and v take a cast each.
        narrow = 2 * d + f + 2 * f
        casts = 3 * (rows_o + rows_o + 2 * rows_kv)
        found = {"launches": launches + 2, "bytes": t * (2 * values - narrow + 2 * d + casts)}
    if mode == "streamed":  # a layer's 4-bit weights are read, and written dense, once either way
        weights = d * (2 * rows_o + 2 * rows_kv) + 3 * d * f
        found["launches"] += 2
        found["bytes"] += 2 * int(weights * (2 + 0.5 + (1 + 4 / 256) / 64))
    return found


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
        "| shape | mode | launches (GEMM), least | GB beside GEMM and attention, least "
        "| attention GB | casts, GB | copies, GB | waits of a step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, modes in found.items():
        for mode, of in modes.items():
            x, floor = of["layer"]["both"], of["layer"]["least"]
            lines.append(
                f"| {name} | {mode} | {x['launches']} ({x['gemm_launches']}), {floor['launches']} "
                f"| {x['bytes'] / 1e9:.2f}, {floor['bytes'] / 1e9:.2f} "
                f"| {x['attention_bytes'] / 1e9:.2f} "
                f"| {x['casts']}, {x['cast_bytes'] / 1e9:.2f} "
                f"| {x['copies']}, {x['copy_bytes'] / 1e9:.2f} "
                f"| {of['step']['both']['waits']} |"
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
