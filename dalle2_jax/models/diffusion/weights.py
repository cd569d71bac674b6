"""What a network predicts, and the weights of its squared error over the noise levels."""

import numpy as np

from dalle2_jax.models.diffusion.schedules import Schedule
from dalle2_jax.runtime.names import nearest

OBJECTIVES = ("eps", "x0", "v", "flow")
WEIGHTINGS = ("uniform", "min_snr", "min_snr:50", "p2", "p2:0.5", "snr:0.65,0.04,10", "v", "flow")


def loss_weights(schedule: Schedule, objective: str, weighting: str) -> np.ndarray:
    """w_t [T] float64 for the squared error in the objective's own variable.

    'uniform' is 1. The others weigh the error in x0 by a function of the signal-to-noise ratio, and are
    carried over to the objective (error in x0 = error in eps / SNR = error in v / (SNR + 1) = error in the
    velocity u^2):
      'min_snr' is min(SNR, 5), 'min_snr:G' is min(SNR, G) (Hang et al. 2023);
      'snr:Y,F,G' is SNR^Y, at least F and at most G. With a Y below 1 all noise levels can give about
        as much to the loss, as learned weights make them give (Karras et al. 2024, arXiv 2312.02696);
      'p2' is SNR / (1 + SNR), that is 1 / (1 + SNR) on the error in eps, and 'p2:Y' has 1 / (1 + SNR)^Y (Choi
        et al. 2022, equation 8 with k = 1);
      'v' is SNR + 1 = 1 / sigma^2, the error in v, with sigma at least 0.05;
      'flow' is 1 / max(u, 0.05)^2, the error in the velocity for a network of any objective (JiT, Li & He
        2025).
    """
    snr, u = schedule.snr, schedule.path_time
    if objective not in OBJECTIVES:
        raise ValueError(unknown("objective", objective, OBJECTIVES))
    if weighting == "uniform":
        return np.ones_like(snr)
    name, colon, text = weighting.partition(":")
    if name == "min_snr":
        on_x0 = np.minimum(snr, _numbers(weighting, text, 1)[0] if colon else 5.0)
    elif name == "snr":
        power, least, most = _numbers(weighting, text, 3)
        if least > most:
            raise ValueError(_form(weighting))
        on_x0 = np.clip(snr**power, least, most)
    elif name == "p2":
        on_x0 = snr / (1.0 + snr) ** (_numbers(weighting, text, 1)[0] if colon else 1.0)
    elif weighting == "v":
        on_x0 = np.minimum(snr + 1.0, 0.05**-2)
    elif weighting == "flow":
        on_x0 = 1.0 / np.maximum(u, 0.05) ** 2
    else:
        raise ValueError(unknown("weighting", weighting, WEIGHTINGS))
    return on_x0 / {"eps": snr, "x0": 1.0, "v": snr + 1.0, "flow": 1.0 / u**2}[objective]


def _numbers(weighting: str, text: str, count: int) -> list[float]:
    """`count` positive numbers, with commas between."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != count or not all(0 < number < np.inf for number in numbers):
        raise ValueError(_form(weighting))
    return numbers


def _form(weighting: str) -> str:
    return (
        f"weighting {weighting!r} must look like 'min_snr:50', with the most that a signal-to-noise ratio "
        "weighs, 'p2:0.5', with the power, or 'snr:0.65,0.04,10', with the power, the least and the most"
    )


def unknown(what: str, name: str, names: tuple[str, ...]) -> str:
    """The message for a name that is not one of `names`."""
    near = nearest(name, names)
    hint = f" (did you mean {near}?)" if near else ""
    return f"unknown {what} {name!r}: choose one of {', '.join(names)}{hint}"
