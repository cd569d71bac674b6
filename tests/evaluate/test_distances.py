"""Distances of sets of features: closed forms, brute force, and torchmetrics where it is installed."""

import numpy as np
import pytest
from scipy import linalg

from dalle2_jax.evaluate import distances
from dalle2_jax.evaluate.distances import Moments


def gaussian(count, dim, seed, scale=1.0, shift=0.0):
    """Correlated Gaussian vectors; the mixing matrix depends on `dim` alone."""
    mixing = np.random.default_rng(dim).normal(size=(dim, dim)) / np.sqrt(dim) + np.eye(dim)
    return np.random.default_rng(seed).normal(size=(count, dim)) @ mixing * scale + shift


def exact(x):
    """Vectors with a mean of 0 and a covariance of 1, exactly."""
    x = x - x.mean(axis=0)
    return np.linalg.solve(np.linalg.cholesky(np.cov(x, rowvar=False)), x.T).T


# Moments


def test_moments_are_those_of_numpy():
    x = gaussian(101, 6, 0, scale=3.0, shift=1000.0)
    np.testing.assert_allclose(Moments.of(x).mean, x.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(Moments.of(x).cov, np.cov(x, rowvar=False), rtol=1e-10, atol=1e-10)


def test_moments_refuse_what_they_cannot_sum():
    with pytest.raises(ValueError, match="1 rows are not finite"):
        Moments.of(np.array([[1.0, 2.0], [np.nan, 0.0]]))
    with pytest.raises(ValueError, match=r"must be \[N, D\]"):
        Moments.of(np.zeros((0, 4)))
    with pytest.raises(ValueError, match="2 or more vectors, not 1"):
        Moments.of(np.zeros((1, 4)))


# Frechet distance


def test_frechet_distance_is_right():
    """Zero between a set and itself; the closed form of two Gaussians."""
    x = gaussian(300, 5, 0)
    assert distances.frechet_distance(Moments.of(x), Moments.of(x)) == pytest.approx(0, abs=1e-9)
    # Covariances A A and B B that commute, so (S_x S_y)^(1/2) = A B.
    white, a, b = exact(gaussian(200, 3, 2)), np.array([1.0, 2.0, 3.0]), np.array([2.0, 0.5, 3.0])
    shift = np.array([1.0, -2.0, 0.5])
    found = distances.frechet_distance(Moments.of(white * a), Moments.of(white * b + shift))
    assert found == pytest.approx(shift @ shift + ((a - b) ** 2).sum(), rel=1e-10)


def test_frechet_distance_equals_the_matrix_square_root():
    x, y = Moments.of(gaussian(90, 12, 0)), Moments.of(gaussian(70, 12, 1, scale=1.5) ** 2)
    root = linalg.sqrtm(x.cov @ y.cov)
    expected = ((x.mean - y.mean) ** 2).sum() + np.trace(x.cov + y.cov - 2 * root.real)
    assert distances.frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)
    assert distances.frechet_distance(y, x) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_fewer_pictures_than_entries():
    """tr (S_x S_y)^(1/2) is the nuclear norm of X Y^T, with X^T X = S_x: exact for singular covariances."""
    x, y = gaussian(20, 64, 0), gaussian(30, 64, 1)
    a, b = Moments.of(x), Moments.of(y)
    inner = ((x - a.mean) / np.sqrt(19)) @ ((y - b.mean) / np.sqrt(29)).T
    nuclear = np.linalg.svd(inner, compute_uv=False).sum()
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.cov) + np.trace(b.cov) - 2 * nuclear
    assert distances.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert distances.frechet_with_error(x, y)[0] == pytest.approx(expected, rel=1e-6)


def test_the_error_of_the_frechet_distance_is_its_spread():
    def one(seed):
        return distances.frechet_with_error(
            gaussian(400, 4, 2 * seed), gaussian(300, 4, 2 * seed + 1, scale=1.4, shift=0.3)
        )

    found = np.array([one(seed) for seed in range(200)])
    assert found[:, 1].mean() == pytest.approx(found[:, 0].std(), rel=0.2)
    moments = (Moments.of(gaussian(400, 4, 0)), Moments.of(gaussian(300, 4, 1, scale=1.4, shift=0.3)))
    assert found[0, 0] == pytest.approx(distances.frechet_distance(*moments), rel=1e-9)


def test_extrapolation_removes_the_bias_of_few_pictures():
    """Equal Gaussians of 20 entries: the true distance is 0, that of 1000 pictures is not."""
    x, reference = gaussian(1000, 20, 0), Moments.of(gaussian(50_000, 20, 1))
    plain = distances.frechet_distance(Moments.of(x), reference)
    found, error = distances.frechet_infinity(x, reference)
    assert plain > 0.15 and abs(found) < plain / 4 and error < plain / 4
    assert distances.frechet_infinity(x, reference) == (found, error)
    with pytest.raises(ValueError, match="needs more than 200"):
        distances.frechet_infinity(x[:200], reference)


# Maximum mean discrepancy


def brute_mmd(x, y, kernel, biased):
    def mean(a, b, same):
        values = [kernel(p, q) for i, p in enumerate(a) for j, q in enumerate(b) if not (same and i == j)]
        return np.mean(values)

    return mean(x, x, not biased) + mean(y, y, not biased) - 2 * mean(x, y, False)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("name", ["cubic", "gaussian"])
def test_mmd_is_its_definition(monkeypatch, biased, name):
    monkeypatch.setattr(distances, "CHUNK", 7)
    x, y = gaussian(16, 3, 0), gaussian(11, 3, 1, shift=0.5)
    one, kernel = {
        "cubic": (lambda p, q: (p @ q / 3 + 1) ** 3, distances.cubic_kernel),
        "gaussian": (lambda p, q: np.exp(-((p - q) ** 2).sum() / 200), distances.gaussian_kernel),
    }[name]
    value, error = distances.mmd(x, y, kernel, biased)
    assert value == pytest.approx(brute_mmd(x, y, one, biased), rel=1e-9) and error > 0


def test_the_error_of_mmd_is_its_spread():
    found = np.array(
        [
            distances.mmd(
                gaussian(150, 3, 2 * i), gaussian(100, 3, 2 * i + 1, shift=0.6), distances.cubic_kernel
            )
            for i in range(200)
        ]
    )
    assert found[:, 1].mean() == pytest.approx(found[:, 0].std(), rel=0.2)


def test_kid_is_unbiased():
    """Of equal distributions it is 0 on average, at any size of the subsets; of others it is not."""
    found = [
        distances.kid(gaussian(60, 4, 2 * i), gaussian(60, 4, 2 * i + 1), subsets=4, subset_size=20)[0]
        for i in range(150)
    ]
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(150)
    assert min(found) < 0
    x, y = gaussian(60, 4, 0), gaussian(60, 4, 1, shift=4.0)
    value, *_ = distances.kid(x, y, subsets=4, subset_size=20)
    assert value > 5 * np.std(found)


def test_kid_of_all_pictures_is_the_unbiased_mmd():
    x, y = gaussian(40, 4, 0), gaussian(40, 4, 1, shift=0.2)
    value, spread, error = distances.kid(x, y, subsets=3, subset_size=40)
    whole = distances.mmd(x, y, distances.cubic_kernel)
    assert (value, error) == pytest.approx(whole, rel=1e-9)
    assert spread == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="subsets of 1000 needs as many pictures: 40 and 40 are too few"):
        distances.kid(x, y)


def test_the_error_of_kid_is_its_spread(monkeypatch):
    """Over other pictures and other subsets, though few rows are looked at for it."""
    monkeypatch.setattr(distances, "ERROR_ROWS", 100)
    found = np.array(
        [
            distances.kid(
                gaussian(200, 3, 2 * i, scale=0.3),
                gaussian(150, 3, 2 * i + 1, scale=0.3, shift=0.6),
                subsets=8,
                subset_size=40,
                seed=i,
            )
            for i in range(300)
        ]
    )
    assert found[:, 2].mean() == pytest.approx(found[:, 0].std(), rel=0.2)


def test_cmmd_of_two_points_is_its_closed_form():
    """Sets that sit on one point each: 2 - 2 exp(-|a - b|^2 / 200), times 1000."""
    a, b = np.eye(2)
    value, _ = distances.cmmd(np.repeat(a[None], 5, 0), np.repeat(b[None], 7, 0))
    assert value == pytest.approx(2000 * (1 - np.exp(-0.01)), rel=1e-10)
    x = gaussian(30, 4, 0)
    assert distances.cmmd(x, x)[0] == pytest.approx(0, abs=1e-9)


# Neighbours


def brute_neighbourhoods(x, y, k):
    def radius(rows, i):
        return np.sort(np.linalg.norm(rows - rows[i], axis=1))[k]

    inside_y = np.array([[np.linalg.norm(p - q) <= radius(y, j) for j, q in enumerate(y)] for p in x])
    inside_x = np.array([[np.linalg.norm(p - q) <= radius(x, i) for i, p in enumerate(x)] for q in y])
    return {
        "precision": inside_y.any(axis=1).mean(),
        "recall": inside_x.any(axis=1).mean(),
        "density": inside_y.sum() / (k * len(x)),
        "coverage": inside_y.any(axis=0).mean(),
    }


@pytest.mark.parametrize("k", [1, 3, 5])
def test_neighbourhoods_are_their_definition(monkeypatch, k):
    monkeypatch.setattr(distances, "CHUNK", 8)
    x, y = gaussian(30, 3, 0), gaussian(21, 3, 1, scale=1.3)
    found = distances.neighbourhoods(x, y, k)
    assert found.pop("density_error") > 0
    assert found == pytest.approx(brute_neighbourhoods(x, y, k))


def test_the_error_of_density_is_its_spread_over_other_pictures():
    y = gaussian(100, 3, 0)
    found = [distances.neighbourhoods(gaussian(80, 3, i), y, 5) for i in range(1, 200)]
    spread = np.std([one["density"] for one in found])
    assert np.mean([one["density_error"] for one in found]) == pytest.approx(spread, rel=0.2)


def test_a_tight_cluster_is_precise_and_covers_little():
    wide = gaussian(500, 8, 0)
    tight = gaussian(400, 8, 1, scale=0.1)
    found = distances.neighbourhoods(tight, wide)
    assert found["precision"] > 0.8 and found["recall"] < 0.3 and found["coverage"] < 0.3
    turned = distances.neighbourhoods(wide, tight)
    assert turned["precision"] == found["recall"] and turned["recall"] == found["precision"]
    same = distances.neighbourhoods(wide, wide)
    assert same["precision"] == same["recall"] == same["coverage"] == 1
    apart = distances.neighbourhoods(wide, wide + 100)
    assert set(apart.values()) == {0.0}
    with pytest.raises(ValueError, match="more than 3 pictures"):
        distances.neighbourhoods(wide[:3], wide)


# Inception score


def test_inception_score_of_certain_labels_is_their_number():
    labels = np.arange(40) % 4
    logits = np.where(labels[:, None] == np.arange(6), 800.0, 0.0)
    value, spread = distances.inception_score(logits, splits=1)
    assert value == pytest.approx(4) and spread == 0
    assert distances.inception_score(np.zeros((40, 6)))[0] == pytest.approx(1)
    with pytest.raises(ValueError, match="cannot be split 10 times"):
        distances.inception_score(logits[:9])


def test_inception_score_splits_consecutively():
    logits = gaussian(30, 5, 0)
    parts = [distances.inception_score(logits[i : i + 10], splits=1, seed=None)[0] for i in (0, 10, 20)]
    value, spread = distances.inception_score(logits, splits=3, seed=None)
    assert value == pytest.approx(np.mean(parts)) and spread == pytest.approx(np.std(parts))
    assert distances.inception_score(logits, splits=3) != (value, spread)


# torchmetrics, fed with the same features


@pytest.fixture(scope="module")
def torch():
    pytest.importorskip("torchmetrics", reason="the comparison needs torchmetrics")
    return pytest.importorskip("torch", reason="the comparison needs torch")


def test_frechet_and_kid_equal_those_of_torchmetrics(torch):
    from torchmetrics.image.fid import _compute_fid
    from torchmetrics.image.kid import poly_mmd

    x, y = gaussian(200, 16, 0), gaussian(150, 16, 1, scale=1.2, shift=0.1)
    a, b = Moments.of(x), Moments.of(y)
    theirs = _compute_fid(*(torch.tensor(value) for m in (a, b) for value in (m.mean, m.cov)))
    assert distances.frechet_distance(a, b) == pytest.approx(float(theirs), rel=1e-8)
    theirs = float(poly_mmd(torch.tensor(x[:150]), torch.tensor(y)))
    ours, *_ = distances.kid(x[:150], y, subsets=1, subset_size=150)
    assert ours == pytest.approx(theirs, rel=1e-8)
