"""Amortised inference: a linear head on the frozen LM's states answers for the posterior E-step.

One forward pass per user, with every soft row at the shared start; its hidden states, summed over
the user's tokens, go through one softmax per field. Sums, because evidence about a user adds up
over tokens as log likelihoods do. The head learns the posterior's probabilities, not its choices,
so it knows when it is unsure; below `em.sure` the posterior E-step decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from userip_fast.codebook.books import Codebook
from userip_fast.core.config import EMConfig
from userip_fast.core.errors import UnsupportedError
from userip_fast.em.posterior import PosteriorEStep
from userip_fast.em.steps import Block, EMState, Profiles
from userip_fast.lm.engine import Engine, PackedEngine
from userip_fast.prompts.packing import Behaviour, iter_packs

_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
_JUDGES = 5  # every fifth user judges


@dataclass(frozen=True)
class Head:
    """log p(z_j = k) = log softmax of `weight[j] @ (x - mean) / scale + bias[j]`.

    Attributes:
        weight, bias: Per field [K_j, F] and [K_j].
        mean, scale: [F] of the features.
    """

    weight: list[Tensor]
    bias: list[Tensor]
    mean: Tensor
    scale: Tensor

    def log_resp(self, x: Tensor) -> list[Tensor]:
        """Per field [U, K_j] from features [U, F]."""
        x = (x - self.mean) / self.scale
        return [(x @ w.T + b).log_softmax(1) for w, b in zip(self.weight, self.bias)]

    def reordered(self, orders: list[Tensor]) -> Head:
        """For codebooks whose codes got other numbers; see `Codebook.reordered`."""
        weight = [w[order] for w, order in zip(self.weight, orders)]
        bias = [b[order] for b, order in zip(self.bias, orders)]
        return Head(weight, bias, self.mean, self.scale)

    def state(self) -> dict[str, Tensor]:
        """Everything, by name."""
        fields = {f"weight.{j}": w for j, w in enumerate(self.weight)}
        fields |= {f"bias.{j}": b for j, b in enumerate(self.bias)}
        return {**fields, "mean": self.mean, "scale": self.scale}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Head:
        """The inverse of `state`; KeyError where something is missing."""
        fields = range(sum(name.startswith("bias.") for name in state))
        return cls(
            [state[f"weight.{j}"] for j in fields],
            [state[f"bias.{j}"] for j in fields],
            state["mean"],
            state["scale"],
        )


@dataclass(frozen=True)
class HeadReport:
    """How well a head does on users whom it was not trained on.

    Attributes:
        users: Their number.
        agreement: Share of them with every code as the posterior E-step has it, the head alone.
        sure: Share of them for whom the head is sure enough to be believed.
        agreement_if_sure: The same share among these; None where there are none.
    """

    users: int
    agreement: float
    sure: float
    agreement_if_sure: float | None


class AmortisedEStep:
    """See the module.

    Args:
        start: [S, D], the shared start.
        slow: For users of whom the head is not sure.
    """

    def __init__(
        self, engine: Engine, start: Tensor, head: Head, slow: PosteriorEStep, config: EMConfig
    ) -> None:
        self.engine, self.start, self.head = engine, start, head
        self.slow, self.config = slow, config

    def run(self, block: Block, codebooks: list[Codebook] | None, state: EMState) -> Profiles:
        """See `EStep.run`. NLL is that of the one pass made: at the shared start, or the slow
        E-step's."""
        x, nll = features(self.engine, block.behaviour, self.start, self.config)
        log_resp = self.head.log_resp(x)
        codes = torch.stack([r.argmax(1) for r in log_resp], dim=1)
        cost = torch.ones(len(nll))
        unsure = (~is_sure(log_resp, self.config.sure)).nonzero().flatten()
        if len(unsure):
            found = self.slow.run(block.select(unsure.numpy()), codebooks, state)
            assert found.code_ids is not None
            assert found.log_resp is not None
            codes[unsure] = found.code_ids
            nll[unsure] = found.nll
            cost[unsure] += found.forward_equivalents
            for r, own in zip(log_resp, found.log_resp):
                r[unsure] = own
        return Profiles(block.hashes, codes, nll, block.weight, cost, log_resp=log_resp)


def is_sure(log_resp: list[Tensor], sure: float) -> Tensor:
    """[U] bool: whether every field's likeliest code has at least probability `sure`."""
    return torch.stack([r.max(1).values.exp() for r in log_resp], dim=1).min(1).values >= sure


def features(
    engine: Engine, behaviour: Behaviour, start: Tensor, config: EMConfig
) -> tuple[Tensor, Tensor]:
    """[U, 3 D] features and [U] NLL, from one pass at the shared start.

    Sums over a user's tokens of the final hidden state, of the same where the token carries loss,
    and of the token's embedding.

    Raises:
        UnsupportedError: The engine gives no hidden states.
    """
    if not isinstance(engine, PackedEngine):
        raise UnsupportedError(
            "em.estep='amortised' reads hidden states, which em.engine='reference' does not give; "
            "take em.engine=auto, packed or graph"
        )
    lm, users = engine.lm, behaviour.num_users
    out = torch.zeros(users, 3, lm.hidden_size)
    nll = torch.zeros(users)
    rows = start.to(lm.device)
    with torch.no_grad():
        for pack in iter_packs(
            behaviour, np.arange(users), engine.layout, lm.device, config.pack_tokens
        ):
            hidden = engine.hidden_states(pack, rows.expand(pack.num_users, -1, -1))
            length = pack.cu_seqlens.diff().long()
            user = torch.repeat_interleave(pack.sequence_user, length)
            token = (pack.plan[: len(user)] >= 0).nonzero().flatten()
            weight = torch.zeros(len(user), device=lm.device)
            weight[pack.loss_rows + 1] = pack.loss_weight
            h = hidden[token].float()
            parts = (h, h * weight[token, None], lm.embed(pack.plan[token].long()).float())
            # Rows of a user lie together; `index_add_` would add them in any order on a GPU.
            count = torch.bincount(user[token], minlength=pack.num_users)
            sums = torch.stack(
                [torch.segment_reduce(p, "sum", lengths=count, initial=0) for p in parts], 1
            )
            index = torch.from_numpy(pack.users)
            out[index] = sums.cpu()
            nll[index] = engine.loss(hidden[pack.loss_rows], pack).cpu()
    return out.flatten(1), nll


def train_head(x: Tensor, log_resp: list[Tensor], config: EMConfig) -> tuple[Head, HeadReport]:
    """A head that answers [U, F] features as the posterior did; judged on every fifth user.

    The least divergence over a penalised linear softmax, by L-BFGS in fp64; the penalty is the one
    best for the users who judge.
    """
    judge = torch.arange(len(x)) % _JUDGES == 0
    mean, scale = x[~judge].mean(0), x[~judge].std(0).clamp_min(1e-6)
    target = [r.double().exp() for r in log_resp]
    z = ((x - mean) / scale).double()
    weight, bias = [], []
    for t in target:
        tried = [_softmax_regression(z[~judge], t[~judge], p) for p in _PENALTIES]
        loss = [_divergence(z[judge], t[judge], *found) for found in tried]
        best = tried[int(np.argmin(loss))]
        weight.append(best[0].float())
        bias.append(best[1].float())
    head = Head(weight, bias, mean, scale)
    found = head.log_resp(x[judge])
    same = torch.stack(
        [a.argmax(1) == b[judge].argmax(1) for a, b in zip(found, log_resp)], dim=1
    ).all(1)
    sure = is_sure(found, config.sure)
    return head, HeadReport(
        users=int(judge.sum()),
        agreement=float(same.double().mean()),
        sure=float(sure.double().mean()),
        agreement_if_sure=float(same[sure].double().mean()) if sure.any() else None,
    )


def _divergence(x: Tensor, target: Tensor, weight: Tensor, bias: Tensor) -> float:
    return float(-(target * (x @ weight.T + bias).log_softmax(1)).sum(1).mean())


def _softmax_regression(x: Tensor, target: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    weight = torch.zeros(target.shape[1], x.shape[1], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(target.shape[1], dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=200, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -(target * (x @ weight.T + bias).log_softmax(1)).sum(1).mean()
        loss = loss + penalty * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()
