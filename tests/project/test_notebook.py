"""examples/log_to_lift.ipynb runs from its first cell to its last, in a kernel of its own."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "log_to_lift.ipynb"
TINY = {
    "lm": {"embedded_tokens": 30_000, "embedded_layers": 1, "embedded_hidden": 32,
           "embedded_vocab": 320, "quantization": "none"},
    "em": {"rounds": 1},
}  # fmt: skip


def write_log(folder: Path) -> None:
    """Two tastes: users of either choose among 20 of 40 items, four times of five."""
    random = np.random.default_rng(0)
    users, events = 160, 16
    taste = random.integers(0, 2, users)
    rows = []
    for u in range(users):
        odds = np.where(np.arange(40) % 2 == taste[u], 4.0, 1.0)
        chosen = random.choice(40, events, replace=False, p=odds / odds.sum())
        rows += [(u, int(i), 1000 * u + t) for t, i in enumerate(chosen)]
    log = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])
    log.to_parquet(folder / "interactions.parquet")
    genre = ["war" if i % 2 else "love" for i in range(40)]
    items = pd.DataFrame({"item_id": range(40), "title": [f"tale {i}" for i in range(40)],
                          "genres": genre})  # fmt: skip
    items.to_parquet(folder / "items.parquet")


def test_the_notebook_tells_a_lift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("lightgbm")
    write_log(tmp_path)
    for name, value in {"DATA": tmp_path, "USERIP_FAST_CACHE": tmp_path / "cache",
                        "JUPYTER_DATA_DIR": tmp_path / "jupyter",
                        "JUPYTER_RUNTIME_DIR": tmp_path / "runtime",
                        "IPYTHONDIR": tmp_path / "ipython"}.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    root = str(NOTEBOOK.parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOK, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) == 10
    assert "SETTINGS = {}" in code[0].source
    code[0].source = code[0].source.replace("SETTINGS = {}", f"SETTINGS = {TINY!r}")
    resources = {"metadata": {"path": str(tmp_path)}}
    interrupts = signal.getsignal(signal.SIGINT)
    try:
        nbclient.NotebookClient(notebook, timeout=120, resources=resources).execute()
    finally:
        signal.signal(signal.SIGINT, interrupts)
    outputs = [output for cell in code for output in cell.outputs]
    told = "".join(o.get("text", "") for o in outputs)
    lift, low, high = map(float, re.findall(r"[+-]\d\.\d+", told))
    assert low <= lift <= high
    assert lift > 0.05  # tastes are plain in what is chosen, not in how often
    bars = [o["data"]["text/html"] for o in outputs if "text/html" in o.get("data", {})]
    assert any("<b>pre-training the LM</b>" in bar and "tokens in" in bar for bar in bars)
    # Of other libraries nothing: neither warnings nor bars.
    assert not re.search("it/s|Warning|gemm_4bit|Loading", told), told
    assert (tmp_path / "run" / "report.html").is_file()
