"""The shapes of `scenes` as signed distances.

`SIGNED_DISTANCE[shape](u, v)` takes broadcastable coordinates, u to the right and v down, in units of the
object's diameter with its centre at 0, and returns a distance in the same units: negative inside, every shape
within [-1/2, 1/2]^2. Only the zero set and the unit slope beside it matter for antialiasing, so corners may
be mitred.
"""

import math

import numpy as np


def _triangle(u, v):
    half, height = 0.5, 0.92
    slope = math.hypot(height, half)
    # Folded on its axis: the right side runs from (0, -height/2) to (half, height/2).
    return np.maximum((height * np.abs(u) - half * (v + height / 2)) / slope, v - height / 2)


def _star(u, v):
    outer = 0.525
    inner = 0.45 * outer
    v = v - outer * (1 - math.cos(math.pi / 5)) / 2  # centres the box
    p, q = np.abs(u), -v
    # Folds the plane into the 36 degrees beside the upper tip, by reflections in lines 108 and 36 degrees
    # from it.
    for angle in (3 * math.pi / 5, math.pi / 5):
        nu, nv = math.cos(angle), -math.sin(angle)
        beyond = 2 * np.maximum(nu * p + nv * q, 0)
        p, q = np.abs(p - beyond * nu), q - beyond * nv
    tip, notch = (0.0, outer), (inner * math.sin(math.pi / 5), inner * math.cos(math.pi / 5))
    du, dv = notch[0] - tip[0], notch[1] - tip[1]
    return (-dv * (p - tip[0]) + du * (q - tip[1])) / math.hypot(du, dv)


def _cross(u, v):
    length, arm = 0.49, 0.165
    u, v = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(u - length, v - arm), np.maximum(u - arm, v - length))


def _heart(u, v):
    h = 0.41  # half diagonal of a square on its corner, with a half disc on each upper side
    u, v = np.abs(u), v - (math.sqrt(2) - 1) * h / 4
    square = (u + np.abs(v) - h) / math.sqrt(2)
    disc = np.sqrt((u - h / 2) ** 2 + (v + h / 2) ** 2) - h / math.sqrt(2)
    return np.minimum(square, disc)


SIGNED_DISTANCE = {
    "circle": lambda u, v: np.sqrt(u * u + v * v) - 0.49,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.44,
    "triangle": _triangle,
    "star": _star,
    "ring": lambda u, v: np.abs(np.sqrt(u * u + v * v) - 0.365) - 0.13,
    "cross": _cross,
    "heart": _heart,
    "diamond": lambda u, v: (0.5 * np.abs(u) + 0.36 * np.abs(v) - 0.18) / math.hypot(0.5, 0.36),
}
