"""The memory model against measurement, and what it decides."""

import importlib
import logging
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from families import EXACT, Family
from transformers import AutoModelForCausalLM, LlamaConfig

from userip_fast.core.config import EMConfig, LMConfig
from userip_fast.core.errors import ConfigError, OutOfMemoryError
from userip_fast.em.blocks import run_anew
from userip_fast.em.steps import Block, EMState, Profiles
from userip_fast.lm import FrozenLM, PackedEngine, attention, memory, open_lm
from userip_fast.lm.limits import GIB, is_out_of_memory
from userip_fast.lm.memory import Plan, choose
from userip_fast.lm.residency import set_recompute
from userip_fast.lm.trace import Architecture, Workload
from userip_fast.prompts.packing import Behaviour, make_pack
from userip_fast.testing import peak_bytes


def sized(family, dim, layers):
    """A config of this family with other sizes, and room for long packs."""
    config = tiny.config(family)
    sizes = {"hidden_size": dim, "num_hidden_layers": layers, "max_position_embeddings": 4096}
    if family == "gpt2":
        sizes = {"n_embd": dim, "n_layer": layers, "n_positions": 4096}
    elif getattr(config, "head_dim", None):
        sizes["head_dim"] = dim // 4
    if getattr(config, "layer_types", None):
        sizes["layer_types"] = ["full_attention"] * layers
    for name, value in sizes.items():
        setattr(config, name, value)
    if hasattr(config, "intermediate_size"):
        config.intermediate_size = dim * 11 // 4
    return config


def engine_of(config):
    attention.register()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="userip_packed")
    lm = FrozenLM(model, tiny.tokenizer(), source="sized", quantization="none")
    return PackedEngine(lm, tiny.template().layout(lm.tokenizer))


def step_of(engine, rows, longest):
    """One forward and backward pass over users of equal length, and the workload that it is."""
    layout = engine.layout
    users, own = rows // longest, longest - layout.num_soft
    ids = np.arange(users * own, dtype=np.int32) % 300
    weight = np.ones((users, own), np.float32)
    weight[:, 0] = 0
    behaviour = Behaviour(
        ids,
        np.full_like(ids, layout.num_fields),
        np.tile(layout.behaviour_start + np.arange(own, dtype=np.int32), users),
        weight.ravel(),
        np.arange(0, len(ids) + 1, own),
        np.ones(users, np.int64),
    )
    pack = make_pack(behaviour, np.arange(users), layout, engine.lm.device)
    theta = torch.randn(users, layout.num_soft, engine.lm.hidden_size).requires_grad_()
    work = Workload(rows, longest, layout.num_soft, len(layout.prefix_ids))
    return lambda: torch.autograd.grad(engine.nll(pack, theta).sum(), theta)[0], work


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_prediction_is_within_a_tenth_of_what_a_step_takes(family):
    """Nothing is fitted to any of them: the steps are traced from the configuration."""
    for dim, layers in ((64, 2), (96, 5), (128, 3)):
        config = sized(family, dim, layers)
        engine = engine_of(config)
        traced = Architecture(config, torch.float32, "cpu", four_bit=False)
        for rows, longest in ((192, 48), (384, 96), (768, 96)):
            run, work = step_of(engine, rows, longest)
            took = peak_bytes(run, "cpu")
            predicted = traced.step(False, work)
            assert abs(predicted / took - 1) < 0.1, (dim, layers, rows, predicted, took)


@pytest.mark.parametrize("name", ["Mixtral", "DeepSeek-V3 (MLA)", "gpt-oss"])
def test_experts_are_predicted_within_a_tenth(name):
    kind, settings = EXACT[name]
    layers = {"layer_types": ["full_attention"] * 4} if "layer_types" in settings else {}
    sizes = {"hidden_size": 96, "num_hidden_layers": 4, "max_position_embeddings": 4096}
    config = Family(kind, {**settings, **sizes, **layers}).config()
    engine = engine_of(config)
    traced = Architecture(config, torch.float32, "cpu", four_bit=False)
    for rows, longest in ((384, 96), (768, 96)):
        run, work = step_of(engine, rows, longest)
        took = peak_bytes(run, "cpu")
        assert abs(traced.step(False, work) / took - 1) < 0.1


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_recomputation_keeps_the_bits_and_takes_less_as_predicted(family):
    config = sized(family, 64, 6)
    engine = engine_of(config)
    run, work = step_of(engine, 512, 128)
    want, full = run(), peak_bytes(run, "cpu")
    set_recompute(engine.lm.model, True)
    assert torch.equal(run(), want)
    took = peak_bytes(run, "cpu")
    assert took < 0.5 * full
    predicted = Architecture(config, torch.float32, "cpu", four_bit=False).step(True, work)
    assert abs(predicted / took - 1) < 0.1, (predicted, took)
    assert not any(m.training for m in engine.lm.model.modules() if "Dropout" in type(m).__name__)
    set_recompute(engine.lm.model, False)
    assert peak_bytes(run, "cpu") == full


@pytest.fixture(scope="module")
def llama_7b():
    return Architecture(LlamaConfig(), torch.bfloat16, "cuda")


def test_the_way_is_chosen_from_the_budget(llama_7b):
    work = Workload(pack_tokens=4096)

    def way(gib, **kwargs):
        plan = choose(llama_7b, int(gib * GIB), work, **kwargs)
        assert plan.estimate.total <= gib * GIB
        return plan.residency, plan.recompute, plan.pack_tokens

    assert way(80) == ("resident", False, 4096)
    assert way(24) == ("streamed", False, 4096)
    assert way(12) == ("streamed", True, 4096)
    assert way(5.5) == ("streamed", True, 1024)
    assert way(80, residency="streamed", recompute="on") == ("streamed", True, 4096)
    assert way(24, residency="resident") == ("resident", True, 4096)
    said = str(choose(llama_7b, 12 * GIB, work))
    assert "lm.residency=streamed, with recomputation, packs of at most 4096 rows" in said
    assert "of 12.00 GiB; too large: resident 29.38 GiB, streamed" in said
    assert said.endswith("em.pack_tokens=1024 would do without recomputation")
    with pytest.raises(ConfigError, match=r"not fit into 3.00 GiB: packs of 256 rows .*streamed"):
        choose(llama_7b, 3 * GIB, work)


def test_weights_of_known_models(llama_7b):
    linear, rest = 6_476_005_376, 2 * 32000 * 4096 + 65 * 4096
    assert llama_7b.weights("resident") == (2 * (linear + rest), 0)
    assert llama_7b.weights("fp8")[0] == 2 * (linear + rest)
    streamed, buffers = llama_7b.weights("streamed")
    assert abs(streamed - 2 * rest - linear * 0.5 * (1 + 2 / 64)) < 0.01 * streamed
    assert buffers == 2 * 2 * 202_375_168


def test_largest_pack_fits_and_the_next_does_not(llama_7b):
    work = Workload(pack_tokens=4096)
    rows = llama_7b.largest_pack(True, work, 2 * GIB)
    takes = [
        llama_7b.step(True, Workload(pack_tokens=n)) for n in (rows * 98 // 100, rows * 102 // 100)
    ]
    assert takes[0] <= 2 * GIB < takes[1]


def test_load_says_what_was_chosen(tmp_path, caplog):
    folder = str(tiny.save("llama", tmp_path))
    small = LMConfig(path=folder, memory_gib=8e-3)
    with caplog.at_level(logging.INFO, logger="userip_fast.lm"):
        lm = open_lm(folder, small, Workload(4096, 64, block_users=64))
    assert "lm.residency=" in caplog.text
    assert f"packs of at most {lm.plan.pack_tokens} rows" in caplog.text
    assert (lm.plan.pack_tokens, lm.plan.recompute) == (1024, False)
    with pytest.raises(ConfigError, match=r"not fit into 0.00 MiB"):
        open_lm(folder, LMConfig(path=folder, memory_gib=1e-6))


def test_an_allocation_that_fails_is_known_for_what_it_is():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**46, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes differ"))


class FailingEStep:
    """Runs out of memory while packs are larger than `fits`."""

    def __init__(self, engine, fits):
        self.engine, self.config, self.fits = engine, EMConfig(pack_tokens=4096), fits
        self.tried = []

    def run(self, block, codebooks, state):
        self.tried.append(self.config.pack_tokens)
        if self.config.pack_tokens > self.fits:
            torch.empty(2**46, dtype=torch.uint8)
        return Profiles(block.hashes, None, *[torch.zeros(0)] * 3)


def test_out_of_memory_goes_on_with_the_largest_pack_that_fits(monkeypatch, caplog):
    lm = tiny.frozen("llama")
    lm.architecture = Architecture(lm.model.config, lm.dtype, "cpu", four_bit=False)
    lm.plan = Plan(
        "resident", False, 4096, lm.architecture.estimate("resident", False, Workload()), ""
    )
    layout = tiny.template().layout(lm.tokenizer)
    behaviour = tiny.behaviour(layout)
    block = Block(behaviour, np.arange(behaviour.num_users).astype(np.uint64))
    engine = PackedEngine(lm, layout)
    work = Workload(4096, int(behaviour.lengths.max()) + 2)
    monkeypatch.setattr(memory, "free_bytes", lambda device: lm.architecture.step(False, work) // 2)
    estep = FailingEStep(engine, 2100)
    run_anew(estep, block, None, EMState())
    assert len(estep.tried) == 2
    assert 1400 < estep.tried[1] <= 2100
    assert f"going on with em.pack_tokens={estep.tried[1]}" in caplog.text
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**16)
    with pytest.raises(OutOfMemoryError, match="longest user has"):
        run_anew(FailingEStep(engine, 0), block, None, EMState())


def test_table_of_a_model_and_its_measurement(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    memory_table = importlib.import_module("memory_table")
    folder = str(tiny.save("llama", tmp_path))
    work = Workload(user_tokens=32, block_users=8)
    lm = open_lm(folder, LMConfig(path=folder), work)
    rows = memory_table.table(lm.architecture, [256, 512], work).splitlines()
    assert rows[0].endswith("| T = 256 | T = 512 |")
    assert [r.split(" |")[0] for r in rows[2:]] == [
        "| resident", "| fp8", "| streamed", "| resident, recomputed", "| streamed, recomputed",
    ]  # fmt: skip
    measured = memory_table.measure(lm, [256, 512], work).splitlines()[2:]
    for line in measured:
        assert abs(float(line.split("|")[-2]) - 1) < 0.1, line
