"""A frozen Llama that reads an item's text once, and then any number of users behind it.

    text [L rows, read once, keys and values kept]   soft row of a user   ->  log odds of two words

What a text leaves of itself are the keys and values of its tokens in all layers. A user costs his
soft rows, which see the text and one another, and the last of them gives the answer; gradients go
to the soft rows alone. Products are in bfloat16, the residual stream in float32; weights of
norms are folded into the products behind them, and of the vocabulary only two rows are needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class _Layer:
    """`qkv` [H + 2 G, D], `out` [D, H], `gate_up` [2 M, D], `down` [D, M]."""

    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True)
class Texts:
    """Texts as they were read.

    Attributes:
        kept: [tokens, layers, 2, G] keys, turned to their places, and values.
        offsets: [I + 1]; text i has tokens `offsets[i]:offsets[i + 1]`.
        tokens: How many the LM read.
    """

    kept: Tensor
    offsets: Int64
    tokens: int


class FrozenReader:
    """See the module.

    Args:
        lm: A Llama of transformers, in float32.
        words: Two token ids: the answer's log odds are of the first over the second.
        dtype: Of products.

    Attributes:
        rows: How many soft rows were read, forward.
    """

    def __init__(
        self, lm: Any, words: tuple[int, int], dtype: torch.dtype = torch.bfloat16
    ) -> None:
        c = lm.config
        self.dtype, self.eps, self.dim = dtype, c.rms_norm_eps, c.hidden_size
        self.heads, self.groups = c.num_attention_heads, c.num_key_value_heads
        self.head_dim = self.dim // self.heads
        self.embedding = lm.get_input_embeddings().weight.detach()
        self.layers = []
        with torch.no_grad():
            for m in lm.model.layers:
                a, f = m.self_attn, m.mlp
                qkv = torch.cat([p.weight for p in (a.q_proj, a.k_proj, a.v_proj)])
                gate_up = torch.cat([f.gate_proj.weight, f.up_proj.weight])
                parts = (
                    qkv * m.input_layernorm.weight, a.o_proj.weight,
                    gate_up * m.post_attention_layernorm.weight, f.down_proj.weight,
                )  # fmt: skip
                self.layers.append(_Layer(*(p.to(dtype).contiguous() for p in parts)))
            head = lm.lm_head.weight.detach()[list(words)]
            self.answer = ((head[0] - head[1]) * lm.model.norm.weight).float().clone()
        rope = c.rope_parameters["rope_theta"]
        half = torch.arange(0, self.head_dim, 2) / self.head_dim
        angle = torch.arange(512)[:, None] * rope ** -half[None]
        self.cos, self.sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
        self.rows = 0

    @torch.no_grad()
    def read(self, ids: list[list[int]], batch: int = 64) -> Texts:
        """Reads texts, each alone."""
        lengths = np.asarray([len(x) for x in ids])
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        layers, width = len(self.layers), self.groups * self.head_dim
        kept = torch.empty(int(offsets[-1]), layers, 2, width, dtype=self.dtype)
        for length in np.unique(lengths).tolist():  # of equal length: nothing is padded
            those = np.flatnonzero(lengths == length)
            for part in np.array_split(those, -(-len(those) // batch)):
                x = self.embedding[torch.tensor([ids[i] for i in part])].float()
                at = torch.from_numpy(offsets[part][:, None] + np.arange(length)).flatten()
                place = torch.arange(length).expand(len(part), -1)
                for i, layer in enumerate(self.layers):
                    q, k, v = self._qkv(layer, x, place)
                    kept[at, i, 0] = k.flatten(2).flatten(0, 1).to(self.dtype)
                    kept[at, i, 1] = v.flatten(2).flatten(0, 1).to(self.dtype)
                    told = F.scaled_dot_product_attention(
                        *(y.transpose(1, 2) for y in (q, k, v)), is_causal=True, enable_gqa=True
                    )
                    x = self._rest(layer, x, told.transpose(1, 2).flatten(2))
        return Texts(kept, offsets, int(offsets[-1]))

    def odds(self, texts: Texts, items: Int64, soft: Tensor) -> Tensor:
        """[P, Q] log odds of the answer to P items about Q users each.

        Args:
            items: [P] rows of `texts`.
            soft: [P, Q, R, D] soft rows; a row sees the text and the rows of its user up to itself.
        """
        p, q, r, _ = soft.shape
        lengths = np.diff(texts.offsets)[items]
        longest = int(lengths.max())
        column = np.minimum(np.arange(longest), lengths[:, None] - 1)
        text = texts.kept[torch.from_numpy(texts.offsets[items][:, None] + column)]
        beyond = torch.from_numpy(np.arange(longest) >= lengths[:, None])
        place = torch.from_numpy(lengths)[:, None, None] + torch.arange(r)
        place = place.expand(p, q, r).reshape(p * q, r)
        mask = torch.zeros(p, 1, 1, longest).masked_fill(beyond[:, None, None], -torch.inf)
        x = soft.flatten(0, 1)
        own_mask = torch.full((r, r), -torch.inf).triu(1)
        for i, layer in enumerate(self.layers):
            told = self._attend(*self._qkv(layer, x, place), text[:, :, i], mask, own_mask)
            x = self._rest(layer, x, told)
        self.rows += p * q * r
        return self._norm(x[:, -1]).mv(self.answer).view(p, q)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, text: Tensor, mask: Tensor, own: Tensor
    ) -> Tensor:
        """[N, R, H] of rows that see their text [P, L, 2, G] and their own keys and values."""
        n, r = q.shape[:2]
        p, g, d = len(text), self.groups, self.head_dim
        each = self.heads // g
        q = q.view(n, r, g, each, d).transpose(1, 2) * d**-0.5  # [N, G, R, H / G, d]
        there = text.unflatten(-1, (g, d)).permute(2, 0, 3, 1, 4).float()  # [2, P, G, L, d]
        many = q.unflatten(0, (p, -1)).transpose(1, 2).flatten(2, 4)  # [P, G, Q R H / G, d]
        to_text = many @ there[0].transpose(-1, -2) + mask
        few = q.flatten(2, 3)  # [N, G, R H / G, d]
        to_own = few @ k.permute(0, 2, 3, 1)
        to_own = (to_own.unflatten(2, (r, each)) + own[:, None]).flatten(2, 3)
        length = to_text.shape[-1]
        both = torch.cat([self._by_row(to_text, n, r * each), to_own], dim=-1).softmax(-1)
        seen = both[..., :length].unflatten(0, (p, -1)).transpose(1, 2).flatten(2, 3)
        told = self._by_row(seen @ there[1], n, r * each)
        told = told + both[..., length:] @ v.transpose(1, 2)
        return told.unflatten(2, (r, each)).transpose(1, 2).flatten(2)

    @staticmethod
    def _by_row(x: Tensor, n: int, rows: int) -> Tensor:
        """[N, G, rows, ...] of [P, G, Q rows, ...]."""
        return x.unflatten(2, (-1, rows)).transpose(1, 2).reshape(n, x.shape[1], rows, -1)

    def _qkv(self, layer: _Layer, x: Tensor, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[N, R, heads, d] each, float32; queries and keys turned to their places."""
        told = F.linear(self._norm(x).to(self.dtype), layer.qkv).float()
        told = told.unflatten(-1, (-1, self.head_dim))
        q, k, v = told.split([self.heads, self.groups, self.groups], dim=2)
        cos, sin = self.cos[place][:, :, None], self.sin[place][:, :, None]
        return _turned(q, cos, sin), _turned(k, cos, sin), v

    def _rest(self, layer: _Layer, x: Tensor, told: Tensor) -> Tensor:
        x = x + F.linear(told.to(self.dtype), layer.out).float()
        gate, up = F.linear(self._norm(x).to(self.dtype), layer.gate_up).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, layer.down).float()

    def _norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin
