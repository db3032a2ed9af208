"""Steps with a language model: the gradient E-step, bulk inference, and the peers of either."""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import _random_lm
import numpy as np
import torch
from _timing import compare
from bench_em_step import Case, layer_linears, make_case, peft
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from gpu_steps.record import Figures, Skipped, Wrong
from gpu_steps.setting import Setting
from userip_fast.codebook.books import Codebook
from userip_fast.core.config import EMConfig
from userip_fast.core.errors import UnavailableError, UnsupportedError
from userip_fast.em import Block, EMState, GradientEStep
from userip_fast.em.posterior import PosteriorEStep
from userip_fast.em.readings import Readings, log_likelihoods
from userip_fast.lm import FrozenLM, PackedEngine, ReferenceEngine
from userip_fast.lm.engines import make_engine
from userip_fast.lm.fp8 import quantize_rows, scaled_product
from userip_fast.lm.fp8_gate import MAX_NLL_SHIFT, Reading
from userip_fast.lm.fp8_gate import compare as compare_readings
from userip_fast.lm.fuse import unfuse
from userip_fast.lm.residency import set_recompute, settle
from userip_fast.prompts.packing import Behaviour, make_pack

FIELDS, KERNELS, EVENT_TOKENS = 2, 12, 8


def em_bf16(setting: Setting, figures: Figures) -> None:
    """The gradient E-step of a whole model, and where its time goes."""
    lm, case = _made(setting, "resident")
    engine = _engine(setting, lm, case)
    figures["error"] = _agree(setting, engine, case)
    _time_em(setting, engine, case, figures)
    figures["kernels_ms"] = kernels(_em_steps(engine, case, 1), setting)


def inference(setting: Setting, figures: Figures) -> None:
    """Forward passes; posteriors over two fields of codes; cells of an event table."""
    lm, case = _made(setting, "resident")
    engine = _engine(setting, lm, case)
    figures["error"] = _agree(setting, engine, case)
    rows = _users_rows(case)
    theta = torch.zeros(case.soft_shape, device=lm.device)

    def passes() -> None:
        with torch.no_grad():
            for _ in range(setting.passes):
                engine.nll(case.pack, theta)

    figures["kernels_ms"] = kernels(lambda: engine.nll(case.pack, theta), setting)
    figures["forward_tokens_per_s"] = round(setting.passes * rows / _seconds(passes, setting, 0))

    torch.manual_seed(0)
    dim = lm.hidden_size
    books = [Codebook(lm.embedding_rms * torch.randn(setting.codes, dim)) for _ in range(FIELDS)]
    config = EMConfig(pack_tokens=setting.rows)
    estep, found = PosteriorEStep(engine, config), []
    seconds = _seconds(lambda: found.append(estep.run(_block(case), books, EMState())), setting, 0)
    figures["posterior"] = {
        "users_per_s": round(case.num_users / seconds, 2),
        "passes_a_user": round(float(found[0].forward_equivalents.mean()), 1),
        "codes": setting.codes,
        "fields": FIELDS,
    }
    readings = Readings.of(_kinds(setting, case))
    soft = torch.stack(
        [torch.stack([a, b]) for a in books[0].codewords for b in books[1].codewords]
    ).to(lm.device)
    read: list[int] = []
    seconds = _seconds(
        lambda: log_likelihoods(engine, readings, soft, setting.rows, read.append), setting, 0
    )
    figures["event_table"] = {
        "cells_per_s": round(readings.num_kinds * len(soft) / seconds),
        "rows_per_s": round(sum(read) / seconds),
        "event_tokens": EVENT_TOKENS,
        "combinations": len(soft),
    }


def em_fp8(setting: Setting, figures: Figures) -> None:
    """As `em_bf16` in FP8: products against fp32, and what is read against unrounded weights."""
    if setting.device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        raise Skipped("this GPU has no FP8 tensor cores")
    figures["product_error"] = _products_agree(setting)
    lm, case = _made(setting, "resident")
    exact = _reading(_engine(setting, lm, case), case)
    settle(lm.model, "fp8", lm.dtype)
    engine = _engine(setting, lm, case)
    report = compare_readings(exact, _reading(engine, case))
    # Cosines of a model without training say little of one that has some, so they stop nothing.
    figures["against_bf16"] = {
        "nll_shift": round(report.nll_shift, 5), "cosine": round(report.cosine, 4),
        "passed": report.passed,
    }  # fmt: skip
    if not report.nll_shift <= MAX_NLL_SHIFT:
        raise Wrong(f"FP8 says something else than the unrounded weights: {report}")
    _time_em(setting, engine, case, figures)
    theta = torch.zeros(case.soft_shape, device=lm.device)
    with torch.no_grad():
        seconds = _seconds(lambda: engine.nll(case.pack, theta), setting)
    figures["forward_tokens_per_s"] = round(_users_rows(case) / seconds)
    figures["kernels_ms"] = kernels(_em_steps(engine, case, 1), setting)


def em_streamed(setting: Setting, figures: Figures) -> None:
    """As `em_bf16` with all layers in NF4, in a GPU cut to a few GB."""
    lm, case = _made(setting, "streamed")
    if setting.device == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, setting.memory_gb * 1e9 / total))
    figures["memory_gb"] = setting.memory_gb
    engine = _engine(setting, lm, case)
    figures["error"] = _agree(setting, engine, case)
    set_recompute(lm.model, True)  # the reference engine is not for that
    _time_em(setting, engine, case, figures)
    figures["kernels_ms"] = kernels(_em_steps(engine, case, 1), setting)


def em_small(setting: Setting, figures: Figures) -> None:
    """A small model, where launches bind: packs of both sizes, as it is and by a graph."""
    lm, large = _made(setting, "resident", setting.small_lm)
    small = make_case(lm, FIELDS, setting.mean_tokens, setting.few_rows)
    for rows, case in ((setting.few_rows, small), (setting.rows, large)):
        found = figures[f"rows_{rows}"] = {"users": case.num_users}
        engine = _engine(setting, lm, case)
        found["error"] = _agree(setting, engine, case)
        runs = {"packed": _em_steps(engine, case, setting.steps)}
        try:
            graph: Any = make_engine("graph", lm, case.layout)
            found["graph_error"] = _agree(setting, graph, case)
            runs["graph"] = _em_steps(graph, case, setting.steps)
        except (KeyError, UnavailableError, UnsupportedError) as e:
            found["graph"] = f"skipped: {e}"
        times = compare(runs, setting.device, seconds=setting.seconds)
        for name, t in times.items():
            found[f"{name}_ms"] = round(t["best_ms"] / setting.steps, 3)
        if "graph" in runs:
            found["graph_is_faster"] = round(found["packed_ms"] / found["graph_ms"], 2)


def em_peers(setting: Setting, figures: Figures) -> None:
    """PEFT prompt tuning of the same users, with and without checkpoints, Liger and bitsandbytes.

    One prompt for all users, padded to the longest; ours beside it in turns.
    """
    lm, case = _made(setting, "resident")
    engine = _engine(setting, lm, case)
    figures["error"] = _agree(setting, engine, case)
    figures["users"], figures["left_out"] = case.num_users, {}
    peers: dict[str, Callable[[], Any]] = {
        "peft": lambda: _plain(lm),
        "peft_checkpoints": lambda: _checkpointing(_plain(lm)),
        "peft_liger": lambda: _with_liger(_checkpointing(_plain(lm))),
        "peft_bnb": lambda: _bitsandbytes(lm),
        "peft_bnb_checkpoints": lambda: _checkpointing(_bitsandbytes(lm)),
    }
    code = sys.modules[type(lm.model).__module__]
    theirs = dict(vars(code))
    for name, make in peers.items():
        try:
            model = make()
            step = peft(case, model)
            if step is None:
                raise Skipped("PEFT is not installed")
            runs = {"ours": _em_steps(engine, case, 1), name: step}
            times = compare(runs, setting.device, seconds=0.0, at_least=2)
            figures[name] = {
                "ms": times[name]["best_ms"],
                "ours_ms": times["ours"]["best_ms"],
                "ours_is_faster": round(times[name]["best_ms"] / times["ours"]["best_ms"], 2),
            }
        except (Skipped, ImportError, torch.OutOfMemoryError) as e:
            figures["left_out"][name] = f"{type(e).__name__}: {str(e).splitlines()[0]}"[:200]
        model = step = runs = None
        vars(code).update(theirs)  # Liger puts its kernels into transformers' module
        if setting.device == "cuda":
            torch.cuda.empty_cache()


# ---- what they are made of


def _made(setting: Setting, residency: str, name: str = "") -> tuple[FrozenLM, Case]:
    """A random model and one pack of users."""
    config = _random_lm.shapes()[name or setting.lm]
    lm = _random_lm.random_lm(config, setting.device, setting.dtype, residency)
    return lm, make_case(lm, FIELDS, setting.mean_tokens, setting.rows)


def _engine(setting: Setting, lm: FrozenLM, case: Case) -> PackedEngine:
    return PackedEngine(lm, case.layout, whole=setting.impl)


def _users_rows(case: Case) -> int:
    """Rows of a pack that are somebody's."""
    return int(case.pack.cu_seqlens[-1])


def _block(case: Case) -> Block:
    return Block(case.behaviour, np.arange(case.num_users).astype(np.uint64))


def _em_steps(engine: Any, case: Case, steps: int) -> Callable[[], Any]:
    """The gradient E-step itself, so many steps of all users in one pack, nothing remembered."""
    config = EMConfig(steps=steps, patience=steps + 1, pack_tokens=case.pack.num_tokens)
    start = torch.zeros(case.soft_shape[1:])
    return lambda: GradientEStep(engine, start, config).run(_block(case), None, EMState())


def _seconds(run: Callable[[], Any], setting: Setting, warm_up: int = 1) -> float:
    """Wall-clock seconds of one call, of the host and the device."""
    for _ in range(warm_up):
        run()
    _wait(setting)
    begin = time.perf_counter()
    run()
    _wait(setting)
    return time.perf_counter() - begin


def _wait(setting: Setting) -> None:
    if setting.device == "cuda":
        torch.cuda.synchronize()


def _time_em(setting: Setting, engine: PackedEngine, case: Case, figures: Figures) -> None:
    """Tokens a second of EM steps, and the memory they take with the model."""
    _em_steps(engine, case, 1)()
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    steps = setting.steps
    seconds = _seconds(_em_steps(engine, case, steps), setting, warm_up=0)
    rows = _users_rows(case)
    figures |= {
        "users": case.num_users,
        "rows": rows,
        "step_ms": round(1e3 * seconds / steps, 2),
        "training_tokens_per_s": round(steps * rows / seconds),
        "whole_stack": engine.stack is not None,
    }
    if setting.device == "cuda":
        figures["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        figures["reserved_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)


def _agree(setting: Setting, engine: Any, case: Case) -> float:
    """Largest relative error of NLL and gradient of a few users against the reference engine.

    Raises:
        Wrong: It is larger than what rounding makes of them in so many layers.
    """
    users = np.arange(min(3, case.num_users))
    behaviour = case.behaviour.select(users)
    pack = make_pack(behaviour, users, case.layout, case.lm.device)
    torch.manual_seed(0)
    x = torch.randn(len(users), *case.soft_shape[1:], device=case.lm.device)
    found = [
        _nll_and_gradient(e, pack, x * case.lm.embedding_rms)
        for e in (engine, ReferenceEngine(engine.lm, case.layout))
    ]
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(*found))
    if not error <= setting.tolerance:  # NaN too
        raise Wrong(f"engine and reference engine are {error:.1e} apart")
    return float(f"{error:.2e}")


def _nll_and_gradient(engine: Any, pack: Any, theta: Tensor) -> tuple[Tensor, Tensor]:
    theta = theta.clone().requires_grad_()
    nll = engine.nll(pack, theta)
    (gradient,) = torch.autograd.grad(nll.sum(), theta)
    return nll.detach().float(), gradient.float()


def _reading(engine: PackedEngine, case: Case) -> Reading:
    torch.manual_seed(0)
    theta = torch.randn(case.soft_shape, device=case.lm.device) * case.lm.embedding_rms
    nll, gradient = _nll_and_gradient(engine, case.pack, theta)
    return Reading(nll, gradient.flatten(1))


def _products_agree(setting: Setting) -> float:
    """FP8 products of rounded operands against fp32 products of the same."""
    torch.manual_seed(0)
    rows, inner, out = 256, 512, 384
    a, b = (torch.randn(n, inner, device=setting.device, dtype=setting.dtype) for n in (rows, out))
    (x, x_scale), (w, w_scale) = quantize_rows(a), quantize_rows(b)
    want = (x.float() @ w.float().T) * x_scale[:, None] * w_scale
    errors = []
    for fast in (False, True):
        got = scaled_product(x, x_scale, w, w_scale, setting.dtype, fast=fast).float()
        errors.append(float((got - want).abs().max() / want.abs().max()))
    if not max(errors) < 1e-2:  # 14 bits in the sum, 8 in the result
        raise Wrong(f"FP8 products are {errors} off")
    return float(f"{max(errors):.1e}")


def kernels(run: Callable[[], Any], setting: Setting) -> dict[str, float]:
    """Milliseconds of the device by kernel (on a CPU by operator) in one call, the largest."""
    run()
    cuda = setting.device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
        run()
        _wait(setting)
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    times = {event.key[:80]: getattr(event, own) / 1e3 for event in found.key_averages()}
    largest = sorted(times, key=lambda name: -times[name])[:KERNELS]
    out = {name: round(times[name], 3) for name in largest}
    return {"all": round(math.fsum(times.values()), 3), **out}


def _kinds(setting: Setting, case: Case) -> Behaviour:
    """Kinds of event, each in the place of a user."""
    random = np.random.default_rng(0)
    count, tokens = setting.kinds, EVENT_TOKENS
    ids = random.integers(1, case.lm.token_embedding.shape[0], count * tokens).astype(np.int32)
    within = np.tile(np.arange(tokens), count)
    return Behaviour(
        ids,
        np.full(len(ids), FIELDS, np.int32),
        (case.layout.behaviour_start + within).astype(np.int32),
        (within > 0).astype(np.float32),
        np.arange(0, len(ids) + 1, tokens),
        np.ones(count, np.int64),
    )


def _plain(lm: FrozenLM) -> Any:
    """The model as transformers runs it, around the same weights."""
    weights = {id(x): x for x in (*lm.model.parameters(), *lm.model.buffers())}
    model = copy.deepcopy(lm.model, weights)
    unfuse(model)
    return model


def _checkpointing(model: Any) -> Any:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def _with_liger(model: Any) -> Any:
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(model=model)
    return model


def _bitsandbytes(lm: FrozenLM) -> Any:
    """The same model on bitsandbytes' 4-bit layers, with weights of their own."""
    from bitsandbytes.nn import Linear4bit

    model = _plain(lm)
    for parent, name, dense in layer_linears(model):
        n, k = dense.weight.shape
        narrow = Linear4bit(k, n, bias=False, compute_dtype=lm.dtype, quant_type="nf4",
                            device="meta")  # fmt: skip
        narrow.weight = _random_lm.random_nf4((n, k), lm.device, lm.dtype).to_bnb()
        narrow.support_avx512bf16_for_cpu = False  # would repack the weights in place
        setattr(parent, name, narrow)
    return model.to(lm.device).requires_grad_(False)
