"""Steps replayed from CUDA graphs, for packs so small that launching a step takes as long as it.

A graph repeats what was launched once, on the same memory. So a pack is copied into one of fixed
sizes (`lm/padding.py`), the largest seen so far with a little room, in which what is left over is
nobody's and changes no other's result; products of more rows may round in another order. Users come
and go, and every shape, launch and address stays.

There is one graph of the NLL alone, and a pair of the NLL and of its gradient, which share memory:
an NLL's gradient has to be asked for before the next NLL. The first replay of each is held against
the launched step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from userip_fast.core.errors import UnavailableError, UnsupportedError
from userip_fast.lm.engine import PackedEngine, is_near
from userip_fast.lm.frozen import FrozenLM
from userip_fast.lm.limits import free_bytes
from userip_fast.lm.padding import PackSizes, fill
from userip_fast.lm.residency import StreamedLinear
from userip_fast.lm.stored import first_line
from userip_fast.prompts.layout import Layout
from userip_fast.prompts.packing import Pack

logger = logging.getLogger("userip_fast.lm")

_WORTH = 2e9 * 8192
"""Weights times rows up to which `em.engine=auto` records graphs. By arithmetic, not measured: so
much takes a large GPU about as long as launching a step takes the host."""


class Recorder(Protocol):
    """Records work on fixed memory once, and repeats it."""

    def warm(self, run: Callable[[], Any]) -> Any:
        """Runs it so often that nothing of it is done for the first time; the last result."""

    def record(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """A function that does again, on the same memory, what `run` does now."""


class CUDAGraphs:
    """`Recorder` of torch's graphs, which share a pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.device = device

    def warm(self, run: Callable[[], Any]) -> Any:
        """See `Recorder`; on another stream, as torch wants it before a capture."""
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            for _ in range(3):
                out = run()
        here.wait_stream(self.stream)
        return out

    def record(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """See `Recorder`."""
        graph = torch.cuda.CUDAGraph()
        # Other threads (of input, of NCCL) may do meanwhile what a capture may not.
        capture = {"pool": self.pool, "stream": self.stream, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(graph, **capture):
            out = run()

        def replay() -> Any:
            graph.replay()
            return out

        return replay


class GraphEngine(PackedEngine):
    """`PackedEngine` whose NLL and gradient are replayed.

    Packs of more rows than `tokens`, and of fewer than half of what a graph has, are launched.

    Args:
        lm, layout, impl, whole: As `PackedEngine`'s.
        tokens: Rows of a pack.
        asked: Whether graphs were asked for; else a step that cannot be recorded is launched, and
            the log says why.
        recorder: CUDA graphs by default.

    Raises:
        UnavailableError: Asked for, and the LM is not on a GPU.
        UnsupportedError: Asked for, and weights are streamed, or the layers are of another form
            than `Stack`'s; from `nll`: the step cannot be recorded.
    """

    def __init__(
        self,
        lm: FrozenLM,
        layout: Layout,
        impl: str = "auto",
        *,
        tokens: int,
        asked: bool = True,
        recorder: Recorder | None = None,
        whole: str = "auto",
    ) -> None:
        if recorder is None:
            check_device("graph", lm.device)
        super().__init__(lm, layout, impl, whole=whole)
        self.tokens, self.asked = max(128, tokens), asked
        self.recorder = recorder or CUDAGraphs(lm.device)
        self.steps: dict[bool, StaticStep] = {}  # by whether loss tokens share rows
        self.turn = 0  # of the graphs' memory: an NLL, or a gradient
        self.off = False
        if any(isinstance(m, StreamedLinear) for m in lm.model.modules()):
            self._refuse("streamed weights choose their buffer as they come")
        elif self.stack is None:
            self._refuse(f"the layers of {type(lm.model).__name__} do not run as halves")

    def nll(self, pack: Pack, soft_rows: Tensor) -> Tensor:
        """See `Engine.nll`. The gradient, once, is to be asked for before the next NLL."""
        wants = torch.is_grad_enabled() and soft_rows.requires_grad
        step = None if self.off else self._step(pack, soft_rows, wants)
        if step is None:
            return super().nll(pack, soft_rows)
        if wants:
            return _Replayed.apply(soft_rows, pack, step)  # type: ignore[no-untyped-call]
        step.load(pack, soft_rows)
        assert step.score is not None
        return step.score()[: len(pack.cu_rows) - 1].clone()

    def _step(self, pack: Pack, soft_rows: Tensor, wants: bool) -> StaticStep | None:
        """Where this pack can be replayed; None where it is to be launched."""
        sizes, kind = PackSizes.of(pack), pack.distinct is not None
        step = self.steps.get(kind)
        if sizes.rows > self.tokens or (step is not None and 2 * sizes.rows < step.sizes.rows):
            return None
        if step is None or not sizes.fits(step.sizes):
            room = sizes.with_room()
            if step is not None:
                room = PackSizes(*map(max, room, step.sizes))
                del self.steps[kind], step  # its memory, before it is wanted again
            step = self.steps[kind] = StaticStep(self, room)
        if (step.forward if wants else step.score) is None:
            try:
                step.load(pack, soft_rows)
                step.record(wants)
            except (RuntimeError, UnsupportedError) as e:
                del self.steps[kind]
                if isinstance(e, torch.OutOfMemoryError) and self.asked:
                    raise
                self._refuse(first_line(e))
                return None
        return step

    def _refuse(self, why: str) -> None:
        self.off = True
        if self.asked:
            raise UnsupportedError(
                f"em.engine=graph cannot record a step: {why}; use em.engine=packed"
            )
        logger.warning("a step is launched, not replayed from a CUDA graph: %s", why)


class StaticStep:
    """A pack of fixed sizes with its soft rows, and what was recorded on them.

    Attributes:
        sizes: Of the pack.
        score, forward, backward: NLL [A] without and with a gradient to come, and the gradient
            [U, S, D]; each in memory that the next replay overwrites. None until recorded.
    """

    def __init__(self, engine: GraphEngine, sizes: PackSizes) -> None:
        lm = engine.lm
        self.engine, self.sizes = engine, sizes
        self.pack = sizes.empty(lm.device)
        self.loaded: Pack | None = None
        self.soft = torch.zeros(
            sizes.users, engine.layout.num_soft, lm.hidden_size, device=lm.device,
            dtype=torch.promote_types(lm.dtype, torch.float32), requires_grad=True,
        )  # fmt: skip
        self.d_nll = torch.ones(sizes.sums, device=lm.device)
        self.nll = self.d_nll  # of the pass that `backward` follows
        self.score: Callable[[], Tensor] | None = None
        self.forward: Callable[[], Tensor] | None = None
        self.backward: Callable[[], Tensor] | None = None

    @torch.no_grad()
    def load(self, pack: Pack, soft_rows: Tensor) -> int:
        """Puts a pack in the place of the one before; the number of this turn."""
        if pack is not self.loaded:
            fill(self.pack, pack)
            self.loaded = pack
        self.soft[: pack.num_users] = soft_rows
        self.engine.turn += 1
        return self.engine.turn

    def record(self, wants: bool) -> None:
        """Records the NLL, and with `wants` its gradient, on what is loaded.

        Raises:
            UnsupportedError: Replayed they say something else.
        """
        recorder = self.engine.recorder
        if wants:
            launched = recorder.warm(lambda: (self._forward().detach(), self._backward()))
            launched = [x.clone() for x in launched]
            self.forward = recorder.record(self._forward)
            self.backward = recorder.record(self._backward)
            replayed = [self.forward().detach().clone(), self.backward()]
        else:
            launched = [recorder.warm(self._score).clone()]
            self.score = recorder.record(self._score)
            replayed = [self.score()]
        if not all(is_near(a, b) for a, b in zip(replayed, launched, strict=True)):
            self.score = self.forward = self.backward = None
            raise UnsupportedError("replayed it says something else")
        logger.info("recorded a step of %s, gradient: %s", self.sizes, wants)

    @torch.no_grad()
    def _score(self) -> Tensor:
        return PackedEngine.nll(self.engine, self.pack, self.soft)

    @torch.enable_grad()
    def _forward(self) -> Tensor:
        self.nll = PackedEngine.nll(self.engine, self.pack, self.soft)
        return self.nll

    def _backward(self) -> Tensor:
        (gradient,) = torch.autograd.grad(self.nll, self.soft, self.d_nll)
        return gradient


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, soft_rows: Tensor, pack: Pack, step: StaticStep) -> Tensor:
        ctx.turn, ctx.step = step.load(pack, soft_rows), step
        ctx.users, ctx.dtype = pack.num_users, soft_rows.dtype
        assert step.forward is not None
        return step.forward().detach()[: len(pack.cu_rows) - 1].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        step: StaticStep = ctx.step
        if ctx.turn != step.engine.turn:
            raise RuntimeError(
                "em.engine=graph keeps one step: ask for an NLL's gradient once, and before the "
                "next NLL, or use em.engine=packed"
            )
        step.engine.turn += 1
        (d_nll,) = grads
        step.d_nll[: len(d_nll)] = d_nll
        step.d_nll[len(d_nll) :] = 0.0
        assert step.backward is not None
        return step.backward()[: ctx.users].to(ctx.dtype, copy=True), None, None


def check_device(name: str, device: torch.device) -> None:
    """Raises UnavailableError where the engine called `name` cannot run on `device`."""
    if name == "graph" and device.type != "cuda":
        raise UnavailableError(
            f"em.engine=graph replays CUDA graphs, and the LM is on {device}; use em.engine=auto"
        )


def pays(lm: FrozenLM, tokens: int) -> bool:
    """Whether packs of `tokens` rows are small enough for this LM on this device, and there is room
    for the graphs' memory beside that of launched packs."""
    if lm.device.type != "cuda":
        return False
    if lm.plan is not None and 2 * lm.plan.estimate.step > free_bytes(lm.device):
        return False
    weights = sum(
        m.in_features * m.out_features
        for m in lm.model.modules()
        if hasattr(m, "in_features") and hasattr(m, "out_features")
    )
    return bool(weights * tokens <= _WORTH)
