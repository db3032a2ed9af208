"""Whether Triton kernels can run on given tensors."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

from torch import Tensor


@cache
def _installed() -> bool:
    # Triton's own default is about to change; the register counts in docs/ were taken with this.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    return find_spec("triton") is not None


def why_not(*tensors: Tensor | None) -> str | None:
    """None where a Triton kernel can run on such tensors, else the reason.

    CPU tensors need Triton's interpreter. Ops list "triton" after "reference" for them, so that
    "auto" never takes it. Tensors on `meta` stand for any device.
    """
    if not _installed():
        return "triton is not installed"
    if any(t is not None and t.device.type not in ("cuda", "meta") for t in tensors):
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "a tensor is not on a CUDA device and TRITON_INTERPRET=1 is not set"
    return None
