"""Folders and files that are no LM we can read are refused in one line that can be followed."""

import json
import logging
import pickle
import re
import struct
import time
from pathlib import Path

import pytest
import tiny
import torch
from families import EXACT
from torch import nn

from userip_fast.cli.doctor import diagnose
from userip_fast.core.config import LMConfig
from userip_fast.core.errors import UnavailableError, UnsupportedError
from userip_fast.lm import FrozenLM, limits, memory, open_lm
from userip_fast.lm.frozen import _positions
from userip_fast.lm.limits import free_bytes
from userip_fast.lm.memory import Plan, budget_bytes, choose
from userip_fast.lm.nf4 import is_linear4bit
from userip_fast.lm.residency import make_resident
from userip_fast.lm.trace import Architecture, Workload


def load(folder, **kwargs):
    return open_lm(str(folder), LMConfig(**{"quantization": "none", **kwargs}))


def refused(folder, message, kind=UnsupportedError, **kwargs):
    with pytest.raises(kind, match=message) as found:
        load(folder, **kwargs)
    assert "\n" not in str(found.value)


@pytest.fixture
def folder(tmp_path):
    return tiny.save("llama", tmp_path / "lm")


def edit(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("base_too", [True, False])
def test_adapters_are_refused_with_the_way_to_merge(folder, base_too):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    if not base_too:
        (folder / "config.json").unlink()
    refused(folder, r"holds an adapter.*merge_and_unload\(\)\.save_pretrained")


def test_a_model_with_adapters_handed_over_is_refused():
    model = tiny.model("llama")
    kind = type("Linear4bit", (nn.Linear,), {"__module__": "peft.tuners.lora.bnb"})
    model.model.layers[0].mlp.up_proj = kind(32, 64, bias=False)
    with pytest.raises(UnsupportedError, match=r"adapters; hand over model\.merge_and_unload"):
        FrozenLM(model, tiny.tokenizer(), source="x", quantization="none")


def test_layers_are_bitsandbytes_by_their_module_not_by_name():
    """A wrapper of the same name that adds something of its own is left alone."""
    kind = type("Linear4bit", (nn.Linear,), {"__module__": "peft.tuners.lora.bnb"})
    wrapper = kind(4, 4)
    model = nn.Sequential(wrapper)
    make_resident(model, torch.float32)
    assert model[0] is wrapper
    bnb = pytest.importorskip("bitsandbytes")
    assert is_linear4bit(bnb.nn.Linear4bit(4, 4))
    assert is_linear4bit(bnb.nn.LinearNF4(4, 4))
    assert not is_linear4bit(wrapper)


@pytest.mark.parametrize(
    "path",
    [
        "nowhere",
        "./nowhere/lm",
        "models/lm",
        "a/b/c",
        "~/lm",
        "/no/such/folder",
        "c:\\lm",
        "",
        "tests/lm",
    ],
)
def test_what_may_be_a_mistyped_folder_never_goes_to_the_hub(path, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "tests").mkdir()
    monkeypatch.chdir(tmp_path)

    def hub(*args, **kwargs):
        raise AssertionError("asked the hub")

    for name in ("cached_file", "cached_files"):
        monkeypatch.setattr(f"transformers.utils.hub.{name}", hub)
    monkeypatch.setattr("transformers.utils.cached_file", hub)
    if path:
        refused(path, "there is no such folder.*OWNER/NAME")
    else:
        refused(path, "is a folder without config.json")  # the folder one is in


def test_a_hub_that_is_away_is_not_asked_again_and_again(tmp_path, monkeypatch):
    def nowhere(*args):
        raise OSError("no such name")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("userip_fast.lm.stored.getproxies", dict)
    monkeypatch.setattr("userip_fast.lm.stored.socket.getaddrinfo", nowhere)
    before = time.monotonic()
    refused("models/lm", "no such folder; it is not in .* cache either, and the hub cannot be")
    assert time.monotonic() - before < 5


def test_a_hub_id_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused("some-owner/some-model", "cannot be loaded")  # tests are offline


def shards(folder):
    tiny.model("llama").save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink()


def pickles(folder):
    torch.save(tiny.model("llama").state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def sharded_pickles(folder):
    weights = tiny.model("llama").state_dict()
    where = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(weights)}
    for file in set(where.values()):
        torch.save({n: w for n, w in weights.items() if where[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("store", [shards, pickles, sharded_pickles])
def test_weights_in_any_form_of_file_are_the_same(folder, store):
    want = load(folder).model.state_dict()
    store(folder)
    got = load(folder)
    assert set(got.model.state_dict()) == set(want)
    assert all(torch.equal(x, want[name]) for name, x in got.model.state_dict().items())
    assert got.fingerprint.startswith("v2:")


def test_single_files_say_what_to_name(folder):
    refused(folder / "model.safetensors", "is a file; name the folder it lies in")
    (folder / "model.safetensors").unlink()
    refused(folder, r"neither model\.safetensors nor pytorch_model\.bin")
    (folder / "config.json").unlink()
    refused(folder, r"without config\.json; name the folder that save_pretrained wrote")


@pytest.mark.parametrize(
    ("method", "about"),
    [("gptq", {"bits": 4}), ("fp8", {}), ("awq", {"bits": 4}), ("mxfp4", {}), ("aqlm", {})],
)
@pytest.mark.parametrize("bitsandbytes", [True, False])
def test_other_quantisations_are_called_by_their_name(
    folder, monkeypatch, method, about, bitsandbytes
):
    if not bitsandbytes:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    edit(folder, quantization_config={"quant_method": method, **about})
    refused(folder, f"is stored as {method}, which is not read")


def test_without_bitsandbytes_the_form_is_told(folder, monkeypatch):
    monkeypatch.setattr("userip_fast.lm.load.importlib.util.find_spec", lambda name: None)
    for about, name in (
        ({"load_in_8bit": True}, "int8"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"),
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, "fp4-double"),
    ):
        edit(folder, quantization_config={"quant_method": "bitsandbytes", **about})
        refused(folder, f"is stored as {name} by bitsandbytes, which is not", UnavailableError)


def test_int8_is_read_dense_so_that_the_doctor_sees_what_it_costs(folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    eight = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=eight, device_map="cpu"
    ).save_pretrained(tmp_path / "int8")
    tiny.tokenizer().save_pretrained(tmp_path / "int8")
    lm, dense = load(tmp_path / "int8"), load(folder)
    assert lm.quantization == "int8"
    got, want = (x.model.model.layers[0].mlp.up_proj for x in (lm, dense))
    assert type(got) is nn.Linear
    step = want.weight.abs().amax(1, keepdim=True) / 127
    error = (got.weight - want.weight).abs()
    assert error.max() > 0
    assert (error <= 0.6 * step).all()  # half a step, and float16 on the way
    assert [c for c in diagnose(lm, users=2) if not c.passed] == []


def test_a_tokenizer_longer_than_the_embedding_table_is_refused(folder):
    tokenizer = tiny.tokenizer()
    saved = tokenizer.backend_tokenizer.to_str()
    rules = json.loads(saved)
    rules["model"]["vocab"]["zebra"] = 320
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    refused(folder, r"gives 'zebra' the id 320, and the model has 320 token embeddings.*resize")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("quantization", ["none", "nf4", "nf4-double"])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"]
)
def test_weights_that_are_no_numbers_are_refused(tmp_path, value, quantization, name):
    model = tiny.model("llama")
    model.get_parameter(name).data[-1, -1] = value
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    refused(tmp_path, f"NaN or infinity in {name[:20]}", quantization=quantization)


class Boom:
    """Unpickled, it leaves a file `boom` in the working folder."""

    def __reduce__(self):
        return (Path.touch, (Path("boom"),))


@pytest.mark.parametrize(
    "write",
    [
        lambda file: file.write_bytes(struct.pack("<Q", 1 << 60) + file.read_bytes()[8:]),
        lambda file: file.write_bytes(file.read_bytes()[:2000]),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(struct.pack("<Q", 2) + b"{}"),
        lambda file: file.rename(file.parent / "pytorch_model.bin"),
        lambda file: (file.unlink(), torch.save({"x": Boom()}, file.parent / "pytorch_model.bin")),
        lambda file: (
            file.unlink(), (file.parent / "pytorch_model.bin").write_bytes(pickle.dumps(Boom())),
        ),
        lambda file: (file.parent / "config.json").write_text("{"),
        lambda file: (file.parent / "config.json").write_text("[" * 100_000),
        lambda file: (file.parent / "config.json").write_text('{"model_type": "nothing"}'),
        lambda file: (file.parent / "tokenizer.json").write_text("{}"),
        lambda file: (file.parent / "tokenizer.json").unlink(),
    ],
    ids=["header 2^60", "cut", "empty", "no tensors", "not pickled", "command in zip",
         "command", "torn config", "deep config", "unknown type", "torn tokenizer", "no tokenizer"],
)  # fmt: skip
def test_damaged_folders_end_in_one_line(folder, write, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
    write(folder / "model.safetensors")
    refused(folder, r"cannot be loaded|files lack|tokenizer")
    assert not Path("boom").exists()


@pytest.mark.parametrize("part", ["full_attention", "sliding_attention"])
def test_a_rope_that_depends_on_the_batch_caps_positions_in_any_type_of_layer(part):
    text = tiny.config("gemma3").get_text_config()
    assert set(text.rope_parameters) == {"full_attention", "sliding_attention"}
    assert _positions(nn.Identity(), text) == 256
    about = {"rope_type": "longrope", "original_max_position_embeddings": 100}
    text.rope_parameters[part].update(about)
    assert _positions(nn.Identity(), text) == 100


@pytest.fixture(scope="module")
def small_llama():
    return Architecture(tiny.config("llama"), torch.float32, "cpu", four_bit=False)


def test_on_a_cpu_packs_are_made_smaller_before_anything_is_recomputed(small_llama):
    work = Workload(pack_tokens=8192, user_tokens=64)
    full, less = (small_llama.estimate("resident", False, work.of_size(n)) for n in (8192, 2048))
    plan = choose(small_llama, full.total, work)
    assert (plan.pack_tokens, plan.recompute) == (8192, False)
    plan = choose(small_llama, less.total, work)
    assert (plan.pack_tokens, plan.recompute) == (2048, False)
    assert "too large: resident" in str(plan)
    smallest = small_llama.estimate("resident", False, work.of_size(1024)).total
    assert choose(small_llama, smallest - 1, work).recompute


def test_a_load_says_that_the_default_pack_does_not_fit(folder, monkeypatch, caplog, small_llama):
    fits = small_llama.estimate("resident", False, Workload(pack_tokens=4096)).total
    monkeypatch.setattr(memory, "free_bytes", lambda device: fits / memory._CPU_SHARE)
    with caplog.at_level(logging.WARNING, logger="userip_fast.lm"):
        lm = load(folder)
    assert isinstance(lm.plan, Plan)
    assert lm.plan.pack_tokens == 4096
    assert "em.pack_tokens=8192 does not fit into memory" in caplog.text


def test_a_part_of_a_cpu_s_free_memory_is_planned_for(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    assert budget_bytes(torch.device("cpu")) == 450
    assert budget_bytes(torch.device("cuda")) == 1000


@pytest.mark.parametrize(
    ("membership", "files", "free"),
    [
        ("0::/a/b", {"a/memory.max": "max", "a/b/memory.max": "5000"}, [5000 - 3000 + 100]),
        ("0::/outside/name", {"memory.max": "4000"}, [4000 - 3000 + 100]),
        ("0::/a", {"memory.max": "9000", "a/memory.max": "4000"}, [1100, 6100]),
        ("4:memory:/x\n1:cpu:/y", {"memory/memory.limit_in_bytes": "8000"}, [5100]),
        ("5:cpu:/y", {"memory.max": "1"}, []),
        ("0::/", {"memory.max": "2000"}, [0]),
    ],
)
def test_limits_of_cgroups_of_both_versions_and_above_are_seen(tmp_path, membership, files, free):
    (tmp_path / "self").write_text(membership + "\n")
    for name, limit in files.items():
        file = tmp_path / "mount" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(limit + "\n")
        for other, value in (
            ("memory.current", "3000\n"), ("memory.usage_in_bytes", "3000\n"),
            ("memory.stat", "file 1\ninactive_file 100\ntotal_inactive_file 100\n"),
        ):  # fmt: skip
            (file.parent / other).write_text(value)
    assert list(limits._cgroups_free(tmp_path / "self", tmp_path / "mount")) == free
    assert 0 < free_bytes(torch.device("cpu")) < 2**60


def test_no_message_of_a_refusal_spans_lines(tmp_path):
    """Also where the library's own error is pages long."""
    path = Path(EXACT["Llama"].save(tmp_path))
    edit(path, hidden_size=48)
    refused(path, re.escape(str(path)))
