"""What importing costs and needs. Each test is a process of its own, in the checkout's root."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

BLOCK_OPTIONAL = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "bitsandbytes", "flash_attn") or (
            name == "userip_fast._C"
        ):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Block())
"""


def run(code: str) -> str:
    # `-c` puts the root on sys.path, as scripts, notebooks and `python -m pytest` in it do.
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_package_imports_nothing_heavy() -> None:
    heavy = run(
        "import sys, userip_fast; "
        "print(*{'torch', 'numpy', 'transformers', 'pyarrow', 'triton'} & sys.modules.keys())"
    )
    assert heavy.split() == []


def test_a_bank_is_written_and_read_without_torch(tmp_path: Path) -> None:
    out = run(
        f"""
import sys
from userip_fast.bank import FeatureBank

fields = [{{"name": "taste", "codebook_size": 9}}]
bank = FeatureBank.write({str(tmp_path / "bank")!r}, [3, 5], [[1], [8]], fields=fields,
                         model_fingerprint="m")
assert bank.update([7], [[2]]).lookup([5, 7]).tolist() == [[8], [2]]
print(*{{"torch", "transformers"}} & sys.modules.keys())
"""
    )
    assert out.split() == []


def test_ops_run_without_optional_parts() -> None:
    out = run(
        BLOCK_OPTIONAL
        + """
import torch
import userip_fast
from userip_fast.core import _extension

x = torch.eye(4)
ids, distance = userip_fast.ops.assign_codes(x, x)
assert ids.tolist() == [0, 1, 2, 3] and not distance.any()
assert _extension.load() is None
print(_extension.why_not())
"""
    )
    assert "userip_fast._C is blocked" in out


def test_every_public_name_resolves_and_leaves_the_process_alone() -> None:
    run(
        BLOCK_OPTIONAL
        + """
import torch
threads = torch.get_num_threads()

import userip_fast
import userip_fast.cli.env
missing = object()
for name in userip_fast.__all__:
    assert getattr(userip_fast, name, missing) is not missing, name
assert not torch.cuda.is_initialized()
assert torch.get_num_threads() == threads
"""
    )


def test_extension_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USERIP_FAST_NO_EXTENSION", "1")
    out = run("from userip_fast.core import _extension as e; print(e.load(), e.why_not())")
    assert out.split() == ["None", "USERIP_FAST_NO_EXTENSION=1"]


def test_a_built_extension_loads() -> None:
    if not list((ROOT / "userip_fast").glob("_C.*")):
        pytest.skip("userip_fast._C is not built in this checkout")
    out = run("from userip_fast.core import _extension as e; print(e.why_not(), bool(e.load()))")
    assert out.split() == ["None", "True"]


def test_the_extension_and_torch_share_their_threads() -> None:
    out = run(
        """
import ctypes
from userip_fast.core import _extension
alone = _extension.load()
import torch
torch.set_num_threads(3)
maps = open("/proc/self/maps").read().split()
found = {name for name in maps if "libgomp" in name}
print(len(found), ctypes.CDLL(found.pop()).omp_get_max_threads() if found and alone else "none")
"""
    )
    if out.split()[1] == "none":
        pytest.skip("userip_fast._C is not built in this checkout")
    assert out.split() == ["1", "3"]


def test_kernels_of_a_bare_checkout() -> None:
    out = run("import userip_fast.kernels as k; print(*k.__path__)")
    assert out.split() == [str(ROOT / "kernels")]
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_transformers_does_not_take_our_kernels_for_hugging_faces() -> None:
    # Without their package, `import kernels` in our root yields an empty namespace: no code of ours
    # runs under that name, transformers sees nothing it could use, and models load.
    run(
        """
import sys
import userip_fast
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import is_kernels_available

if not is_kernels_available():
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=2, vocab_size=16)
    LlamaForCausalLM(config)
    import kernels
    assert kernels.__file__ is None
    assert not [name for name in dir(kernels) if not name.startswith("_")]
"""
    )


def test_hugging_faces_kernels_wins_over_our_folder(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("theirs = True\n")
    run(
        f"""
import sys
sys.path.append({str(tmp_path)!r})  # behind the root, as site-packages is
import userip_fast.kernels as ours
import kernels
assert kernels.theirs and ours is not kernels
"""
    )
