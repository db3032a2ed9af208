"""Torn, altered and foreign folders: a FormatError that names the file, never a crash."""

import json
import shutil

import numpy as np
import pytest

from userip_fast.bank import FeatureBank
from userip_fast.errors import FormatError, UserIPError
from userip_fast.files import sha256_file

INTEGER_FILES = ["keys.bin", "directory.bin", "codes.bin", "probabilities.bin", "manifest.json"]
STRING_FILES = ["key_offsets.bin", "key_text.bin", "key_hashes.bin", "directory.bin"]
CASES = [("int64", name) for name in INTEGER_FILES] + [("string", name) for name in STRING_FILES]


@pytest.fixture(scope="module")
def banks(tmp_path_factory):
    """One bank per key type, to be copied."""
    path = tmp_path_factory.mktemp("banks")
    rng = np.random.default_rng(0)
    for kind, keys in [("int64", list(range(300))), ("string", [f"user {i}" for i in range(300)])]:
        FeatureBank.write(
            path / kind,
            keys,
            rng.integers(0, 5, (300, 1)),
            fields=[{"name": "f", "codebook_size": 5, "code_names": None}],
            model_fingerprint="m",
            probabilities=rng.random((300, 1)),
        )
    return path


@pytest.fixture
def bank(banks, tmp_path):
    def copy(kind):
        shutil.copytree(banks / kind, tmp_path / "b")
        return tmp_path / "b"

    return copy


def test_every_file_is_covered(banks):
    for kind in ("int64", "string"):
        files = {p.name for p in (banks / kind / "gen-000001").iterdir()}
        others = {"manifest.json", "codes.bin", "probabilities.bin"}
        assert files == {name for k, name in CASES if k == kind} | others
        FeatureBank.open(banks / kind, verify=True)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_altered_byte(bank, kind, name):
    path = bank(kind)
    file = path / "gen-000001" / name
    original = file.read_bytes()
    for at in (0, len(original) // 2, len(original) - 1):
        data = bytearray(original)
        data[at] ^= 1
        file.write_bytes(data)
        with pytest.raises(FormatError, match=name):
            FeatureBank.open(path, verify=True)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_torn_or_missing_file(bank, kind, name):
    path = bank(kind)
    file = path / "gen-000001" / name
    data = file.read_bytes()
    for torn in (data[:-1], data + b"\0", b""):
        file.write_bytes(torn)
        with pytest.raises(FormatError, match=name):
            FeatureBank.open(path)
    file.unlink()
    with pytest.raises(FormatError, match=name):
        FeatureBank.open(path)
    file.mkdir()
    with pytest.raises(FormatError, match=name):
        FeatureBank.open(path)


@pytest.mark.parametrize(("kind", "name"), CASES[:4] + CASES[5:])
@pytest.mark.parametrize("fill", [0x00, 0x7F, 0x80, 0xFF])
def test_reading_a_damaged_bank_unverified_does_not_crash(bank, kind, name, fill):
    """Answers may be wrong (that is what `verify` is for), but no address outside the files."""
    path = bank(kind)
    file = path / "gen-000001" / name
    file.write_bytes(bytes([fill]) * file.stat().st_size)
    damaged = FeatureBank.open(path)
    keys = list(range(300)) if kind == "int64" else [f"user {i}" for i in range(300)]
    for read in (
        lambda: damaged.lookup(keys, on_unknown="code"),
        lambda: damaged.lookup(keys),
        damaged.keys,
    ):
        try:
            read()
        except UserIPError as e:
            assert str(path) in str(e)  # noqa: PT017 (it may also succeed)
    with pytest.raises(FormatError):
        damaged.verify()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"generation": "gen-000001"}',
        '{"generation": "../elsewhere", "manifest_sha256": ""}',
        '{"generation": "gen-000009", "manifest_sha256": ""}',
        "\0\0\0\0",
    ],
)
def test_damaged_pointer(bank, text):
    path = bank("int64")
    (path / "CURRENT").write_text(text)
    with pytest.raises(FormatError, match=r"CURRENT|gen-000009"):
        FeatureBank.open(path)
    # A whole new bank may be written over it.
    fields = [{"name": "f", "codebook_size": 5}]
    FeatureBank.write(path, [1], [[1]], fields=fields, model_fingerprint="m").verify()


def forge(path, change):
    """Alters the manifest and makes CURRENT vouch for it, as another program might."""
    file = path / "gen-000001" / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))
    pointer = {"generation": "gen-000001", "manifest_sha256": sha256_file(file)}
    (path / "CURRENT").write_text(json.dumps(pointer))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format="other"), "not the manifest of a feature bank"),
        (lambda m: m.update(version=2), "layout version 2, this release reads 1"),
        (lambda m: m.update(users=301), "must be"),
        (lambda m: m.update(users="many"), "not a valid manifest"),
        (lambda m: m.update(users=-1), "manifest"),
        (lambda m: m.update(key_type="string"), "not a valid manifest"),
        (lambda m: m.update(fields=[]), "not a valid manifest"),
        (lambda m: m["fields"][0].update(codebook_size=70000), "codes.bin is .* must be"),
        (lambda m: m["files"].pop("keys.bin"), "not a valid manifest"),
        (lambda m: m["files"]["keys.bin"].update(dtype="<f8"), "keys.bin is"),
        (lambda m: m["files"]["codes.bin"].update(shape=[300, 2]), "codes.bin is"),
        (lambda m: m.pop("model_fingerprint"), "not a valid manifest"),
    ],
)
def test_manifest_that_does_not_fit(bank, change, message):
    path = bank("int64")
    forge(path, change)
    with pytest.raises(FormatError, match=message):
        FeatureBank.open(path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("keys.bin", lambda a: a[::-1], "not in hash order"),
        ("keys.bin", lambda a: np.r_[a[:1], a[:-1]], "occur more than once"),
        ("codes.bin", lambda a: np.full_like(a, 5), "has code 5 in field 'f'"),
        ("probabilities.bin", lambda a: -a, "probabilities: must be within"),
        ("directory.bin", lambda a: np.r_[a[1:], a[-1:]], "directory.bin: does not fit the keys"),
    ],
)
def test_verify_checks_what_checksums_cannot(bank, name, change, message):
    path = bank("int64")
    file = path / "gen-000001" / name

    def rewrite(manifest):
        entry = manifest["files"][name]
        change(np.fromfile(file, entry["dtype"])).tofile(file)
        entry["sha256"] = sha256_file(file)

    forge(path, rewrite)
    with pytest.raises(FormatError, match=message):
        FeatureBank.open(path).verify()


def test_no_bank(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(FormatError, match=r"no feature bank here \(there is no file CURRENT\)"):
            FeatureBank.open(path)
