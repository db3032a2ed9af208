"""What a GPU gives, headlines first, within ten minutes: one command, offline.

    python benchmarks/gpu_check.py --plan                    # steps, seconds, what travels
    python benchmarks/gpu_check.py [--minutes 10] [--only em_bf16 ...] [--wheels FOLDER]
    python benchmarks/gpu_check.py --stand-in                # the same code, tiny, on a CPU

Needs torch with CUDA and Triton, transformers, and no C++ build. Steps run in one process in the
order of STEPS, each within its seconds. As soon as one ends, whatever its end, a JSON line with
device, versions, seconds and figures is on disk, in $OUT or benchmarks/results/<device>/; so the
run may be killed at any moment. What is timed was compared with something simpler before. Peers
that are not installed are left out and named; wheels of `--wheels` are unpacked beside the run.
Exit code: 0 where every step ended well or cannot run here, 143 after SIGTERM, else 1.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu_steps import lm, ops, record
from gpu_steps.record import Step
from gpu_steps.setting import REAL, STAND_IN, Setting

STEPS = (
    Step("ceilings", 20, "GEMM, read, copy; FP8 products, fast and slow sums", ops.ceilings),
    Step("em_bf16", 60, "whole 7B, B = 300, T = 8192: EM steps, by kernel", lm.em_bf16),
    Step("inference", 60, "the same: forward, posteriors, event table", lm.inference),
    Step("em_fp8", 45, "the same in FP8", lm.em_fp8),
    Step("em_streamed", 40, "the same in streamed NF4, in 12 GB", lm.em_streamed),
    Step("em_peers", 85, "PEFT of the same users, plain and with checkpoints, Liger, bitsandbytes",
         lm.em_peers, ("peft", "accelerate", "bitsandbytes", "liger-kernel")),
    Step("attention", 70, "three real shapes: torch varlen, FlexAttention, flash-attn",
         ops.attention, ("flash-attn",)),
    Step("em_small", 30, "a 0.5B model, small and large packs, as it is and by a graph",
         lm.em_small),
    Step("tests", 60, "few codes, the engine, graphs", record.gpu_tests([
        "tests/ops/test_assign_codes_triton.py", "tests/lm/test_engine_gpu.py",
        "tests/lm/test_graphs.py"])),
    Step("assign_codes", 50, "K = 16 and 64, D = 256 and 4096", ops.assign_codes,
         ("flash-kmeans",)),
    Step("profile_posterior", 20, "two million users, against read bandwidth",
         ops.profile_posterior),
)  # fmt: skip


def plan(minutes: float, wheels: Path | None) -> str:
    """Steps with their seconds, and what has to be brought to a machine without a network."""
    lines = ["| s | step | what | peers |", "|---|---|---|---|"]
    for step in STEPS:
        lines.append(
            f"| {step.budget_s} | {step.name} | {step.what} | {', '.join(step.needs) or '-'} |"
        )
    total = sum(step.budget_s for step in STEPS)
    lines += [f"\n{total} s at most, cut at {minutes:g} minutes.", "\nWhat travels:"]
    names = subprocess.run(
        ["git", "-C", str(record.ROOT), "ls-files", "-z"], capture_output=True, check=False
    )
    files = [record.ROOT / name for name in names.stdout.decode().split("\0") if name]
    size = sum(f.stat().st_size for f in files if f.is_file())
    lines.append(f"- this checkout, {size / 2**20:.1f} MiB in {len(files)} files; no build")
    for wheel in sorted(wheels.glob("*.whl")) if wheels else []:
        lines.append(f"- {wheel.name}, {wheel.stat().st_size / 2**20:.1f} MiB")
    for name in sorted({name for step in STEPS for name in step.needs}):
        try:
            lines.append(f"- {name}: {metadata.version(name)} is installed here")
        except metadata.PackageNotFoundError:
            lines.append(f"- {name}: not installed here; as a wheel in --wheels")
    return "\n".join(lines)


def unpack(wheels: Path, into: Path) -> None:
    """Makes the wheels' packages importable, without installing them."""
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as file:
            file.extractall(into)


def settled(setting: Setting, only: list[str], minutes: float, folder: str | None) -> Path:
    """Runs the steps; where the record is."""
    out = Path(folder or os.environ.get("OUT") or record.folder(setting.device))
    out.mkdir(parents=True, exist_ok=True)
    out = out / f"gpu_check-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.jsonl"
    steps = [step for step in STEPS if not only or step.name in only]

    def worker(names: list[str], until: float) -> list[str]:
        this = [sys.executable, str(Path(__file__).resolve()), "--out", str(out)]
        stand_in = ["--stand-in"] if setting is STAND_IN else []
        return [*this, *stand_in, "--work-until", repr(until), "--only", *names]

    record.supervise(steps, out, 60 * minutes - 15, worker)  # the start of all, and a last line
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--plan", action="store_true", help="print what would be run")
    parser.add_argument("--minutes", type=float, default=10.0, help="limit of all steps together")
    parser.add_argument("--only", nargs="+", choices=[s.name for s in STEPS], default=[])
    parser.add_argument("--wheels", type=Path, help="folder of wheels that peers come from")
    parser.add_argument("--stand-in", action="store_true", help="tiny sizes, on a CPU")
    parser.add_argument("--out", help="folder of the record")
    parser.add_argument("--work-until", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    setting = STAND_IN if args.stand_in else REAL
    if args.plan:
        print(plan(args.minutes, args.wheels))
        return 0
    if args.work_until:
        steps = [step for step in STEPS if step.name in args.only]
        return record.work(steps, setting, Path(args.out), args.work_until)

    import torch

    if setting is REAL and not torch.cuda.is_available():
        print("torch sees no CUDA device; --stand-in tries the same code on a CPU")
        return 1
    os.environ.pop("TRITON_INTERPRET", None)  # it makes triton.compile fail
    with tempfile.TemporaryDirectory() as brought:
        if args.wheels:
            unpack(args.wheels, Path(brought))
        path = [brought, str(record.ROOT), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        out = settled(setting, args.only, args.minutes, args.out)
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    bad = [x["step"] for x in lines if x["status"] not in ("ok", "skipped")]
    print(f"gpu-check {'FAILED: ' + ', '.join(bad) if bad else 'passed'}; {out}")
    if any(x["status"] == "stopped" for x in lines):
        return 128 + signal.SIGTERM
    return 1 if bad or not lines else 0


if __name__ == "__main__":
    sys.exit(main())
