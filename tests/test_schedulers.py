"""Samplers and noise schedules: against diffusers' step by step, and against a problem with a known solution.

The references are written by tools/make_scheduler_references.py. The known solution is that of data which is
normally distributed: the best prediction is linear there, and where a sampler has to arrive follows on paper.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from procedural import values
from safetensors.torch import load_file
from torch import Tensor

from flux_sd.errors import RequestError
from flux_sd.schedulers import SAMPLERS, SCHEDULES, NoiseSchedule, Sampler, check_pair, make_sampler
from flux_sd.schedulers.lcm import Lcm
from flux_sd.schedulers.levels import Levels
from flux_sd.schedulers.noise import LEAST_ABAR
from flux_sd.schedulers.sampler import METHODS

ORACLE = Path(__file__).resolve().parent.parent / "reference_outputs" / "oracle" / "schedulers.safetensors"
STORED = load_file(ORACLE)
CASES = sorted({name.rpartition(".")[0] for name in STORED})
SHAPE = (1, 4, 4, 4)
RELEASED = NoiseSchedule.scaled_linear()
PAIRS = [(sampler, schedule) for sampler in SAMPLERS for schedule in METHODS[sampler].schedules]
BY_TIME = ("leading", "trailing", "linspace")
TOLERANCE = 1e-5


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def test_every_pair_has_a_reference_that_is_stepped_through() -> None:
    stepped = {tuple(case.split(".")[:2]) for case in CASES if f"{case}.states" in STORED}
    assert stepped == set(PAIRS)


@pytest.mark.parametrize("case", CASES)
def test_every_step_is_that_of_diffusers(case: str) -> None:
    sampler, schedule, steps, prediction = case.split(".")
    zero = prediction.endswith("_zero_snr")
    prediction = prediction.removesuffix("_zero_snr")
    assert prediction in ("epsilon", "v_prediction", "sample")
    noise = NoiseSchedule.scaled_linear(zero_terminal_snr=zero)
    ours = make_sampler(sampler, noise, schedule, int(steps), prediction)
    stored = {key: STORED[f"{case}.{key}"] for key in ("timesteps", "sigmas", "states", "init_scale")
              if f"{case}.{key}" in STORED}  # fmt: skip
    assert len(ours.timesteps) == len(stored["timesteps"])
    # diffusers' multistep solvers round the times of karras and exponential; our network takes fractions.
    rounded = sampler in ("dpm++_2m", "uni_pc") and schedule in ("karras", "exponential")
    assert (ours.timesteps - stored["timesteps"]).abs().max() <= (1.0 if rounded else 1e-6)
    if "sigmas" in stored:
        assert torch.allclose(ours.noise_levels, stored["sigmas"], rtol=TOLERANCE, atol=0)
    if "init_scale" in stored:
        wanted = stored["init_scale"]
        if ours.method.exploding and schedule in ("simple", "sgm_uniform", "ddim_uniform"):
            wanted = (stored["sigmas"][:1] ** 2 + 1).sqrt()  # see Sampler.init_scale: diffusers lacks these
        assert relative(torch.tensor([ours.init_scale]), wanted) <= TOLERANCE
    if "states" in stored:
        print(f"{case}: {_largest(ours, stored['states']):.1e} (at most {TOLERANCE:.0e})")


def _largest(ours: Sampler, states: Tensor) -> float:
    """The largest difference of a step. Goes on from our own states, so what a solver remembers counts."""
    x, found = states[:1], [0.0]
    for index in range(len(states) - 1):
        output = 0.5 * ours.scale_input(x, index) + 0.5 * values(f"oracle.output_{index}", SHAPE)
        x = ours.step(output, index, x, values(f"oracle.noise_{index}", SHAPE)).latents
        found.append(relative(x, states[index + 1 : index + 2]))
        assert found[-1] <= TOLERANCE, f"step {index}"
    return max(found)


# ---------------------------------------------------------------------------------- a problem solved on paper

MEAN, SPREAD = 0.3, 0.5  # of the clean pictures


def best(x: Tensor, abar: float) -> Tensor:
    """The mean of clean pictures that a variance-preserving state may come from."""
    share = abar * SPREAD**2 / (abar * SPREAD**2 + 1 - abar)
    return MEAN + share * (x / abar**0.5 - MEAN)


def epsilon(x: Tensor, abar: float) -> Tensor:
    return (x - abar**0.5 * best(x, abar)) / (1 - abar) ** 0.5


def arrival(name: str, schedule: str, steps: int) -> tuple[float, float]:
    """Where a run ends, as relative errors of the mean and of the spread.

    Every step is linear in the state and in its noise: one run with the start and the noise of each step in a
    column of its own says exactly what the mean and the spread of all runs are. A last step to no noise at
    all loses spread however small the others are, 1 - SPREAD / sqrt(SPREAD^2 + sigma^2) of it, and is counted
    for what it is; so what is left falls with the size of the steps.
    """
    sampler = make_sampler(name, RELEASED, schedule, steps, "epsilon")
    count, abar = len(sampler.timesteps), sampler.levels.abars[0]
    x = torch.full((1, 1, 1, count + 2), abar**0.5 * MEAN)
    x[..., 1] += (abar * SPREAD**2 + 1 - abar) ** 0.5  # what the first level's states are spread by
    x = x / abar**0.5 if METHODS[name].exploding else x
    for index in range(count):
        shown, abar = sampler.scale_input(x, index), sampler.levels.abars[index]
        noise = torch.zeros_like(x)
        noise[..., index + 2] = 1
        x = sampler.step(epsilon(shown, abar), index, x, noise).latents
    before, left = sampler.noise_levels[-2:].tolist()
    signal = (1 + left**2) ** -0.5
    columns = x.flatten().double()
    spread = float((columns[1:] - columns[0]).norm()) / (signal * (SPREAD**2 + left**2) ** 0.5)
    lost = 0.0 if left else 1 - SPREAD / (SPREAD**2 + before**2) ** 0.5
    return float(columns[0]) / (signal * MEAN) - 1, spread + lost - 1


ORDERS = {"ddim": 1, "ddpm": 1, "euler": 1, "euler_ancestral": 1, "dpm++_2m": 2, "uni_pc": 3}
SOLVED = [pair for pair in PAIRS if pair[0] in ORDERS]  # LCM solves nothing: its network does


@pytest.mark.parametrize(("name", "schedule"), SOLVED)
def test_each_pair_comes_near_what_is_solved_on_paper(name: str, schedule: str) -> None:
    (_, rough), (mean, fine) = arrival(name, schedule, 50), arrival(name, schedule, 100)
    # DDIM over linspace: diffusers' steps do not end where the next begins (see Levels.of_times).
    assert abs(mean) < (0.006 if (name, schedule) == ("ddim", "linspace") else 1e-6)
    assert abs(fine) < (0.011 if ORDERS[name] > 1 else 0.06 if METHODS[name].noisy else 0.03)
    assert abs(rough) > 1.45 * abs(fine)  # of evenly spaced times, the last levels remain far apart


@pytest.mark.parametrize("schedule", ["karras", "exponential"])
@pytest.mark.parametrize("name", ORDERS)
def test_twice_the_steps_leave_an_error_smaller_by_the_method_s_order(name: str, schedule: str) -> None:
    (_, rough), (_, fine) = arrival(name, schedule, 50), arrival(name, schedule, 100)
    assert abs(rough / fine) == pytest.approx(2 ** ORDERS[name], rel=0.07)


@pytest.mark.parametrize("name", ["dpm++_2m", "uni_pc"])
def test_two_runs_side_by_side_do_not_share_what_they_remember(name: str) -> None:
    def run(samplers: list[Sampler]) -> list[Tensor]:
        states = [values(f"oracle.start_{i}", SHAPE) for i in range(len(samplers))]
        for index in range(5):
            for i, sampler in enumerate(samplers):
                states[i] = sampler.step((0.5 + i) * states[i], index, states[i]).latents
        return states

    def fresh() -> Sampler:
        return make_sampler(name, RELEASED, "leading", 5, "epsilon")

    together, alone = run([fresh(), fresh()]), run([fresh()])
    assert torch.equal(together[0], alone[0]) and not torch.equal(together[0], together[1])


# ------------------------------------------------------------------------------------------ what is refused


def test_a_pair_that_does_not_go_together_is_refused_by_name() -> None:
    refused = 0
    for sampler in SAMPLERS:
        for schedule in SCHEDULES:
            if (sampler, schedule) in PAIRS:
                check_pair(sampler, schedule)
            else:
                refused += 1
                with pytest.raises(RequestError, match=f"{sampler} cannot use schedule {schedule}"):
                    make_sampler(sampler, RELEASED, schedule, 4, "epsilon")
    assert refused == 7
    for sampler, schedule, said in (
        ("pndm", "leading", "pndm is not built"),
        ("heun", "leading", "'heun' is unknown: choose ddim"),
        ("ddim", "beta", "'beta' is unknown: choose leading"),
    ):
        with pytest.raises(RequestError, match=said):
            check_pair(sampler, schedule)


@pytest.mark.parametrize("steps", [0, 1001])
def test_a_number_of_steps_that_cannot_be_is_refused(steps: int) -> None:
    with pytest.raises(RequestError, match=r"outside 1\.\.1000"):
        make_sampler("euler", RELEASED, "trailing", steps, "epsilon")
    with pytest.raises(RequestError, match="at most 50 steps"):
        make_sampler("lcm", RELEASED, "trailing", 51, "epsilon")


def test_lcm_takes_every_step_that_it_was_distilled_on() -> None:
    times = make_sampler("lcm", RELEASED, "trailing", 50, "epsilon").timesteps
    assert times.tolist() == [20.0 * k - 1 for k in range(50, 0, -1)]


def test_lcm_keeps_its_boundary_conditions() -> None:
    """Equation 9: at time 0 the state itself; with the published constants, at 10 t = 0.5 half of it. The
    times of a run are so large that a state has no part in what comes out."""
    x, clean = values("oracle.x", SHAPE), values("oracle.clean", SHAPE)
    for time, expected in ((0.0, x), (0.05, 0.5 * x + 0.5**0.5 * clean)):
        solver = Lcm(Levels((time,), (0.9,), (1.0,)))
        torch.testing.assert_close(solver.advance(0, x, clean, torch.zeros(SHAPE)), expected)


REPEATING = [("leading", 999), ("leading", 1000), ("linspace", 1000)]


@pytest.mark.parametrize(("schedule", "steps"), REPEATING)
@pytest.mark.parametrize("sampler", ["dpm++_2m", "uni_pc"])
def test_levels_that_repeat_are_refused_where_their_distance_counts(
    sampler: str, schedule: str, steps: int
) -> None:
    with pytest.raises(RequestError, match=f"{steps} steps of {schedule} repeat a level, which"):
        make_sampler(sampler, RELEASED, schedule, steps, "epsilon")
    made = make_sampler(sampler, RELEASED, schedule, 998, "epsilon")
    assert (made.noise_levels.diff() < 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 999, 1000])
def test_levels_fall_and_stay_within_the_training(schedule: str, steps: int) -> None:
    for sampler in ("ddim", "euler", "dpm++_2m"):
        if sampler == "dpm++_2m" and (schedule, steps) in REPEATING:
            continue
        made = make_sampler(sampler, RELEASED, schedule, steps, "epsilon")
        assert (made.noise_levels.diff() <= 0).all() and len(made.noise_levels) == len(made.timesteps) + 1
        assert 0 <= float(made.timesteps.min()) and float(made.timesteps.max()) <= 999
        assert len(made.timesteps) >= min(steps, 999 if schedule == "ddim_uniform" else 1000)


def test_zero_terminal_snr_ends_in_pure_noise_and_leaves_the_first_level() -> None:
    zero = NoiseSchedule.scaled_linear(zero_terminal_snr=True)
    assert float(zero.alphas_cumprod[-1]) == 0.0 and zero.zero_terminal_snr
    assert float(zero.alphas_cumprod[0]) == pytest.approx(float(RELEASED.alphas_cumprod[0]), rel=1e-12)
    assert float(zero.sigmas[-1]) == pytest.approx(4096, rel=1e-6)
    with pytest.raises(RequestError, match="no epsilon to predict"):
        make_sampler("ddim", zero, "trailing", 4, "epsilon")
    least = NoiseSchedule(torch.tensor([0.9, LEAST_ABAR], dtype=torch.float64))  # signal enough to divide by
    assert not least.zero_terminal_snr and float(least.sigmas[-1]) == pytest.approx(4096, rel=1e-6)


def test_times_and_sigmas_are_each_other_s_inverse() -> None:
    times = torch.tensor([0.0, 0.4, 10.0, 499.5, 998.9, 999.0], dtype=torch.float64)
    assert torch.allclose(RELEASED.time_of(RELEASED.sigma_at(times)), times, atol=1e-9)


def test_a_sampler_that_draws_noise_asks_for_it() -> None:
    sampler = make_sampler("euler_ancestral", RELEASED, "trailing", 2, "epsilon")
    with pytest.raises(ValueError, match="pass it"):
        sampler.step(torch.zeros(SHAPE), 0, torch.zeros(SHAPE))


@pytest.mark.parametrize("name", SAMPLERS)
def test_noise_added_at_a_step_is_what_that_step_begins_with(name: str) -> None:
    sampler = make_sampler(name, RELEASED, "trailing", 4, "epsilon")
    clean, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    for index, sigma in enumerate(sampler.noise_levels[:-1]):
        shown = sampler.scale_input(sampler.add_noise(clean, noise, index), index)
        expected = (clean + sigma.float() * noise) / (1 + sigma.float() ** 2) ** 0.5
        assert torch.allclose(shown, expected, atol=1e-5)
    assert torch.equal(sampler.add_noise(clean, noise, 4), clean)
