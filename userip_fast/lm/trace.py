"""How much memory an EM step takes, before it is taken.

The activations of a step are not estimated by a formula per model but traced: two and three layers
of the architecture are built on the `meta` device, where tensors have sizes and no memory, the
packed engine runs forward and backward on them, and the largest sum of live tensors is noted. More
layers add the difference, so Llama-70B is traced as fast as a toy. What our own operators use
inside is declared beside them. Nothing is fitted to a measurement; `tests/lm/test_memory.py` holds
the prediction against measurements.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from userip_fast.core.config import Config
from userip_fast.lm import attention
from userip_fast.lm.engine import PackedEngine
from userip_fast.lm.fuse import fuse
from userip_fast.lm.layers import layer_of
from userip_fast.lm.masks import body
from userip_fast.lm.residency import set_recompute, settle
from userip_fast.ops._dispatch import unannounced
from userip_fast.ops.linear_cross_entropy import scratch_bytes as head_scratch
from userip_fast.ops.soft_prompt_attention import attention_backward, attention_forward
from userip_fast.prompts.layout import Layout
from userip_fast.prompts.packing import Behaviour, Pack, make_pack

MIN_PACK = 256
_NF4_BYTES = 0.5 + (1 + 4 / 256) / 64  # codes; 8-bit scales of 64; fp32 scales of 256 of those


@dataclass(frozen=True)
class Workload:
    """What an E-step asks of the LM.

    Attributes:
        pack_tokens: Rows of a pack, T.
        user_tokens: Rows of one user's longest sequence.
        soft_rows, prefix_rows: S and P.
        loss_share: Share of the rows that carry loss.
        block_users: Users whose soft prompts and optimiser state are on the device.
    """

    pack_tokens: int = 8192
    user_tokens: int = 256
    soft_rows: int = 2
    prefix_rows: int = 16
    loss_share: float = 1.0
    block_users: int = 4096

    def of_size(self, pack_tokens: int) -> Workload:
        """The same with other packs."""
        return replace(self, pack_tokens=pack_tokens)

    @classmethod
    def of(cls, config: Config) -> Workload:
        """That of a run with these settings."""
        soft = sum(f.num_virtual_tokens for f in config.fields)
        return cls(
            pack_tokens=config.em.pack_tokens,
            user_tokens=config.told.token_limits[1] + soft,
            soft_rows=soft,
            block_users=config.em.block_users,
        )


@dataclass(frozen=True)
class Estimate:
    """Bytes on the device during a step.

    Attributes:
        weights: Of the frozen LM, its head and embeddings included.
        buffers: The two layers that `streamed` holds dense.
        state: Soft prompts of a block and their optimiser state.
        step: Activations, gradients and scratch at the worst moment of forward and backward.
    """

    weights: int
    buffers: int
    state: int
    step: int

    @property
    def total(self) -> int:
        return self.weights + self.buffers + self.state + self.step


class Architecture:
    """A causal LM by its configuration alone: sizes of its weights, and traced steps.

    Args:
        hf_config: A Hugging Face configuration.
        dtype: Of the activations.
        device_type: "cuda" or "cpu"; operators use other scratch on either.
        four_bit: Whether the linears of the layers are stored in NF4.
        fused: Whether the blocks' element-wise parts are fused (`userip_fast.lm.fuse`).
    """

    def __init__(
        self,
        hf_config: Any,
        dtype: torch.dtype,
        device_type: str,
        *,
        four_bit: bool = True,
        fused: bool = False,
    ) -> None:
        self.hf_config, self.dtype, self.device_type = hf_config, dtype, device_type
        self.four_bit, self.fused = four_bit, fused
        text = hf_config.get_text_config()
        self.num_layers = int(text.num_hidden_layers)
        self.hidden_size = int(text.hidden_size)
        # Two layers at least, so that one is neither the first nor the last to be recomputed.
        self.models = [self._build(n) for n in (2, 3)]

    def weights(self, residency: str) -> tuple[int, int]:
        """Bytes of weights and of the stream's buffers."""
        linear, other = zip(*(_values(m) for m in self.models))
        layer = linear[1] - linear[0]
        linears, rest = self._of_all_layers(linear), self._of_all_layers(other)
        size = self.dtype.itemsize
        per_value = {"resident": size, "fp8": 2, "streamed": _NF4_BYTES if self.four_bit else size}
        buffers = 2 * layer * size if residency == "streamed" else 0
        return int(linears * per_value[residency]) + rest * size, buffers

    def estimate(self, residency: str, recompute: bool, work: Workload) -> Estimate:
        """What a step on a full pack takes."""
        weights, buffers = self.weights(residency)
        state = 12 * work.block_users * work.soft_rows * self.hidden_size
        return Estimate(weights, buffers, state, self.step(recompute, work))

    @functools.cache  # noqa: B019  (a handful of architectures live, as long as the process)
    def step(self, recompute: bool, work: Workload) -> int:
        """Peak bytes above what lies there before the step."""
        return self._of_all_layers([self._trace(m, recompute, work) for m in self.models])

    def largest_pack(self, recompute: bool, work: Workload, free: int) -> int:
        """Most rows, a multiple of 64, whose step takes at most `free` bytes; 0 if none."""
        full = work.of_size(max(work.pack_tokens, 2 * MIN_PACK))
        half = work.of_size(full.pack_tokens // 2)
        high, low = self.step(recompute, full), self.step(recompute, half)
        per_row = (high - low) / (full.pack_tokens - half.pack_tokens)
        return max(0, int((free - high) / per_row + full.pack_tokens) // 64 * 64)

    def _of_all_layers(self, two_and_three: Any) -> int:
        two, three = two_and_three
        return int(two + (self.num_layers - 2) * (three - two))

    def _build(self, layers: int) -> Any:
        from transformers import AutoModelForCausalLM

        attention.register()
        config = copy.deepcopy(self.hf_config)
        text = config.get_text_config()
        for name, value in list(vars(text).items()):  # what configs list layer by layer
            if isinstance(value, list) and len(value) == text.num_hidden_layers:
                setattr(text, name, [value[i % len(value)] for i in range(layers)])
        text.num_hidden_layers = layers
        rope = getattr(text, "rope_parameters", None)
        if isinstance(rope, dict) and rope.get("rope_type") in ("dynamic", "longrope"):
            rope["rope_type"] = "default"  # no larger, and chosen without a look at the positions
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation=attention.NAME, dtype=self.dtype
            )
        model.requires_grad_(False).eval()
        if self.fused:
            fuse(model, "reference", try_out=False)
        return model

    def settle(self, residency: str) -> None:
        """Brings the traced models' linears into `residency`, as a load does."""
        for model in self.models:
            settle(model, residency, self.dtype)

    def _trace(self, model: Any, recompute: bool, work: Workload) -> int:
        set_recompute(model, recompute)
        with self.step_on_meta(model, work) as (nll, theta), self._tracker() as tracker:
            torch.autograd.grad(nll().sum(), theta)
        return tracker.peak

    def _tracker(self) -> _PeakTracker:
        return _PeakTracker(self.device_type)

    @contextmanager
    def step_on_meta(
        self, model: Any, work: Workload
    ) -> Iterator[tuple[Callable[[], Tensor], Tensor]]:
        """A step of one of `models` to be run inside it: the users' NLL as a function, and what it
        is differentiated by."""
        impl = "cpu" if self.device_type == "cpu" else "triton"
        layout, pack = sample_pack(work, torch.device("meta"))
        lm: Any = _MetaLM(model)
        theta = torch.empty(
            pack.num_users, work.soft_rows, self.hidden_size, device="meta", requires_grad=True
        )
        with unannounced(), _GroupedProducts():  # type: ignore[no-untyped-call]
            engine = PackedEngine(lm, layout, impl, probe=False)
            yield (lambda: engine.nll(pack, theta)), theta


class _GroupedProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Experts' grouped product [S, K] x [E, K, N] on `meta` in any dtype: torch has it in bf16."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket.__name__ == "_grouped_mm" and args[0].dim() == 2:
            return args[0].new_empty(args[0].shape[0], args[1].shape[-1])
        return func(*args, **(kwargs or {}))


class _PeakTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Largest sum of storages made inside it that live at once, with operators' scratch."""

    def __init__(self, device_type: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device_type = device_type
        self.live = self.peak = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.known.update(s for s in _storages((args, kwargs)))
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage not in self.known:
                self.known.add(storage)
                size = storage.nbytes()
                self.live += size
                weakref.finalize(storage, self._free, size).atexit = False
        scratch = _SCRATCH.get(func.overloadpacket.__name__)
        extra = scratch(self.device_type, args) if scratch else 0
        self.peak = max(self.peak, self.live + extra)
        return out

    def _free(self, size: int) -> None:
        self.live -= size


def _storages(tree: Any) -> Iterator[Any]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf.untyped_storage()


def _attention_scratch(device_type: str, args: Any, op: Any, backward: bool) -> int:
    if device_type != "cpu":
        return 0  # beyond the outputs, a list of tiles
    from userip_fast.ops.soft_prompt_attention.cpu import scratch_bytes

    *tensors, context, _ = op.arguments.grouped(args)
    q, k, v = tensors[backward : backward + 3]
    return scratch_bytes(q, k, v, context, backward=backward)


_SCRATCH = {
    "linear_cross_entropy": lambda device_type, args: head_scratch(
        device_type, args[0], args[1], need_grad=args[8]
    ),
    "soft_prompt_attention": lambda device_type, args: _attention_scratch(
        device_type, args, attention_forward, False
    ),
    "soft_prompt_attention_backward": lambda device_type, args: _attention_scratch(
        device_type, args, attention_backward, True
    ),
}


class _MetaLM:
    """What the packed engine needs of a `FrozenLM`, without values."""

    def __init__(self, model: Any) -> None:
        embedding = model.get_input_embeddings()
        head = model.get_output_embeddings()
        self.model, self.body, self.device = model, body(model), torch.device("meta")
        self.token_embedding, self.dtype = embedding.weight, embedding.weight.dtype
        self.hidden_size = embedding.weight.shape[1]
        self.embedding_scale = float(getattr(embedding, "scalar_embed_scale", 1.0))
        self.head_weight, self.head_bias = head.weight, getattr(head, "bias", None)
        text = model.config.get_text_config()
        self.softcap = float(getattr(text, "final_logit_softcapping", None) or 0.0)
        self.logit_scale = 1.0
        self.near: dict[int, Any] = {}
        self.embed = embedding

    def attention(self, name: str) -> Any:
        return attention.running(self.model, name)


def sample_pack(work: Workload, device: torch.device) -> tuple[Layout, Pack]:
    """Users of equal length, as many as fill a pack, and the layout of their prompts."""
    soft = work.soft_rows
    prefix, rows = (np.arange(n, dtype=np.int32) for n in (work.prefix_rows, soft))
    layout = Layout(prefix, prefix, prefix, rows, rows, (slice(0, soft),))
    users = max(1, work.pack_tokens // work.user_tokens)
    offsets = np.linspace(0, work.pack_tokens - users * soft, users + 1).astype(np.int64)
    ids = np.zeros(offsets[-1], np.int32)
    has_loss = np.arange(len(ids)) % 1024 < work.loss_share * 1024
    has_loss[offsets[:-1]] = False
    behaviour = Behaviour(
        ids,
        ids + layout.num_fields,
        ids + layout.behaviour_start,
        has_loss.astype(np.float32),
        offsets,
        np.ones(users, np.int64),
    )
    return layout, make_pack(behaviour, np.arange(users), layout, device)


def _values(model: nn.Module) -> tuple[int, int]:
    """Values in the layers' matrices, and in everything else."""
    parameters = {id(p): (n, p) for n, p in model.named_parameters()}.values()  # tied ones once
    sizes = [(layer_of(n) != n and p.dim() == 2, p.numel()) for n, p in parameters]
    return sum(n for linear, n in sizes if linear), sum(n for linear, n in sizes if not linear)
