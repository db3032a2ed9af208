"""Static steps: packs of other users have the same shapes, and say what packs of their own say."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from userip_fast.core.config import Config, EMConfig
from userip_fast.core.errors import UnavailableError, UnsupportedError
from userip_fast.em.gradient import GradientEStep
from userip_fast.em.readings import Readings, gradients, log_likelihoods
from userip_fast.em.steps import Block, EMState
from userip_fast.lm import FrozenLM, PackedEngine, ReferenceEngine, fp8, graphs, make_engine
from userip_fast.lm.fuse import fuse
from userip_fast.lm.graphs import GraphEngine
from userip_fast.lm.padding import PackSizes, fill
from userip_fast.lm.trace import Architecture, _MetaLM
from userip_fast.prompts.packing import iter_packs, make_pack

CPU, META = torch.device("cpu"), torch.device("meta")
BIG = 1e30


class Rerun:
    """Stands in for CUDA graphs on a CPU: runs again on the same memory, into the same memory."""

    def __init__(self):
        self.recorded = 0

    def warm(self, run):
        return run()

    def record(self, run):
        self.recorded += 1
        kept = torch.full_like(run().detach(), torch.nan)  # recorded is not yet run

        def replay():
            kept.copy_(run().detach())
            return kept

        return replay


def fused(family="llama", dtype=torch.float32):
    lm = FrozenLM(tiny.model(family, dtype), tiny.tokenizer(), source="tiny", quantization="none")
    fuse(lm.model, "reference")
    return lm


def engines(lm, tokens=256, recorder=None, **options):
    """One that is launched and one that is replayed, of the same layers."""
    layout = tiny.template(2, 2).layout(lm.tokenizer)
    packed = PackedEngine(lm, layout, "reference", whole="reference")
    replayed = GraphEngine(
        lm, layout, "reference", tokens=tokens, recorder=recorder or Rerun(), whole="reference",
        **options,
    )  # fmt: skip
    return packed, replayed


def thetas(engine, users):
    random = torch.Generator().manual_seed(1)
    shape = users, engine.layout.num_soft, engine.lm.hidden_size
    return torch.randn(shape, generator=random) * engine.lm.embedding_rms


def step(engine, pack, theta, weight=None):
    x = theta.clone().requires_grad_()
    nll = engine.nll(pack, x)
    loss = nll.sum() if weight is None else (nll * weight).sum()
    (gradient,) = torch.autograd.grad(loss, x)
    return nll.detach(), gradient


def same(got, want, rtol=2e-5):
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().max()))


class Launches(TorchDispatchMode):
    """Every operator with the shapes and numbers it is given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        def told(x):
            return (tuple(x.shape), x.stride(), x.dtype) if isinstance(x, torch.Tensor) else x

        self.seen.append((str(func), str(tree_map(told, (args, kwargs or {})))))
        return func(*args, **(kwargs or {}))


def launches(engine, pack):
    """Of forward and backward on `meta`, where nothing can depend on a value."""
    x = torch.zeros(
        pack.num_users, engine.layout.num_soft, engine.lm.hidden_size, device=META,
        requires_grad=True,
    )  # fmt: skip
    with Launches() as seen:
        nll = engine.nll(pack, x)
        (gradient,) = torch.autograd.grad(nll, x, torch.ones_like(nll))
    assert gradient.shape == x.shape
    return seen.seen


def event_packs(engine, users, tokens):
    """Packs of an event table, whose loss tokens share rows."""
    kinds = tiny.behaviour(engine.layout, users=users, context="independent").by_sequence()[0]
    readings = Readings.of(kinds)
    asked = np.arange(readings.num_readings)
    return [pack for pack, *_ in readings.passes(engine, asked, tokens)]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packs_of_other_users_have_the_same_shapes_everywhere(family, dtype):
    """With the kernels of a GPU, by operators; a value that decided a shape would raise."""
    model = Architecture(tiny.config(family), dtype, "cuda", fused=True).models[0]
    layout = tiny.template(2, 2).layout(tiny.tokenizer())
    engine = PackedEngine(_MetaLM(model), layout, "triton", probe=False)
    assert engine.stack is not None
    behaviour = tiny.behaviour(layout, users=12)
    packs = [make_pack(behaviour, np.arange(*ends), layout, META) for ends in ((0, 5), (5, 12))]
    tables = event_packs(engine, 3, 9999) + event_packs(engine, 9, 9999)
    for a, b in (packs, tables):
        sizes = PackSizes(*map(max, PackSizes.of(a).with_room(), PackSizes.of(b).with_room()))
        static = sizes.empty(META)
        seen = []
        for pack in (a, b):
            assert PackSizes.of(pack).fits(sizes)
            fill(static, pack)
            seen.append(launches(engine, static))
        assert seen[0] == seen[1]
        assert len(seen[0]) > 40
        assert launches(engine, a) != launches(engine, b)  # it can tell


class Kernel:
    """Stands in for a Triton kernel: notes how it is launched."""

    def __init__(self, name, seen):
        self.name, self.seen = name, seen

    def __getitem__(self, grid):
        def told(x):
            return (tuple(x.shape), x.stride(), x.dtype) if isinstance(x, torch.Tensor) else x

        return lambda *args, **options: self.seen.append(
            (self.name, grid, *map(told, args), *sorted(options.items()))
        )


@pytest.fixture
def kernel_launches(monkeypatch):
    """What the layers' kernels are launched with; a value that is looked at raises."""
    from userip_fast.kernels import frozen_block, packed_block, soft_prompt_attention
    from userip_fast.kernels import soft_prompt_attention_shared as shared

    seen = []
    for module in (frozen_block, packed_block, soft_prompt_attention, shared):
        for name in [n for n in vars(module) if n.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Kernel(name, seen))
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy",
                 "nonzero"):  # fmt: skip
        monkeypatch.setattr(torch.Tensor, name, lambda x, *_: pytest.fail("a value was looked at"))
    return seen


@pytest.mark.parametrize("residency", ["resident", "fp8"])
def test_packs_of_other_users_launch_the_same_kernels(residency, request):
    """The layers, forward and backward, as they run on a GPU: not by way of operators."""
    lm = fused()
    if residency == "fp8":
        fp8.convert_linears(lm.model)
    layout = tiny.template(2, 2).layout(lm.tokenizer)
    engine = PackedEngine(lm, layout, "triton", whole="triton", probe=False)
    behaviour = tiny.behaviour(layout, users=12)
    packs = [make_pack(behaviour, np.arange(*ends), layout, CPU) for ends in ((0, 5), (5, 12))]
    sizes = PackSizes(*map(max, *(PackSizes.of(p).with_room() for p in packs)))
    statics = [sizes.empty(CPU) for _ in packs]
    for static, pack in zip(statics, packs, strict=True):
        fill(static, pack)
    seen = request.getfixturevalue("kernel_launches")

    def launched(pack):
        seen.clear()
        x = torch.zeros(pack.num_tokens, lm.hidden_size, requires_grad=True)
        context = engine.context(pack)
        y = engine.stack(x, pack.position, context, "triton", pack.loss_rows)
        torch.autograd.grad(y, x, torch.zeros_like(y))
        return list(seen)

    first, second = (launched(static) for static in statics)
    assert first == second
    names = {launch[0] for launch in first}
    assert {"_fwd_kernel", "_dq_kernel", "_dkdv_kernel", "_work_list_kernel"} <= names
    assert launched(packs[0]) != launched(packs[1])  # it can tell


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("context", ["sequence", "independent"])
def test_what_is_left_over_changes_nothing(family, context):
    """In float64, where the order of sums hides nothing; what lay in the buffers is poison."""
    lm = fused(family, torch.float64)
    layout = tiny.template(2, 2).layout(lm.tokenizer)
    engine = PackedEngine(lm, layout, "reference", whole="reference", probe=False)
    behaviour = tiny.behaviour(engine.layout, users=9, context=context, chunk_tokens=30)
    users = np.array([7, 2, 5, 0])
    theta = thetas(engine, 4).double()
    pack = make_pack(behaviour, users, engine.layout, CPU)
    want = step(engine, pack, theta)
    sizes = PackSizes.of(make_pack(behaviour, np.arange(9), engine.layout, CPU)).with_room()
    static = sizes.empty(CPU)
    for name in ("plan", "segment", "position", "cu_seqlens", "loss_rows", "target", "cu_rows"):
        getattr(static, name).fill_(10**6)
    static.loss_weight.fill_(torch.nan)
    fill(static, pack)
    soft = torch.full((sizes.users, *theta.shape[1:]), BIG, dtype=torch.float64)
    soft[:4] = theta
    nll, gradient = step(engine, static, soft)
    same((nll[:4], gradient[:4]), want, rtol=1e-6)  # an NLL is kept in float32
    torch.testing.assert_close(gradient[:4], want[1], rtol=1e-9, atol=1e-12)
    assert not nll[4:].any()
    assert not gradient[4:].any()


def test_a_smaller_pack_leaves_no_trace_in_the_next(monkeypatch):
    """To the bit: the same sizes, after other users or from nothing."""
    lm = fused()
    behaviour = tiny.behaviour(tiny.template(2, 2).layout(lm.tokenizer), users=20)
    found = []
    for first in (np.arange(3, 20), np.arange(3)):
        _, engine = engines(lm, tokens=2048)
        layout = engine.layout
        sizes = PackSizes.of(make_pack(behaviour, np.arange(20), layout, CPU)).with_room()
        monkeypatch.setattr(PackSizes, "with_room", lambda self, sizes=sizes: sizes)
        pack = make_pack(behaviour, first, layout, CPU, sizes.rows)
        step(engine, pack, thetas(engine, len(first)))
        pack = make_pack(behaviour, np.arange(4), layout, CPU, sizes.rows)
        found.append(step(engine, pack, thetas(engine, 4)))
        monkeypatch.undo()
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_replayed_steps_equal_launched_ones(family):
    """Pack after pack of other users, each with its weights, with and without a gradient."""
    lm, recorder = fused(family), Rerun()
    packed, replayed = engines(lm, recorder=recorder)
    behaviour = tiny.behaviour(packed.layout, users=40)
    kept = []
    for pack in iter_packs(behaviour, np.arange(40), packed.layout, CPU, 256):
        theta = thetas(packed, pack.num_users) * (1 + 0.1 * len(kept))
        weight = torch.linspace(-1, 2, pack.num_users)
        want = step(packed, pack, theta, weight)
        kept.append((step(replayed, pack, theta, weight), want))
        with torch.no_grad():
            kept.append(((replayed.nll(pack, theta),), (packed.nll(pack, theta),)))
    assert len(kept) > 10
    for got, want in kept:  # after all replays: nothing is left in memory that they overwrite
        same(got, want)
    assert 3 <= recorder.recorded <= 9  # a score, a pair, and again where a pack was larger


def test_event_tables_are_replayed():
    lm, recorder = fused(), Rerun()
    packed, replayed = engines(lm, recorder=recorder)
    kinds = tiny.behaviour(packed.layout, users=9, context="independent").by_sequence()[0]
    readings = Readings.of(kinds)
    soft = thetas(packed, 3)
    pairs = np.arange(3 * readings.num_readings)
    asked = {
        "reading": pairs // 3, "codes": pairs % 3, "factor": torch.rand(len(pairs)).double(),
        "weight": torch.randn(readings.num_kinds, 3).double(), "tokens": 256,
    }  # fmt: skip
    found = []
    for engine in (replayed, packed):
        values = log_likelihoods(engine, readings, soft, 256)
        gradient, total = gradients(engine, readings, soft, **asked)
        found.append((values, gradient, torch.tensor(total)))
    same(*found)
    assert recorder.recorded >= 3


def test_a_gradient_e_step_ends_where_the_launched_one_does():
    lm = fused()
    config = EMConfig(steps=4, pack_tokens=256)
    found = []
    for engine in engines(lm):
        behaviour = tiny.behaviour(engine.layout, users=12)
        block = Block(behaviour, np.arange(12, dtype=np.uint64))
        estep = GradientEStep(engine, thetas(engine, 1)[0], config)
        profiles = estep.run(block, None, EMState(0))
        found.append((profiles.theta, profiles.nll))
    same(*found, rtol=2e-3)


def test_a_gradient_is_asked_for_once_and_before_the_next_nll():
    _, engine = engines(fused())
    behaviour = tiny.behaviour(engine.layout, users=6)
    pack = make_pack(behaviour, np.arange(6), engine.layout, CPU)
    x = thetas(engine, 6).requires_grad_()
    first = engine.nll(pack, x)
    second = engine.nll(pack, x)
    with pytest.raises(RuntimeError, match="before the next NLL"):
        torch.autograd.grad(first.sum(), x)
    torch.autograd.grad(second.sum(), x, retain_graph=True)
    with pytest.raises(RuntimeError, match="gradient once"):
        torch.autograd.grad(second.sum(), x)


def test_long_histories_and_small_remainders_are_launched():
    recorder = Rerun()
    packed, replayed = engines(fused(), tokens=256, recorder=recorder)
    behaviour = tiny.behaviour(packed.layout, users=12)
    for users, new in ((12, 0), (4, 2), (1, 0)):
        pack = make_pack(behaviour, np.arange(users), packed.layout, CPU)
        before = recorder.recorded
        same(*(step(e, pack, thetas(e, users)) for e in (replayed, packed)))
        assert recorder.recorded - before == new, PackSizes.of(pack)


class Fails(Rerun):
    def record(self, run):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")


class Forgets(Rerun):
    def record(self, run):
        out = torch.zeros_like(run())
        return lambda: out


@pytest.mark.parametrize("recorder", [Fails, Forgets])
def test_what_cannot_be_recorded_is_launched_or_refused(recorder, caplog):
    packed, replayed = engines(fused(), recorder=recorder(), asked=False)
    behaviour = tiny.behaviour(packed.layout, users=6)
    pack = make_pack(behaviour, np.arange(6), packed.layout, CPU)
    for _ in range(2):
        same(*(step(e, pack, thetas(e, 6)) for e in (replayed, packed)))
    assert len([r for r in caplog.records if "launched, not replayed" in r.message]) == 1
    _, asked = engines(fused(), recorder=recorder())
    with pytest.raises(UnsupportedError, match=r"cannot record a step: .*; use em.engine=packed"):
        step(asked, pack, thetas(asked, 6))


def test_other_layers_are_launched_or_refused(caplog):
    lm = tiny.frozen("gemma2")
    layout = tiny.template(2, 2).layout(lm.tokenizer)
    engine = GraphEngine(lm, layout, tokens=256, asked=False, recorder=Rerun())
    assert engine.off
    assert "do not run as halves" in caplog.text
    with pytest.raises(UnsupportedError, match=r"Gemma2.* do not run as halves; use em.engine=pa"):
        GraphEngine(lm, layout, tokens=256, recorder=Rerun())


def test_auto_is_by_device_and_size(monkeypatch):
    def lm(weights, device, step=None):
        plan = None if step is None else SimpleNamespace(estimate=SimpleNamespace(step=step))
        parts = [SimpleNamespace(in_features=1000, out_features=weights // 1000), object()]
        modules = SimpleNamespace(modules=lambda: parts)
        return SimpleNamespace(device=torch.device(device), model=modules, plan=plan)

    monkeypatch.setattr(graphs, "free_bytes", lambda device: 1000)
    assert graphs.pays(lm(500_000_000, "cuda"), 8192)
    assert graphs.pays(lm(500_000_000, "cuda", 500), 8192)
    assert not graphs.pays(lm(500_000_000, "cuda", 501), 8192)  # memory of two steps
    assert graphs.pays(lm(7_000_000_000, "cuda"), 2048)
    assert not graphs.pays(lm(7_000_000_000, "cuda"), 8192)
    assert not graphs.pays(lm(500_000_000, "cpu"), 8192)
    tiny_lm = tiny.frozen("llama")
    layout = tiny.template().layout(tiny_lm.tokenizer)
    assert type(make_engine("auto", tiny_lm, layout)) is PackedEngine
    assert type(make_engine("packed", tiny_lm, layout)) is PackedEngine
    assert type(make_engine("reference", tiny_lm, layout)) is ReferenceEngine
    assert EMConfig().engine == "auto"


def test_without_a_gpu_graphs_are_refused_in_a_line():
    from userip_fast import fit

    lm = tiny.frozen("llama")
    layout = tiny.template().layout(lm.tokenizer)
    with pytest.raises(UnavailableError, match=r"^em.engine=graph .*on cpu; use em.engine=auto$"):
        make_engine("graph", lm, layout)
    with pytest.raises(UnavailableError, match=r"^em.engine=graph .*on cpu; use em.engine=auto$"):
        GraphEngine(lm, layout, tokens=256)
    config = Config().override({"em.engine": "graph", "lm.device": "cpu"})
    with pytest.raises(UnavailableError, match=r"^em.engine=graph .*on cpu; use em.engine=auto$"):
        fit(interactions(), config=config)  # before the embedded LM is trained


def interactions():
    import pyarrow as pa

    from userip_fast.data import read_interactions

    users = [f"u{i}" for i in range(30) for _ in range(3)]
    items = [f"i{k % 7}" for k in range(90)]
    events = pa.table({"user_id": users, "item_id": items})
    catalogue = pa.table({"item_id": [f"i{k}" for k in range(7)], "title": [*tiny.TEXTS, "rod"]})
    return read_interactions(events, catalogue)


def test_sizes_leave_room_and_stay_near():
    for n in itertools.chain(range(1, 300), (1000, 8191, 8192, 8193)):
        sizes = PackSizes(n, n, n, n, n, 0)
        room = sizes.with_room()
        assert sizes.fits(room)
        assert room.users > n
        assert room.loss_rows <= max(8, n * 9 // 8 + 1)
    full = PackSizes(8192, 27, 27, 2000, 27, 0)
    assert full.with_room().rows == 8192
    assert not PackSizes(8192, 28, 28, 2000, 28, 0).fits(PackSizes(8192, 28, 28, 2000, 28, 0))
    shared = PackSizes(100, 9, 9, 60, 30, 40)
    assert shared.fits(shared.with_room())
    assert not shared.fits(full)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graphs_equal_launched_steps(dtype):
    """Packs of other users one after the other, forward and backward, and an event table."""
    lm = FrozenLM(
        tiny.model("llama", dtype).cuda(), tiny.tokenizer(), source="tiny", quantization="none"
    )
    fuse(lm.model)
    layout = tiny.template(2, 2).layout(lm.tokenizer)
    packed, replayed = PackedEngine(lm, layout), make_engine("graph", lm, layout, 1024)
    behaviour = tiny.behaviour(layout, users=120)
    near = 64 * torch.finfo(dtype).eps
    kept = []
    for pack in iter_packs(behaviour, np.arange(120), layout, lm.device, 1024):
        theta = thetas(packed, pack.num_users).cuda()
        weight = torch.linspace(-1, 2, pack.num_users, device="cuda")
        kept.append((step(replayed, pack, theta, weight), step(packed, pack, theta, weight)))
        with torch.no_grad():
            kept.append(((replayed.nll(pack, theta),), (packed.nll(pack, theta),)))
    assert not replayed.off
    assert len(kept) > 4
    for got, want in kept:
        same(got, want, rtol=near)
    kinds = tiny.behaviour(layout, users=60, context="independent").by_sequence()[0]
    readings = Readings.of(kinds)
    soft = thetas(packed, 3).cuda()
    values = [log_likelihoods(e, readings, soft, 1024) for e in (replayed, packed)]
    same(values[:1], values[1:], rtol=near)
    assert set(replayed.steps) == {False, True}
