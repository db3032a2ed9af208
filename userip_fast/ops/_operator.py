"""What an operator is made of: a reference, others by name, a fake for traces, maybe a gradient.

Its arguments are those of its reference and `impl`, the name of an implementation; nowhere else are
they written down. Arguments that belong together stand in a NamedTuple, which torch's schema has as
its fields one after another.

torch's dispatcher costs a call of a custom operator tens of microseconds, of which a small layer
has a dozen. Nothing needs it while plain tensors are computed with; torch.compile, the `meta` and
fake tensors of traces, and modes that look at every operator do. So it sees a call only then.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Sequence
from inspect import Parameter
from typing import Any

import torch
from torch import Tensor


def watched(x: Any) -> bool:
    """Whether an operator on x, a tensor or begun by one, must go through the dispatcher."""
    x = x[0] if isinstance(x, tuple) else x
    return torch.compiler.is_compiling() or (
        (type(x) is not Tensor and type(x) is not torch.nn.Parameter)
        or x.is_meta
        or torch._C._len_torch_dispatch_stack() > 0
    )


class Arguments:
    """Those of a function, its NamedTuples replaced by their fields: in order, one by one."""

    def __init__(self, function: Callable[..., Any]) -> None:
        hints = typing.get_type_hints(function)
        self.result = None if hints["return"] is type(None) else hints["return"]
        self.parameters: list[Parameter] = []
        self._tuples: list[tuple[int, Any]] = []  # (where its fields begin, its class)
        for p in inspect.signature(function).parameters.values():
            kind = hints[p.name]
            if not hasattr(kind, "_fields"):
                self.parameters.append(p.replace(annotation=kind))
                continue
            self._tuples.append((len(self.parameters), kind))
            of, defaults = typing.get_type_hints(kind), kind._field_defaults
            self.parameters += [
                Parameter(n, p.kind, annotation=of[n], default=defaults.get(n, Parameter.empty))
                for n in kind._fields
            ]

    def flat(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments one by one; what follows them stays."""
        for at, _ in self._tuples:
            args = (*args[:at], *args[at], *args[at + 1 :])
        return args

    def grouped(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """The inverse of `flat`."""
        for at, kind in reversed(self._tuples):
            end = at + len(kind._fields)
            args = (*args[:at], kind(*args[at:end]), *args[end:])
        return tuple(args)


def flat(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, called with the fields of its NamedTuples one by one, by place or by name."""
    arguments = Arguments(function)
    signature = inspect.Signature(arguments.parameters, return_annotation=arguments.result)

    @functools.wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        bound = signature.bind(*args, **named)
        bound.apply_defaults()
        return function(*arguments.grouped(bound.args))

    call.__signature__ = signature  # type: ignore[attr-defined]
    return call


def operator(
    name: str,
    reference: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    mutates: tuple[str, ...] = (),
) -> Any:
    """Decorator of what runs an operator's other implementations: `run(*arguments, impl)`.

    What is returned is called like it, by places, and is the reference for "reference". The custom
    operator `userip_fast::name` is its attribute `op`, its `Arguments` are `arguments`.

    Args:
        name: Of the operator.
        reference: Its oracle, fully annotated; its first argument a tensor or begun by one.
        fake: `fake(*arguments, impl)`, its results on tensors without values.
        mutates: Names of the arguments that it writes to.
    """
    arguments = Arguments(reference)
    parameters = [p.replace(default=Parameter.empty) for p in arguments.parameters]
    parameters.append(Parameter("impl", Parameter.POSITIONAL_OR_KEYWORD, annotation=str))

    def wrap(run: Callable[..., Any]) -> Any:
        def direct(*args: Any) -> Any:
            return reference(*args[:-1]) if args[-1] == "reference" else run(*args)

        def dispatched(*args: Any) -> Any:
            return direct(*arguments.grouped(args))

        signature = inspect.Signature(parameters, return_annotation=arguments.result)
        dispatched.__signature__ = signature  # type: ignore[attr-defined]
        op = torch.library.custom_op(f"userip_fast::{name}", dispatched, mutates_args=mutates)
        op.register_fake(lambda *args: fake(*arguments.grouped(args)))

        @functools.wraps(run)
        def call(*args: Any) -> Any:
            return op(*arguments.flat(args)) if watched(args[0]) else direct(*args)

        told: Any = call
        told.op, told.direct, told.arguments = op, direct, arguments
        return told

    return wrap


def differentiable(operator: Any, setup_context: Any, backward: Any) -> Callable[..., Any]:
    """An operator with a gradient: by `torch.autograd.Function` where nobody watches.

    That costs a tenth of the host time of an operator with registered autograd.

    Args:
        operator: Made by `operator`.
        setup_context: `setup_context(ctx, arguments and impl, results)`.
        backward: `backward(ctx, *gradients of results)` to a tuple: the gradients of the first
            arguments, those that follow have none.
    """
    arguments = operator.arguments
    nothing = (None,) * (len(arguments.parameters) + 1)

    def gradients(ctx: Any, *grads: Any) -> Any:
        found = backward(ctx, *grads)
        return found + nothing[len(found) :]  # autograd takes more Nones than there are arguments

    operator.op.register_autograd(
        gradients,
        setup_context=lambda ctx, inputs, output: setup_context(
            ctx, arguments.grouped(inputs), output
        ),
    )

    def forward(ctx: Any, *args: Any) -> Any:
        out = operator.direct(*args)
        setup_context(ctx, args, out)
        return out

    # A `setup_context` of its own would have torch bind the arguments to their names in each call.
    members = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    direct: Any = type(operator.__name__, (torch.autograd.Function,), members)

    def call(*args: Any) -> Any:
        return operator.op(*arguments.flat(args)) if watched(args[0]) else direct.apply(*args)

    return call
