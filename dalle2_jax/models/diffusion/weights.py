"""What a network predicts, and the weights of its squared error over the noise levels."""

import numpy as np

from dalle2_jax.models.diffusion.schedules import Schedule
from dalle2_jax.runtime.names import nearest

OBJECTIVES = ("eps", "x0", "v", "flow")
WEIGHTINGS = ("uniform", "min_snr", "min_snr:50", "p2", "v", "v:0.4", "flow")


def loss_weights(schedule: Schedule, objective: str, weighting: str) -> np.ndarray:
    """w_t [T] float64 for the squared error in the objective's own variable.

    'uniform' is 1. The others weigh the error in x0 by a function of the signal-to-noise ratio, and are
    carried over to the objective (error in x0 = error in eps / SNR = error in v / (SNR + 1) = error in the
    velocity u^2): 'min_snr' is min(SNR, 5), 'min_snr:G' is min(SNR, G) (Hang et al. 2023). 'p2' is SNR / (1 +
    SNR), that is 1 / (1 + SNR) on the error in eps (Choi et al. 2022, k = gamma = 1). 'v' is SNR + 1 = 1 /
    sigma^2, the error in v, with sigma at least 0.05; 'v:S': at least S. 'flow' is 1 / max(u, 0.05)^2, the
    error in the velocity for a network of any objective (JiT, Li & He 2025).
    """
    snr, u = schedule.snr, schedule.path_time
    if objective not in OBJECTIVES:
        raise ValueError(unknown("objective", objective, OBJECTIVES))
    if weighting == "uniform":
        return np.ones_like(snr)
    name, colon, text = weighting.partition(":")
    if name == "min_snr":
        on_x0 = np.minimum(snr, _number(weighting, text, np.inf) if colon else 5.0)
    elif weighting == "p2":
        on_x0 = snr / (1.0 + snr)
    elif name == "v":
        on_x0 = np.minimum(snr + 1.0, (_number(weighting, text, 1.0) if colon else 0.05) ** -2)
    elif weighting == "flow":
        on_x0 = 1.0 / np.maximum(u, 0.05) ** 2
    else:
        raise ValueError(unknown("weighting", weighting, WEIGHTINGS))
    return on_x0 / {"eps": snr, "x0": 1.0, "v": snr + 1.0, "flow": 1.0 / u**2}[objective]


def _number(weighting: str, text: str, below: float) -> float:
    """The positive number `text` behind the colon of a weighting."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < below:
        raise ValueError(
            f"weighting {weighting!r} must look like 'min_snr:50' or 'v:0.4': the largest signal-to-noise "
            "ratio, or the least sigma, below 1"
        )
    return number


def unknown(what: str, name: str, names: tuple[str, ...]) -> str:
    """The message for a name that is not one of `names`."""
    near = nearest(name, names)
    hint = f" (did you mean {near}?)" if near else ""
    return f"unknown {what} {name!r}: choose one of {', '.join(names)}{hint}"
