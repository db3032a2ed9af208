"""Torn, altered and foreign folders: a FormatError that names the file, never a crash."""

import json
import os
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from userip_fast.bank import FeatureBank
from userip_fast.bank.index import HashIndex
from userip_fast.bank.pages import PAGE, PageSums
from userip_fast.core import _extension
from userip_fast.core.errors import FormatError
from userip_fast.core.files import sha256_file

INTEGER_FILES = [
    "keys.bin", "directory.bin", "codes.bin", "probabilities.bin", "manifest.json", "page_sums.bin",
]  # fmt: skip
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
        others = {"manifest.json", "codes.bin", "probabilities.bin", "page_sums.bin"}
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


ARRAYS = [case for case in CASES if case[1] not in ("manifest.json", "page_sums.bin")]
LOOKED_UP = [case for case in ARRAYS if case[1] != "probabilities.bin"] + [("string", "codes.bin")]


def users_of(kind):
    return list(range(300)) if kind == "int64" else [f"user {i}" for i in range(300)]


def old_style(path):
    """Makes it a bank of a release that knew no page sums."""
    forge(path, lambda m: m["files"].pop("page_sums.bin"))
    (path / "gen-000001" / "page_sums.bin").unlink()


@pytest.mark.parametrize(("kind", "name"), LOOKED_UP)
@pytest.mark.parametrize("native", [True, False])
def test_a_flipped_bit_is_never_served(bank, monkeypatch, kind, name, native):
    if not native:
        monkeypatch.setattr(HashIndex, "_native", lambda *_: None)
    path, keys = bank(kind), users_of(kind)
    file = path / "gen-000001" / name
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    for at in [0, len(whole) - 1, *rng.integers(0, len(whole), 20).tolist()]:
        data = bytearray(whole)
        data[at] ^= 1 << int(rng.integers(8))
        file.write_bytes(data)
        damaged = FeatureBank.open(path)
        page = rf"{name}: page {at // PAGE} .*\(CRC-32 differs\); restore"
        for _ in range(2):  # it does not pass for whole the second time
            with pytest.raises(FormatError, match=page):
                damaged.lookup(keys, on_unknown="code")
        with pytest.raises(FormatError, match=page):
            damaged.rows(keys) if name != "codes.bin" else damaged.codes()


def test_arrays_that_are_handed_out_are_checked_as_a_whole(bank):
    path = bank("string")
    reads = {
        "codes.bin": FeatureBank.codes, "probabilities.bin": lambda b: b.probabilities,
        "key_text.bin": FeatureBank.keys, "key_offsets.bin": FeatureBank.keys,
    }  # fmt: skip
    for name, read in reads.items():
        file = path / "gen-000001" / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(FormatError, match=f"{name}: page"):
            read(FeatureBank.open(path))
        with pytest.raises(FormatError, match=f"{name}: page"):  # nor does it get new sums
            FeatureBank.open(path).update(["new"], [[0]], [[1.0]])
        file.write_bytes(whole)
    FeatureBank.open(path).update(["new"], [[0]], [[1.0]])


@pytest.mark.parametrize("users", [511, 512, 513, 5000])
def test_whole_pages_pass_wherever_they_end(tmp_path, users):
    """Rows, directory entries and texts that lie across two pages or fill many."""
    fields = [{"name": f"f{j}", "codebook_size": 300} for j in range(3)]
    codes = np.random.default_rng(0).integers(0, 300, (users, 3))
    for keys in (list(range(users)), [f"{i}" * (i % 40) + f"|{i}" for i in range(users)]):
        if isinstance(keys[0], str):
            keys[7] = "é" * 3 * PAGE
        made = FeatureBank.write(tmp_path / "b", keys, codes, fields=fields, model_fingerprint="m")
        for some in (slice(7, 8), slice(None)):
            np.testing.assert_array_equal(made.lookup(keys[some]), codes[some])
        arrays = made._generation.arrays
        looked_up = [a for n, a in arrays.items() if n != "key_hashes.bin"]
        assert min(a.seen.mean() for a in looked_up) > 0.9
        for a in arrays.values():
            data = a.path.read_bytes()
            want = [zlib.crc32(data[i : i + PAGE]) for i in range(0, len(data), PAGE)]
            assert a.sums.tolist() == want


def test_sums_do_not_depend_on_the_pieces():
    data = np.random.default_rng(0).bytes(3 * PAGE + 5)
    for size in (1, 7, PAGE - 1, PAGE, PAGE + 1, len(data)):
        sums = PageSums()
        for start in range(0, len(data), size):
            sums.add(memoryview(data)[start : start + size])
        want = [zlib.crc32(data[i : i + PAGE]) for i in range(0, len(data), PAGE)]
        assert sums.sums().tolist() == want


@pytest.mark.parametrize(("kind", "name"), ARRAYS)
@pytest.mark.parametrize("fill", [0x00, 0x7F, 0x80, 0xFF])
def test_an_old_bank_that_is_damaged_does_not_crash(bank, kind, name, fill):
    """Without page sums answers may be wrong (that is what `verify` is for), but no address lies
    outside the files, and no code outside its field."""
    path = bank(kind)
    old_style(path)
    assert not FeatureBank.open(path, verify=True).info()["page_sums"]
    whole = FeatureBank.open(path).lookup(users_of(kind))
    file = path / "gen-000001" / name
    file.write_bytes(bytes([fill]) * file.stat().st_size)
    damaged = FeatureBank.open(path)
    for read in (lambda: damaged.lookup(users_of(kind), on_unknown="code"), damaged.keys):
        try:
            found = read()
            if not name.startswith(("key", "codes", "dir")):
                assert np.array_equal(damaged.lookup(users_of(kind)), whole)
            assert read == damaged.keys or found.max() <= 5
        except FormatError as e:
            assert str(path) in str(e)  # noqa: PT017 (it may also succeed)
    with pytest.raises(FormatError):
        damaged.verify()
    with pytest.raises(FormatError):  # what is damaged gets no new sums
        damaged.update(users_of(kind)[:1], [[0]], [[1.0]])


def test_an_old_bank_is_read_and_gets_sums_when_it_is_written_to(bank):
    path = bank("int64")
    want = FeatureBank.open(path)
    codes, digest = want.lookup(range(300)), want.digest
    old_style(path)
    old = FeatureBank.open(path, verify=True)
    np.testing.assert_array_equal(old.lookup(range(300)), codes)
    assert (old.info()["page_sums"], old.digest) == (False, digest)
    new = old.update([1000], [[1]], [[0.5]])
    assert new.info()["page_sums"]
    np.testing.assert_array_equal(new.lookup(range(300)), codes)


@pytest.mark.parametrize("native", [True, False])
def test_a_code_that_is_none_is_refused_whatever_the_sums_say(bank, monkeypatch, native):
    if not native:
        monkeypatch.setattr(HashIndex, "_native", lambda *_: None)
    elif _extension.load() is None:
        pytest.skip(f"no compiled extension: {_extension.why_not()}")
    path = bank("int64")
    file = path / "gen-000001" / "codes.bin"
    codes = np.fromfile(file, np.uint8)
    row = FeatureBank.open(path).rows([17])[0]
    for code in (5, 255):
        codes[row] = code
        forge(path, lambda m: rewrite(m, file, codes))
        damaged = FeatureBank.open(path)
        with pytest.raises(FormatError, match=rf"codes.bin: holds the codes \[{code}\], .* \[5\]"):
            damaged.lookup([16, 17])
        assert damaged.lookup([16]).shape == (1, 1)


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


def rewrite(manifest, file, values):
    """Writes an array, and sums that say it is right."""
    values.tofile(file)
    manifest["files"][file.name]["sha256"] = sha256_file(file)
    sums = []
    for name in sorted(set(manifest["files"]) - {"page_sums.bin"}):
        pages = PageSums()
        pages.add(memoryview(file.with_name(name).read_bytes()))
        sums.append(pages.sums())
    np.concatenate(sums).tofile(file.with_name("page_sums.bin"))
    manifest["files"]["page_sums.bin"]["sha256"] = sha256_file(file.with_name("page_sums.bin"))


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
        (lambda m: m.update(key_type="string"), r"names \['keys.bin'\], no files of such a bank"),
        (lambda m: m.update(fields=[]), "not a valid manifest"),
        (lambda m: m["fields"][0].update(codebook_size=70000), "codes.bin is .* must be"),
        (lambda m: m["files"].pop("keys.bin"), "not a valid manifest"),
        (lambda m: m["files"]["keys.bin"].update(dtype="<f8"), "keys.bin is"),
        (lambda m: m["files"]["codes.bin"].update(shape=[300, 2]), "codes.bin is"),
        (lambda m: m["files"]["page_sums.bin"].update(shape=[3]), "page_sums.bin: is .* must be"),
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

    dtype = FeatureBank.open(path)._generation.arrays[name].unchecked.dtype
    forge(path, lambda m: rewrite(m, file, change(np.fromfile(file, dtype))))
    with pytest.raises(FormatError, match=message):
        FeatureBank.open(path).verify()


@pytest.mark.parametrize("outside", ["../../../secret", "/dev/zero", "/etc/passwd", "sub/x", ".."])
def test_manifests_name_files_of_the_bank_only(bank, tmp_path, outside):
    path = bank("int64")
    (tmp_path / "secret").write_text("x")
    entry = {"dtype": "|u1", "shape": [1], "sha256": sha256_file(tmp_path / "secret")}
    forge(path, lambda m: m["files"].update({outside: entry}))
    with pytest.raises(FormatError, match="no files of such a bank"):
        FeatureBank.open(path)


@pytest.mark.parametrize(
    "name", ["CURRENT", "gen-000001", *(f"gen-000001/{n}" for n in INTEGER_FILES)]
)
@pytest.mark.parametrize("kind", ["symbolic link", "FIFO"])
def test_links_are_not_followed_and_pipes_not_waited_for(bank, tmp_path, name, kind):
    path = bank("int64")
    entry, moved = path / name, tmp_path / "outside"
    entry.rename(moved)
    if kind == "FIFO":
        os.mkfifo(entry)
    else:
        entry.symlink_to(moved)
    with pytest.raises(FormatError, match=entry.name):
        FeatureBank.open(path)


def test_a_bank_itself_may_be_reached_by_a_link(bank, tmp_path):
    (tmp_path / "link").symlink_to(bank("int64"))
    FeatureBank.open(tmp_path / "link", verify=True).update([1000], [[1]], [[0.5]])
    assert len(FeatureBank.open(tmp_path / "link")) == 301


def test_no_bank(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(FormatError, match=r"no feature bank here \(there is no file CURRENT\)"):
            FeatureBank.open(path)


def test_threads_may_look_into_a_fresh_bank_at_once(tmp_path):
    keys = np.random.default_rng(0).permutation(60_000)
    codes = (keys % 5)[:, None]
    fields = [{"name": "f", "codebook_size": 5}]
    FeatureBank.write(tmp_path / "b", keys, codes, fields=fields, model_fingerprint="m")
    for texts in (False, True):
        bank = FeatureBank.open(tmp_path / "b")
        with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(8) as threads:
            if texts:  # the path that text keys take
                patch.setattr(HashIndex, "_native", lambda *_: None)
            parts = np.array_split(np.arange(len(keys)), 64)
            found = threads.map(lambda part, b=bank: b.lookup(keys[part]), parts)
            for part, got in zip(parts, found):
                np.testing.assert_array_equal(got, codes[part])
