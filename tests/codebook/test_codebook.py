import pytest
import torch

from userip_fast.codebook.books import Codebook, ResidualCodebook
from userip_fast.core.errors import MismatchError
from userip_fast.ops import assign_codes_with_stats


def blobs(k=8, per=60, dim=16, spread=0.05):
    """Vectors around k well separated centres, shuffled, with their true labels."""
    centres = torch.randn(k, dim) * 3
    label = torch.arange(k).repeat_interleave(per)[torch.randperm(k * per)]
    return centres[label] + spread * torch.randn(len(label), dim), label, centres


def same_partition(a, b):
    pairs = set(zip(a.tolist(), b.tolist(), strict=True))
    return len(pairs) == len(set(a.tolist())) == len(set(b.tolist()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(4))
def test_kmeans_finds_separated_blobs(seed, dtype):
    x, label, _ = blobs()
    book = Codebook.kmeans(x.to(dtype), 8, seed=seed)
    ids, distance = book.assign(x.to(dtype))
    assert same_partition(ids, label)
    assert distance.mean() < 2 * 16 * 0.05**2 + (0 if dtype == torch.float32 else 1e-3)
    assert book.usage(ids).dead == 0


def test_kmeans_is_repeatable_and_near_scikit_learn():
    from sklearn.cluster import KMeans

    x = torch.rand(2000, 5)
    a, b = (Codebook.kmeans(x, 20, seed=7, iterations=50) for _ in range(2))
    assert torch.equal(a.codewords, b.codewords)
    assert not torch.equal(a.codewords, Codebook.kmeans(x, 20, seed=8).codewords)
    ours = float(a.assign(x)[1].sum())
    theirs = [
        KMeans(20, n_init=1, max_iter=50, random_state=s).fit(x.numpy()).inertia_ for s in range(5)
    ]
    assert ours <= 1.03 * max(theirs)


def test_kmeans_with_fewer_distinct_rows_than_codes():
    x = torch.randn(3, 4).repeat(10, 1)
    book = Codebook.kmeans(x, 6, seed=0)
    assert float(book.assign(x)[1].sum()) < 1e-8
    assert bool(book.codewords.isfinite().all())


def test_kmeans_plus_plus_samples_when_there_are_many_rows(monkeypatch):
    monkeypatch.setattr("userip_fast.codebook.books._INIT_ROWS_PER_CODE", 10)
    x, label, _ = blobs(k=6, per=200)
    ids, _ = Codebook.kmeans(x, 6, seed=3).assign(x)
    assert same_partition(ids, label)


def test_ema_follows_the_data():
    x, _, centres = blobs(k=4)
    book = Codebook(centres + 0.5)
    counts, sums = assign_codes_with_stats(x, book.codewords)[2:]
    lloyd = Codebook(book.codewords)
    lloyd.ema_update(counts, sums, 0.0)
    torch.testing.assert_close(lloyd.codewords, sums / counts[:, None])
    for _ in range(80):
        book.ema_update(*assign_codes_with_stats(x, book.codewords)[2:], decay=0.9)
    torch.testing.assert_close(book.codewords, lloyd.codewords, rtol=1e-3, atol=1e-3)


def test_ema_leaves_unused_codewords_alone():
    book = Codebook(torch.tensor([[0.0], [1.0], [50.0]]))
    for _ in range(200):
        book.ema_update(torch.tensor([4, 4, 0]), torch.tensor([[4.0], [8.0], [0.0]]), decay=0.5)
    torch.testing.assert_close(book.codewords, torch.tensor([[1.0], [2.0], [50.0]]))


def test_usage():
    book = Codebook(torch.randn(4, 2))
    stats = book.usage(torch.tensor([0, 1, 2, 3] * 5))
    assert stats.counts.tolist() == [5, 5, 5, 5]
    assert stats.perplexity == pytest.approx(4.0)
    assert stats.dead == 0
    stats = book.usage(torch.zeros(9, dtype=torch.int64))
    assert (stats.perplexity, stats.dead) == (pytest.approx(1.0), 3)
    assert book.usage(torch.empty(0, dtype=torch.int64)).dead == 4


def test_state_round_trip():
    book = Codebook(torch.randn(4, 3))
    assert set(book.state()) == {"codewords"}
    assert torch.equal(Codebook.from_state(book.state()).codewords, book.codewords)
    book.ema_update(torch.ones(4), torch.randn(4, 3), 0.9)
    other = Codebook.from_state(book.state())
    for b in (book, other):
        b.ema_update(torch.ones(4), torch.ones(4, 3), 0.9)
    assert torch.equal(other.codewords, book.codewords)
    with pytest.raises(MismatchError, match="ema_counts"):
        Codebook.from_state({**book.state(), "ema_counts": torch.ones(5)})
    with pytest.raises(MismatchError, match="extra"):
        Codebook.from_state({**book.state(), "extra": torch.ones(5)})


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"fp32 \[K, D\]"):
        Codebook(torch.randn(4, 2).double())
    with pytest.raises(ValueError, match="NaN"):
        Codebook(torch.full((2, 2), float("nan")))
    with pytest.raises(ValueError, match="N >= k = 5"):
        Codebook.kmeans(torch.randn(4, 2), 5, seed=0)
    book = Codebook(torch.randn(4, 2))
    with pytest.raises(ValueError, match=r"counts must be \[4\]"):
        book.ema_update(torch.ones(3), torch.ones(4, 2), 0.9)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\)"):
        book.ema_update(torch.ones(4), torch.ones(4, 2), 1.0)


def test_residual_levels_refine_and_decode():
    x = torch.randn(3000, 8)
    book = ResidualCodebook.kmeans(x, [8, 8, 8], seed=0, iterations=10)
    ids, distance = book.assign(x)
    assert ids.shape == (3000, 3)
    torch.testing.assert_close((x - book.decode(ids)).square().sum(1), distance)
    one, two = (float(ResidualCodebook(book.levels[:n]).assign(x)[1].mean()) for n in (1, 2))
    assert float(distance.mean()) < 0.85 * two < 0.85 * 0.85 * one
    flat = Codebook.kmeans(x, 24, seed=0, iterations=10)  # as many rows, but 24 ids instead of 512
    assert float(distance.mean()) < float(flat.assign(x)[1].mean())
    with pytest.raises(ValueError, match=r"must be \[N, 3\]"):
        book.decode(ids[:, :2])
    with pytest.raises(ValueError, match="one dimension"):
        ResidualCodebook([Codebook(torch.randn(2, 3)), Codebook(torch.randn(2, 4))])
