"""The last layer, behind its attention, on chosen rows only.

Of a row without loss the last layer needs keys and values alone: its output projection and MLP
serve loss rows only, forward and backward. The model stays unmodified. A hook before its last layer
runs that layer on all rows as far as attention, whose function stops it by raising `Attended`; then
the model's own call goes on with the chosen rows, whose attention is known, and a hook behind it
puts them back in their places. The price: q, k and v of the chosen rows are computed twice forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from userip_fast.lm.attention import Attended, current, reading
from userip_fast.lm.masks import body


def last_layer(model: Any) -> nn.Module | None:
    """The model's last decoder layer, None where it is not the end of one list of all layers."""
    count = model.config.get_text_config().num_hidden_layers
    for module in body(model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module[-1]
    return None


@contextmanager
def rows_behind_attention(layer: nn.Module, rows: Tensor, num_rows: int) -> Iterator[None]:
    """Within it, only `rows` [R] of the model's T = `num_rows` output rows mean anything.

    Args:
        layer: `last_layer` of the model, which asks attention once, within `attention.reading`.
        rows: [R] int64.
        num_rows: T.
    """

    def only_rows(x: Any) -> Any:
        if isinstance(x, Tensor) and x.dim() > 1 and x.shape[1] == num_rows:
            return x.index_select(1, rows)
        return x

    second = ExitStack()

    def before(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        context = current()
        try:
            with reading(replace(context, stop=True)):
                module.forward(*args, **kwargs)
        except Attended as found:
            attended = found.out.index_select(0, rows)
        else:
            raise AssertionError("the last layer did not call attention")
        second.enter_context(reading(replace(context, attended=attended)))
        return pytree.tree_map(only_rows, (args, kwargs))

    def after(_module: nn.Module, _args: Any, out: Any) -> Any:
        second.close()
        x = out[0] if isinstance(out, tuple) else out  # [1, R, D]
        whole = x.new_zeros(1, num_rows, x.shape[2]).index_copy(1, rows, x)
        return (whole, *out[1:]) if isinstance(out, tuple) else whole

    handles = (
        layer.register_forward_pre_hook(before, with_kwargs=True),
        layer.register_forward_hook(after),
    )
    try:
        yield
    finally:
        second.close()
        for handle in handles:
            handle.remove()
