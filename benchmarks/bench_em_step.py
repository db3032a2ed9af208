"""One gradient EM step, against the public code's way and against PEFT prompt tuning.

    python benchmarks/bench_em_step.py --device cpu|cuda [--case NAME] [--rounds N]
    pytest benchmarks/bench_em_step.py --benchmark-only

Case: a random Llama (hidden 512, 8 layers, vocabulary 8192; on CUDA the Llama-2-7B shape) in NF4
with double quantisation, 16 name tokens a field, a table of 20,000 users, 32 users a step, ragged
behaviour of 30 to 300 tokens. `b100_j2` has 2 fields and about 100 tokens a user, `b50_j8` 8 fields
and about 50 (15 to 150). A step is forward, backward to the soft prompts, and the optimiser.

- ours: packed rows, constant prefix, loss rows only, Adam on the rows of the step; element-wise
  parts of the model fused where there are kernels for it, as a loaded model has them.
- public: whole prompts padded, plain causal mask, logits of every position, dense AdamW over the
  whole table; padded to the longest text of the data set (as is) or, without the dense optimiser,
  of the batch.
- peft: PEFT prompt tuning with ONE prompt of P + S rows for all users, padded to the longest of
  the batch. It learns no user's profile: the comparison flatters it. It runs on the dequantised
  weights of ours; `peft_bnb` on bitsandbytes' own 4-bit layers, which dequantise in every call.

Everyone reads the same NF4 weights, all but `peft_bnb` dequantised once. Between ours and public,
`split` adds one cause of cost at a time. Correctness first: ours and the reference engine agree on
NLL and soft-prompt gradient. The last line is JSON; `ratios` are the other's best time over ours,
`memory` the tensors that one step allocates at its peak beside what it holds between steps.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from _random_lm import NoTokenizer
from _timing import add_arguments, apply_arguments, ceilings, compare, machine, peak_mib, run_script

from userip_fast.lm import FrozenLM, PackedEngine, ReferenceEngine
from userip_fast.lm.attention import register
from userip_fast.lm.fuse import fuse, pays
from userip_fast.ops import nf4_dequantize, sparse_adam
from userip_fast.ops.nf4_format import NF4Weight
from userip_fast.prompts.layout import Layout
from userip_fast.prompts.packing import Behaviour, Pack, make_pack

TABLE, USERS, NAME_TOKENS = 20_000, 32, 16
CASES = {"b50_j8": (8, 50), "b100_j2": (2, 100)}  # fields, mean tokens of behaviour


@dataclass
class Case:
    """One batch of users, and the frozen LM that reads it."""

    lm: FrozenLM
    layout: Layout
    behaviour: Behaviour
    longest_text: int
    pack: Pack
    users: torch.Tensor
    fields: int

    @property
    def soft_shape(self) -> tuple[int, int, int]:
        return self.num_users, self.layout.num_soft, self.lm.hidden_size

    @property
    def num_users(self) -> int:
        return self.pack.num_users


def make_lm(device: str, quick: bool) -> FrozenLM:
    """A random Llama whose linears hold NF4 values, dequantised once."""
    from transformers import LlamaConfig, LlamaForCausalLM

    register()
    sizes = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8,
             "intermediate_size": 1408, "vocab_size": 8192}  # fmt: skip
    if device == "cuda":
        sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
                 "intermediate_size": 11008, "vocab_size": 32000}  # fmt: skip
    if quick:
        sizes |= {"num_hidden_layers": 2}
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="userip_packed"))
    torch.set_default_dtype(torch.float32)
    for _, _, dense in layer_linears(model):
        dense.nf4 = NF4Weight.quantize(dense.weight.data)
        dense.weight.data = nf4_dequantize(dense.nf4)
    return FrozenLM(model, NoTokenizer(), source="random", quantization="nf4-double")


def layer_linears(model: Any) -> list[tuple[Any, str, torch.nn.Linear]]:
    """(parent, name, module) of every linear of the layers."""
    return [(parent, name, dense) for parent in model.model.layers.modules()
            for name, dense in parent.named_children()
            if isinstance(dense, torch.nn.Linear)]  # fmt: skip


def on_bitsandbytes(lm: FrozenLM) -> Any | None:
    """The same model on bitsandbytes' 4-bit layers; None where it is not installed."""
    try:
        from bitsandbytes.nn import Linear4bit
    except ImportError:
        return None
    model = copy.deepcopy(lm.model)
    for parent, name, dense in layer_linears(model):
        narrow = Linear4bit(dense.in_features, dense.out_features, bias=False,
                            compute_dtype=lm.dtype, quant_type="nf4", device="meta")  # fmt: skip
        narrow.weight = dense.nf4.to_bnb()
        narrow.support_avx512bf16_for_cpu = False  # would repack the weights in place
        setattr(parent, name, narrow)
    return model.to(lm.device).requires_grad_(False)


def make_case(lm: FrozenLM, fields: int, mean: int, rows: int | None = None) -> Case:
    """Lengths from 0.3 to 3 times the mean, longer ones rarer; NAME_TOKENS a field after BOS.

    Args:
        rows: Of the pack, as many users as fit into it, in the place of USERS.
    """
    random = np.random.default_rng(0)
    low, high = int(0.3 * mean), 3 * mean
    drawn = low + random.exponential(mean - low, TABLE)
    lengths = np.clip(drawn, low, high).astype(np.int64)
    batch = random.choice(TABLE, USERS if rows is None else TABLE, replace=False)
    if rows is not None:
        batch = batch[np.cumsum(lengths[batch] + fields) <= rows]
    batch, users = np.sort(batch), len(batch)
    vocabulary = lm.token_embedding.shape[0]
    at, ids, segment, position, soft = 1, [0], [-1], [0], []
    for j in range(fields):
        ids += random.integers(1, vocabulary, NAME_TOKENS).tolist()
        segment += [j] * NAME_TOKENS
        position += range(at, at + NAME_TOKENS)
        soft.append(at + NAME_TOKENS)
        at += NAME_TOKENS + 1
    as_int = lambda x: np.asarray(x, np.int32)  # noqa: E731
    layout = Layout(as_int(ids), as_int(segment), as_int(position), as_int(range(fields)),
                    as_int(soft), tuple(slice(j, j + 1) for j in range(fields)))  # fmt: skip
    n = lengths[batch]
    offsets = np.concatenate([[0], np.cumsum(n)])
    within = np.concatenate([np.arange(x) for x in n])
    behaviour = Behaviour(
        ids=random.integers(1, vocabulary, offsets[-1]).astype(np.int32),
        segment=np.full(offsets[-1], fields, np.int32),
        position=(layout.behaviour_start + within).astype(np.int32),
        weight=(within > 0).astype(np.float32),
        offsets=offsets,
        events=np.ones(users, np.int64),
    )
    pack = make_pack(behaviour, np.arange(users), layout, lm.device,
                     pad_to=128 if lm.device.type == "cuda" else 1)  # fmt: skip
    return Case(lm, layout, behaviour, int(lengths.max()), pack,
                torch.from_numpy(batch).to(lm.device), fields)  # fmt: skip


class Rows:
    """Soft prompts of the whole table with row-sparse Adam."""

    def __init__(self, case: Case) -> None:
        dim = case.lm.hidden_size
        shape = (TABLE * case.layout.num_soft, dim)
        self.theta = torch.zeros(shape, device=case.lm.device)
        # Moments live for the users of a block only; the table is what the public way holds too.
        self.m = torch.zeros(case.num_users * case.layout.num_soft, dim, device=case.lm.device)
        self.v = torch.zeros_like(self.m)
        self.step = torch.zeros(len(self.m), dtype=torch.int32, device=case.lm.device)
        soft = torch.arange(case.layout.num_soft, device=case.lm.device)
        self.rows = (case.users[:, None] * case.layout.num_soft + soft).flatten()
        self.local = torch.arange(len(self.m), device=case.lm.device)

    def read(self, case: Case) -> torch.Tensor:
        return self.theta[self.rows].view(case.soft_shape).requires_grad_()

    def update(self, case: Case, x: torch.Tensor, grad: torch.Tensor) -> None:
        block = x.detach().reshape(self.m.shape).contiguous()
        sparse_adam(block, self.m, self.v, self.step, self.local, grad.reshape(self.m.shape),
                    lr=0.01)  # fmt: skip
        self.theta[self.rows] = block


class Dense:
    """Soft prompts of the whole table as one parameter with AdamW over every row."""

    def __init__(self, case: Case) -> None:
        self.theta = torch.zeros(TABLE, case.layout.num_soft, case.lm.hidden_size,
                                 device=case.lm.device, requires_grad=True)  # fmt: skip
        self.optimiser = torch.optim.AdamW([self.theta], lr=0.01, fused=True)

    def read(self, case: Case) -> torch.Tensor:
        return self.theta[case.users]

    def finish(self, loss: torch.Tensor) -> None:
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()


def as_loaded(lm: FrozenLM) -> FrozenLM:
    """The LM as `FrozenLM.load` leaves it, element-wise parts fused, around the same weights."""
    if not pays(lm.token_embedding):
        return lm
    weights = {id(x): x for x in (*lm.model.parameters(), *lm.model.buffers())}
    model = copy.deepcopy(lm.model, weights)
    fuse(model)
    return FrozenLM(model, NoTokenizer(), source=lm.source, quantization=lm.quantization)


def ours(case: Case, lm: FrozenLM) -> Callable[[], Any]:
    engine, rows = PackedEngine(lm, case.layout), Rows(case)

    def step() -> None:
        x = rows.read(case)
        loss = engine.nll(case.pack, x).sum()
        (grad,) = torch.autograd.grad(loss, x)
        rows.update(case, x, grad)

    return step


def padded(
    case: Case,
    *,
    to_data_set: bool = False,
    dense: bool = False,
    all_logits: bool = True,
    width: bool = True,
) -> Callable[[], Any]:
    """The public way, whole prompts in a padded batch under a plain causal mask (SDPA).

    Args:
        to_data_set: Pad to the longest text of the data set rather than of the batch.
        dense: AdamW over the whole table rather than on the rows of the step.
        all_logits: Logits and loss over every position rather than where there is loss.
        width: Pad at all; False runs users one after another, each at its own length.
    """
    head = case.layout.behaviour_start
    lengths = case.behaviour.lengths
    longest = case.longest_text if to_data_set else int(lengths.max())
    store: Any = Dense(case) if dense else Rows(case)
    users = case.num_users
    groups = [range(users)] if width else [range(u, u + 1) for u in range(users)]
    batches = []
    for group in groups:
        columns = longest if width else int(lengths[group[0]])
        ids = torch.zeros(len(group), head + columns, dtype=torch.int64)
        real = torch.zeros(len(group), head + columns, dtype=torch.bool)
        for row, u in enumerate(group):
            span = slice(int(case.behaviour.offsets[u]), int(case.behaviour.offsets[u + 1]))
            ids[row, head : head + lengths[u]] = torch.from_numpy(
                case.behaviour.ids[span].astype(np.int64)
            )
            real[row, head : head + lengths[u]] = True
        ids[:, case.layout.prefix_position] = torch.from_numpy(
            case.layout.prefix_ids.astype(np.int64)
        )
        target = torch.full(ids.shape, -100)
        target[:, head : ids.shape[1] - 1] = torch.where(
            real[:, head + 1 :], ids[:, head + 1 :], -100
        )
        keep = torch.cat(
            [torch.ones(len(group), head, dtype=torch.int64), real[:, head:].long()], 1
        )
        where = torch.arange(head, ids.shape[1])
        batches.append([x.to(case.lm.device) for x in (ids, target, keep, where)])
    soft_at = torch.from_numpy(case.layout.soft_position).long().to(case.lm.device)

    def step() -> None:
        x = store.read(case)
        total = torch.zeros((), device=case.lm.device)
        with case.lm.attention("sdpa"):
            for group, (ids, target, keep, where) in zip(groups, batches):
                part = x[group.start : group.stop].to(case.lm.dtype)
                embedded = case.lm.embed(ids).index_copy(1, soft_at, part)
                out = case.lm.model(
                    inputs_embeds=embedded,
                    attention_mask=keep if width else None,
                    use_cache=False,
                    logits_to_keep=0 if all_logits else where,
                )
                wanted = target if all_logits else target[:, where]
                total = total + F.cross_entropy(
                    out.logits.flatten(0, 1).float(), wanted.flatten(), ignore_index=-100,
                    reduction="sum",
                )  # fmt: skip
        if dense:
            store.finish(total)
        else:
            (grad,) = torch.autograd.grad(total, x)
            store.update(case, x, grad)

    return step


def peft(case: Case, model: Any) -> Callable[[], Any] | None:
    """One PEFT soft prompt of P + S rows for all users, batch-padded, logits of every position."""
    try:
        from peft import PromptTuningConfig, get_peft_model
    except ImportError:
        return None
    rows = case.layout.behaviour_start
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=rows)
    model.set_attn_implementation("sdpa")
    tuned = get_peft_model(model, config).to(case.lm.device)
    optimiser = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=0.01)
    lengths = case.behaviour.lengths
    ids = torch.zeros(case.num_users, int(lengths.max()), dtype=torch.int64)
    keep = torch.zeros_like(ids)
    for u in range(case.num_users):
        span = slice(int(case.behaviour.offsets[u]), int(case.behaviour.offsets[u + 1]))
        ids[u, : lengths[u]] = torch.from_numpy(case.behaviour.ids[span].astype(np.int64))
        keep[u, : lengths[u]] = 1
    ids, keep = ids.to(case.lm.device), keep.to(case.lm.device)
    labels = torch.where(keep.bool(), ids, -100)

    def step() -> None:
        loss = tuned(input_ids=ids, attention_mask=keep, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return step


def check(case: Case) -> float:
    """Relative error of our loss and gradient against the padded reference engine.

    Raises:
        AssertionError: They do not agree.
    """
    x = torch.randn(case.soft_shape, device=case.lm.device) * case.lm.embedding_rms
    found = []
    for engine in (PackedEngine(case.lm, case.layout), ReferenceEngine(case.lm, case.layout)):
        y = x.clone().requires_grad_()
        nll = engine.nll(case.pack, y)
        (grad,) = torch.autograd.grad(nll.sum(), y)
        found.append((nll.detach(), grad))
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(*found)]
    limit = 3e-2 if case.lm.dtype == torch.bfloat16 else 1e-4
    assert max(errors) < limit, f"ours and the reference disagree: {errors}"
    return max(errors)


def contenders(case: Case) -> dict[str, Callable[[], Any]]:
    """Ours, and the public way piece by piece."""
    return {
        "ours": ours(case, as_loaded(case.lm)),
        "split_fused": ours(case, case.lm),
        "split_prefix": padded(case, width=False, all_logits=False),
        "split_padding": padded(case, all_logits=False),
        "public_batch": padded(case),
        "public_longest": padded(case, to_data_set=True),
        "public_as_is": padded(case, to_data_set=True, dense=True),
    }


def measure(lm: FrozenLM, fields: int, mean: int, device: str, rounds: int) -> dict[str, Any]:
    case = make_case(lm, fields, mean)
    error = check(case)
    steps = contenders(case)
    if fields == 2:
        for name, model in (("peft_bnb", on_bitsandbytes(lm)), ("peft", lm.model)):
            if model is not None and (step := peft(case, model)):
                steps[name] = step
    if case.longest_text == case.behaviour.lengths.max():
        steps["public_longest"] = steps["public_batch"]  # the same padding: measured once
    distinct = dict(steps)
    if steps["public_longest"] is steps["public_batch"]:
        del distinct["public_longest"]
    memory = {}
    for name, step in list(distinct.items()):
        try:
            memory[name] = peak_mib(step, device)  # and a warm-up
        except torch.OutOfMemoryError:
            if name == "ours":
                raise
            print(f"{name} left out: more memory than the device has")
            del distinct[name], steps[name]
            torch.cuda.empty_cache()
    seconds = 10.0 if device == "cpu" else 3.0
    times = compare(distinct, device, seconds=seconds, rounds=7, at_least=rounds, warm_up=False)
    for found in (memory, times):
        if "public_longest" in steps and "public_batch" in found:
            found.setdefault("public_longest", found["public_batch"])
    table = TABLE * case.layout.num_soft * lm.hidden_size * 4 / 2**20
    held = {"public_as_is": 4 * table, "peft": 0.0, "peft_bnb": 0.0}  # with gradient and moments
    state = {name: round(held.get(name, table), 1) for name in steps}
    best = times["ours"]["best_ms"]
    print(f"\n{fields} fields, behaviour {case.behaviour.lengths.mean():.0f} tokens on average "
          f"(longest {case.behaviour.lengths.max()}, of the data set {case.longest_text}); "
          f"error {error:.1e}")  # fmt: skip
    print(f"{'':16}{'ms':>10}{'p50':>10}{'users/s':>10}{'ours is':>10}{'step MiB':>10}{'state':>9}")
    for name, t in times.items():
        print(f"{name:16}{t['best_ms']:10.1f}{t['median_ms']:10.1f}"
              f"{USERS / t['best_ms'] * 1e3:10.1f}{t['best_ms'] / best:9.2f}x"
              f"{memory[name]:10.1f}{state[name]:9.1f}")  # fmt: skip
    ratio = {name: round(t["best_ms"] / best, 3) for name, t in times.items()}
    causes = {"fused": ("split_fused", "ours"), "prefix": ("split_prefix", "split_fused"),
              "padding": ("split_padding", "split_prefix"),
              "logits": ("public_batch", "split_padding"),
              "padding_to_data_set": ("public_longest", "public_batch"),
              "optimiser": ("public_as_is", "public_longest")}  # fmt: skip
    split = {cause: round(ratio[with_it] / ratio[without], 3)
             for cause, (with_it, without) in causes.items()
             if with_it in ratio and without in ratio}  # fmt: skip
    print("split by cause, each on top of those before: "
          + ", ".join(f"{name} {x:.2f}x" for name, x in split.items()))  # fmt: skip
    return {
        "ratios": ratio,
        "times": times,
        "peak_mib": memory,
        "state_mib": state,
        "users_per_s": round(USERS / best * 1e3, 2),
        "tokens_per_s": round(int(case.pack.cu_seqlens[-1]) / best * 1e3, 1),
        "split": split,
        "error": error,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--case", choices=sorted(CASES), help="only this one")
    parser.add_argument("--rounds", type=int, help="timed steps of each, at least (3; CUDA 2)")
    arguments = parser.parse_args(argv)
    apply_arguments(arguments)
    lm = make_lm(arguments.device, arguments.quick)
    rounds = arguments.rounds or (2 if arguments.device == "cuda" else 3)
    cases = {
        name: measure(lm, *case, arguments.device, rounds)
        for name, case in CASES.items()
        if arguments.case in (None, name)
    }

    def ratio(case: str, other: str) -> float | None:
        return cases[case]["ratios"].get(other) if case in cases else None

    print(json.dumps({
        "benchmark": "em_step",
        "ratios": {
            "public_b100_j2": ratio("b100_j2", "public_batch"),
            "public_b50_j8": ratio("b50_j8", "public_batch"),
            "public_as_is": ratio("b100_j2", "public_as_is"),
            "peft": ratio("b100_j2", "peft"),
            "peft_bnb": ratio("b100_j2", "peft_bnb"),
        },
        "memory_mib": {
            name: {who: {"step": mib, "state": case["state_mib"][who]}
                   for who, mib in case["peak_mib"].items()}
            for name, case in cases.items()
        },
        "cases": cases,
        "ceilings": ceilings(arguments.device),
        "machine": machine(arguments.device),
    }))  # fmt: skip


@pytest.mark.parametrize("name", ["ours", "public_batch"])
def test_em_step(benchmark: Any, name: str) -> None:
    case = make_case(make_lm("cpu", quick=True), 2, 100)
    check(case)
    benchmark.pedantic(contenders(case)[name], rounds=2, warmup_rounds=1)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    run_script(main)
