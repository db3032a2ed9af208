"""From a pack and its soft rows to each user's negative log-likelihood.

`PackedEngine` computes what must be computed: no padding, no repeated names, logits only where
there is loss. `ReferenceEngine` spells the same thing out with Hugging Face's own eager attention
on padded, whole prompts; it is the oracle and the profile's baseline.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from userip_fast.errors import MismatchError
from userip_fast.lm import attention
from userip_fast.lm.attention import PackContext
from userip_fast.lm.frozen import FrozenLM
from userip_fast.ops import linear_cross_entropy, prepend_soft_prompts
from userip_fast.packing import Pack
from userip_fast.prompts import Layout


class Engine(Protocol):
    """Scores packs. Independent of how soft rows were made, so any E-step can use it."""

    lm: FrozenLM
    layout: Layout

    def nll(self, pack: Pack, soft_rows: Tensor) -> Tensor:
        """[U] fp32 weighted NLL in nats; differentiable in `soft_rows` [U, S, D]."""
        ...


def make_engine(name: str, lm: FrozenLM, layout: Layout) -> PackedEngine | ReferenceEngine:
    """The engine called `name` ("packed" or "reference")."""
    return {"packed": PackedEngine, "reference": ReferenceEngine}[name](lm, layout)


def check_positions(lm: FrozenLM, layout: Layout, tokens: int) -> None:
    """Raises MismatchError when prompt and `tokens` of behaviour exceed the LM's context."""
    room = lm.max_positions - layout.behaviour_start
    if tokens > room:
        raise MismatchError(
            f"a sequence of {tokens} behaviour tokens behind {layout.behaviour_start} prompt rows "
            f"is {tokens + layout.behaviour_start} long, but the LM has {lm.max_positions} "
            f"positions; set data.chunk_tokens (longer histories are cut) to at most {room}"
        )


class PackedEngine:
    """Packed rows, constant prefix keys and values, loss rows only."""

    def __init__(self, lm: FrozenLM, layout: Layout, impl: str = "auto") -> None:
        self.lm, self.layout, self.impl = lm, layout, impl
        self.prefix_segment = _tensor(layout.prefix_segment, lm.device)
        self.prefix_position = _tensor(layout.prefix_position, lm.device)
        self.prefix = self._prefix_keys_values()

    def nll(self, pack: Pack, soft_rows: Tensor) -> Tensor:
        """See `Engine.nll`."""
        hidden = self.hidden_states(pack, soft_rows)
        return linear_cross_entropy(
            hidden[pack.loss_rows],
            self.lm.head_weight,
            pack.target,
            pack.loss_weight,
            pack.cu_rows,
            bias=self.lm.head_bias,
            softcap=self.lm.softcap,
        )

    def hidden_states(self, pack: Pack, soft_rows: Tensor) -> Tensor:
        """[T, D] final hidden states of every row of the pack."""
        x = prepend_soft_prompts(
            self.lm.token_embedding,
            soft_rows.reshape(-1, self.lm.hidden_size).to(self.lm.dtype),
            pack.plan,
            scale=self.lm.embedding_scale,
        )
        context = PackContext(
            pack.segment,
            pack.position,
            pack.cu_seqlens,
            pack.max_seqlen,
            self.layout.num_fields,
            self.prefix_segment,
            self.prefix_position,
            prefix=self.prefix,
            impl=self.impl,
        )
        return self._forward(x, pack.position, context)

    def _forward(self, x: Tensor, position: Tensor, context: PackContext) -> Tensor:
        with self.lm.attention(attention.NAME):
            out: Any = self.lm.model.base_model(
                inputs_embeds=x.unsqueeze(0),
                position_ids=position.long().unsqueeze(0),
                use_cache=False,
                userip=context,
            )
        return out.last_hidden_state[0]

    @torch.no_grad()
    def _prefix_keys_values(self) -> list[tuple[Tensor, Tensor]]:
        """Runs the prefix alone, as if it were one user, under the same mask rule."""
        rows = len(self.layout.prefix_ids)
        captured: list[tuple[Tensor, Tensor]] = []
        if rows == 0:
            config = self.lm.model.config.get_text_config()
            heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            width = (
                getattr(config, "head_dim", None)
                or config.hidden_size // config.num_attention_heads
            )
            empty = torch.empty(0, heads, width, dtype=self.lm.dtype, device=self.lm.device)
            return [(empty, empty)] * config.num_hidden_layers
        context = PackContext(
            self.prefix_segment,
            self.prefix_position,
            torch.tensor([0, rows], dtype=torch.int32, device=self.lm.device),
            rows,
            self.layout.num_fields,
            self.prefix_segment[:0],
            self.prefix_position[:0],
            capture=captured,
            impl=self.impl,
        )
        ids = _tensor(self.layout.prefix_ids, self.lm.device).long()
        self._forward(self.lm.embed(ids), self.prefix_position, context)
        return captured


class ReferenceEngine:
    """The same likelihood from whole padded prompts, a dense 4-D mask and full logits."""

    def __init__(self, lm: FrozenLM, layout: Layout) -> None:
        self.lm, self.layout = lm, layout

    def nll(self, pack: Pack, soft_rows: Tensor) -> Tensor:
        """See `Engine.nll`."""
        layout, device = self.layout, self.lm.device
        prefix_rows, soft = len(layout.prefix_ids), layout.num_soft
        head = prefix_rows + soft
        starts = pack.cu_seqlens.tolist()
        width = max(b - a for a, b in pairwise(starts)) + prefix_rows
        sequences = len(starts) - 1

        # Rows in prompt order: prefix and soft rows interleaved by position, then behaviour,
        # padding.
        x = torch.zeros(sequences, width, self.lm.hidden_size, dtype=self.lm.dtype, device=device)
        segment = torch.full((sequences, width), -2, dtype=torch.int32, device=device)
        position = torch.zeros(sequences, width, dtype=torch.int64, device=device)
        at_prefix = _tensor(layout.prefix_position, device).long()
        at_soft = _tensor(layout.soft_position, device).long()
        x[:, at_prefix] = self.lm.embed(_tensor(layout.prefix_ids, device).long())
        x = x.index_copy(1, at_soft, soft_rows[pack.sequence_user].to(self.lm.dtype))
        segment[:, at_prefix] = _tensor(layout.prefix_segment, device)
        segment[:, at_soft] = _tensor(layout.soft_segment, device)
        position[:, :head] = torch.arange(head, device=device)
        behaviour = torch.zeros_like(x)
        for c, (a, b) in enumerate(pairwise(starts)):
            rows = slice(a + soft, b)
            here = slice(head, head + b - a - soft)
            behaviour[c, here] = self.lm.embed(pack.plan[rows].long())
            segment[c, here] = pack.segment[rows]
            position[c, here] = pack.position[rows].long()
        x = x + behaviour

        with self.lm.attention("eager"):
            logits = self.lm.model(
                inputs_embeds=x,
                attention_mask=self._mask(segment, position),
                position_ids=position,
                use_cache=False,
            ).logits

        # A loss row of the pack is row `head - soft + (row - start of its sequence)` of the prompt.
        sequence = torch.searchsorted(pack.cu_seqlens, pack.loss_rows.int(), right=True) - 1
        row = pack.loss_rows - pack.cu_seqlens.long()[sequence] + prefix_rows
        picked = logits[sequence, row]
        token = F.cross_entropy(picked.float(), pack.target, reduction="none") * pack.loss_weight
        nll = torch.zeros(pack.num_users, dtype=token.dtype, device=device)
        return nll.index_add(0, pack.sequence_user[sequence], token)

    def _mask(self, segment: Tensor, position: Tensor) -> Any:
        """Additive [U, 1, L, L] masks, one per kind of layer where the model has several kinds."""
        fields = self.layout.num_fields
        row, column = segment[:, :, None], segment[:, None, :]
        causal = torch.ones(segment.shape[1], segment.shape[1], device=segment.device).tril().bool()
        sees = (
            (row == column)
            | (column == -1)
            | ((row >= fields) & (column < fields) & (column >= -1))
        )
        sees = (sees & causal) | torch.eye(segment.shape[1], device=segment.device).bool()
        config = self.lm.model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or [])
        window = getattr(config, "sliding_window", None)
        if not getattr(config, "use_sliding_window", True):
            window = None
        full = _additive(sees, self.lm.dtype)
        if window is None:
            return {kind: full for kind in kinds} if kinds - {"full_attention"} else full
        near = sees & (position[:, None, :] > position[:, :, None] - window)
        sliding = _additive(near, self.lm.dtype)
        if not kinds:
            return sliding
        return {"full_attention": full, "sliding_attention": sliding}


def _additive(sees: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(
        ~sees, torch.finfo(dtype).min
    )[:, None]


def _tensor(values: Any, device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device)
