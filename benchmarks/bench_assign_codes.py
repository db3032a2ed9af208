"""assign_codes against torch, FAISS, scikit-learn, vector-quantize-pytorch and flash-kmeans.

    python benchmarks/bench_assign_codes.py --device cpu|cuda [--threads N] [--clock cpu] [--quick]
        [--out RESULT.json] [--plot RESULT.png]
    pytest benchmarks/bench_assign_codes.py --benchmark-only

x [N, D] fp32 on CPU (bf16 on CUDA), one codebook [K, D]; x is 1 GB for K <= 16 (up to 8.6 GB on
CUDA). Correctness first: every contender's codeword is as near as ours within rounding, or there is
no number. In the last line, JSON, each figure is the worst over D and K of its group:

- `ratios`: the fastest peer's best time over ours. `fused_stats` (K <= 16) and `fused_stats_k64`:
  the fastest peer's assignment followed by index_add, or an iteration of flash-kmeans, over ours
  with statistics. `kmeans`: five rounds of Lloyd from the same start.
- `share`: the time that the binding ceiling (GEMM rate or read bandwidth) would need, over ours.
  The ceilings are measured beside the contenders, turn by turn, on the same threads: a square
  torch.mm, and torch's sum and amax of 256 MiB. Of GEMMs the best of all cases counts, so that load
  in one case cannot raise a share; our own GEMM can, where it beats torch's. Of reads the best of
  the same case counts, each next to our own turn: what a shared machine's memory gives moves by a
  factor of two in spells of ten seconds, for torch and us alike.
- `gates`: K <= 16: 3 times the fastest peer or 85 % of the ceiling; K = 64: 2 times or 85 %;
  K >= 1024: 0.95 times and 80 %; statistics: 2 times, at K = 64 or 85 % (the GEMM alone may leave
  less than 2 times to gain). Where `assign_codes` runs on 512-bit vectors besides `wide`: K = 64
  2.5 times the fastest peer, K >= 1024 1.8 times. None where other load made times meaningless.

All run on all rows; the slow ones (torch cdist, vector-quantize-pytorch; on CUDA statistics that
take over 0.2 s) once instead of in turns.
`peak_mib` on CPU is the rise of the process's resident memory in a call, outputs included (the
kernel's high-water mark, reset before; malloc's free blocks given back before).
"""

from __future__ import annotations

import argparse
import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _timing import (
    add_arguments,
    apply_arguments,
    compare,
    loaded,
    machine,
    peak_mib,
    run_script,
    time_ms,
)

from userip_fast import ops
from userip_fast.ops import isa

GROUPS = {"small_k": (4, 16), "k64": (64,), "large_k": (1024, 4096)}
DIMS = (256, 4096)
Run = Callable[[], Any]


def torch_matmul(x: torch.Tensor, c: torch.Tensor) -> Run:
    half = c.square().sum(1) / 2
    rows = (1 << 31) // len(c)  # scores of all rows at once would not fit on a GPU
    if not x.is_cuda or len(x) <= rows:
        return lambda: (x @ c.T - half).argmax(1)
    return lambda: torch.cat([(part @ c.T - half).argmax(1) for part in x.split(rows)])


def torch_cdist(x: torch.Tensor, c: torch.Tensor) -> Run:
    return lambda: torch.cdist(x, c).argmin(1)


def faiss_flat(x: torch.Tensor, c: torch.Tensor) -> Run:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(x.shape[1])
    index.add(c.numpy())
    return lambda: torch.from_numpy(index.search(x.numpy(), 1)[1][:, 0])


def scikit_learn(x: torch.Tensor, c: torch.Tensor) -> Run:
    from sklearn.metrics import pairwise_distances_argmin

    return lambda: torch.from_numpy(pairwise_distances_argmin(x.numpy(), c.numpy()))


def vector_quantize(x: torch.Tensor, c: torch.Tensor) -> Run:
    from vector_quantize_pytorch import VectorQuantize

    module = VectorQuantize(x.shape[1], len(c)).eval()
    with torch.no_grad():
        module._codebook.embed.copy_(c[None])
        module._codebook.initted.fill_(True)

    def run() -> torch.Tensor:
        with torch.no_grad():
            return module(x[None])[1][0]

    return run


def flash_kmeans(x: torch.Tensor, c: torch.Tensor) -> Run:
    """It is given |x|^2, which it computes once per clustering."""
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    sq_norm = x.float().square().sum(1)[None]
    return lambda: euclid_assign_triton(x[None], c[None], sq_norm)[0].long()


def flash_kmeans_iteration(x: torch.Tensor, c: torch.Tensor) -> Run:
    from flash_kmeans.centroid_update_triton import triton_centroid_update_sorted_euclid as update

    assign = flash_kmeans(x, c)
    return lambda: update(x[None], assign()[None], c[None])


PEERS: dict[str, Callable[[torch.Tensor, torch.Tensor], Run]] = {
    "torch matmul": torch_matmul,
    "torch cdist": torch_cdist,
    "faiss": faiss_flat,
    "scikit-learn": scikit_learn,
    "vector-quantize-pytorch": vector_quantize,
    "flash-kmeans": flash_kmeans,
}
CUDA_PEERS = ("torch matmul", "flash-kmeans")
CPU_PEERS = tuple(name for name in PEERS if name != "flash-kmeans")
SLOW = {"torch cdist", "vector-quantize-pytorch"}


def peers(x: torch.Tensor, c: torch.Tensor) -> dict[str, Run]:
    """The peers that are installed and can take this case."""
    out = {}
    for name in CUDA_PEERS if x.is_cuda else CPU_PEERS:
        try:
            out[name] = PEERS[name](x, c)
        except ImportError as e:
            print(f"{name} left out: {e}")
    return out


def check(x: torch.Tensor, c: torch.Tensor, name: str, ids: Any) -> None:
    """On the first and last rows no codeword of `name` may be farther than rounding allows."""
    rows = torch.cat([torch.arange(min(512, len(x))), torch.arange(max(0, len(x) - 512), len(x))])
    rows = rows.to(x.device)
    xs, words = x[rows].double(), c.double()
    best = torch.cdist(xs, words).square().min(1).values
    band = 8 * torch.finfo(x.dtype).eps * (xs.norm(dim=1) + words.norm(dim=1).max()).square()
    got = (xs - words[(ids[0] if isinstance(ids, tuple) else ids)[rows]]).square().sum(1)
    if not bool((got <= best + band).all()):
        raise SystemExit(f"{name} is wrong at K={len(c)} D={x.shape[1]}: no numbers")


def first_call(run: Run, device: str) -> tuple[Any, float, float]:
    """What it returns, its milliseconds, and peak memory in MiB with buffers of C++ libraries."""
    if device == "cuda":
        return run(), time_ms(run, device), peak_mib(run, device)

    def status(key: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1])
        raise SystemExit(f"/proc/self/status has no {key}")

    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    out = []
    ms = time_ms(lambda: out.append(run()), device)
    return out[0], ms, round((status("VmHWM") - before) / 1024, 1)


def ceilings(device: str) -> dict[str, tuple[Run, float]]:
    """Name -> what to run, and its GFLOP or GB."""
    cuda = device == "cuda"
    n = 8192 if cuda else 1536
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if cuda else torch.float32)
    source = torch.randn((1 << 30 if cuda else 1 << 28) // 4, device=device)  # far beyond caches
    return {
        "sgemm": (lambda: a @ a, 2e-9 * n**3),
        "read, sum": (source.sum, source.nbytes / 1e9),
        "read, amax": (source.amax, source.nbytes / 1e9),
    }


def measure(
    n: int, k: int, dim: int, device: str, limits: dict[str, tuple[Run, float]], seconds: float
) -> dict[str, Any]:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x = torch.randn(min(n, 4096), dim, device=device).to(dtype).repeat(-(-n // 4096), 1)[:n]
    c = torch.randn(k, dim, device=device).to(dtype)
    others = peers(x, c)
    runs: dict[str, Run] = {"ours": lambda: ops.assign_codes(x, c), **others}
    memory, times = {}, {}
    for name, run in runs.items():
        ids, ms, memory[name] = first_call(run, device)
        check(x, c, name, ids)
        if name in SLOW:
            times[name] = {"best_ms": round(ms, 4)}
    runs["ours, stats"] = lambda: ops.assign_codes_with_stats(x, c)
    ids = ops.assign_codes(x, c)[0]
    sums = torch.zeros(k, dim, device=device)

    def index_add() -> None:
        torch.bincount(ids, minlength=k)
        sums.index_add_(0, ids, x.float())

    runs["index_add"] = index_add
    if "flash-kmeans" in others:
        runs["flash-kmeans iteration"] = flash_kmeans_iteration(x, c)
    for name in ("index_add", "flash-kmeans iteration"):
        if device == "cuda" and name in runs:
            runs[name]()  # compiles
            if (ms := time_ms(runs[name], device)) > 200:
                times[name] = {"best_ms": round(ms, 4)}
    for name in times:  # measured already
        del runs[name]
    runs = {
        "ours": runs.pop("ours"),
        **{name: run for name, (run, _) in limits.items()},
        **runs,
    }
    # Where memory binds, a neighbour on it is felt most, and least often in the best of many turns.
    turns = 10 if device == "cpu" and k <= 64 and x.nbytes > 2**29 else 3
    times |= compare(runs, device, seconds=seconds, at_least=turns, warm_up=device == "cuda")
    rate = {name: 1e3 * work / times.pop(name)["best_ms"] for name, (_, work) in limits.items()}
    read = max(rate["read, sum"], rate["read, amax"])
    flops, nbytes = 2.0 * n * k * dim, x.nbytes + c.nbytes
    ours, with_stats = times["ours"]["best_ms"], times["ours, stats"]["best_ms"]
    fastest = min(times[name]["best_ms"] for name in others)
    updates = [fastest + times["index_add"]["best_ms"]]
    if "flash-kmeans iteration" in times:
        updates.append(times["flash-kmeans iteration"]["best_ms"])
    row = {
        "n": n,
        "k": k,
        "dim": dim,
        "ratio": round(fastest / ours, 3),
        "gflop": flops / 1e9,
        "gbyte": nbytes / 1e9,
        "fused_stats": round(min(updates) / with_stats, 3),
        "sgemm_gflops": round(rate["sgemm"], 1),
        "read_gb_per_s": round(read, 2),
        "peak_mib": memory,
        "times": times,
    }
    print(
        f"N={n} K={k} D={dim}: {row['ratio']}x the fastest peer, with statistics "
        f"{row['fused_stats']}x; beside it {row['sgemm_gflops']} GFLOP/s, {read:.2f} GB/s read"
    )
    for name, t in times.items():
        print(
            f"    {name}: best {t['best_ms']} ms, {flops / t['best_ms'] / 1e6:.1f} GFLOP/s, "
            f"{nbytes / t['best_ms'] / 1e6:.2f} GB/s"
            + (f", peak {memory[name]} MiB" if name in memory else ""),
            flush=True,
        )
    return row


def add_shares(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Each row's `share`, `stats_share` and `binds`; returns the ceilings."""
    best = {key: max(r[key] for r in rows) for key in ("sgemm_gflops", "read_gb_per_s")}
    for r in rows:
        compute = 1e3 * r["gflop"] / best["sgemm_gflops"]
        floor = max(compute, 1e3 * r["gbyte"] / r["read_gb_per_s"])
        r["binds"] = "sgemm" if compute == floor else "read"
        r["share"] = round(floor / r["times"]["ours"]["best_ms"], 3)
        r["stats_share"] = round(floor / r["times"]["ours, stats"]["best_ms"], 3)
        print(
            f"K={r['k']} D={r['dim']}: share {r['share']} of {r['binds']}, with statistics "
            f"{r['stats_share']}"
        )
    return best


def kmeans(k: int, dim: int, n: int) -> dict[str, Any]:
    """Five rounds of Lloyd on CPU from the same start."""
    torch.manual_seed(0)
    x, start, rounds = torch.randn(n, dim), torch.randn(k, dim), 5

    def ours() -> torch.Tensor:
        c = start.clone()
        for _ in range(rounds):
            _, _, counts, sums = ops.assign_codes_with_stats(x, c)
            used = counts > 0
            c[used] = sums[used] / counts[used, None]
        return c

    def plain_torch() -> torch.Tensor:
        c = start.clone()
        for _ in range(rounds):
            ids = torch_matmul(x, c)()
            counts = torch.bincount(ids, minlength=k)
            sums = torch.zeros(k, dim).index_add_(0, ids, x)
            used = counts > 0
            c[used] = sums[used] / counts[used, None]
        return c

    runs: dict[str, Run] = {"ours": ours, "torch": plain_torch}
    try:
        import faiss

        def by_faiss() -> torch.Tensor:
            book = faiss.Kmeans(dim, k, niter=rounds, max_points_per_centroid=n, seed=1)
            book.train(x.numpy(), init_centroids=start.numpy())
            return torch.from_numpy(book.centroids)

        runs["faiss"] = by_faiss
    except ImportError as e:
        print(f"faiss k-means left out: {e}")
    try:
        from sklearn.cluster import KMeans

        def by_sklearn() -> torch.Tensor:
            book = KMeans(k, init=start.numpy(), n_init=1, max_iter=rounds, tol=0.0)
            return torch.from_numpy(book.fit(x.numpy()).cluster_centers_)

        runs["scikit-learn"] = by_sklearn
    except ImportError as e:
        print(f"scikit-learn k-means left out: {e}")
    want = float(ops.assign_codes(x, ours())[1].mean())
    for name, run in runs.items():
        got = float(ops.assign_codes(x, run())[1].mean())
        if abs(got - want) > 1e-3 * want:
            raise SystemExit(f"k-means of {name} is wrong: mean distance {got}, ours {want}")
    times = compare(runs, "cpu", seconds=2.0)
    fastest = min(t["best_ms"] for name, t in times.items() if name != "ours")
    row = {"n": n, "k": k, "dim": dim, "ratio": round(fastest / times["ours"]["best_ms"], 3)}
    print(f"k-means {row}: " + ", ".join(f"{m} {t['best_ms']} ms" for m, t in times.items()))
    return {**row, "times": times}


def scaling(limit: int) -> dict[str, float]:
    """Time on one thread over time on n, at K = 4, 16, 64 and 1024, D = 256."""
    out = {}
    for k, n in ((4, 200_000), (16, 200_000), (64, 100_000), (1024, 20_000)):
        x, c = torch.randn(n, 256), torch.randn(k, 256)
        best = {}
        for threads in (1, limit):
            torch.set_num_threads(threads)
            timed = compare({"ours": lambda x=x, c=c: ops.assign_codes(x, c)}, "cpu", seconds=1.0)
            best[threads] = timed["ours"]["best_ms"]
        out[f"k{k}"] = round(best[1] / best[limit], 2)
    print(f"{limit} threads are so many times as fast as one: {out}")
    return out


def gates(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """Which of the promises in this file's docstring hold."""
    small, k64, large = (
        [r for r in rows if r["k"] in GROUPS[name]] for name in ("small_k", "k64", "large_k")
    )
    return {
        "small_k": all(r["ratio"] >= 3 or r["share"] >= 0.85 for r in small),
        "k64": all(r["ratio"] >= 2 or r["share"] >= 0.85 for r in k64),
        "large_k": all(r["ratio"] >= 0.95 and r["share"] >= 0.80 for r in large),
        "fused_stats": all(r["fused_stats"] >= 2 for r in small),
        "fused_stats_k64": all(r["fused_stats"] >= 2 or r["stats_share"] >= 0.85 for r in k64),
        **(
            {"wide": all(r["ratio"] >= 2.5 for r in k64) and all(r["ratio"] >= 1.8 for r in large)}
            if isa.settle().get("assign_codes") == "avx512"
            else {}
        ),
    }


def run(device: str, quick: bool) -> dict[str, Any]:
    limits = ceilings(device)
    rows = []
    for ks in GROUPS.values():
        for k in ks:
            for dim in DIMS:
                # 1 GB of x where bandwidth may bind, else 25 GFLOP and rows that pay for packing
                n = (1 << 28) // dim if k <= 16 else max(3072, int(2.5e10 / (2 * k * dim)))
                if device == "cuda":
                    n = min((1 << 32) // dim, int(2e13 / (2 * k * dim)))
                seconds = 0.5 if device == "cuda" else 5.0
                n, seconds = (min(n, 1000), 0.2) if quick else (n, seconds)
                rows.append(measure(n, k, dim, device, limits, seconds))
                if device == "cuda":
                    torch.cuda.empty_cache()
    limits_found = add_shares(rows)
    clusterings = []
    if device == "cpu":
        for k, dim, n in ((16, 256, 50_000), (64, 256, 50_000), (16, 4096, 4_000)):
            clusterings.append(kmeans(k, dim, min(n, 10_000) if quick else n))
    group = {name: [r for r in rows if r["k"] in ks] for name, ks in GROUPS.items()}
    threads = torch.get_num_threads()
    return {
        "benchmark": "assign_codes",
        "ratios": {
            **{name: min(r["ratio"] for r in part) for name, part in group.items()},
            "fused_stats": min(r["fused_stats"] for r in group["small_k"]),
            "fused_stats_k64": min(r["fused_stats"] for r in group["k64"]),
            **({"kmeans": min(r["ratio"] for r in clusterings)} if clusterings else {}),
        },
        "share": {name: min(r["share"] for r in part) for name, part in group.items()},
        "gates": None if loaded() else gates(rows),
        "ceilings": limits_found,
        "scaling": scaling(threads) if device == "cpu" and threads > 1 else None,
        "results": rows,
        "kmeans": clusterings,
        **machine(device),
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Speed of every contender in GFLOP/s, case by case, under what the ceilings allow."""
    from matplotlib.figure import Figure

    rows = result["results"]
    names = ["ours", *(name for name in PEERS if name in rows[0]["times"])]
    axes = (figure := Figure(figsize=(11, 4.5), layout="constrained")).subplots()
    for i, name in enumerate(names):
        speed = [2e-6 * r["n"] * r["k"] * r["dim"] / r["times"][name]["best_ms"] for r in rows]
        at = [r + 0.8 * (i - (len(names) - 1) / 2) / len(names) for r in range(len(rows))]
        axes.bar(at, speed, 0.8 / len(names), label=name)
    for i, r in enumerate(rows):
        ours = 2e-6 * r["n"] * r["k"] * r["dim"] / r["times"]["ours"]["best_ms"]
        label = "ceiling (GEMM or read bandwidth)" if i == 0 else None
        axes.hlines(ours / r["share"], i - 0.45, i + 0.45, colors="black", label=label)
    axes.set_xticks(range(len(rows)), [f"K={r['k']}\nD={r['dim']}" for r in rows])
    axes.set_ylabel("GFLOP/s of 2 N K D")
    axes.set_ylim(top=1.35 * axes.get_ylim()[1])
    axes.set_title(f"{result['device']}, {result['threads']} thread(s), {result['clock']} clock")
    axes.legend(loc="upper left", ncols=2)
    figure.savefig(path, dpi=120)


@pytest.mark.parametrize("k", [16, 256])
def test_assign_codes(benchmark: Any, k: int) -> None:
    x, c = torch.randn(4096, 256), torch.randn(k, 256)
    benchmark(lambda: ops.assign_codes(x, c))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--out", type=Path, help="write the last line there too")
    parser.add_argument("--plot", type=Path, help="draw it (PNG, SVG; needs matplotlib)")
    args = parser.parse_args()
    apply_arguments(args)
    result = run(args.device, args.quick)
    if args.out:
        args.out.write_text(json.dumps(result, indent=4) + "\n", encoding="utf-8")
    if args.plot:
        plot(result, args.plot)
    print(json.dumps(result))


if __name__ == "__main__":
    run_script(main)
