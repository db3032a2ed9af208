"""Serving answers as the model does, without torch; profiles grow; items are ranked."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

import userip_fast as uf
from userip_fast.core.config import Config, DataConfig, EMConfig, LMConfig
from userip_fast.core.errors import ConfigError, DataError, FormatError, MismatchError
from userip_fast.core.profiles import Profile, Ranking, likings, odds
from userip_fast.em.lifts import PLAIN
from userip_fast.serve import Server

sys.path.append(str(Path(__file__).parents[1] / "em"))
from test_resume import read

ROOT = Path(__file__).resolve().parents[2]
CONFIG = Config(
    data=DataConfig(behaviour_context="independent", max_tokens=60),
    em=EMConfig(estep="posterior", posterior="exact", rounds=2, lr=0.2),
    fields=(uf.ProfileField("taste", "The taste is", 1, 4), uf.ProfileField("b", "b", 1, 3)),
)


@pytest.fixture(scope="module", params=["ratings", "choices"])
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    config = replace(CONFIG, lm=LMConfig(path=str(tiny.save("llama", folder / "lm"))))
    data = read(60)
    if request.param == "choices":
        data, config = replace(data, rating=None), config.override({"data.negatives": 1})
    return folder, uf.fit(data, config=config, out=folder / "run"), request.param


@pytest.fixture(scope="module")
def server(made):
    return Server.open(made[0] / "run" / "model", bank=made[0] / "run" / "bank")


def words(made):
    return ["liked", "disliked", "okay"] if made[2] == "ratings" else ["chosen", "passed over"]


def test_it_answers_as_the_model_does(made, server):
    folder, model, kind = made
    draw = np.random.default_rng(0)
    for events in (0, 1, 7, 40):
        items = draw.integers(0, len(tiny.TEXTS), events).tolist()
        went = draw.choice(words(made), events).tolist()
        want = model.profile(items, went)
        np.testing.assert_allclose(server.profile(items, went), want, rtol=5e-4, atol=1e-6)
        for top in (5, 100):
            (keys, scores), (same, ours) = model.top_items(want, top), server.top_items(want, top)
            assert keys.tolist() == same.tolist()
            np.testing.assert_allclose(scores, ours, rtol=1e-5)
    if kind == "ratings":
        np.testing.assert_allclose(server.profile([0, 3], [5, 1]), model.profile([0, 3], [5, 1.0]),
                                   rtol=5e-4, atol=1e-6)  # fmt: skip
    many = server.profile([[0, 1], [], [2]], [words(made)[:2], [], words(made)[:1]])
    assert many.shape == (3, 12)
    assert np.array_equal(many[0], server.profile([0, 1], words(made)[:2]))
    np.testing.assert_allclose(many[1], np.exp(server.log_prior), rtol=1e-5)
    np.testing.assert_allclose(server.affinity(many, [0, 4]), model.affinity(many, [0, 4]),
                               rtol=1e-5)  # fmt: skip
    keys = uf.FeatureBank.open(folder / "run" / "bank").keys()
    assert np.array_equal(server.lookup(keys), uf.FeatureBank.open(folder / "run/bank").codes())


def test_unknown_items_are_skipped_and_counted(made, server):
    went, before = words(made)[0], server.skipped
    known = server.profile([0, 1], [went, went])
    assert np.array_equal(server.profile([0, "x", 1, 99], [went] * 4), known)
    assert server.skipped == before + 2
    assert server.knows(0)
    assert not server.knows(99)
    assert np.array_equal(server.profile([99], [went]), server.profile([]))
    found = server.affinity(known, [99, 0])
    assert np.isnan(found[0])
    assert found[1] == pytest.approx(float(server.affinity(known, [0])[0]))
    profile = server.open_profile([99, 0], [went, went])
    assert (profile.events, profile.skipped) == (1, 1)
    assert not profile.add(98, went)
    assert profile.skipped == 2
    text = {77: tiny.TEXTS[2]}
    renamed = Server.open(made[0] / "run" / "model", texts=text)
    assert np.array_equal(renamed.profile([77], [went]), server.profile([2], [went]))


def test_a_profile_grows_by_events(made, server):
    model, went = made[1], words(made)
    draw = np.random.default_rng(1)
    items = draw.integers(0, len(tiny.TEXTS), 500).tolist()
    told = draw.choice(went, 500).tolist()
    for start in (model.open_profile, server.open_profile):
        profile = start()
        np.testing.assert_allclose(profile.probabilities, model.profile([]), rtol=1e-5)
        assert profile.evidence == pytest.approx(0, abs=1e-6)
        for n, (item, reaction) in enumerate(zip(items[:60], told[:60]), start=1):
            assert profile.add(item, reaction)
            if n in (1, 10, 60):
                want = model.profile(items[:n], told[:n])
                np.testing.assert_allclose(profile.probabilities, want, rtol=5e-4, atol=1e-6)
                grid = want.reshape(4, 3)
                assert profile.codes.tolist() == [grid.sum(1).argmax(), grid.sum(0).argmax()]
        begun = start(items[:60], told[:60])
        np.testing.assert_allclose(begun.log_joint, profile.log_joint, rtol=1e-9, atol=1e-6)
        assert begun.events == profile.events == 60
        before = profile.log_joint.copy()
        profile.add(3, went[0])
        profile.add(3, went[0], weight=-1)
        np.testing.assert_allclose(profile.log_joint, before, rtol=1e-12)
        with pytest.raises(DataError, match="weight=nan"):
            profile.add(3, went[0], weight=float("nan"))
    table = model.event_table()
    kinds = [(tiny.TEXTS[i], w) for i, w in zip(items, told)]
    rows = table.rows(kinds if model.format.repeats else list(dict.fromkeys(kinds)))
    _, evidence = table.posterior(rows, np.array([0, len(rows)]))
    assert server.open_profile(items, told).evidence == pytest.approx(float(evidence[0]), rel=1e-6)


def test_what_cannot_be_asked(made, server, tmp_path):
    folder, model, kind = made
    with pytest.raises(DataError, match="reaction 'loved' is not one of the model's"):
        server.profile([0], ["loved"])
    with pytest.raises(DataError, match="reaction 'loved'"):  # of an unknown item too
        server.profile([99], ["loved"])
    with pytest.raises(DataError, match="reaction None"):
        server.profile([0])
    with pytest.raises(DataError, match=r"reaction \['liked'\]"):
        server.profile([0], [["liked"]])
    with pytest.raises(DataError, match="2 items and 1 reactions"):
        server.profile([0, 1], [words(made)[0]])
    for who in (server, model):
        for rating in (float("nan"), np.float32("inf"), *[5] * (kind == "choices")):
            with pytest.raises(DataError, match="is not one of the model's"):
                who.profile([0], [rating])
    for who in (server, model):
        with pytest.raises(DataError, match=r"must be \[Z\] or \[U, Z\], Z = 12, got \(5,\)"):
            who.top_items(np.ones(5), 3)
        with pytest.raises(DataError, match="n=0: must be at least 1"):
            who.top_items(np.ones(12), 0)
    root = tmp_path / "model"
    shutil.copytree(folder / "run" / "model", root)
    with pytest.raises(ConfigError, match="without a bank"):
        Server.open(root).lookup([1])
    bank = tmp_path / "bank"
    uf.FeatureBank.write(bank, [1], [[0, 0]], fields=model.bank_fields(), model_fingerprint="m")
    with pytest.raises(MismatchError, match="is of model m"):
        Server.open(root, bank=bank)
    shutil.move(root / "events", tmp_path / "elsewhere")
    with pytest.raises(FormatError, match="has no event table"):
        Server.open(root)
    moved = Server.open(root, events=[tmp_path / "elsewhere"])
    went = words(made)[:1]
    assert np.array_equal(moved.profile([0], went), server.profile([0], went))
    shutil.rmtree(root / "lm", ignore_errors=True)  # it is not looked at
    for name in ("config.json", "codebooks.safetensors", "catalogue.parquet", "manifest.json"):
        whole = (root / name).read_bytes()
        (root / name).write_bytes(whole[:-9] + b"x" + whole[-8:])
        with pytest.raises(FormatError, match=name.partition(".")[0]):
            Server.open(root, events=[tmp_path / "elsewhere"])
        (root / name).write_bytes(whole)
    about = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps({**about, "sha256": 3}))
    with pytest.raises(FormatError, match="altered"):
        Server.open(root, events=[tmp_path / "elsewhere"])


def test_items_are_ranked_as_by_hand(made, server):
    model, kind = made[1], made[2]
    p = np.random.default_rng(0).dirichlet(np.ones(12), 5).astype(np.float32)
    catalogue, n = model.catalogue, len(model.catalogue.item_keys)
    keys = catalogue.item_keys.to_pylist()
    one_by_one = np.stack([model.affinity(np.eye(12, dtype=np.float32), [k])[:, 0] for k in keys])
    if kind == "choices":
        odds = one_by_one / (1 - one_by_one) * (catalogue.counts**0.75)[:, None]
        one_by_one = odds / odds.sum(0)
        np.testing.assert_allclose(model.top_items(p, n)[1].sum(1), 1, rtol=1e-4)
    want = p @ one_by_one.T
    for top in (1, 3, n, n + 5):
        found, scores = model.top_items(p, top)
        assert found.shape == scores.shape == (5, min(top, n))
        for u in range(5):
            order = np.argsort(-want[u], kind="stable")[:top]
            assert found[u].tolist() == [keys[i] for i in order]
            np.testing.assert_allclose(scores[u], want[u][order], rtol=1e-4)
        alone = model.top_items(p[2], top)
        assert alone[0].tolist() == found[2].tolist()


def test_choices_of_a_planted_world_are_ranked_by_what_is_chosen():
    """Where "chosen" is told as the sampling has it, scores are p(item | codes)."""
    draw, items, codes = np.random.default_rng(0), 40, 3
    p = draw.dirichlet(np.ones(items) * 0.3, codes).T  # p(item | codes)
    sampled = p.sum(1) ** 0.75
    q = (sampled / sampled.sum())[:, None]
    chosen = np.log(p / (p + q)), np.log(q / (p + q))
    values = np.stack(chosen, axis=1).astype(np.float32)

    def scores(a, b):
        return odds(likings(values[a:b], 0, 1.0))

    ranking = Ranking(np.arange(items), scores, codes, sampled)
    np.testing.assert_allclose(ranking.scores, p, rtol=1e-3, atol=1e-6)
    tied = Ranking(np.arange(6), lambda a, b: scores(0, 1).repeat(b - a, 0), codes, None)
    assert tied.top(np.ones(codes) / codes, 4)[0].tolist() == [0, 1, 2, 3]


def test_a_profile_by_itself():
    told = {"a": (0, np.array([-1.0, -2.0], np.float32))}
    profile = Profile(np.log([0.25, 0.75]), [2], lambda item, reaction: told.get(item))
    assert profile.codes.tolist() == [1]
    by_events = Profile(
        np.log([0.25, 0.75]), [2], lambda item, reaction: told.get(item), code_prior=0.1
    )
    assert by_events.codes.tolist() == [1]
    by_events.add("a")  # 0.25 * e to 0.75, but what the event says speaks for the other
    assert by_events.codes.tolist() == [0]
    assert by_events.probabilities.argmax() == 1
    assert profile.add("a")
    assert not profile.add("b")
    joint = np.log([0.25, 0.75]) - np.array([1, 2])
    assert profile.evidence == pytest.approx(np.log(np.exp(joint).sum()))
    np.testing.assert_allclose(profile.probabilities, np.exp(joint - profile.evidence), rtol=1e-6)


def test_serving_needs_no_torch(made):
    code = f"""
import sys
from userip_fast.serve import Server

server = Server.open({str(made[0] / "run" / "model")!r}, bank={str(made[0] / "run" / "bank")!r})
p = server.profile([0, 1], {words(made)[:2]!r})
server.top_items(p, 3), server.affinity(p, [0]), server.lookup(server.bank.keys())
server.open_profile().add(0, {words(made)[0]!r})
heavy = ("torch", "transformers", "safetensors", "tokenizers", "userip_fast.data")
print(*[name for name in heavy if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_choices_told_by_their_text_are_served(tmp_path):
    config = replace(CONFIG, lm=LMConfig(path=str(tiny.save("llama", tmp_path / "lm"))))
    model = uf.fit(replace(read(60), rating=None), config=config, out=tmp_path / "run")
    # As a calibration would have it that found events to say less than they seem to.
    joint = torch.arange(12.0).double().log_softmax(0)
    model.calibration = replace(
        model.calibration, half_events=10.0, code_prior=0.2, log_prior=joint
    )
    model.save(tmp_path / "model")
    loaded, server = uf.Model.load(tmp_path / "model"), Server.open(tmp_path / "model")
    assert loaded.calibration.half_events == 10.0
    items = [0, 1, 1, 3]
    p = loaded.profile(items)
    np.testing.assert_allclose(p, loaded.profile(items, [None] * 4), rtol=1e-6)
    np.testing.assert_allclose(server.profile(items), p, rtol=5e-4, atol=1e-6)
    grid = joint.exp().numpy().reshape(4, 3)
    priors, told = [grid.sum(1), grid.sum(0)], p.astype(np.float64).reshape(4, 3)
    np.testing.assert_allclose(server.profile([]), joint.exp().numpy(), rtol=1e-6)
    np.testing.assert_allclose(loaded.profile([]), joint.exp().numpy(), rtol=1e-6)
    for who in (loaded, server):
        profile = who.open_profile(items)
        np.testing.assert_allclose(profile.probabilities, p, rtol=5e-4, atol=1e-6)
        for j, (q, code) in enumerate(zip(priors, profile.codes)):
            own = told.sum(tuple(i for i in range(told.ndim) if i != j))
            assert code == (own / q**0.8).argmax()
        keys, scores = who.top_items(p, 100)
        lift = dict(zip(keys.tolist(), who.affinity(p, keys.tolist())))
        counts = dict(zip(model.catalogue.item_keys.to_pylist(), model.catalogue.counts))
        share = np.asarray([lift[k] * counts[k] for k in keys.tolist()])
        np.testing.assert_allclose(scores / scores[0], share / share[0], rtol=0.3)
        assert float(scores.sum()) == pytest.approx(1, rel=1e-3)
    assert model.fingerprint != replace(model, calibration=PLAIN).fingerprint


def test_a_model_without_reactions_ranks_nothing(tmp_path):
    config = replace(CONFIG, lm=LMConfig(path=str(tiny.save("llama", tmp_path / "lm"))))
    config = config.override({"data.loss": [1.0, 0.0]})
    model = uf.fit(read(20), config=config, out=tmp_path / "run")
    server = Server.open(tmp_path / "run" / "model")
    told = [0, 1], ["liked", "okay"]
    np.testing.assert_allclose(server.profile(*told), model.profile(*told), rtol=1e-4)
    for who in (model, server):
        with pytest.raises(ConfigError, match="no loss on reactions"):
            who.top_items(who.profile([]), 3)
