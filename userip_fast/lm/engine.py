"""From a pack and its soft rows to each user's negative log-likelihood.

`PackedEngine` computes what must be computed: no padding, no repeated names, logits only where
there is loss. `ReferenceEngine` spells the same thing out with Hugging Face's own eager attention
on padded, whole prompts; it is the oracle and the profile's baseline.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from userip_fast.core.errors import MismatchError, UnsupportedError
from userip_fast.lm import attention
from userip_fast.lm.attention import Call, PackContext
from userip_fast.lm.frozen import FrozenLM
from userip_fast.lm.last_layer import last_layer, rows_behind_attention
from userip_fast.lm.stack import Stack, stack_of
from userip_fast.lm.stored import told
from userip_fast.ops import linear_cross_entropy, prepend_soft_prompts
from userip_fast.prompts.layout import Layout
from userip_fast.prompts.packing import Pack

logger = logging.getLogger("userip_fast.lm")

_FEW = 0.75  # loss rows over rows up to which the last layer's second look at them pays


class Engine(Protocol):
    """Scores packs. Independent of how soft rows were made, so any E-step can use it."""

    lm: FrozenLM
    layout: Layout

    def nll(self, pack: Pack, soft_rows: Tensor) -> Tensor:
        """[U] fp32 weighted NLL in nats; differentiable in `soft_rows` [U, S, D].

        Of a pack whose `cu_rows` count other sums than users', those: [A] for A sums.
        """
        ...


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
    """Packed rows, constant prefix keys and values, loss rows only.

    Args:
        lm, layout: The frozen LM and the prompt.
        impl: Implementation of attention.
        probe: Whether to try the model on a small pack first.
        whole: Whether layers run as a `Stack`: "auto" (on a GPU, where the model was fused and is
            of that form), "off", or an implementation of its operators.

    Raises:
        UnsupportedError: The model does something on packed rows that it does not do on one user's,
            or masks in a way that attention is not told of; the text names it.
    """

    def __init__(
        self,
        lm: FrozenLM,
        layout: Layout,
        impl: str = "auto",
        *,
        probe: bool = True,
        whole: str = "auto",
    ) -> None:
        self.lm, self.layout, self.impl = lm, layout, impl
        self.prefix_segment = _tensor(layout.prefix_segment, lm.device)
        self.prefix_position = _tensor(layout.prefix_position, lm.device)
        self.last_layer = last_layer(lm.model)
        self.stack: Stack | None = None
        if whole == "auto":
            whole = "off" if lm.device.type == "cpu" or impl == "cpu" else "triton"
        stack = None if whole == "off" else stack_of(lm.model, whole)
        with told(f"{type(lm.model).__name__} cannot be run on packed rows"):
            self.prefix = self._prefix_keys_values()
            last = () if self.last_layer is None else self.last_layer.modules()
            if sum(len(self.prefix.get(id(m), ())) for m in last) != 1:
                self.last_layer = None
            if probe:
                self._probe()
                self.last_layer = self.last_layer if self._picks_rows() else None
            if stack is not None and (not probe or self._agrees(stack)):
                self.stack = stack
                self.prefix = self._prefix_keys_values()

    def nll(self, pack: Pack, soft_rows: Tensor) -> Tensor:
        """See `Engine.nll`."""
        if pack.distinct is None and len(pack.cu_rows) - 1 != pack.num_users:
            raise ValueError(
                f"a pack of {pack.num_users} users and {len(pack.cu_rows) - 1} sums must say which "
                "rows are distinct (Pack.distinct)"
            )
        rows: Tensor | None
        rows, which = pack.distinct or (pack.loss_rows, None)
        if self.stack is not None:
            hidden = self._hidden(pack, soft_rows, rows)
            return self.loss(hidden if which is None else hidden[which], pack)
        if self.last_layer is None or not 0 < len(pack.loss_rows) <= _FEW * pack.num_tokens:
            rows = None
        return self.loss(self.hidden_states(pack, soft_rows, rows)[pack.loss_rows], pack)

    def loss(self, hidden: Tensor, pack: Pack) -> Tensor:
        """As `nll`, from the final hidden states [R, D] of the loss rows."""
        return linear_cross_entropy(
            hidden,
            self.lm.head_weight,
            pack.target,
            pack.loss_weight,
            pack.cu_rows,
            bias=self.lm.head_bias,
            softcap=self.lm.softcap,
            scale=self.lm.logit_scale,
        )

    def hidden_states(self, pack: Pack, soft_rows: Tensor, rows: Tensor | None = None) -> Tensor:
        """[T, D] final hidden states of the pack; with `rows` [R] given, of these rows alone."""
        hidden = self._hidden(pack, soft_rows, rows)
        if rows is None or self.stack is None:
            return hidden
        whole = hidden.new_zeros(pack.num_tokens, hidden.shape[1])
        return whole.index_copy(0, rows, hidden)

    def _hidden(self, pack: Pack, soft_rows: Tensor, rows: Tensor | None = None) -> Tensor:
        """As `hidden_states`, but [R, D] from a stack."""
        x = prepend_soft_prompts(
            self.lm.token_embedding,
            soft_rows.reshape(-1, self.lm.hidden_size).to(self.lm.dtype),
            pack.plan,
            scale=self.lm.embedding_scale,
        )
        return self._forward(x, pack.position, self.context(pack), rows)

    def context(self, pack: Pack) -> PackContext:
        """What attention has to know of a pack."""
        return PackContext(
            pack.segment,
            pack.position,
            pack.cu_seqlens,
            pack.max_seqlen,
            self.layout.num_fields,
            self.prefix_segment,
            self.prefix_position,
            prefix=self.prefix,
            near=self.lm.near,
            impl=self.impl,
        )

    def _forward(
        self, x: Tensor, position: Tensor, context: PackContext, rows: Tensor | None = None
    ) -> Tensor:
        if self.stack is not None:
            return self.stack(x, position, context, self._attention_impl(x), rows)
        with ExitStack() as stack:
            stack.enter_context(self.lm.attention(attention.NAME))
            stack.enter_context(attention.reading(context))
            if rows is not None:
                assert self.last_layer is not None
                stack.enter_context(rows_behind_attention(self.last_layer, rows, len(x)))
            out: Any = self.lm.body(
                inputs_embeds=x.unsqueeze(0),
                position_ids=position.long().unsqueeze(0),
                use_cache=False,
            )
        return out.last_hidden_state.squeeze(0)

    def _attention_impl(self, x: Tensor) -> str:
        """By name; a stack leaves nothing to choose."""
        if self.impl != "auto":
            return self.impl
        return "reference" if x.device.type == "cpu" else "triton"

    def _plain(self, lengths: list[int], **options: Any) -> PackContext:
        """Users of so many rows each, all of them behaviour, without a prefix."""
        rows, device = sum(lengths), self.lm.device
        return PackContext(
            torch.full((rows,), self.layout.num_fields, dtype=torch.int32, device=device),
            torch.cat([torch.arange(n, dtype=torch.int32, device=device) for n in lengths]),
            torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device),
            max(lengths),
            self.layout.num_fields,
            self.prefix_segment[:0],
            self.prefix_position[:0],
            near=self.lm.near,
            impl=self.impl,
            **options,
        )

    @torch.no_grad()
    def _probe(self) -> None:
        """Two small users packed against the second alone."""
        lm = self.lm
        x, whole = self._two_users()
        with lm.attention("eager"):
            alone = lm.body(inputs_embeds=x[None, 5:], use_cache=False)
        if not is_near(whole[5:], alone.last_hidden_state[0]):
            raise UnsupportedError(
                f"{type(lm.model).__name__} reads packed users in another way than a user alone; "
                "use em.engine=reference"
            )

    def _two_users(self, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embedded tokens [10, D] of two users, and their final hidden states as `_forward`'s."""
        lm, context = self.lm, self._plain([5, 5])
        x = lm.embed(torch.arange(3, 13, device=lm.device) % lm.token_embedding.shape[0])
        return x, self._forward(x, context.position, context, rows)

    @torch.no_grad()
    def _picks_rows(self) -> bool:
        """Whether the last layer may be run on chosen rows alone."""
        if self.last_layer is None:
            return False
        rows = torch.tensor([6, 9], device=self.lm.device)
        _, whole = self._two_users()
        try:
            _, picked = self._two_users(rows)
        except Exception as e:  # of a library's code, on fewer rows than it was told of
            logger.debug("the last layer is run on all rows: %s", e)
            return False
        return is_near(picked[rows], whole[rows])

    @torch.no_grad()
    def _agrees(self, stack: Stack) -> bool:
        """Whether the stack reads two small users as the modules do."""
        rows = torch.tensor([6, 9], device=self.lm.device)
        _, want = self._two_users()
        self.stack = stack
        (_, whole), (_, picked) = self._two_users(), self._two_users(rows)
        self.stack = None
        if is_near(whole, want) and is_near(picked, want[rows]):
            return True
        name = type(self.lm.model).__name__
        logger.info("%s is not what its layers look like: it runs module by module", name)
        return False

    @torch.no_grad()
    def _prefix_keys_values(self) -> dict[int, list[tuple[Tensor, Tensor]]]:
        """Runs the prefix alone, as if it were one user, under the same mask rule."""
        rows = len(self.layout.prefix_ids)
        calls: list[Call] = []
        context = self._plain([max(rows, 1)], calls=calls)
        if rows:
            context = replace(context, segment=self.prefix_segment, position=self.prefix_position)
        ids = _tensor(self.layout.prefix_ids, self.lm.device).long() if rows else context.position
        self._forward(self.lm.embed(ids.long()), context.position, context)
        prefix: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for call in calls:
            prefix.setdefault(call.module, []).append((call.key[:rows], call.value[:rows]))
        return prefix


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
        sums = len(pack.cu_rows) - 1
        nll = torch.zeros(sums, dtype=token.dtype, device=device)
        own = torch.arange(sums, device=device).repeat_interleave(pack.cu_rows.diff())
        return nll.index_add(0, own, token)

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
        here, there = position[:, :, None], position[:, None, :]
        window, chunk = (max(sizes) for sizes in zip(*self.lm.near.values()))
        near = sees & (there > here - window) if window else sees
        if chunk:
            near = sees & (there // chunk == here // chunk)
        full, narrow = (_additive(x, self.lm.dtype) for x in (sees, near))
        kinds = set(getattr(self.lm.model.config.get_text_config(), "layer_types", None) or [])
        if kinds - {"full_attention"}:
            return {kind: full if kind == "full_attention" else narrow for kind in attention.KINDS}
        return narrow


def is_near(got: Tensor, want: Tensor) -> bool:
    """Whether two readings differ by no more than roundings do."""
    limit = torch.finfo(want.dtype).eps ** 0.5 * float(want.abs().max())
    return bool((got - want).abs().max() <= limit)


def _additive(sees: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(
        ~sees, torch.finfo(dtype).min
    )[:, None]


def _tensor(values: Any, device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device)
