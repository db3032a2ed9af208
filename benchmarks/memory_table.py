"""Tables of what a step takes: `python benchmarks/memory_table.py`.

    python benchmarks/memory_table.py                                 # three known shapes
    python benchmarks/memory_table.py --lm FOLDER --budget-gib 24     # yours, and its way
    python benchmarks/memory_table.py --lm FOLDER --measure           # beside what is measured

Everything is predicted (`userip_fast.lm.trace`) but the column that `--measure` adds.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

import torch

from userip_fast.core.config import LMConfig
from userip_fast.core.errors import ConfigError
from userip_fast.lm.engine import PackedEngine
from userip_fast.lm.frozen import FrozenLM
from userip_fast.lm.limits import GIB, size_text
from userip_fast.lm.load import open_lm
from userip_fast.lm.memory import choose
from userip_fast.lm.trace import Architecture, Workload, sample_pack
from userip_fast.testing import peak_bytes

WAYS = (("resident", False), ("fp8", False), ("streamed", False), ("resident", True),
        ("streamed", True))  # fmt: skip


def known_shapes() -> dict[str, Any]:
    """Configurations whose sizes are those of well-known models."""
    from transformers import LlamaConfig, Qwen2Config

    return {
        "Llama-2-7B": LlamaConfig(),
        "Qwen2.5-14B": Qwen2Config(
            vocab_size=152064, hidden_size=5120, intermediate_size=13824, num_hidden_layers=48,
            num_attention_heads=40, num_key_value_heads=8,
        ),
        "Llama-2-70B": LlamaConfig(
            hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
            num_attention_heads=64, num_key_value_heads=8,
        ),
    }  # fmt: skip


def table(architecture: Architecture, packs: Iterable[int], work: Workload) -> str:
    """Markdown: ways down, pack sizes across; GiB in all, and of what is there without a step."""
    packs = list(packs)
    lines = [
        "| way | weights | block state | " + " | ".join(f"T = {n}" for n in packs) + " |",
        "|---|---|---|" + "---|" * len(packs),
    ]
    for mode, again in WAYS:
        if mode == "streamed" and not architecture.four_bit:
            continue
        found = [architecture.estimate(mode, again, work.of_size(n)) for n in packs]
        fixed = (found[0].weights + found[0].buffers, found[0].state)
        cells = [f"{x / GIB:.1f}" for x in (*fixed, *(e.total for e in found))]
        name = mode + (", recomputed" if again else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measure(lm: FrozenLM, packs: Iterable[int], work: Workload) -> str:
    """Markdown: a step's memory above the weights, predicted and measured on the LM's device."""
    assert lm.plan is not None
    assert lm.architecture is not None
    lines = ["| T | predicted | measured | predicted / measured |", "|---|---|---|---|"]
    for tokens in packs:
        now = work.of_size(tokens)
        layout, pack = sample_pack(now, lm.device)
        engine = PackedEngine(lm, layout)
        shape = pack.num_users, now.soft_rows, lm.hidden_size
        theta = torch.zeros(shape, device=lm.device, requires_grad=True)

        def step(engine: Any = engine, pack: Any = pack, theta: Any = theta) -> Any:
            return torch.autograd.grad(engine.nll(pack, theta).sum(), theta)

        step()
        took, predicted = peak_bytes(step, lm.device), lm.architecture.step(lm.plan.recompute, now)
        lines.append(
            f"| {tokens} | {size_text(predicted)} | {size_text(took)} | {predicted / took:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lm", help="folder or hub id; default: three known shapes")
    parser.add_argument("--packs", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--user-tokens", type=int, default=256, help="rows of a user's sequence")
    parser.add_argument("--device", default="cuda", help="cuda or cpu, predicted for")
    parser.add_argument("--budget-gib", type=float, help="also say what a load would choose")
    parser.add_argument("--measure", action="store_true", help="load the LM and run the steps")
    args = parser.parse_args()
    work = Workload(user_tokens=args.user_tokens)
    if args.measure:
        lm = open_lm(args.lm, LMConfig(path=args.lm, device=args.device), work)
        print(f"{args.lm} on {lm.device}, {lm.dtype}: {lm.plan}\n")
        print(measure(lm, args.packs, work))
        return
    if args.lm:
        from transformers import AutoConfig

        shapes = {args.lm: AutoConfig.from_pretrained(args.lm)}
    else:
        shapes = known_shapes()
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    print(f"Predicted, not measured: GiB for {args.device}, {dtype}, 4-bit linears, users of")
    print(f"{work.user_tokens} rows, all rows with loss, {work.block_users} users in a block.")
    for name, config in shapes.items():
        architecture = Architecture(config, dtype, args.device, fused=True)
        print(f"\n**{name}**\n\n{table(architecture, args.packs, work)}")
        for tokens in args.packs if args.budget_gib else ():
            try:
                said = str(choose(architecture, int(args.budget_gib * GIB), work.of_size(tokens)))
            except ConfigError as e:
                said = str(e)
            print(f"\n{args.budget_gib:g} GiB, em.pack_tokens={tokens}: {said}")


if __name__ == "__main__":
    main()
