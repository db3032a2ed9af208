"""Drift between banks, and an update of everybody."""

import numpy as np
import pytest

from userip_fast.bank import FeatureBank
from userip_fast.bank.drift import drift
from userip_fast.core.errors import MismatchError

FIELDS = [
    {"name": "taste", "codebook_size": 3, "code_names": None},
    {"name": "habit", "codebook_size": 2, "code_names": None},
]


def bank(folder, keys, codes, fields=FIELDS, model="m"):
    return FeatureBank.write(folder, keys, np.array(codes), fields=fields, model_fingerprint=model)


def test_drift_counts_who_moved_where(tmp_path):
    old = bank(tmp_path / "old", [1, 2, 3, 4], [[0, 0], [0, 1], [1, 1], [2, 0]])
    new = bank(
        tmp_path / "new", [2, 3, 4, 5, 6], [[1, 1], [1, 1], [0, 0], [0, 0], [1, 0]], model="n"
    )
    found = drift(old, new)
    assert found["users"] == {"old": 4, "new": 5, "both": 3}
    assert not found["same_model"]
    taste, habit = found["fields"]["taste"], found["fields"]["habit"]
    assert taste["changed"] == pytest.approx(2 / 3)
    assert taste["moves"] == [[0, 1, 1], [2, 0, 1]]
    assert (taste["users_old"], taste["users_new"]) == ([2, 1, 1], [2, 3, 0])
    assert (habit["changed"], habit["moves"]) == (0.0, [])
    a, b = np.array([2.5, 1.5, 1.5]) / 5.5, np.array([2.5, 3.5, 0.5]) / 6.5
    assert taste["psi"] == pytest.approx(float(((b - a) * np.log(b / a)).sum()))


def test_no_drift_from_itself_and_none_to_an_empty_bank(tmp_path):
    keys = [f"u{i}" for i in range(50)]
    one = bank(tmp_path / "a", keys, np.arange(100).reshape(50, 2) % 2)
    found = drift(one, one)
    assert found["same_model"]
    assert all(f["psi"] == f["changed"] == 0 for f in found["fields"].values())
    empty = bank(tmp_path / "b", [], np.zeros((0, 2), int))
    assert drift(empty, one)["users"] == {"old": 0, "new": 50, "both": 0}
    assert drift(one, empty)["users"]["both"] == 0


def test_banks_that_cannot_be_compared_are_refused(tmp_path):
    a = bank(tmp_path / "a", [1], [[0, 0]])
    with pytest.raises(MismatchError, match="other fields"):
        drift(a, bank(tmp_path / "b", [1], [[0]], FIELDS[:1]))
    with pytest.raises(MismatchError, match="int64 and string keys"):
        drift(a, bank(tmp_path / "c", ["x"], [[0, 0]]))
