"""controllers.py: how each controller moves its coefficient, and what it refuses."""

import math

import pytest

from trl_ext.ppo.controllers import BandController, FixedController, ProportionalController, SchulmanController


def moved(controller, value, episodes=100):
    controller.update(value, episodes)
    return controller.coef


@pytest.mark.parametrize(
    ("measured", "factor"),
    [
        (6.0, 1.0),
        (6.6, 1.01),  # 10% too large, 100 of 1000 episodes
        (5.4, 0.99),
        (60.0, 1.02),  # clipped at 20%
        (0.0, 0.98),
        (-1.0, 0.98),  # an estimate may be negative
    ],
)
def test_proportional_controller_follows_the_relative_error(measured, factor):
    assert moved(ProportionalController(0.3, target=6.0, horizon=1000), measured) == pytest.approx(0.3 * factor)


@pytest.mark.parametrize(("measured", "factor"), [(0.4, 0.5), (0.5, 1), (1.0, 1), (2.0, 1), (2.1, 2), (-3.0, 0.5)])
def test_band_controller_halves_below_and_doubles_above(measured, factor):
    assert moved(BandController(0.3), measured) == pytest.approx(0.3 * factor)


@pytest.mark.parametrize(("measured", "factor"), [(0.019, 0.5), (0.021, 1), (0.03, 1), (0.044, 1), (0.046, 2)])
def test_schulman_controller_keeps_within_a_factor_of_one_and_a_half(measured, factor):
    assert moved(SchulmanController(0.3, target=0.03), measured) == pytest.approx(0.3 * factor)


def test_fixed_controller_stays():
    assert moved(FixedController(0.3), 1e9) == 0.3
    assert moved(FixedController(0.0), 1e9) == 0.0


def controllers():
    return [
        FixedController(0.3),
        ProportionalController(0.3, target=6.0, horizon=1000),
        BandController(0.3),
        SchulmanController(0.3, target=0.03),
    ]


@pytest.mark.parametrize("controller", controllers())
@pytest.mark.parametrize("measured", [math.nan, math.inf, -math.inf])
def test_controller_refuses_a_kl_that_is_no_number(controller, measured):
    with pytest.raises(ValueError, match="a finite number is needed"):
        controller.update(measured, episodes=100)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedController(-0.1), "coef is -0.1; it must be finite and at least 0"),
        (lambda: FixedController(math.nan), "coef is nan"),
        (lambda: ProportionalController(0.0, 6.0, 1000), "coef is 0.0.*use FixedController for 0"),
        (lambda: BandController(0.0), "coef is 0.0.*use FixedController for 0"),
        (lambda: SchulmanController(-1.0, 0.03), "coef is -1.0.*must start above 0"),
        (lambda: ProportionalController(0.1, 0.0, 1000), "target is 0.0"),
        (lambda: ProportionalController(0.1, 6.0, 0), "horizon is 0"),
        (lambda: SchulmanController(0.1, 0.0), "target is 0.0"),
        (lambda: BandController(0.1, low=2.0, high=2.0), "low is 2.0 and high is 2.0"),
    ],
)
def test_controller_that_could_not_steer_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_proportional_controller_refuses_a_rollout_that_turns_the_sign():
    controller = ProportionalController(0.3, target=6.0, horizon=10)
    with pytest.raises(ValueError, match="set horizon above 20"):
        controller.update(0.0, episodes=100)
    assert controller.coef == 0.3
