"""`UserProfiler` among scikit-learn's own: its checks, clones, pickles, and a pipeline."""

import pickle
import subprocess
import sys

import joblib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sparse
import small_log
from sklearn.base import clone
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

import userip_fast as uf
from userip_fast.core.errors import ConfigError, DataError
from userip_fast.em.scorer import log_prior

TASTE = uf.ProfileField("taste", "likes", codebook_size=4)
HABIT = uf.ProfileField("habit", "does", codebook_size=2)
TINY = {
    **dict(setting.split("=") for setting in small_log.TINY),
    "lm.embedded_tokens": 2000, "em.rounds": 1, "em.codeword_steps": 1,
}  # fmt: skip
ROLES = {"rating": "rating", "time": "timestamp"}

NOT_APPLICABLE = dict.fromkeys(
    ("check_estimator_sparse_array", "check_estimator_sparse_matrix"),
    "takes whoever has predict_proba for a classifier of y, and reads a classifier's tags; "
    "test_sparse_and_dense_matrices_are_one stands for it",
)


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("USERIP_FAST_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@parametrize_with_checks(
    [uf.UserProfiler([TASTE], config=TINY)],
    expected_failed_checks=lambda estimator: NOT_APPLICABLE,
)
def test_the_checks_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The small log and its items as files, and a profiler fitted on them."""
    root = tmp_path_factory.mktemp("log")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("USERIP_FAST_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        log, items = small_log.write(root)
        profiler = uf.UserProfiler(
            [TASTE, HABIT], history=log, items=items, **ROLES, text="{title} ({genres})",
            config=TINY,
        )  # fmt: skip
        yield root, profiler.fit(pa.table({"user_id": [1]}))


def rows_of(users):
    return pytest.importorskip("pandas").DataFrame({"user_id": users, "x": np.arange(len(users))})


def test_rows_get_the_codes_of_their_users(place):
    _, profiler = place
    users = [3, 1, 99, 3, 2]
    codes = profiler.transform(rows_of(users))
    assert codes.shape == (5, 2)
    assert codes[0].tolist() == codes[3].tolist()
    assert codes[2].tolist() == [4, 2]  # of a user without a history, as in a bank
    known = np.delete(codes, 2, axis=0)
    assert ((known >= 0) & (known < [4, 2])).all()
    data = uf.read_interactions(profiler.history, profiler.items, **ROLES, text=profiler.text)
    want = profiler.model_.infer(data)[data.user_index([3, 1, 3, 2])]
    assert known.tolist() == want.tolist()
    assert profiler.get_feature_names_out().tolist() == ["taste", "habit"]


def test_probabilities_are_of_the_codes(place):
    _, profiler = place
    users = [3, 1, 99, 2]
    taste, habit = profiler.predict_proba(rows_of(users))
    assert (taste.shape, habit.shape) == ((4, 4), (4, 2))
    np.testing.assert_allclose(taste.sum(1), 1, atol=1e-5)
    prior = log_prior(profiler.model_.codebooks[0]).exp().numpy()
    np.testing.assert_allclose(taste[2], prior / prior.sum(), rtol=1e-5)
    joint = profiler.model_.profile([[]])
    np.testing.assert_allclose(habit[2], joint.reshape(4, 2).sum(0), rtol=1e-4)


def test_affinity_is_that_of_the_model(place):
    root, profiler = place
    log = pq.read_table(root / "interactions.parquet")
    own = log.filter(pa.compute.equal(log["user_id"], 5))
    found = profiler.affinity(rows_of([5, 99]), [0, 7, 23])
    p = profiler.model_.profile(own["item_id"].to_pylist(), own["rating"].to_pylist())
    np.testing.assert_allclose(found[0], profiler.model_.affinity(p, [0, 7, 23]), rtol=1e-4)
    nobody = profiler.model_.affinity(profiler.model_.profile([]), [0, 7, 23])
    np.testing.assert_allclose(found[1], nobody, rtol=1e-4)


def test_without_a_history_the_log_is_its_own(place):
    root, profiler = place
    pandas = pytest.importorskip("pandas")
    log = pandas.read_parquet(root / "interactions.parquet")
    alone = clone(profiler).set_params(history=None)
    codes = alone.fit_transform(log)
    assert codes.shape == (len(log), 2)
    assert codes.tolist() == profiler.transform(log).tolist()
    assert alone.transform(log[log.user_id == 4]).tolist() == codes[log.user_id == 4].tolist()


def test_parameters_and_clones(place):
    _, profiler = place
    other = clone(profiler)
    assert other.get_params() == profiler.get_params()
    assert not hasattr(other, "model_")
    assert other.set_params(fields="movies", seed=3).get_params()["seed"] == 3
    assert other.get_feature_names_out().tolist() == [f.name for f in other._fields()]


@pytest.mark.parametrize("through", ["pickle", "joblib"])
def test_pickles_hold_the_files_of_the_model(place, through, tmp_path):
    _, profiler = place
    if through == "pickle":
        text = pickle.dumps(profiler)
        assert b"torch" not in text  # no tensor is ever unpickled
        again = pickle.loads(text)
    else:
        joblib.dump(profiler, tmp_path / "profiler.joblib")
        again = joblib.load(tmp_path / "profiler.joblib")
    rows = rows_of([1, 2, 99])
    assert again.transform(rows).tolist() == profiler.transform(rows).tolist()
    assert again.model_.fingerprint == profiler.model_.fingerprint
    np.testing.assert_allclose(again.affinity(rows, [3]), profiler.affinity(rows, [3]), rtol=1e-4)
    assert pickle.loads(pickle.dumps(again)).model_.fingerprint == again.model_.fingerprint


def test_pickles_name_the_run_where_there_is_one(place, tmp_path):
    _, profiler = place
    kept = clone(profiler).set_params(out=str(tmp_path / "run")).fit(rows_of([1]))
    text = pickle.dumps(kept)
    assert len(text) < 1 << 17
    assert pickle.loads(text).model_.fingerprint == kept.model_.fingerprint
    kept.set_params(seed=1).fit(rows_of([1]))
    with pytest.raises(DataError, match="was fitted anew since the estimator was saved"):
        pickle.loads(text)


def test_a_pipeline_with_lightgbm(place):
    lightgbm = pytest.importorskip("lightgbm")
    _, profiler = place
    random = np.random.default_rng(0)
    users = random.integers(0, small_log.USERS, 120)
    rows, clicked = rows_of(users), (users % 2).astype(int)
    pipeline = make_pipeline(
        clone(profiler).set_output(transform="pandas"),
        lightgbm.LGBMClassifier(n_estimators=5, min_child_samples=2, verbose=-1, n_jobs=1),
    )
    chances = pipeline.fit(rows, clicked).predict_proba(rows)
    assert chances.shape == (120, 2)
    assert pipeline[-1].feature_name_ == ["taste", "habit"]
    scores = cross_val_score(pipeline, rows, clicked, cv=2, error_score="raise")
    assert len(scores) == 2


def matrix():
    random = np.random.default_rng(0)
    ratings = random.integers(0, 6, (30, 8)).astype(float)
    ratings[0] = 0
    ratings[1, :3] = np.nan
    return ratings


def test_sparse_and_dense_matrices_are_one():
    dense = matrix()
    profiler = uf.UserProfiler([TASTE], items=[f"book {i}" for i in range(8)], config=TINY)
    codes = profiler.fit_transform(dense)
    assert codes[0].tolist() == [4]  # no event, no profile
    for make in (sparse.csr_array, sparse.coo_matrix, sparse.csc_matrix):
        assert clone(profiler).fit_transform(make(dense)).tolist() == codes.tolist()
    assert profiler.predict_proba(dense).shape == (30, 4)
    assert profiler.affinity(dense, [0, 7]).shape == (30, 2)
    assert profiler.model_.catalogue.text_of[7] == "book 7"


@pytest.mark.parametrize(
    ("params", "x", "error", "message"),
    [
        ({"fields": "magic"}, matrix(), ConfigError, "fields must be fields or one of .*'magic'"),
        ({"items": ["one"]}, matrix(), DataError, "a text for each of the 8 columns"),
        ({"history": "log.csv"}, matrix(), DataError, "X must be a table with a column 'user_id'"),
        ({}, np.zeros((9, 3)), DataError, "every entry is 0 or NaN"),
        ({}, matrix()[:2], ValueError, r"2 sample.* minimum of 4 is required"),
        ({}, pa.table({"uid": [1]}), DataError, "X has no column 'user_id'; it has"),
        ({}, 7, DataError, "X must be files or a table .*is int"),
        ({"config": {"em.speed": 9}}, matrix(), ConfigError, "'em.speed' is unknown"),
    ],
)
def test_what_cannot_be_fitted_is_refused(params, x, error, message):
    with pytest.raises(error, match=message):
        uf.UserProfiler(**{"fields": [TASTE], "config": TINY} | params).fit(x)


def test_users_of_another_kind_are_refused(place):
    _, profiler = place
    with pytest.raises(DataError, match="users of X are large_string, those of the history int64"):
        profiler.transform(pa.table({"user_id": ["a"]}))


def test_codes_alone_have_no_probabilities():
    config = TINY | {"em.estep": "gradient", "data.behaviour_context": "sequence"}
    profiler = uf.UserProfiler([TASTE], config=config).fit(matrix()[1:])
    assert profiler.transform(matrix()[1:]).shape == (29, 1)
    with pytest.raises(ConfigError, match=r"em.estep=gradient gives codes alone"):
        profiler.predict_proba(matrix()[1:])


def test_the_package_does_without_scikit_learn():
    code = """
import sys
sys.modules["sklearn"] = None
import userip_fast
from userip_fast import *
assert "UserProfiler" in dir(userip_fast)
try:
    userip_fast.UserProfiler
except userip_fast.UserIPError as e:
    print(e)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "estimator of scikit-learn 1.6 or later, which is not installed" in done.stdout
