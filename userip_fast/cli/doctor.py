"""`userip doctor`: does the packed engine compute, on your LM, what the plain model computes?

The oracle is a float64 copy of the LM that reads one user at a time as one whole prompt with a
dense mask (`ReferenceEngine`). The budget of an error is what the same plain computation in the
LM's own dtype costs, as in `userip_fast.testing`, the worst of several roundings of its input;
where every bit must agree, it is 0.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from userip_fast.core.config import Config
from userip_fast.core.fields import ProfileField
from userip_fast.data import read_interactions
from userip_fast.demo.world import make_world
from userip_fast.lm import FrozenLM, PackedEngine, ReferenceEngine, open_lm
from userip_fast.lm.engine import Engine, check_positions
from userip_fast.lm.fuse import unfuse
from userip_fast.lm.residency import make_resident
from userip_fast.lm.stored import told
from userip_fast.model.prepare import prepare
from userip_fast.prompts.layout import Layout, PromptTemplate, TokenTable
from userip_fast.prompts.packing import Behaviour, build_behaviour, make_pack

FIELDS = (
    ProfileField("hobby", "The user's hobby is", 1),
    ProfileField("background", "The user's background is", 2),
    ProfileField("other", "", 1),
)
_MAX_TOKENS = 48
_ROUNDINGS = 4  # one alone may be lucky by a factor of three, on another CPU or with other products
_WIDE = 1_000_000_000  # parameters above which a bf16 LM is judged by a float32 copy

Context = Literal["sequence", "independent"]


@dataclass(frozen=True)
class Check:
    """One finding: it passes when `error <= budget`."""

    name: str
    error: float
    budget: float

    @property
    def passed(self) -> bool:
        return self.error <= self.budget  # False for NaN


def load(config: Config) -> FrozenLM:
    """The LM that `config.lm` names; "default" is briefly trained on a planted world."""
    if config.lm.path != "default":
        return open_lm(config.lm.path, config.lm)
    world = make_world(256, seed=0)
    data = read_interactions(world.interactions, world.items, time="time")
    brief = replace(config.lm, embedded_tokens=min(config.lm.embedded_tokens, 50_000))
    return prepare(data, replace(config, lm=brief, fields=FIELDS))[0].lm


def diagnose(lm: FrozenLM, *, users: int = 8, seed: int = 0) -> list[Check]:
    """Compares the engines on random users of ragged lengths.

    Args:
        lm: Any loaded LM.
        users: How many users share a pack.
        seed: Of tokens, histories and soft prompts.

    Returns:
        For both behaviour contexts: NLL and theta gradient against the oracle, one user at a time
        against the pack, and four kinds of leak that must be exactly zero (in mixtures of experts,
        rounding).

    Raises:
        MismatchError: The LM's context is too short for the prompts.
        UnsupportedError: The model cannot be run on prompts; the text says why.
    """
    with told(f"{type(lm.model).__name__} cannot be run on prompts"):
        return _diagnose(lm, users, seed)


def _diagnose(lm: FrozenLM, users: int, seed: int) -> list[Check]:
    layout = PromptTemplate(FIELDS).layout(lm.tokenizer)
    check_positions(lm, layout, _MAX_TOKENS)
    random = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(users, layout.num_soft, lm.hidden_size, generator=generator)
    theta = theta.to(lm.device) * lm.embedding_rms
    exact = _wide_copy(lm)
    contexts: tuple[Context, ...] = ("sequence", "independent")
    checks = [_frozen(lm)]
    for context in contexts:
        behaviour = _random_behaviour(lm, layout, context, users, random)
        checks += _against_oracle(lm, exact, layout, behaviour, theta, context)
        checks += _leaks(lm, layout, behaviour, theta, context)
    return checks


def _frozen(lm: FrozenLM) -> Check:
    trainable = sum(p.requires_grad for p in lm.model.parameters())
    return Check("parameters that require grad", trainable, 0)


def _wide_copy(lm: FrozenLM) -> FrozenLM:
    size = sum(p.numel() for p in lm.model.parameters())
    wide = torch.float32 if lm.dtype != torch.float32 and size > _WIDE else torch.float64
    model = copy.deepcopy(lm.model)
    unfuse(model)
    make_resident(model, wide)
    torch.nn.Module.to(model, wide)  # transformers' own `to` refuses models that were quantised
    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "eager"  # the grouped product is not for float64
    return FrozenLM(model, lm.tokenizer, source=lm.source, quantization="none")


def _random_behaviour(
    lm: FrozenLM, layout: Layout, context: Context, users: int, random: np.random.Generator
) -> Behaviour:
    """Histories of 1 to 8 events of 2 to 7 random tokens of the tokenizer's; some are longer than
    what is kept."""
    kinds = 64
    size = random.integers(2, 8, kinds)
    offsets = np.concatenate([[0], np.cumsum(size)])
    table = TokenTable(
        random.choice(list(lm.tokenizer.get_vocab().values()), offsets[-1]).astype(np.int32),
        random.random(offsets[-1]) < 0.4,
        offsets,
    )
    events = random.integers(1, 9, users)
    events[:2] = 1, 24
    return build_behaviour(
        table,
        random.integers(kinds, size=events.sum()),
        np.concatenate([[0], np.cumsum(events)]),
        layout,
        max_tokens=_MAX_TOKENS,
        context=context,
        text_weight=0.3,
        feedback_weight=1.0,
    )


def _against_oracle(
    lm: FrozenLM,
    exact: FrozenLM,
    layout: Layout,
    behaviour: Behaviour,
    theta: Tensor,
    context: Context,
) -> list[Check]:
    packed = PackedEngine(lm, layout, probe=False)
    everyone = np.arange(behaviour.num_users)
    oracle = _one_by_one(ReferenceEngine(exact, layout), behaviour, theta)
    plain = [
        _one_by_one(ReferenceEngine(lm, layout), behaviour, near) for near in _roundings(theta, lm)
    ]
    alone = _one_by_one(packed, behaviour, theta)
    together = _score(packed, behaviour, everyone, theta)
    checks = []
    for i, what in enumerate(("NLL", "theta gradient")):
        budget = 2 * max(_worst(one[i], oracle[i]) for one in plain)
        budget += 4 * torch.finfo(lm.dtype).eps * float(oracle[i].abs().max())
        for name, other in (("the oracle", oracle), ("one user at a time", alone)):
            error = _worst(together[i], other[i])
            checks.append(Check(f"{context}: {what}, pack against {name}", error, budget))
    return checks


def _roundings(theta: Tensor, lm: FrozenLM) -> list[Tensor]:
    """theta, and what it may have been before it was rounded to the LM's dtype."""
    generator = torch.Generator().manual_seed(0)
    eps = torch.finfo(lm.dtype).eps / 2
    noise = [2 * torch.rand(theta.shape, generator=generator) - 1 for _ in range(_ROUNDINGS - 1)]
    return [theta, *(theta * (1 + eps * one.to(theta.device)) for one in noise)]


def _score(
    engine: Engine, behaviour: Behaviour, users: np.ndarray, theta: Tensor
) -> tuple[Tensor, Tensor]:
    """NLL [n] and its gradient [n, S, D] of some users in one pack, in float64."""
    pack = make_pack(behaviour, users, engine.layout, engine.lm.device)
    x = theta[torch.from_numpy(users).to(theta.device)].clone().requires_grad_()
    nll = engine.nll(pack, x)
    (gradient,) = torch.autograd.grad(nll.sum(), x)
    return nll.detach().double(), gradient.double()


def _one_by_one(engine: Engine, behaviour: Behaviour, theta: Tensor) -> tuple[Tensor, Tensor]:
    parts = [_score(engine, behaviour, np.array([u]), theta) for u in range(behaviour.num_users)]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _leaks(
    lm: FrozenLM, layout: Layout, behaviour: Behaviour, theta: Tensor, context: Context
) -> list[Check]:
    """What must not matter, changed; whatever else moves by a single bit is a leak."""
    engine = PackedEngine(lm, layout, probe=False)
    everyone = np.arange(behaviour.num_users)

    # Another user's tokens and soft prompt.
    victim = behaviour.num_users // 2
    own = slice(behaviour.offsets[victim], behaviour.offsets[victim + 1])
    ids = behaviour.ids.copy()
    ids[own] = (ids[own] + 1) % lm.token_embedding.shape[0]
    theirs = theta.clone()
    theirs[victim] *= -2
    before = _score(engine, behaviour, everyone, theta)
    after = _score(engine, replace(behaviour, ids=ids), everyone, theirs)
    others = torch.from_numpy(everyone != victim).to(theta.device)
    moved = max(_worst(a[others], b[others]) for a, b in zip(before, after))
    # Experts read their rows in groups: what else is in a group decides how sums are rounded.
    grouped = hasattr(lm.model.config, "num_experts_per_tok")
    rounding = 16 * torch.finfo(lm.dtype).eps if grouped else 0.0
    budget = rounding * max(float(a.abs().max()) for a in before)
    checks = [Check(f"{context}: another user", moved, budget)]

    pack = make_pack(behaviour, everyone, layout, lm.device)
    with torch.no_grad():
        hidden = engine.hidden_states(pack, theta)
        # Another field: its soft rows may reach behaviour, never the soft rows of a field.
        leak, budget = 0.0, rounding * float(hidden.abs().max())
        for j, rows in enumerate(layout.field_slices):
            theirs = theta.clone()
            theirs[:, rows] *= -2
            soft = (pack.segment < layout.num_fields) & (pack.segment != j)
            leak = max(leak, _worst(engine.hidden_states(pack, theirs)[soft], hidden[soft]))
        checks.append(Check(f"{context}: another field", leak, budget))
        # The future: the last behaviour token of every user, seen from any row before it.
        last = pack.cu_seqlens[1:].long() - 1
        earlier = torch.ones_like(pack.plan, dtype=torch.bool)
        earlier[last] = False
        plan = pack.plan.clone()
        plan[last] = (plan[last] + 1) % lm.token_embedding.shape[0]
        later = engine.hidden_states(replace(pack, plan=plan), theta)
        seen = _worst(later[earlier], hidden[earlier])
        checks.append(Check(f"{context}: the future", seen, budget))
        if context == "independent":
            # The first event of every user, seen from its other events.
            first = pack.segment == layout.num_fields
            plan = torch.where(first, (pack.plan + 1) % lm.token_embedding.shape[0], pack.plan)
            moved_hidden = engine.hidden_states(replace(pack, plan=plan), theta)
            leak = _worst(moved_hidden[~first], hidden[~first])
            checks.append(Check(f"{context}: another event", leak, budget))
    return checks


def _worst(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())
