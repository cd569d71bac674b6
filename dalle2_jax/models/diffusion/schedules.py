"""Noise schedules, choices of timesteps, and the posterior between two times: float64 numpy on the host.

A schedule is alpha_bar[t], t = 0..T-1, in q(x_t | x0) = N(sqrt(alpha_bar[t]) x0, (1 - alpha_bar[t]) I).
Time t = 0 has been noised once; the clean end, before it, has alpha_bar = 1. A sampler walks down some
subset of the times; between a kept time t and the next one s < t (or the clean end) everything follows from
the two alpha_bars:

    alpha      = alpha_bar[t] / alpha_bar[s]                 the share of the signal that survives from s to t
    beta       = 1 - alpha
    beta_tilde = beta (1 - alpha_bar[s]) / (1 - alpha_bar[t])                     variance of q(x_s | x_t, x0)
    mean       = sqrt(alpha_bar[s]) beta / (1 - alpha_bar[t]) x0
               + sqrt(alpha) (1 - alpha_bar[s]) / (1 - alpha_bar[t]) x_t          mean of q(x_s | x_t, x0)

For neighbouring times these are DDPM's tables (Ho et al. 2020, equations 6 and 7), for a subset those of
respaced betas (Nichol & Dhariwal 2021, section 4), so that respacing is nothing but the choice of
timesteps. Float64, because computing the tables in float32 costs up to 2e-3 of relative error in beta.

Flow matching has the straight path z = (1 - u) x0 + u k eps from data at u = 0 to noise at u = 1, with u =
(t + 1) / T and k = 1 (Lipman et al. 2023; Liu et al. 2023). z is a multiple of x_t, by `path_scale`, so this
is a schedule. Its network reads z; samplers, guidance and bounds work on x_t. A walk begins at pure noise,
alpha_bar = 0.
"""

import dataclasses

import numpy as np

from dalle2_jax.runtime.names import nearest

NAMES = ("linear", "cosine", "cosine:4", "logsnr", "logsnr:4", "flow", "flow:2")
# The ends of 'logsnr': log(alpha_bar / (1 - alpha_bar)) is in +-20.
_MOST_LOGSNR = 20.0
SPACINGS = ("uniform", "trailing", "adm", "ddim", "fast27", "sections:10,10,3,2,2", "shift:3")


def make_schedule(name: str, num_timesteps: int = 1000) -> "Schedule":
    """The schedule `name` with T = `num_timesteps`.

    'linear' is DDPM's, beta from 1e-4 to 0.02 at T = 1000 and scaled by 1000 / T otherwise; 'cosine' is
    improved DDPM's (Nichol & Dhariwal 2021, equation 17), beta at most 0.999. 'cosine:F' is the cosine of
    pictures with 1/F of the side: its signal-to-noise ratio is divided by F^2, so that a picture made F
    times smaller by averaging shows as much as 'cosine' leaves of a picture of that size (simple diffusion,
    Hoogeboom et al. 2023, equation 4). 'logsnr' is that of classifier-free guidance (Ho & Salimans 2022,
    section 2): log SNR = -2 log tan(a u + b) at u = (t + 1) / T, within +-20. Its time is continuous: take T
    = 65536, and scale the network's time by 1000 / T. 'logsnr:F' is moved as 'cosine:F' is. 'flow' is flow
    matching's straight path, 'flow:F' the one with k = F, for pictures of F times the side (JiT, Li & He
    2025: 'flow:2' at 512 pixels).

    Raises ValueError for another name, and for fewer steps than the schedule can be defined on.
    """
    name, _, factor = name.partition(":")
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps must be at least 1, got {num_timesteps}")
    if factor and name not in ("cosine", "logsnr", "flow"):
        raise ValueError(_no_factor(name, factor))
    if name == "linear":
        if num_timesteps <= 20:
            raise ValueError(
                f"the linear schedule needs more than 20 timesteps (beta would reach 1), got {num_timesteps}"
            )
        scale = 1000.0 / num_timesteps
        beta = np.linspace(1e-4 * scale, 0.02 * scale, num_timesteps, dtype=np.float64)
        alpha_bar = np.cumprod(1.0 - beta)
    elif name == "cosine":
        u = np.arange(num_timesteps + 1, dtype=np.float64) / num_timesteps
        f = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
        alpha_bar = np.cumprod(1.0 - np.minimum(1.0 - f[1:] / f[:-1], 0.999))
    elif name == "flow":
        u = np.arange(1, num_timesteps + 1) / num_timesteps
        k = _factor(name, factor) if factor else 1.0
        return Schedule(f"flow:{factor}" if factor else name, ((1.0 - u) / np.hypot(1.0 - u, k * u)) ** 2, k)
    elif name == "logsnr":
        b = np.arctan(np.exp(-0.5 * _MOST_LOGSNR))
        a = np.arctan(np.exp(0.5 * _MOST_LOGSNR)) - b
        # alpha_bar = sigmoid(-2 log tan x) = cos(x)^2
        alpha_bar = np.cos(a * np.arange(1, num_timesteps + 1) / num_timesteps + b) ** 2
    else:
        raise ValueError(
            f"unknown schedule {name!r}: choose one of {', '.join(NAMES)}{_did_you_mean(name, NAMES)}"
        )
    if factor:
        alpha_bar = alpha_bar / (alpha_bar + _factor(name, factor) ** 2 * (1.0 - alpha_bar))
    return Schedule(f"{name}:{factor}" if factor else name, alpha_bar)


def _factor(name: str, text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 0 < factor < np.inf:
        raise ValueError(_no_factor(name, text))
    return factor


def _no_factor(name: str, text: str) -> str:
    return (
        f"schedule '{name}:{text}' must look like 'cosine:4', 'logsnr:4' or 'flow:2', with a positive ratio "
        "of pictures' sides"
    )


def space_timesteps(num_steps: int, num_timesteps: int = 1000, spacing: str = "uniform") -> np.ndarray:
    """The timesteps that a sampler visits: `num_steps` distinct original times, int64, descending.

    spacing:
      'uniform'   round(i (T-1) / (n-1)), halves to even, so both 0 and T-1 are among them; n = 1 gives [T-1];
      'trailing'  round(T - i T / n) - 1: starts at T-1, ends at about T/n - 1;
      'adm'       'uniform' as ADM's code adds it up in floats, i times the stride: one off at some counts;
      'ddim'      0, k, 2k, ... with the smallest whole k that gives n times (ADM's 'ddimN');
      'sections:a,b,...'  T is cut into equal sections, the cleanest first, with a, b, ... uniform steps;
      'fast27'    GLIDE's 27 steps of 1000: sections 10,10,3,2,2 with 997 in the place of 999, against DDIM's
                  artifacts from the noisiest times;
      'shift:S'   'trailing' with the times u = (t + 1) / T `shifted` by S, more of them noisy.

    Raises ValueError if the steps do not fit the spacing or the schedule.
    """
    T = num_timesteps
    if not 1 <= num_steps <= T:
        raise ValueError(f"num_steps must be between 1 and num_timesteps = {T}, got {num_steps}")
    if spacing == "uniform":
        times = _uniform(T, num_steps) if num_steps > 1 else np.array([T - 1])
    elif spacing == "trailing":
        times = np.rint(T - np.arange(num_steps) * T / num_steps).astype(np.int64) - 1
    elif spacing == "adm":
        stride = (T - 1) / (num_steps - 1) if num_steps > 1 else 1.0
        times = np.rint(np.cumsum([0.0] + [stride] * (num_steps - 1))).astype(np.int64)
    elif spacing == "ddim":
        strides = [k for k in range(1, T) if len(range(0, T, k)) == num_steps] or [T] * (num_steps == 1)
        if not strides:
            raise ValueError(
                f"spacing 'ddim' has no whole stride for {num_steps} of {T} steps: use 'uniform'"
            )
        times = np.arange(0, T, strides[0])
    elif spacing == "fast27":
        if T != 1000 or num_steps != 27:
            raise ValueError(f"spacing 'fast27' is 27 steps of 1000, not {num_steps} of {T}: use 'uniform'")
        times = _sections(T, [10, 10, 3, 2, 2])
        times[times == 999] = 997
    elif spacing.startswith("shift:"):
        times = _shifted_times(T, num_steps, spacing)
    elif spacing.startswith("sections:"):
        try:
            counts = [int(count) for count in spacing.removeprefix("sections:").split(",")]
        except ValueError:
            raise ValueError(f"spacing {spacing!r} must look like 'sections:10,10,3,2,2'") from None
        if sum(counts) != num_steps:
            raise ValueError(
                f"the counts of spacing {spacing!r} sum to {sum(counts)}, but num_steps is {num_steps}"
            )
        times = _sections(T, counts)
    else:
        choices = ", ".join(SPACINGS)
        raise ValueError(
            f"unknown spacing {spacing!r}: choose one of {choices}{_did_you_mean(spacing, SPACINGS)}"
        )
    return np.sort(times)[::-1].copy()


def shifted(u, factor: float):
    """Times u in [0, 1] of the straight path, an array, for pictures of `factor` times the side.

    (1 - u) / u is divided by `factor` (Stable Diffusion 3, Esser et al. 2024, equation 23).
    """
    return factor * u / (1.0 + (factor - 1.0) * u)


def two_time(schedule: "Schedule", timesteps: np.ndarray) -> "TwoTime":
    """The posterior of every step of a walk down `timesteps` [n] (descending) that ends at the clean data.

    The last step has beta_tilde = 0; its logarithm is clipped to the value of the step before it, as a
    learned variance interpolates between logarithms (improved DDPM). A walk of one step has none before it
    and takes log beta. Raises ValueError unless the times are integers of the schedule in strictly
    descending order.
    """
    t = np.asarray(timesteps)
    if t.ndim != 1 or t.size == 0 or not np.issubdtype(t.dtype, np.integer):
        raise ValueError(f"timesteps must be a non-empty list of integers, got {timesteps!r}")
    if t[0] >= schedule.num_timesteps or t[-1] < 0 or np.any(np.diff(t) >= 0):
        raise ValueError(
            f"timesteps must descend strictly within {schedule.num_timesteps - 1}..0, got {t.tolist()}"
        )
    alpha_bar_t = schedule.alpha_bar[t]
    alpha_bar_s = np.append(alpha_bar_t[1:], 1.0)
    u_t = schedule.path_time[t]
    alpha = alpha_bar_t / alpha_bar_s
    beta = 1.0 - alpha
    beta_tilde = beta * (1.0 - alpha_bar_s) / (1.0 - alpha_bar_t)
    log_beta = np.log(beta)
    inner = np.log(beta_tilde[:-1])
    return TwoTime(
        t=t.astype(np.int32),
        alpha_bar_t=alpha_bar_t,
        alpha_bar_s=alpha_bar_s,
        beta=beta,
        beta_tilde=beta_tilde,
        log_beta=log_beta,
        log_beta_tilde=np.append(inner, inner[-1] if inner.size else log_beta[-1]),
        u_t=u_t,
        u_s=np.append(u_t[1:], 0.0),
        coef_x0=np.sqrt(alpha_bar_s) * beta / (1.0 - alpha_bar_t),
        coef_x_t=np.sqrt(alpha) * (1.0 - alpha_bar_s) / (1.0 - alpha_bar_t),
    )


def _uniform(size: int, count: int) -> np.ndarray:
    return np.rint(np.arange(count) * (size - 1) / (count - 1)).astype(np.int64)


def _shifted_times(size: int, count: int, spacing: str) -> np.ndarray:
    try:
        factor = float(spacing.removeprefix("shift:"))
    except ValueError:
        factor = 0.0
    if not 0 < factor < np.inf:
        raise ValueError(f"spacing {spacing!r} must look like 'shift:3', with a positive factor")
    times = np.rint(size * shifted(1.0 - np.arange(count) / count, factor)).astype(np.int64) - 1
    if times[-1] < 0 or np.any(np.diff(times) >= 0):
        raise ValueError(f"spacing {spacing!r} has no {count} distinct times of {size}: take fewer steps")
    return times


def _sections(num_timesteps: int, counts: list[int]) -> np.ndarray:
    sizes = [num_timesteps // len(counts) + (i < num_timesteps % len(counts)) for i in range(len(counts))]
    times, start = [], 0
    for size, count in zip(sizes, counts, strict=True):
        if not 1 <= count <= size:
            raise ValueError(
                f"a section of {size} timesteps cannot have {count} steps: change the spacing's counts"
            )
        times.append(start + (_uniform(size, count) if count > 1 else np.array([0])))
        start += size
    return np.concatenate(times)


def _did_you_mean(name: str, names: tuple[str, ...]) -> str:
    near = nearest(name, names)
    return f" (did you mean {near}?)" if near else ""


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """alpha_bar [T], float64, strictly descending in [0, 1). Equal and hashed by value, as jit's static.

    path_noise: k of flow matching's straight path, which the network reads; None: the network reads x_t.
    """

    name: str
    alpha_bar: np.ndarray
    path_noise: float | None = None

    def __post_init__(self):
        table = np.array(self.alpha_bar, dtype=np.float64)
        descends = table.ndim == 1 and table.size and np.all(np.diff(table, prepend=1.0) < 0)
        if not descends or table[-1] < 0:
            raise ValueError(
                f"alpha_bar of schedule {self.name!r} must be one row that descends strictly within [0, 1)"
            )
        table.setflags(write=False)
        object.__setattr__(self, "alpha_bar", table)

    @property
    def num_timesteps(self) -> int:
        """T: training times are 0..T-1."""
        return len(self.alpha_bar)

    @property
    def snr(self) -> np.ndarray:
        """Signal-to-noise ratio alpha_bar / (1 - alpha_bar) [T], float64."""
        return self.alpha_bar / (1.0 - self.alpha_bar)

    @property
    def noise_level(self) -> np.ndarray:
        """sqrt((1 - alpha_bar) / alpha_bar) [T], float64: sigma of x0 + sigma eps, as in EDM."""
        with np.errstate(divide="ignore"):  # infinite at pure noise
            return np.sqrt((1.0 - self.alpha_bar) / self.alpha_bar)

    @property
    def path_time(self) -> np.ndarray:
        """u [T] in (0, 1], float64: whatever the schedule, x_t is a multiple of (1 - u) x0 + u k eps."""
        sigma = np.sqrt(1.0 - self.alpha_bar)
        return sigma / ((self.path_noise or 1.0) * np.sqrt(self.alpha_bar) + sigma)

    @property
    def path_scale(self) -> np.ndarray:
        """(1 - u) x0 + u k eps over x_t, [T] float64."""
        return 1.0 / (np.sqrt(self.alpha_bar) + np.sqrt(1.0 - self.alpha_bar) / (self.path_noise or 1.0))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Schedule) or self.path_noise != other.path_noise:
            return False
        return np.array_equal(self.alpha_bar, other.alpha_bar)

    def __hash__(self) -> int:
        return hash(self.alpha_bar.tobytes())


@dataclasses.dataclass(frozen=True)
class TwoTime:
    """Tables [n] of the posterior q(x_s | x_t, x0), one entry a step in sampling order; t is int32.

    mean = coef_x0 x0 + coef_x_t x_t; a learned variance lies between beta_tilde and beta. u_t and u_s are the
    times on the straight path.
    """

    t: np.ndarray
    alpha_bar_t: np.ndarray
    alpha_bar_s: np.ndarray
    beta: np.ndarray
    beta_tilde: np.ndarray
    log_beta: np.ndarray
    log_beta_tilde: np.ndarray
    u_t: np.ndarray
    u_s: np.ndarray
    coef_x0: np.ndarray
    coef_x_t: np.ndarray
