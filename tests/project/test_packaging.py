"""Wheel, sdist and editable install hold what they should; built from a copy, offline."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources alone: no build products, no other files of the checkout."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("userip_fast", "kernels", "csrc"):
        ignore = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for pattern in (
        "setup.py",
        "pyproject.toml",
        "CMakeLists.txt",
        "MANIFEST.in",
        "*.md",
        "LICENSE",
    ):
        for path in ROOT.glob(pattern):
            shutil.copy(path, copy)
    return copy


def build(checkout: Path, what: str, out: Path, **env: str) -> tuple[Path, str]:
    """Builds by the backend's own hook. Returns the file and what was printed."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"from setuptools import build_meta as b; b.build_{what}({str(out)!r})",
        ],
        cwd=checkout,
        env={**os.environ, "USERIP_FAST_NO_EXTENSION": "1", **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (built,) = out.iterdir()
    return built, done.stdout


def run(code: str, cwd: Path) -> list[str]:
    # -I -S: nothing but `code` decides what is on sys.path, an installed userip_fast least of all.
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_wheel(checkout: Path, tmp_path: Path) -> None:
    wheel, printed = build(
        checkout, "wheel", tmp_path / "dist", USERIP_FAST_NO_EXTENSION="0", PATH=""
    )
    assert wheel.name.endswith("-py3-none-any.whl")
    (line,) = [line for line in printed.splitlines() if line.startswith("userip_fast:")]
    assert "no C++ compiler found" in line

    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as z:
        names = set(z.namelist())
        z.extractall(site)
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "userip_fast").rglob("*.py")}
    sources |= {f"userip_fast/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    assert names >= sources | {"userip_fast/py.typed"}
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"userip_fast"}

    # Also in a checkout's root, where a top-level `kernels/` lies beside.
    found = run(
        f"import sys; sys.path.insert(0, {str(site)!r}); import userip_fast.kernels as k; "
        "print(*k.__path__)",
        ROOT,
    )
    assert found == [str(site / "userip_fast" / "kernels")]


def test_sdist_builds_a_wheel(checkout: Path, tmp_path: Path) -> None:
    sdist, _ = build(checkout, "sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as t:
        t.extractall(tmp_path, filter="data")
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    native = [p.relative_to(ROOT) for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    kernels = [p.relative_to(ROOT) for p in (ROOT / "kernels").glob("*.py")]
    for path in [*native, *kernels, Path("CMakeLists.txt"), Path("LICENSE")]:
        assert (unpacked / path).is_file(), path
    wheel, _ = build(unpacked, "wheel", tmp_path / "dist")
    assert "userip_fast/ops/__init__.py" in zipfile.ZipFile(wheel).namelist()


def test_editable_install(checkout: Path, tmp_path: Path) -> None:
    wheel, _ = build(checkout, "editable", tmp_path / "dist")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    found = run(
        f"import site; site.addsitedir({str(site)!r}); import userip_fast.kernels as k, "
        "importlib.util as u; print(*k.__path__, u.find_spec('kernels'))",
        tmp_path,
    )
    assert found[0] == str(checkout / "kernels")
    assert str(checkout) not in "".join(found[1:])
