"""Noise schedules, choices of timesteps and the two-time posterior against their textbook definitions in
float64."""

import math

import numpy as np
import pytest

from dalle2_jax.models.diffusion import schedules

COSINE = schedules.make_schedule("cosine")
LINEAR = schedules.make_schedule("linear")


def textbook(beta):
    """DDPM's tables by scalar recurrences, for betas in ascending time (Ho et al. 2020, section 2)."""
    rows, alpha_bar_previous = [], 1.0
    for b in beta:
        alpha_bar = alpha_bar_previous * (1.0 - b)
        rows.append(
            dict(
                alpha_bar=alpha_bar,
                beta_tilde=b * (1.0 - alpha_bar_previous) / (1.0 - alpha_bar),
                coef_x0=b * math.sqrt(alpha_bar_previous) / (1.0 - alpha_bar),
                coef_x_t=(1.0 - alpha_bar_previous) * math.sqrt(1.0 - b) / (1.0 - alpha_bar),
            )
        )
        alpha_bar_previous = alpha_bar
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def cosine_betas(num_timesteps):
    def f(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    T = num_timesteps
    return np.array([min(1.0 - f((i + 1) / T) / f(i / T), 0.999) for i in range(T)])


def linear_betas(num_timesteps):
    T = num_timesteps
    return np.array([(1e-4 + (0.02 - 1e-4) * i / (T - 1)) * 1000 / T for i in range(T)])


@pytest.mark.parametrize("name, betas", [("cosine", cosine_betas), ("linear", linear_betas)])
@pytest.mark.parametrize("num_timesteps", [1000, 100])
def test_tables_follow_the_textbook_recurrences(name, betas, num_timesteps):
    schedule = schedules.make_schedule(name, num_timesteps)
    expected = textbook(betas(num_timesteps))
    tables = schedules.two_time(schedule, np.arange(num_timesteps)[::-1])
    assert schedule.alpha_bar.dtype == np.float64
    np.testing.assert_allclose(schedule.alpha_bar, expected["alpha_bar"], rtol=1e-12)
    np.testing.assert_allclose(tables.beta[::-1], betas(num_timesteps), rtol=1e-11)
    for field in ("beta_tilde", "coef_x0", "coef_x_t"):
        np.testing.assert_allclose(getattr(tables, field)[::-1], expected[field], rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(
        tables.log_beta_tilde[::-1][1:], np.log(expected["beta_tilde"][1:]), rtol=1e-11
    )


def test_cosine_ends_where_its_definition_says():
    """The last alpha_bar is f(999/1000) / f(0) times the capped 1 - 0.999: the ratio telescopes up to the
    cap."""
    f = [math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2 for u in (0.0, 0.999)]
    assert COSINE.alpha_bar[-1] == pytest.approx(f[1] / f[0] * 1e-3, rel=1e-9)
    assert COSINE.alpha_bar[-1] == pytest.approx(2.43e-9, rel=1e-3)


def test_last_log_variance_is_that_of_the_step_before():
    """Trap: beta_tilde is 0 at t = 0, and log(1e-20) = -46 in its place makes exp(46) of the bound."""
    log_beta_tilde = schedules.two_time(COSINE, np.arange(1000)[::-1]).log_beta_tilde
    expected = math.log(textbook(cosine_betas(1000))["beta_tilde"][1])
    assert log_beta_tilde[-1] == log_beta_tilde[-2] == pytest.approx(expected, rel=1e-12)
    assert expected == pytest.approx(-10.73, abs=5e-3)
    subset = schedules.two_time(COSINE, np.array([999, 500, 40, 3]))
    assert subset.log_beta_tilde[-1] == subset.log_beta_tilde[-2]


def test_a_walk_of_one_step_is_finite():
    tables = schedules.two_time(COSINE, schedules.space_timesteps(1))
    assert tables.t.tolist() == [999]
    assert (tables.coef_x0[0], tables.coef_x_t[0], tables.alpha_bar_s[0]) == (1.0, 0.0, 1.0)
    assert np.isfinite(tables.log_beta_tilde).all()


@pytest.mark.parametrize("schedule", [COSINE, LINEAR], ids=["cosine", "linear"])
@pytest.mark.parametrize(
    "spacing, num_steps", [("uniform", 25), ("uniform", 250), ("fast27", 27), ("trailing", 50)]
)
def test_two_time_posterior_equals_respaced_tables(schedule, spacing, num_steps):
    """New betas of the subset, 1 - alpha_bar[S_i] / alpha_bar[S_(i-1)], put through DDPM's tables."""
    times = schedules.space_timesteps(num_steps, 1000, spacing)
    kept = schedule.alpha_bar[times[::-1]]
    respaced_beta = 1.0 - kept / np.concatenate([[1.0], kept[:-1]])
    expected = textbook(respaced_beta)
    tables = schedules.two_time(schedule, times)
    np.testing.assert_array_equal(tables.alpha_bar_t[::-1], kept)
    np.testing.assert_allclose(tables.beta[::-1], respaced_beta, rtol=1e-12)
    for field in ("beta_tilde", "coef_x0", "coef_x_t"):
        np.testing.assert_allclose(getattr(tables, field)[::-1], expected[field], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("num_steps", [2, 7, 25, 50, 64, 100, 250, 1000])
def test_uniform_spacing_is_rounded_half_to_even_with_both_ends(num_steps):
    expected = [round(i * 999 / (num_steps - 1)) for i in range(num_steps)]  # Python rounds halves to even
    times = schedules.space_timesteps(num_steps)
    assert times[::-1].tolist() == expected
    assert (times[0], times[-1]) == (999, 0)


def test_uniform_spacing_of_25_is_the_published_list():
    assert schedules.space_timesteps(25)[:5].tolist() == [999, 957, 916, 874, 832]


def test_uniform_halves_go_to_even():
    assert schedules.space_timesteps(3, 1000).tolist() == [999, 500, 0]  # 499.5 -> 500
    assert schedules.space_timesteps(3, 998).tolist() == [997, 498, 0]  # 498.5 -> 498


def test_fast27_is_glides_list():
    expected = [0, 22, 44, 66, 88, 111, 133, 155, 177, 199]
    expected += [200, 222, 244, 266, 288, 311, 333, 355, 377, 399, 400, 500, 599, 600, 799, 800, 997]
    assert schedules.space_timesteps(27, 1000, "fast27")[::-1].tolist() == expected
    sections = schedules.space_timesteps(27, 1000, "sections:10,10,3,2,2")[::-1].tolist()
    assert sections == [*expected[:-1], 999]


def test_sections_share_out_uneven_lengths():
    """Ten times in three sections are of 4, 3 and 3; a section of one step keeps its first time."""
    assert schedules.space_timesteps(6, 10, "sections:2,1,3")[::-1].tolist() == [0, 3, 4, 7, 8, 9]


def test_a_shifted_cosine_leaves_of_the_averaged_picture_what_cosine_leaves_of_a_small_one():
    shifted = schedules.make_schedule("cosine:4")
    np.testing.assert_allclose(shifted.snr * 16, COSINE.snr, rtol=1e-10)
    # Blocks of 4 x 4 pixels, averaged: the signal stays, the noise's variance is a sixteenth.
    np.testing.assert_allclose(
        (1 - shifted.alpha_bar) / 16 / shifted.alpha_bar,
        (1 - COSINE.alpha_bar) / COSINE.alpha_bar,
        rtol=1e-10,
    )
    moved, continuous = (schedules.make_schedule(name, 4096) for name in ("logsnr:2", "logsnr"))
    np.testing.assert_allclose(moved.snr * 4, continuous.snr, rtol=1e-6)
    assert shifted != COSINE and schedules.make_schedule("cosine:1.0").snr == pytest.approx(COSINE.snr)


def test_trailing_starts_at_the_noisiest_time():
    assert schedules.space_timesteps(4, 1000, "trailing").tolist() == [999, 749, 499, 249]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: schedules.make_schedule("cosin"), "did you mean 'cosine'"),
        (lambda: schedules.make_schedule("linear", 20), "more than 20"),
        (lambda: schedules.make_schedule("linear:4"), "must look like 'cosine:4'"),
        (lambda: schedules.make_schedule("linear:x"), "must look like 'cosine:4'"),
        (lambda: schedules.make_schedule("cosine:-4"), "must look like 'cosine:4'"),
        (lambda: schedules.space_timesteps(0), "between 1 and"),
        (lambda: schedules.space_timesteps(1001), "between 1 and"),
        (lambda: schedules.space_timesteps(27, 1000, "fast72"), "did you mean 'fast27'"),
        (lambda: schedules.space_timesteps(50, 1000, "fast27"), "27 steps of 1000"),
        (lambda: schedules.space_timesteps(9, 100, "sections:4,4"), "sum to 8"),
        (lambda: schedules.space_timesteps(8, 100, "sections:4;4"), "must look like"),
        (lambda: schedules.space_timesteps(8, 10, "sections:7,1"), "section of 5"),
        (lambda: schedules.two_time(COSINE, np.array([0, 999])), "descend"),
        (lambda: schedules.two_time(COSINE, np.array([1000, 0])), "descend"),
        (lambda: schedules.two_time(COSINE, np.array([], int)), "non-empty"),
        (lambda: schedules.two_time(COSINE, np.array([3.0, 1.0])), "integers"),
        (lambda: schedules.Schedule("mine", np.array([0.5, 0.6])), "descends strictly"),
    ],
)
def test_mistakes_are_answered_with_what_to_change(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_schedules_compare_and_hash_by_value_and_cannot_be_changed():
    again = schedules.make_schedule("cosine")
    assert again == COSINE and hash(again) == hash(COSINE) and again != LINEAR
    with pytest.raises(ValueError):
        again.alpha_bar[0] = 0.5
