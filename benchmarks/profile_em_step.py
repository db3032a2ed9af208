"""Where an EM step's time goes: the reference engine and the packed engine side by side.

    python benchmarks/profile_em_step.py [--device cuda] [--case b100_j2|b50_j8] [--out DIR]
    nsys profile -t cuda,nvtx python benchmarks/profile_em_step.py --device cuda

The case of `bench_em_step.py`. Both engines run one gradient step on the same pack under
torch.profiler; stages are marked by hooks on the unmodified model, forward and backward, also as
NVTX ranges on CUDA. Printed: milliseconds by stage and by operator (self time: of the device on
CUDA, else of the CPU). Written to DIR (`runs/profile`): a Chrome trace per engine and
`profile.json`, which is also the last line.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from _timing import add_arguments, apply_arguments, machine, run_script
from bench_em_step import CASES, Case, Rows, make_case, make_lm
from torch.profiler import ProfilerActivity, profile, record_function

from userip_fast.lm import PackedEngine, ReferenceEngine
from userip_fast.lm.engine import Engine

TOP = 12  # operators printed


@contextmanager
def stage(name: str, cuda: bool) -> Iterator[None]:
    """A range in torch.profiler, and in NVTX on CUDA."""
    if cuda:
        torch.cuda.nvtx.range_push(name)
    try:
        with record_function(f"stage {name}"):
            yield
    finally:
        if cuda:
            torch.cuda.nvtx.range_pop()


class Stages:
    """Marks a model's parts as stages through hooks; `remove` takes them away again.

    A part's backward pass begins when its output's gradient is known and ends with its input's.
    """

    def __init__(self, model: Any, cuda: bool) -> None:
        self.cuda = cuda
        self.open: list[tuple[str, Any]] = []
        self.handles: list[Any] = []
        for name, module in model.base_model.named_modules():
            kind = self._kind(name.rsplit(".", 1)[-1], module)
            # Not the parts of parts: a norm inside attention belongs to attention.
            if kind and not any(self._kind(part, None) for part in name.split(".")[:-1]):
                self.handles += [
                    module.register_forward_pre_hook(self._before(kind), with_kwargs=True),
                    module.register_forward_hook(self._after(kind), always_call=True),
                ]

    @staticmethod
    def _kind(name: str, module: Any) -> str | None:
        if name in ("self_attn", "attn"):
            return "attention block"
        if name == "mlp":
            return "mlp"
        return "norms" if "norm" in type(module).__name__.lower() else None

    def _before(self, kind: str) -> Callable[..., Any]:
        def hook(_module: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
            x = args[0] if args else kwargs["hidden_states"]
            x = x.view_as(x)  # a tensor of its own, so that its gradient is this part's alone
            if x.requires_grad:
                x.register_hook(lambda _: self._leave(f"backward: {kind}"))
            self._enter(f"forward: {kind}")
            return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

        return hook

    def _after(self, kind: str) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, out: Any) -> None:
            self._leave(f"forward: {kind}")
            y = out[0] if isinstance(out, tuple) else out
            if y is not None and y.requires_grad:
                y.register_hook(lambda _: self._enter(f"backward: {kind}"))

        return hook

    def _enter(self, name: str) -> None:
        self.open.append((name, stage(name, self.cuda)))
        self.open[-1][1].__enter__()

    def _leave(self, name: str) -> None:
        if self.open and self.open[-1][0] == name:
            self.open.pop()[1].__exit__(None, None, None)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def gradient_step(engine: Engine, case: Case) -> Callable[[], None]:
    """One step of all users of the case's pack, in stages."""
    rows, cuda = Rows(case), case.lm.device.type == "cuda"

    def step() -> None:
        x = rows.read(case)
        with stage("forward", cuda):
            loss = engine.nll(case.pack, x).sum()
        with stage("backward", cuda):
            (grad,) = torch.autograd.grad(loss, x)
        with stage("optimiser", cuda):
            rows.update(case, x, grad)

    return step


def profiled(engine: Engine, case: Case, trace: Path) -> dict[str, Any]:
    """Stages and operators of one step in milliseconds, after a warm-up, and a Chrome trace."""
    cuda = case.lm.device.type == "cuda"
    step = gradient_step(engine, case)
    step()
    stages = Stages(case.lm.model, cuda)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities, profile_memory=True) as found:
        step()
        if cuda:
            torch.cuda.synchronize()
    stages.remove()
    found.export_chrome_trace(str(trace))
    total, own = ("device_time_total", "self_device_time_total") if cuda else (
        "cpu_time_total", "self_cpu_time_total")  # fmt: skip
    by_stage: dict[str, float] = {}
    by_operator: dict[str, float] = defaultdict(float)
    for event in found.key_averages():
        if event.key.startswith("stage "):
            by_stage[event.key[6:]] = getattr(event, total) / 1e3
        else:
            # Kernels and operators; autograd's wrappers only repeat them.
            by_operator[re.sub(r"<.*", "", event.key)] += getattr(event, own) / 1e3
    for way in ("forward", "backward"):
        parts = sum(ms for name, ms in by_stage.items() if name.startswith(f"{way}: "))
        by_stage[f"{way}: input, head, loss"] = by_stage.pop(way) - parts
    return {"stages": by_stage, "operators": dict(by_operator), "ms": sum(by_stage.values())}


def print_table(title: str, both: dict[str, dict[str, float]], names: list[str]) -> None:
    print(f"\n{title:44}{'reference':>12}{'packed':>12}{'ratio':>8}")
    for name in names:
        a, b = (both[engine].get(name, 0.0) for engine in ("reference", "packed"))
        print(f"{name[:43]:44}{a:12.2f}{b:12.2f}" + (f"{a / b:7.2f}x" if b else ""))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--case", choices=sorted(CASES), default="b100_j2")
    parser.add_argument("--out", type=Path, default=Path("runs/profile"))
    arguments = parser.parse_args(argv)
    apply_arguments(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    case = make_case(make_lm(arguments.device, arguments.quick), *CASES[arguments.case])
    found = {}
    for name, kind in (("reference", ReferenceEngine), ("packed", PackedEngine)):
        engine: Any = kind(case.lm, case.layout)
        found[name] = profiled(engine, case, arguments.out / f"{name}.json")
    total = {name: {"whole step": f["ms"]} for name, f in found.items()}
    print_table(f"{arguments.case}, milliseconds", total, ["whole step"])
    for what in ("stages", "operators"):
        both = {name: f[what] for name, f in found.items()}
        worst = {n: max(f.get(n, 0.0) for f in both.values()) for f in both.values() for n in f}
        names = sorted(worst, key=lambda n: -worst[n])
        print_table(f"by {what[:-1]}", both, names if what == "stages" else names[:TOP])
    report = {"benchmark": "profile_em_step", "case": arguments.case, **found,
              "machine": machine(arguments.device)}  # fmt: skip
    (arguments.out / "profile.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"\nChrome traces: {arguments.out}/reference.json, {arguments.out}/packed.json")
    print(json.dumps(report))


if __name__ == "__main__":
    run_script(main)
