"""The published recipe, as its public code runs it, on our data path: the honest baseline.

Random soft prompts U(-0.1, 0.1) and codewords U(-1/K, 1/K); batches of 8 users; loss = mean token
NLL of the batch + 0.5 * sum_j mse(stopgrad(theta_j), C_j[z_j]); one AdamW over every row of theta
and every codeword, so rows outside the batch move too (momentum, weight decay). Source: arXiv
2408.06577 and its repository. Differences, for a fair comparison: our field mask and prompt layout,
and the fields' own codebook sizes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from userip_fast.codebook.books import Codebook
from userip_fast.core.config import EMConfig
from userip_fast.core.progress import progress
from userip_fast.em.gradient import assign
from userip_fast.em.steps import Block, Profiles
from userip_fast.lm.engine import Engine
from userip_fast.prompts.layout import ProfileField
from userip_fast.prompts.packing import iter_packs, make_pack


def run_paper(
    block: Block,
    engine: Engine,
    fields: tuple[ProfileField, ...],
    config: EMConfig,
    codebooks: list[Codebook] | None = None,
    show: bool = False,
) -> tuple[list[Codebook], Profiles]:
    """Trains thetas of all users and the codebooks jointly; with `codebooks` given they stay as
    they are.

    Returns:
        The codebooks, and the users' profiles.
    """
    lm, slices = engine.lm, engine.layout.field_slices
    users = block.behaviour.num_users
    generator = torch.Generator().manual_seed(config.seed)
    theta = _uniform((users, engine.layout.num_soft, lm.hidden_size), 0.1, generator).to(lm.device)
    theta.requires_grad_()
    learn = codebooks is None
    if codebooks is None:
        words = [
            _uniform(
                (f.codebook_size, f.num_virtual_tokens * lm.hidden_size),
                1 / f.codebook_size,
                generator,
            )
            .to(lm.device)
            .requires_grad_()
            for f in fields
        ]
    else:
        words = [book.codewords.to(lm.device) for book in codebooks]
    optimizer = torch.optim.AdamW([theta, *(words if learn else [])], lr=config.paper_lr)
    random = np.random.default_rng(config.seed)
    with progress("paper's recipe", users * config.paper_epochs, "users", show) as bar:
        for _ in range(config.paper_epochs):
            order = random.permutation(users)
            for i in range(0, users, config.paper_batch):
                pack = make_pack(
                    block.behaviour, order[i : i + config.paper_batch], engine.layout, lm.device
                )
                x = theta[torch.from_numpy(pack.users).to(lm.device)]
                nll = engine.nll(pack, x).sum() / pack.loss_weight.sum()
                loss = nll
                for c, s in zip(words, slices):
                    flat = x[:, s].flatten(1).detach()
                    code = torch.cdist(flat, c.detach()).argmin(1)
                    loss = loss + config.paper_vq_weight * (flat - c[code]).square().mean()
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                bar.advance(pack.num_users, nll=float(nll.detach()))
    books = [Codebook(c.detach().cpu()) for c in words]
    found = theta.detach().cpu()
    return books, Profiles(
        hashes=block.hashes,
        code_ids=assign(books, found, slices),
        nll=_nll(block, engine, theta.detach(), config),
        weight=block.weight,
        forward_equivalents=torch.full((users,), 2.0 * config.paper_epochs),
        theta=found,
    )


@torch.no_grad()
def _nll(block: Block, engine: Engine, theta: Tensor, config: EMConfig) -> Tensor:
    out = torch.empty(len(theta))
    everyone = np.arange(len(theta))
    for pack in iter_packs(
        block.behaviour, everyone, engine.layout, theta.device, config.pack_tokens
    ):
        index = torch.from_numpy(pack.users)
        out[index] = engine.nll(pack, theta[index.to(theta.device)]).cpu()
    return out


def _uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> Tensor:
    return (torch.rand(shape, generator=generator) * 2 - 1) * bound
