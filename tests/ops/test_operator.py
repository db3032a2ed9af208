"""The pattern of operators, on one made up for it: tuples in the middle, defaults, a gradient."""

import inspect
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from userip_fast.ops import _operator
from userip_fast.ops._operator import differentiable, flat, operator


class Line(NamedTuple):
    slope: Tensor
    shift: Tensor | None
    scale: float = 1.0


def reference(x: Tensor, line: Line, power: int = 1) -> Tensor:
    """scale (slope x + shift) ^ power."""
    y = x * line.slope if line.shift is None else x * line.slope + line.shift
    return line.scale * y**power


CALLS = []


@operator("made_up_for_a_test", reference, fake=lambda x, line, power, impl: torch.empty_like(x))
def run(x, line, power, impl):
    CALLS.append((line.scale, impl))
    return reference(x, line, power)


def _setup_context(ctx, inputs, output):
    x, line, ctx.power, _ = inputs
    ctx.save_for_backward(x, *line[:2])
    ctx.scale = line.scale


def _backward(ctx, grad):
    x, *line = ctx.saved_tensors
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = reference(x, Line(*line, ctx.scale), ctx.power)
        return torch.autograd.grad(y, x, grad)


with_gradient = differentiable(run, _setup_context, _backward)
LINE = Line(torch.tensor(2.0), None, 3.0)


def test_the_schema_is_the_references_arguments_one_by_one():
    assert str(run.op._opoverload._schema) == (
        "userip_fast::made_up_for_a_test(Tensor x, Tensor slope, Tensor? shift, float scale, "
        "SymInt power, str impl) -> Tensor"
    )
    args = (torch.ones(2), LINE, 2, "other")
    lying = run.arguments.flat(args)
    assert lying[1:] == (*LINE, 2, "other")
    assert run.arguments.grouped(lying) == args
    assert isinstance(run.arguments.grouped(lying)[1], Line)


def test_a_flat_function_is_called_by_place_or_by_name():
    told = flat(reference)
    assert list(inspect.signature(told).parameters) == ["x", "slope", "shift", "scale", "power"]
    x = torch.arange(3.0)
    want = reference(x, Line(torch.tensor(2.0), x), 2)
    assert torch.equal(told(x, torch.tensor(2.0), x, power=2), want)
    assert torch.equal(told(shift=x, x=x, slope=torch.tensor(2.0), power=2), want)
    with pytest.raises(TypeError, match="slope"):
        told(x)


@pytest.mark.parametrize("watched", [False, True])
def test_both_ways_run_the_same_with_the_same_gradient(watched, monkeypatch):
    monkeypatch.setattr(_operator, "watched", lambda x: watched)
    CALLS.clear()
    for impl in ("reference", "other"):
        x = torch.arange(3.0, requires_grad=True)
        y = with_gradient(x, LINE, 2, impl)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(y, reference(x, LINE, 2))
        assert torch.equal(grad, 3.0 * 2 * (2 * x) * 2)
    assert CALLS == [(3.0, "other")]  # the reference is not asked for by `run`


def test_opcheck_meta_and_one_graph():
    x = torch.arange(3.0, requires_grad=True)
    torch.library.opcheck(run.op, (x, *LINE, 2, "other"))
    assert run(torch.empty(5, device="meta"), LINE, 2, "other").shape == (5,)
    compiled = torch.compile(
        lambda x: with_gradient(x, LINE, 2, "reference"), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x), reference(x, LINE, 2))
