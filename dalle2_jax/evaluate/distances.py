"""Distances of two sets of feature vectors, in numpy and float64, for features of any network.

With features x_1 .. x_N of generated pictures and y_1 .. y_M of a reference, both of D entries,

    Frechet distance    |m_x - m_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2))            arXiv:1706.08500
    unbiased MMD^2      mean over i != j of k(x_i, x_j) + the same of y - 2 mean of k(x_i, y_j)
      KID               of k(x, y) = (x . y / D + 1)^3, the mean over subsets        arXiv:1801.01401
      CMMD              biased, k(x, y) = exp(-|x - y|^2 / 2 sigma^2), times 1000    arXiv:2401.09603
    precision, recall   share of x in the k-nearest-neighbour balls of y, and back   arXiv:1904.06991
    density, coverage   how many balls of y hold an x; share of balls that hold one  arXiv:2002.09797
    inception score     exp of the mean of KL(p(label | x) | p(label))               arXiv:1606.03498

The covariances S are those of `numpy.cov` (divided by N - 1). The Frechet distance of finite sets is too
large by about c / N; `frechet_infinity` extrapolates to 1 / N = 0 (arXiv:1911.07023).

Standard errors are first-order: the spread of each example's influence on the distance, over sqrt(N). They
estimate the change with other pictures. They do not include the bias in N, and tend to 0 if the distributions
are equal.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import numpy as np

CHUNK = 1024  # rows of a block of pairwise distances
ERROR_ROWS = 4096  # enough rows to estimate the variance of one row's influence


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean [D] and unbiased covariance [D, D] of a set of vectors."""

    mean: np.ndarray
    cov: np.ndarray

    @staticmethod
    def of(x: np.ndarray) -> "Moments":
        """The moments of the rows of x [N, D]. Raises ValueError for N < 2 and for non-finite rows."""
        x = as_features(x)
        if len(x) < 2:
            raise ValueError(f"a covariance needs 2 or more vectors, not {len(x)}")
        mean = x.mean(axis=0)
        return Moments(mean, (x - mean).T @ (x - mean) / (len(x) - 1))


def as_features(x: np.ndarray, name: str = "features") -> np.ndarray:
    """x as float64 [N, D]. Raises ValueError for another shape, for no rows, and for NaN and infinities."""
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or not x.size:
        raise ValueError(f"{name} must be [N, D] with N and D above 0, not {list(x.shape)}")
    if not np.isfinite(x).all():
        raise ValueError(f"{name}: {int((~np.isfinite(x)).any(axis=1).sum())} rows are not finite")
    return x


def _pair(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y = as_features(x, "generated features"), as_features(y, "reference features")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"features of {x.shape[1]} and of {y.shape[1]} entries cannot be compared")
    return x, y


# Frechet distance


def frechet_distance(x: Moments, y: Moments) -> float:
    """The Frechet distance of two Gaussians with these moments; at least 0.

    tr (S_x S_y)^(1/2) is the sum of the square roots of the eigenvalues of R S_x R with R = S_y^(1/2): two
    symmetric eigenproblems. Negative eigenvalues are rounding errors and are set to 0, so that covariances
    may be singular.

    Raises ValueError for features of different lengths, or of fewer than two pictures.
    """
    return _frechet(x, y, _root(y.cov))


def frechet_with_error(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(Frechet distance of the features x [N, D] and y [M, D], its standard error).

    With the optimal transport T = R^-1 (R S_y R)^(1/2) R^-1 from x to y, R = S_x^(1/2), the influence of a
    picture x_i with d = x_i - m_x is 2 (m_x - m_y) . d + d (1 - T) d up to a constant; that of a y_j is the
    same with the roles exchanged, T^-1 for T. Directions in which x does not vary are left out. The error is
    a good estimate for N and M of several D.
    """
    x, y = _pair(x, y)
    a, b = Moments.of(x), Moments.of(y)
    values, vectors = np.linalg.eigh(a.cov)
    keep = values > max(values[-1], 0) * 1e-12
    root = np.sqrt(values[keep])
    between = (vectors[:, keep] * root).T @ b.cov @ (vectors[:, keep] * root)
    inner, turned = np.linalg.eigh(between)
    inner = np.sqrt(np.clip(inner, 0, None))
    shift = a.mean - b.mean
    distance = shift @ shift + np.trace(a.cov) + np.trace(b.cov) - 2 * inner.sum()
    # d T d = |inner^(1/2) turned^T R^-1 d|^2, and d T^-1 d with R and the inverse of inner.
    to_y = (vectors[:, keep] / root) @ turned * np.sqrt(inner)
    small = inner > (inner[-1] if inner.size else 0) * 1e-12
    to_x = (vectors[:, keep] * root) @ turned[:, small] / np.sqrt(inner[small])
    error = 0.0
    for rows, moments, away, transport in ((x, a, shift, to_y), (y, b, -shift, to_x)):
        d = rows - moments.mean
        influence = 2 * d @ away + (d**2).sum(axis=1) - ((d @ transport) ** 2).sum(axis=1)
        error += influence.var(ddof=1) / len(rows)
    return max(0.0, float(distance)), float(np.sqrt(error))


def frechet_infinity(x: np.ndarray, y: Moments, points: int = 15, seed: int = 0) -> tuple[float, float]:
    """(the Frechet distance extrapolated to infinitely many generated pictures, the line's standard error).

    A line in 1 / n is fitted to the distances of `points` random subsets of x [N, D], of sizes n spaced
    evenly from min(5000, N / 10) to N, from a fixed reference. The smallest must exceed D: below, the
    distance is not linear in 1 / n. The error is that of the line through these subsets alone; add the error
    for other pictures of `frechet_with_error`.

    Raises ValueError for too few rows.
    """
    x = as_features(x)
    count, dim = x.shape
    smallest = min(5000, count // 10)
    if smallest <= dim:
        raise ValueError(f"extrapolating {dim} features needs more than {10 * dim} pictures, not {count}")
    draw, root = np.random.RandomState(seed), _root(y.cov)
    sizes = np.linspace(smallest, count, points).astype(int)
    found = [_frechet(Moments.of(x[draw.choice(count, n, replace=False)]), y, root) for n in sizes]
    (_, at_zero), covariance = np.polyfit(1 / sizes, found, 1, cov=True)
    return float(at_zero), float(np.sqrt(covariance[1, 1]))


def _root(cov: np.ndarray) -> np.ndarray:
    """The square root of a covariance."""
    values, vectors = np.linalg.eigh(cov)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def _frechet(x: Moments, y: Moments, root: np.ndarray) -> float:
    """The Frechet distance; `root` is the square root of the covariance of y."""
    if x.mean.shape != y.mean.shape:
        raise ValueError(f"features of {len(x.mean)} and of {len(y.mean)} entries cannot be compared")
    shift, cov = x.mean - y.mean, x.cov
    between = root @ cov @ root
    overlap = np.sqrt(np.clip(np.linalg.eigvalsh((between + between.T) / 2), 0, None)).sum()
    return max(0.0, float(shift @ shift + np.trace(cov) + np.trace(y.cov) - 2 * overlap))


# Maximum mean discrepancy

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]


def cubic_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """KID's (x . y / D + 1)^3, [N, M]."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """CMMD's exp(-|x - y|^2 / 2 sigma^2) with sigma 10, [N, M]."""
    return np.exp(-_squared_distances(x, y) / (2 * 10.0**2))


def mmd(x: np.ndarray, y: np.ndarray, kernel: Kernel, biased: bool = False) -> tuple[float, float]:
    """(squared maximum mean discrepancy of x [N, D] and y [M, D], its standard error).

    biased: include the pairs of a row with itself. The biased estimate has less variance and is at least 0;
    the unbiased one has the expectation 0 for equal distributions and may be negative.

    Raises ValueError for fewer than two rows.
    """
    value, spread_x, spread_y = _mmd(x, y, kernel, biased)
    return value, float(np.sqrt(spread_x / len(x) + spread_y / len(y)))


def _mmd(x: np.ndarray, y: np.ndarray, kernel: Kernel, biased: bool) -> tuple[float, float, float]:
    """(squared discrepancy, the variances of the influences of a row of x and of y)."""
    x, y = _pair(x, y)
    if min(len(x), len(y)) < 2:
        raise ValueError("a discrepancy needs 2 or more pictures on either side")

    def within(rows: np.ndarray) -> np.ndarray:
        """Means of the kernel between a row and the rows of its set."""
        means = _by_chunks(rows, lambda part: kernel(part, rows).mean(axis=1))
        if biased:
            return means
        return (means * len(rows) - _by_chunks(rows, lambda x: kernel(x, x).diagonal())) / (len(rows) - 1)

    parts, yx = [], np.zeros(len(y))  # means of the kernel between a row and all rows of the other set
    for rows in _chunks(x):
        gram = kernel(rows, y)
        parts.append(gram.mean(axis=1))
        yx += gram.sum(axis=0) / len(x)
    xx, yy, xy = within(x), within(y), np.concatenate(parts)
    spread_x, spread_y = (float((2 * influence).var(ddof=1)) for influence in (xx - xy, yy - yx))
    return float(xx.mean() + yy.mean() - 2 * xy.mean()), spread_x, spread_y


def kid(
    x: np.ndarray, y: np.ndarray, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> tuple[float, float, float]:
    """(mean over subsets, their standard deviation, the mean's standard error): cubic kernel, unbiased MMD^2.

    Each subset has `subset_size` different rows of x [N, D] and as many of y [M, D], drawn in this order by
    numpy's RandomState(seed), as in torch-fidelity. The standard error has two parts: for other pictures,
    from the influences of at most ERROR_ROWS on either side, and for other subsets.

    Raises ValueError for fewer rows than `subset_size`.
    """
    x, y = _pair(x, y)
    if min(len(x), len(y)) < subset_size:
        few = f"{len(x)} and {len(y)} are too few"
        raise ValueError(f"KID of subsets of {subset_size} needs as many pictures: {few}")
    if subset_size < 2:
        raise ValueError("subsets must have 2 or more pictures")
    draw, found = np.random.RandomState(seed), []
    pairs = subset_size * (subset_size - 1)
    for _ in range(subsets):
        a = x[draw.choice(len(x), subset_size, replace=False)]
        b = y[draw.choice(len(y), subset_size, replace=False)]
        within = [cubic_kernel(rows, rows) for rows in (a, b)]
        same = sum((gram.sum() - np.trace(gram)) / pairs for gram in within)
        found.append(same - 2 * cubic_kernel(a, b).mean())
    part = np.random.RandomState(seed)
    some_x, some_y = (rows[part.permutation(len(rows))[:ERROR_ROWS]] for rows in (x, y))
    _, spread_x, spread_y = _mmd(some_x, some_y, cubic_kernel, biased=False)
    error = spread_x / len(x) + spread_y / len(y) + np.var(found) / subsets
    return float(np.mean(found)), float(np.std(found)), float(np.sqrt(error))


def cmmd(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(1000 times the biased MMD^2 with a Gaussian kernel, its standard error), as CMMD is defined.

    x [N, D] and y [M, D] are CLIP's image embeddings, of unit norm.
    """
    value, error = mmd(x, y, gaussian_kernel, biased=True)
    return 1000 * value, 1000 * error


# Neighbours


def neighbourhoods(x: np.ndarray, y: np.ndarray, k: int = 3) -> dict[str, float]:
    """precision, recall, density, density_error and coverage of generated x [N, D] and reference y [M, D].

    The ball of a vector has the distance to its k-th nearest neighbour in its set as its radius, border
    included. Usual are k = 3 for precision and recall, k = 5 for density and coverage. density_error is the
    standard error of density for other x and the same y.

    Raises ValueError unless both sets have more than k rows.
    """
    x, y = _pair(x, y)
    if k < 1 or min(len(x), len(y)) <= k:
        raise ValueError(f"balls to the {k}th neighbour need more than {k} pictures on either side")
    radius_x, radius_y = _radii(x, k), _radii(y, k)
    in_x = np.zeros(len(y), bool)  # whether a y lies in any ball of x
    hit_y = np.zeros(len(y), bool)  # whether the ball of a y holds any x
    counts = []  # number of balls of y around each x
    for rows, radii in zip(_chunks(x), _chunks(radius_x), strict=True):
        distances = _squared_distances(rows, y)
        inside = distances <= radius_y
        counts.append(inside.sum(axis=1))
        hit_y |= inside.any(axis=0)
        in_x |= (distances <= radii[:, None]).any(axis=0)
    balls = np.concatenate(counts)
    return {
        "precision": float((balls > 0).mean()),
        "recall": float(in_x.mean()),
        "density": float(balls.mean() / k),
        "density_error": float(balls.std() / k / np.sqrt(len(x))),
        "coverage": float(hit_y.mean()),
    }


def _radii(x: np.ndarray, k: int) -> np.ndarray:
    """Squared distance of each row to its k-th nearest other row."""
    # the k + 1 nearest rows include the row itself, at a distance of 0 but for rounding
    return _by_chunks(x, lambda rows: np.partition(_squared_distances(rows, x), k, axis=1)[:, k])


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Squared distances [N, M] between the rows of two arrays."""
    squares = (x**2).sum(axis=1)[:, None] + (y**2).sum(axis=1)
    return np.maximum(squares - 2 * x @ y.T, 0)


def _chunks(x: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(x), CHUNK):
        yield x[start : start + CHUNK]


def _by_chunks(x: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return np.concatenate([function(rows) for rows in _chunks(x)])


# Inception score


def inception_score(logits: np.ndarray, splits: int = 10, seed: int | None = 2020) -> tuple[float, float]:
    """(mean, standard deviation over splits) of the inception score of logits [N, C].

    seed: of the permutation before the split, by numpy's RandomState as in torch-fidelity; None: no
      permutation.

    Raises ValueError for fewer rows than splits.
    """
    logits = as_features(logits, "logits")
    if not 1 <= splits <= len(logits):
        raise ValueError(f"{len(logits)} pictures cannot be split {splits} times")
    if seed is not None:
        logits = logits[np.random.RandomState(seed).permutation(len(logits))]
    log_p = logits - logits.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    found, ends = [], np.arange(splits + 1) * len(logits) // splits
    for part in (log_p[start:end] for start, end in itertools.pairwise(ends)):
        p = np.exp(part)
        log_marginal = np.log(np.maximum(p.mean(axis=0), np.finfo(float).tiny))
        found.append(np.exp((p * (part - log_marginal)).sum(axis=1).mean()))
    return float(np.mean(found)), float(np.std(found))
