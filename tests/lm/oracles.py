"""What an LM says of users by transformers alone, in float64: no code of the engine.

The model is built anew from its config and given the loaded weights; attention is its own eager
code, masks are its own, positions are those of plain sequences. With several fields a hook hides
the columns that the rows of a field must not see.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor


def wide_copy(config: Any, loaded: Any) -> Any:
    """The model of `config` with the weights of a loaded one, in float64 and eager attention."""
    config = copy.deepcopy(config)
    config._experts_implementation = "eager"
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.to(torch.float64).eval().requires_grad_(False)
    weights = {k: v.double() for k, v in loaded.state_dict().items()}
    for name, module in model.named_modules():
        # GPT-2 keeps its dense weights transposed; in 4 bits they are linears like any.
        if type(module).__name__ == "Conv1D" != type(loaded.get_submodule(name)).__name__:
            weights[f"{name}.weight"] = weights[f"{name}.weight"].T
    lacking = model.load_state_dict(weights, strict=False)
    assert not lacking.unexpected_keys, lacking.unexpected_keys[:3]
    tied = getattr(model, "_tied_weights_keys", None) or ()
    assert not [k for k in lacking.missing_keys if not k.endswith(".weight") or not tied]
    return model


def read(model: Any, prompt: Any, tokens: list[list[int]], weight: list[list[float]], theta: Tensor,
         *, independent: bool) -> Tensor:  # fmt: skip
    """NLL of one user.

    Args:
        prompt: Rows in prompt order: ("bos" or "name", field, token id) or ("soft", field, row).
        tokens: Of each event.
        weight: Loss weights of these.
        theta: [S, D], the soft rows.
        independent: Whether each event is read behind the prompt alone.
    """
    embed = model.get_input_embeddings()
    total = torch.zeros((), dtype=torch.float64)
    reads = [([t], [w]) for t, w in zip(tokens, weight, strict=True)]
    if not independent:
        reads = [(tokens, weight)]
    for parts, losses in reads:
        ids = [i for part in parts for i in part]
        loss = [x for part in losses for x in part]
        rows = [
            theta[what] if kind == "soft" else embed(torch.tensor(what)) for kind, _, what in prompt
        ]
        x = torch.cat([torch.stack(rows), embed(torch.tensor(ids))])
        owner = [-1 if kind == "bos" else field for kind, field, _ in prompt] + [99] * len(ids)
        hidden = torch.tensor([[c not in (-1, r) and r != 99 for c in owner] for r in owner])
        with hiding(model, hidden):
            logits = model(inputs_embeds=x[None], use_cache=False).logits[0]
        log_p = F.log_softmax(logits[len(prompt) - 1 : -1], -1)
        picked = log_p.gather(1, torch.tensor(ids)[:, None]).squeeze(1)
        total = total - (picked * torch.tensor(loss, dtype=torch.float64)).sum()
    return total


def of_users(model: Any, layout: Any, behaviour: Any, theta: Tensor) -> Tensor:
    """[U] NLL of all users, from the prompt of a `Layout` and a `Behaviour`'s tokens."""
    prompt: list[Any] = [None] * layout.behaviour_start
    for i, at, j in zip(layout.prefix_ids, layout.prefix_position, layout.prefix_segment):
        prompt[at] = ("bos" if j < 0 else "name", int(j), int(i))
    for row, (at, j) in enumerate(zip(layout.soft_position, layout.soft_segment)):
        prompt[at] = ("soft", int(j), row)
    users = []
    for u in range(behaviour.num_users):
        own = slice(behaviour.offsets[u], behaviour.offsets[u + 1])
        cuts = np.flatnonzero(np.diff(behaviour.segment[own])) + 1
        tokens, weight = (
            [part.tolist() for part in np.split(values[own], cuts)]
            for values in (behaviour.ids, behaviour.weight)
        )
        # Events of one segment each are independent; one segment for all is a sequence.
        independent = len(tokens) > 1
        users.append(read(model, prompt, tokens, weight, theta[u], independent=independent))
    return torch.stack(users)


class hiding:
    """Within it, attention's own masks hide these cells [n, n] too."""

    def __init__(self, model: Any, hidden: Tensor) -> None:
        self.model, self.hidden = model, hidden
        self.handles: list[Any] = []
        self.masks = 0

    def __enter__(self) -> None:
        if not self.hidden.any():  # plain causal: nothing of the model is touched
            return
        for module in self.model.modules():
            names = list(inspect.signature(type(module).forward).parameters)
            if "attention_mask" in names and module is not self.model:
                at = names.index("attention_mask") - 1
                hook = lambda _, args, kwargs, at=at: self._hide(at, args, kwargs)  # noqa: E731
                self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _hide(self, at: int, args: Any, kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask") if at >= len(args) else args[at]
        if not isinstance(mask, Tensor) or mask.shape[-2:] != self.hidden.shape:
            return args, kwargs  # of a whole model, which is given none
        low = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        mask = mask.masked_fill(self.hidden, low)
        self.masks += 1
        if at >= len(args):
            return args, {**kwargs, "attention_mask": mask}
        return (*args[:at], mask, *args[at + 1 :]), kwargs

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()
        layers = self.model.config.get_text_config().num_hidden_layers
        assert self.masks >= layers or not self.hidden.any()
