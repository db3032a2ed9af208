"""Which instruction set each CPU op uses: the one that was the fastest here.

Whether 512-bit vectors pay depends on the processor (a Zen 4 takes two turns for one, a Zen 5 does
not) and on the op. So before the first call of an op each set is tried for some milliseconds, and
what was found is kept by processor and build in `instruction_sets.json` of the cache folder. All
sets of vectors give the same bits (`baseline`, for processors without any of them, only about the
same), so a choice that a busy machine got wrong costs time alone. Libraries of products do not.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from userip_fast._version import __version__
from userip_fast.core import _extension, measured
from userip_fast.core.errors import UserIPError

logger = logging.getLogger("userip_fast.ops")

VARIABLE = "USERIP_FAST_ISA"
SETS = ("baseline", "avx2", "avx512vl", "avx512")  # plainest first
PRODUCTS = "products"  # of dense fp32 matrices: no set but a library, see ops/_products.py

_QUESTION = "instruction_sets"
_GAIN = 0.95  # a wider set must take at most so much of the plainer one's time
_ROUNDS = 7


@cache
def settle() -> dict[str, str]:
    """Sets the instruction set of every op, once per process: {op: set}, empty without extension.

    Raises:
        UserIPError: `USERIP_FAST_ISA` names no instruction set of an op.
    """
    module: Any = _extension.load()
    if module is None or not hasattr(module, "instruction_sets"):
        return {}
    usable = choices(module)
    ask = forced(usable)
    chosen = (_kept(usable) or _measured_and_kept(module, usable)) | ask
    for op, name in chosen.items():
        if op != PRODUCTS:
            module.use_instruction_set(op, name)
    logger.info("instruction sets: %s", ", ".join(f"{op} {name}" for op, name in chosen.items()))
    return chosen


def choices(module: Any) -> dict[str, list[str]]:
    """{op: what it can use here, plainest first}; for products torch's two libraries."""
    sets = {op: list(sets) for op, sets in module.instruction_sets().items() if sets}
    return sets | {PRODUCTS: ["mkl"] if onednn() is None else ["mkl", "onednn"]}


def forced(usable: Mapping[str, list[str]]) -> dict[str, str]:
    """What the variable asks for: SET for every op (the next plainer one where an op lacks it), and
    OP=SET for one, separated by commas."""
    asked: dict[str, str] = {}
    for word in filter(None, os.environ.get(VARIABLE, "").split(",")):
        op, _, name = word.rpartition("=")
        if not op and name in SETS:
            at_most = SETS[: SETS.index(name) + 1]
            asked |= {op: next((s for s in reversed(at_most) if s in sets), sets[0])
                      for op, sets in usable.items() if op != PRODUCTS}  # fmt: skip
        elif name in usable.get(op, ()):
            asked[op] = name
        else:
            known = "; ".join(f"{op}: {' '.join(sets)}" for op, sets in usable.items())
            raise UserIPError(
                f"{VARIABLE} must be one of {', '.join(SETS)}, or OP=SET of what this machine has "
                f"({known}), separated by commas; is {word!r}"
            )
    return asked


@cache
def onednn() -> Any | None:
    """torch's own binding of oneDNN's linear layer, None where this build has none.

    It is not among torch's public functions, so it is tried before it is believed in.
    """
    library: Any = torch.backends.mkldnn
    if not (library.is_available() and library.enabled):
        return None
    linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    x = torch.tensor([[2.0, 3.0]])
    try:
        return None if linear is None or linear(x, x, None, "none", [], "").item() != 13 else linear
    except (RuntimeError, TypeError, ValueError):
        return None


def cpu_name() -> str:
    """The processor's model, as the system tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    fields = {k: re.search(rf"^{k}\s*: (.*)$", text, re.MULTILINE)
              for k in ("model name", "cpu family", "model", "stepping")}  # fmt: skip
    found = {k: m[1].strip() for k, m in fields.items() if m}
    name = found.pop("model name", platform.machine())
    return name + "".join(f", {k.removeprefix('cpu ')} {v}" for k, v in found.items())


def _key() -> str:
    file = Path(getattr(_extension.load(), "__file__", ""))
    size = file.stat().st_size if file.is_file() else 0
    build = f"userip_fast {__version__}, extension of {size} bytes, torch {torch.__version__}"
    return f"{cpu_name()}; {build}"


def _kept(usable: Mapping[str, list[str]]) -> dict[str, str]:
    """What was found for this processor and build, where it is still of use; else {}."""
    found = measured.kept(_QUESTION, _key())
    try:
        return {op: {s: s for s in sets}[found[op]] for op, sets in usable.items()}
    except (KeyError, TypeError):
        return {}


def _measured_and_kept(module: Any, usable: Mapping[str, list[str]]) -> dict[str, str]:
    chosen = {op: sets[-1] for op, sets in usable.items()}
    if all(len(sets) < 2 for sets in usable.values()):
        return chosen
    limit, threads = module.thread_limit(), torch.get_num_threads()
    module.set_thread_limit(1)
    torch.set_num_threads(1)
    try:
        chosen |= measure(module, usable)
    finally:
        module.set_thread_limit(limit)
        torch.set_num_threads(threads)
    measured.keep(_QUESTION, _key(), chosen)
    return chosen


def measure(module: Any, usable: Mapping[str, list[str]]) -> dict[str, str]:
    """{op: the fastest set}, each op's sets in turns, by this thread's processor time."""
    chosen = {}
    for op, call in _calls(module).items():
        if op not in usable:
            continue
        sets = [s for s in usable[op] if s != "baseline"] or usable[op]
        best = dict.fromkeys(sets, float("inf"))
        for turn in range(_ROUNDS + 1):  # the first brings code and data into caches
            for name in sets:
                if op != PRODUCTS:
                    module.use_instruction_set(op, name)
                begin = time.thread_time_ns()
                call(name)
                if turn:
                    best[name] = min(best[name], time.thread_time_ns() - begin)
        pick = sets[0]
        for name in sets[1:]:
            if best[name] <= _GAIN * best[pick]:
                pick = name
        chosen[op] = pick
    return chosen


def _calls(module: Any) -> dict[str, Callable[[str], object]]:
    """For each op a call of some 0.2 ms, with a set's name, on numbers that do not matter."""
    x = torch.linspace(-1, 1, 256 * 512).view(256, 512)
    y, out = x.clone(), torch.empty(256, 512)
    ids = torch.arange(256) % 64
    far = torch.empty(256)
    wide = torch.empty(256, dtype=torch.float64)
    half = torch.full((512 * 512 // 2,), 0x5A, dtype=torch.uint8)
    scales = torch.ones(512 * 512 // 64)
    dense = torch.empty(512 * 512)
    kinds = torch.arange(256 * 16) * 7 % 256
    bounds = torch.arange(0, 256 * 16 + 1, 16)
    prior = torch.zeros(64, dtype=torch.float64)
    at: Callable[[torch.Tensor], int] = torch.Tensor.data_ptr

    def assign_codes(_: str) -> None:
        module.assign_codes_cpu(
            isa="", x=at(x), type=0, rows=256, dim=512, stride_book=0, stride_row=512,
            stride_dim=1, codewords=at(y), sizes=[64], active=0, normalize=False,
            code_ids=at(ids), sq_distance=at(far), second_sq_distance=0, counts=0, sums=0,
        )  # fmt: skip

    def cross_entropy(_: str) -> None:
        y.copy_(x)
        module.cross_entropy_rows(at(y), 256, 512, 0, 0.0, at(kinds), at(far), at(far), True)

    def frozen_block(_: str) -> None:
        module.gated(at(x), at(x), at(out), x.numel(), 0)
        module.rms_norm(at(x), 0, at(x), at(out), 0, at(far), 256, 512, 1e-6, 0.0)

    def nf4(_: str) -> None:
        module.nf4_dequantize(
            [at(half), at(scales), 0, 0, 0], [512, 512, 64], 0, 512, 0, 512, at(dense), 0, True
        )

    def profile_posterior(_: str) -> None:
        module.profile_posterior(
            at(x), 256, 64, at(kinds), 0, len(kinds), at(bounds), 256, at(prior), at(out), at(wide)
        )

    linear: Any = onednn()

    def products(library: str) -> torch.Tensor:
        if library == "mkl":
            return torch.mm(x, y.t())
        result: torch.Tensor = linear(x, y, None, "none", [], "")
        return result

    return {
        PRODUCTS: products,
        "assign_codes": assign_codes,
        "cross_entropy": cross_entropy,
        "frozen_block": frozen_block,
        "nf4": nf4,
        "profile_posterior": profile_posterior,
    }
