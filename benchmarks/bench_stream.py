"""Streaming: peak memory over 10,000 to 1,000,000 users, users a second, and who waits for whom.

    python benchmarks/bench_stream.py [--users 10000 100000 1000000] [--quick]

A log of synthetic users (2 events each) is written as Parquet; a tiny random Llama and a model
fitted on a thousand users infer everybody's codes into a bank, each run in a process of its own:
`stream` (sorted on disk, then read a block at a time) over all sizes, `memory` over the largest but
one. First the two must give the same bank, else there is no number. `peak_rss_mib` is the process's
peak (`VmHWM`; `ru_maxrss` would begin at its parent's). `peak_anonymous_mib` is that of its own
pages and `peak_mapped_mib` that of files mapped by it (libraries, weights), which the kernel may
take back, both looked at 50 times a second. `wait_share` is the time the model waited for its
input. The last line is JSON; `ratios.users_per_s` is stream over memory, `ratios.peak_rss` the
largest stream's peak over the smallest's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from _timing import machine

import userip_fast as uf
from userip_fast.core.config import Config, DataConfig, EMConfig, LMConfig
from userip_fast.core.keys import mix64

EVENTS, ITEMS = 2, 500
FIELDS = (
    uf.ProfileField("taste", "likes", codebook_size=8),
    uf.ProfileField("habit", "is", codebook_size=4),
)


def write_log(path: Path, users: int) -> None:
    """Users in batches of 100,000, their rows spread over the whole file."""
    path.mkdir(parents=True)
    for part, start in enumerate(range(0, users, 100_000)):
        n = min(100_000, users - start)
        user = mix64(np.arange(start, start + n, dtype=np.uint64)).view(np.int64)
        rng = np.random.default_rng(part)
        rows = rng.permutation(np.repeat(user, EVENTS))
        table = {
            "user_id": rows,
            "item_id": rng.integers(0, ITEMS, len(rows)),
            "rating": rng.integers(1, 6, len(rows)).astype(np.float32),
            "time": rng.integers(0, 10**9, len(rows)),
        }
        pq.write_table(pa.table(table), path / f"{part:04d}.parquet")


def write_lm(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    texts = [f"; item {i}: {word}" for i in range(ITEMS) for word in ("liked", "okay", "disliked")]
    bpe.train_from_iterator([*texts, "likes", "is"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def prepare(folder: Path) -> None:
    """LM, items, and a model fitted on a thousand users."""
    write_lm(folder / "lm")
    items = pa.table({"item_id": range(ITEMS), "title": [f"item {i}" for i in range(ITEMS)]})
    pq.write_table(items, folder / "items.parquet")
    write_log(folder / "fit", 1000)
    config = Config(
        data=DataConfig(rating="rating", time="time", max_tokens=64),
        lm=LMConfig(path=str(folder / "lm"), quantization="none", device="cpu"),
        em=EMConfig(estep="gradient", rounds=1, steps=1),
        fields=FIELDS,
    )
    data = uf.read_interactions(
        folder / "fit", folder / "items.parquet", rating="rating", time="time"
    )
    uf.fit(data, config=config, out=folder / "run")


class Memory(threading.Thread):
    """Looks at this process's memory."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = {"RssAnon": 0, "RssFile": 0, "VmHWM": 0}
        self.start()

    def run(self) -> None:
        while True:
            self.look()
            time.sleep(0.02)

    def look(self) -> dict[str, int]:
        """Peaks in MiB until now."""
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in self.peak:
                self.peak[name] = max(self.peak[name], int(value.split()[0]) // 1024)
        return self.peak


def worker(folder: Path, users: int, how: str) -> dict[str, Any]:
    log, items = folder / f"log{users}", folder / "items.parquet"
    memory = Memory()
    started = time.perf_counter()
    reading: dict[str, Any] = {"rating": "rating", "time": "time"}
    if how == "stream":
        data: Any = uf.stream_interactions(log, items, work=folder / f"work{users}", **reading)
    else:
        data = uf.read_interactions(log, items, **reading)
    read_s = time.perf_counter() - started
    model = uf.Model.load(folder / "run" / "model")
    model.trainer = model.ready_trainer()
    started = time.perf_counter()
    bank = model.infer(data, folder / f"{how}{users}")
    seconds = time.perf_counter() - started
    assert len(bank) == users
    trainer, peak = model.trainer, memory.look()
    return {
        "how": how,
        "users": users,
        "processor_s": round(time.process_time(), 1),
        "read_s": round(read_s, 2),
        "infer_s": round(seconds, 2),
        "users_per_s": round(users / trainer.swept_s),
        "wait_share": round(trainer.waited_s / trainer.swept_s, 4),
        "peak_rss_mib": peak["VmHWM"],
        "peak_anonymous_mib": peak["RssAnon"],
        "peak_mapped_mib": peak["RssFile"],
    }


def run(sizes: list[int], folder: Path) -> dict[str, Any]:
    prepare(folder)
    for users in sizes:
        write_log(folder / f"log{users}", users)
    compared = sizes[-2] if len(sizes) > 1 else sizes[-1]
    results = []
    for users, how in [(compared, "memory"), *((n, "stream") for n in sizes)]:
        command = [sys.executable, __file__, "--worker", str(folder), str(users), how]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print(results[-1], flush=True)
        if how == "stream" and users == compared:
            a, b = (uf.FeatureBank.open(folder / f"{h}{users}") for h in ("memory", "stream"))
            if not (a.keys().equals(b.keys()) and np.array_equal(a.codes(), b.codes())):
                raise SystemExit("stream and memory give other codes: no number")
    memory = results[0]
    streams = {r["users"]: r for r in results[1:]}
    return {
        "benchmark": "stream",
        "ratios": {
            "users_per_s": round(streams[compared]["users_per_s"] / memory["users_per_s"], 3),
            "peak_rss": round(
                streams[sizes[-1]]["peak_rss_mib"] / streams[sizes[0]]["peak_rss_mib"], 3
            ),
        },
        "results": results,
        **machine("cpu"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu"], default="cpu", help="memory is the host's")
    parser.add_argument("--users", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--quick", action="store_true", help="5,000 and 20,000 users")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        folder, users, how = args.worker
        print(json.dumps(worker(Path(folder), int(users), how)))
        return
    sizes = [5_000, 20_000] if args.quick else sorted(args.users)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(run(sizes, Path(folder))))


if __name__ == "__main__":
    main()
