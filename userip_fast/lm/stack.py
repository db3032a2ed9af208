"""All layers of a frozen LM as a run of halves, where its modules are of the common form.

That form: pre-norm RMSNorm, q-k-v attention with RoPE (and perhaps norms of heads), gated MLP, as
in Llama, Mistral, Qwen 2 and Qwen 3. It is recognised by the modules' parts, and `fuse` must have
recognised each of them; whether the layers do what their parts promise is seen by the engine's
probe, which compares with the model's own code. A model of another form, or whose linears cannot
be joined, runs module by module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from userip_fast.lm.attention import PackContext
from userip_fast.lm.halves import AttentionHalf, HeadNorms, MLPHalf, Norm
from userip_fast.lm.masks import body
from userip_fast.lm.products import product_of
from userip_fast.ops.frozen_block import rms_norm

_BASE = {"embed_tokens", "layers", "norm", "rotary_emb"}
_LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


@dataclass(frozen=True)
class Stack:
    """The layers, the norm behind them, and what turns positions into angles."""

    layers: tuple[tuple[AttentionHalf, MLPHalf, nn.Module], ...]
    norm: Norm
    rotary: Any

    def __call__(
        self, x: Tensor, position: Tensor, context: PackContext, impl: str,
        rows: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """x [T, D] to final hidden states [T, D], or [R, D] where `rows` [R] are given."""
        cosine, sine = self.rotary(x[None], position.long()[None])
        angles = cosine[0].to(x.dtype).contiguous(), sine[0].to(x.dtype).contiguous()
        residual: Tensor | None = None
        for i, (attention, mlp, module) in enumerate(self.layers):
            chosen = rows if i == len(self.layers) - 1 else None

            def layer(
                x: Tensor, residual: Tensor | None, a: AttentionHalf = attention,
                m: MLPHalf = mlp, chosen: Tensor | None = chosen,
            ) -> tuple[Tensor, Tensor]:  # fmt: skip
                return m(*a(x, residual, angles, context, impl, chosen))

            if module.training and getattr(module, "gradient_checkpointing", False):
                whole = x if residual is None else x + residual  # what is kept: one tensor a layer
                x, residual = checkpoint(
                    layer, whole, None, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x, residual = layer(x, residual)
        y: Tensor = rms_norm(
            x,
            self.norm.weight,
            residual=residual,
            eps=self.norm.eps,
            offset=self.norm.offset,
            impl=self.norm.impl,
        )[0]
        return y


def stack_of(model: Any, impl: str) -> Stack | None:
    """The layers of a fused model as a stack, None where it is of another form.

    Joins the weights of linears with one input, in place; the modules keep views of them.

    Args:
        model: After `fuse`; all its linears as they stay.
        impl: Implementation of the element-wise operators, "triton" or "reference".
    """
    base, config = body(model), model.config.get_text_config()
    if _parts(base) != _BASE or getattr(config, "attn_logit_softcapping", None):
        return None
    norm = _norm(base.norm, impl)
    if norm is None or len(set(base.layers)) != config.num_hidden_layers:
        return None
    layers = [_layer(layer, impl) for layer in base.layers]
    if not all(layers):
        return None
    return Stack(tuple(x for x in layers if x is not None), norm, base.rotary_emb)


def _parts(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _fused(module: nn.Module) -> Any:
    """The override that `fuse` put in, None where it did not."""
    forward = getattr(module.__dict__.get("forward"), "__func__", None)
    return forward if getattr(forward, "userip_fused", False) else None


def _norm(module: Any, impl: str) -> Norm | None:
    numbers = getattr(_fused(module), "userip_norm", None)
    if numbers is None:
        return None
    eps, offset = numbers
    return Norm(module.weight.detach(), eps, offset, impl)


def _layer(layer: Any, impl: str) -> tuple[AttentionHalf, MLPHalf, nn.Module] | None:
    if _parts(layer) != _LAYER:
        return None
    attention, mlp = layer.self_attn, layer.mlp
    first, second = _norm(layer.input_layernorm, impl), _norm(layer.post_attention_layernorm, impl)
    norms = _parts(attention) - _PROJECTIONS
    act = getattr(_fused(mlp), "userip_act", None)
    if (
        first is None or second is None or act is None or _fused(attention) is None
        or not _parts(attention) >= _PROJECTIONS or norms not in (set(), _HEAD_NORMS)
        or _parts(mlp) != _MLP
        or list(attention.parameters(recurse=False))  # sinks
        or _width(attention.v_proj) != _width(attention.k_proj)
    ):  # fmt: skip
        return None
    products = [
        product_of([getattr(parent, name) for name in names])
        for parent, names in (
            (attention, ("q_proj", "k_proj", "v_proj")), (attention, ("o_proj",)),
            (mlp, ("gate_proj", "up_proj")), (mlp, ("down_proj",)),
        )
    ]  # fmt: skip
    found = [p for p in products if p is not None]
    if len(found) != len(products):
        return None
    qkv, output, gate_up, down = found
    dim = int(attention.head_dim)
    heads = (_width(attention.q_proj) // dim, _width(attention.k_proj) // dim, dim)
    head_norms = None
    if norms:
        query, key = (_norm(getattr(attention, n), impl) for n in ("q_norm", "k_norm"))
        if query is None or key is None or query.weight.shape != (dim,) or (
            (query.eps, query.offset, query.weight.shape)
            != (key.eps, key.offset, key.weight.shape)
        ):  # fmt: skip
            return None
        head_norms = HeadNorms(query.weight, key.weight, query.eps, query.offset)
    return (
        AttentionHalf(
            first, qkv, output, heads, head_norms, float(attention.scaling), id(attention)
        ),
        MLPHalf(second, gate_up, down, act),
        layer,
    )


def _width(linear: Any) -> int:
    return int(linear.out_features)
