"""Builds the optional extension `userip_fast._C` with CMake; everything else is in pyproject.toml.

Nothing here imports torch or touches the network. Without a C++ compiler or CMake the package
installs pure, with one line that says so. Variables: see docs/environment.md.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CUDA_ARCHITECTURES = "8.0+PTX;8.6;8.9;9.0a"  # the PTX serves what comes after


def why_no_extension() -> str | None:
    """The reason why `_C` cannot be built here, None where it can."""
    if os.environ.get("USERIP_FAST_NO_EXTENSION") == "1":
        return "USERIP_FAST_NO_EXTENSION=1"
    compilers = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
    if not any(shutil.which(c.split()[0]) for c in compilers if c.strip()):
        return "no C++ compiler found; install g++ or set CXX"
    if shutil.which("cmake") is None:
        return "cmake not found; pip install cmake"
    try:
        import pybind11  # noqa: F401
    except ImportError:
        return "pybind11 not found; pip install pybind11"
    return None


def find_nvcc() -> str | None:
    """Path of nvcc, None for a CPU-only build.

    Raises:
        SystemExit: USERIP_FAST_CUDA=1 asks for the CUDA half and there is no nvcc.
    """
    wanted = os.environ.get("USERIP_FAST_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"USERIP_FAST_CUDA must be 0, 1 or unset, got {wanted!r}")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    names = (os.environ.get("CUDACXX"), "nvcc", f"{home}/bin/nvcc")
    nvcc = next((path for name in names if name and (path := shutil.which(name))), None)
    if wanted == "1" and nvcc is None:
        raise SystemExit("USERIP_FAST_CUDA=1 but nvcc is not found; set CUDACXX or CUDA_HOME")
    return nvcc


def cuda_architectures() -> str:
    """TORCH_CUDA_ARCH_LIST ("8.0+PTX;9.0a"; spaces or commas too) in CMake's words.

    Raises:
        SystemExit: An entry is not a number such as 8.0, 9.0a or 8.0+PTX.
    """
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES
    real, virtual = [], []
    for arch in listed.replace(";", " ").replace(",", " ").split():
        number = arch.removesuffix("+PTX").replace(".", "")
        if not re.fullmatch(r"[0-9]{2,3}[af]?", number):
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: {arch!r} is not a number such as 9.0a")
        real.append(f"{number}-real")
        if arch.endswith("+PTX"):
            virtual.append(f"{number}-virtual")
    return ";".join(real + virtual)


class CMakeBuild(build_ext):
    """Runs CMake and lets it write the module where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        output = (ROOT / self.get_ext_fullpath(ext.name)).resolve()
        build = (ROOT / self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            f"-S{ROOT}",
            f"-B{build}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output.parent}",
        ]
        if ninja := shutil.which("ninja"):
            # In full: the ninja of an earlier isolated build is gone but stays in CMake's cache.
            configure += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        nvcc = find_nvcc()
        if nvcc:
            configure += [
                "-DUSERIP_FAST_CUDA=ON",
                f"-DCMAKE_CUDA_COMPILER={nvcc}",
                f"-DCMAKE_CUDA_ARCHITECTURES={cuda_architectures()}",
            ]
        else:
            configure.append("-DUSERIP_FAST_CUDA=OFF")
        print(f"userip_fast: building _C, CUDA half {f'with {nvcc}' if nvcc else 'off'}")
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(build), "--parallel"], check=True)
        except subprocess.CalledProcessError as e:
            raise SystemExit(
                f"userip_fast: building _C failed ({e}). USERIP_FAST_CUDA=0 leaves out the CUDA "
                "half, USERIP_FAST_NO_EXTENSION=1 the whole extension (slower, same results)."
            ) from e


reason = why_no_extension()
if reason:
    print(f"userip_fast: no compiled extension, the reference path will be used: {reason}")

setup(
    packages=[*find_packages(include=["userip_fast", "userip_fast.*"]), "userip_fast.kernels"],
    package_dir={"userip_fast": "userip_fast", "userip_fast.kernels": "kernels"},
    ext_modules=[] if reason else [Extension("userip_fast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
