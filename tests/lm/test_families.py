"""Families of language models: each is exact or refused by name, and never a traceback.

python tests/lm/test_families.py > docs/models.md
"""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script

import oracles
import tiny
import torch
import transformers as tf
from families import ATTENTION, EXACT, NOT_HERE, OTHER, REFUSED, Family

from userip_fast.core.config import LMConfig
from userip_fast.core.errors import UnsupportedError
from userip_fast.lm import FrozenLM, PackedEngine, open_lm
from userip_fast.prompts.packing import make_pack

DOCS = Path(__file__).resolve().parents[2] / "docs" / "models.md"
READINGS = ((1, "sequence"), (3, "sequence"), (3, "independent"))
NLL, GRADIENT = 1e-6, 1e-5
THIS = tf.__version__.startswith("5.24.")
"""Of another transformers it is asked that each family is exact, refused, or not there."""
UNPREDICTED = {"DBRX", "JetMoE", "LongCat-Flash (MLA)"}
"""Whose experts choose rows by value: what a step takes cannot be traced."""
NOT_IN_4_BITS = {"LongCat-Flash (MLA)"}
"""Whose router reads its weight past its module: bitsandbytes cannot hold it."""


def errors(lm: FrozenLM, family: Family, readings: Any) -> tuple[float, float]:
    """Largest relative errors of NLL and theta gradient of users in a pack, over the readings."""
    wide = oracles.wide_copy(family.config(), lm.model)
    worst = [0.0, 0.0]
    for fields, context in readings:
        layout = tiny.template(fields).layout(lm.tokenizer)
        behaviour = tiny.behaviour(layout, 2, context=context)
        random = torch.Generator().manual_seed(3)
        theta = torch.randn(2, layout.num_soft, lm.hidden_size, generator=random)
        theta *= lm.embedding_rms
        x, y = theta.clone().requires_grad_(), theta.double().requires_grad_()
        nll = PackedEngine(lm, layout).nll(make_pack(behaviour, range(2), layout, lm.device), x)
        want = oracles.of_users(wide, layout, behaviour, y)
        (got_gradient,) = torch.autograd.grad(nll.sum(), x)
        (gradient,) = torch.autograd.grad(want.sum(), y)
        found = (
            float(((nll - want).abs() / want.abs()).max()),
            float((got_gradient - gradient).abs().max() / gradient.abs().max()),
        )
        worst = [max(a, b) for a, b in zip(worst, found)]
    return worst[0], worst[1]


def load(family: Family, folder: Path, quantization: str = "none") -> FrozenLM:
    if not (folder / "config.json").exists():
        try:
            family.save(folder)
        except Exception as e:  # of an older or newer library, which knows no such family
            if THIS:
                raise
            pytest.skip(f"transformers {tf.__version__} cannot make it ({type(e).__name__})")
    return open_lm(str(folder), LMConfig(quantization=quantization))


@pytest.mark.parametrize("name", EXACT)
def test_packed_users_are_read_as_float64_reads_each_alone(
    name: str, tmp_path: Path, recwarn: Any
) -> None:
    try:
        lm = load(EXACT[name], tmp_path)
    except UnsupportedError as e:
        if THIS:
            raise
        pytest.skip(f"refused with transformers {tf.__version__}: {e}")
    assert not THIS or (lm.plan is None) == (name in UNPREDICTED)
    nll, gradient = errors(lm, EXACT[name], READINGS)
    assert nll <= NLL
    assert gradient <= GRADIENT
    if name in NOT_IN_4_BITS:
        return
    nll, gradient = errors(load(EXACT[name], tmp_path, "nf4-double"), EXACT[name], READINGS[1:2])
    assert nll <= NLL
    assert gradient <= GRADIENT


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused_by_name(name: str, tmp_path: Path) -> None:
    layout = tiny.template(3).layout(tiny.tokenizer())
    why = re.escape(REFUSED[name]) if THIS else ""
    with pytest.raises(UnsupportedError, match=why) as found:
        PackedEngine(load({**ATTENTION, **OTHER}[name], tmp_path), layout)
    assert "\n" not in str(found.value)


def test_families_with_attention_are_read() -> None:
    assert not set(OTHER) - set(REFUSED)
    assert len(EXACT) >= 0.85 * len(ATTENTION)


def test_no_causal_lm_of_transformers_is_forgotten() -> None:
    auto: Any = pytest.importorskip("transformers.models.auto.modeling_auto")
    known = getattr(auto, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", None)
    if known is None or not THIS:
        pytest.skip("the families are those of transformers 5.24")
    here = {family.kind for family in {**ATTENTION, **OTHER}.values()}
    there = {kind for kinds in NOT_HERE.values() for kind in kinds.split()}
    assert not here & there
    assert set(known) == (here | there) & set(known)


def test_a_trace_that_fails_is_told_and_left_out(tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING, logger="userip_fast.lm"):
        lm = load(EXACT["JetMoE"], tmp_path)
    assert lm.plan is None
    assert "what a step takes cannot be predicted (UnsupportedError: JetMoe" in caplog.text


def test_a_rope_of_two_lengths_is_read_up_to_the_shorter(tmp_path: Path) -> None:
    lm = load(EXACT["Phi-4-mini (longrope, partial rotary)"], tmp_path)
    assert lm.max_positions == 128
    assert load(EXACT["Llama, dynamic rope"], tmp_path / "other").max_positions == 256


HEAD = """\
# Which language models load

Written by `python tests/lm/test_families.py`, whose tests load a small random model of each family
that transformers 5.24 has for text (encoders, and models of images or sound, apart). Exact: the
largest relative errors of NLL and theta gradient of users in a pack, in float32, against two
computations in float64 that share no code with the engine: the model's own code on one user's
prompt as it is, with one field; and the same with three fields, where a hook hides from a field's
rows what they must not see, in both contexts. At most 1e-6 and 1e-5 pass. The last two columns are
of linears in 4 bits (nf4-double), against those same values. `userip lm PATH` says what your model
is, `userip doctor --lm PATH` looks closer.

In mixtures of experts a pack decides how an expert's rows are grouped, and so how sums are rounded:
last bits of a user move with his company. None of these drops tokens, so nothing else moves.
Experts that are one tensor stay as they are; 4 bits reach the linears beside them.
"""


def row(name: str, family: Family, folder: Path) -> str:
    kind = type(family.model()).__name__
    if name in REFUSED:
        return f"| {name} | {kind} | refused: {REFUSED[name]} | | | |"
    figures = errors(load(family, folder), family, READINGS)
    if name in NOT_IN_4_BITS:
        return f"| {name} | {kind} | {figures[0]:.0e} | {figures[1]:.0e} | no | |"
    figures += errors(load(family, folder, "nf4-double"), family, READINGS[1:2])
    return f"| {name} | {kind} | " + " | ".join(f"{x:.0e}" for x in figures) + " |"


def table(rows: list[str]) -> str:
    share = f"{len(EXACT)} of {len(ATTENTION)} families with softmax attention are exact."
    lines = [
        "| family | class | NLL | gradient | 4 bits: NLL | gradient |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([HEAD, share, "", *lines, *rows])


def test_the_page_is_of_these_tests() -> None:
    page = DOCS.read_text()
    assert page.startswith(table([]))
    cells = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")][1:]
    assert [c[0][2:] for c in cells] == [*ATTENTION, *OTHER]
    for name, _, first, *figures in ([c[0][2:], *c[1:]] for c in cells):
        if name in REFUSED:
            assert first == f"refused: {REFUSED[name]}"
        else:
            assert float(first) <= NLL
            assert float(figures[0].rstrip(" |")) <= GRADIENT


if __name__ == "__main__":
    import tempfile

    tf.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        print(table([row(n, f, Path(folder) / n) for n, f in {**ATTENTION, **OTHER}.items()]))
