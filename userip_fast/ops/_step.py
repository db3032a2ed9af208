"""Operators that are steps of an autograd function: the dispatcher sees them only when it must.

torch's dispatcher costs a call of a custom operator tens of microseconds, of which a small layer
has a dozen. Nothing needs it while plain tensors are computed with; torch.compile, the `meta` and
fake tensors of traces, and modes that look at every operator do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def watched(x: Tensor) -> bool:
    """Whether an operator on x must go through the dispatcher."""
    return torch.compiler.is_compiling() or (
        (type(x) is not Tensor and type(x) is not torch.nn.Parameter)
        or x.is_meta
        or torch._C._len_torch_dispatch_stack() > 0
    )


def step_op(
    name: str, *, fake: Callable[..., Any] | None = None, mutates: tuple[str, ...] = ()
) -> Any:
    """Decorator: a custom operator `userip_fast::name`, called directly where nobody watches.

    The operator itself is the attribute `op` of what is returned.

    Args:
        name: Of the operator.
        fake: Its results on tensors without values; else to be registered with `op`.
        mutates: Names of the arguments that it writes to.
    """

    def wrap(run: F) -> F:
        op = torch.library.custom_op(f"userip_fast::{name}", run, mutates_args=mutates)
        if fake is not None:
            op.register_fake(fake)

        @functools.wraps(run)
        def call(*args: Any) -> Any:
            return op(*args) if watched(args[0]) else run(*args)

        call.op = op  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return wrap


def differentiable(step: Any, setup_context: Any, backward: Any) -> Callable[..., Any]:
    """A step as a differentiable function: by `torch.autograd.Function` where nobody watches.

    That costs a tenth of the host time of an operator with registered autograd.

    Args:
        step: Made by `step_op`.
        setup_context, backward: As for `register_autograd`, which is called with them.
    """
    step.op.register_autograd(backward, setup_context=setup_context)

    def forward(ctx: Any, *args: Any) -> Any:
        out = step.__wrapped__(*args)
        setup_context(ctx, args, out)
        return out

    # A `setup_context` of its own would have torch bind the arguments to their names in each call.
    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    direct: Any = type(step.__name__, (torch.autograd.Function,), members)

    def call(*args: Any) -> Any:
        return step.op(*args) if watched(args[0]) else direct.apply(*args)

    return call
