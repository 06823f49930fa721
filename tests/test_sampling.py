"""Noise, packing, schedules and the loop."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from flux_sd.sampling import State, begin_at, denoise, get_noise, get_schedule, pack, unpack


def test_noise_is_a_function_of_seed_and_size_alone() -> None:
    noise = get_noise(7, 48, 32)
    assert noise.shape == (1, 16, 6, 4) and noise.dtype == torch.float32 and noise.device.type == "cpu"
    torch.manual_seed(99)
    torch.rand(3)
    assert torch.equal(noise, get_noise(7, 48, 32))
    assert not torch.equal(noise, get_noise(8, 48, 32))


def test_noise_of_a_known_seed_stays_what_it_is() -> None:
    expected = torch.randn((1, 16, 2, 2), generator=torch.Generator().manual_seed(42))
    assert torch.equal(get_noise(42, 16, 16), expected)


def test_packing_orders_channel_row_column_and_unpack_undoes_it() -> None:
    latents = torch.arange(2 * 16 * 4 * 6, dtype=torch.float32).reshape(2, 16, 4, 6)
    img = pack(latents)
    assert img.shape == (2, 6, 64)
    token = img[1, 4].reshape(16, 2, 2)  # row 1, column 1 of 2 x 3 tokens
    assert torch.equal(token, latents[1, :, 2:4, 2:4])
    assert torch.equal(unpack(img, 32, 48), latents)


def test_state_numbers_rows_and_columns_and_broadcasts_the_text() -> None:
    state = State.new(torch.zeros(1, 5, 8), torch.zeros(1, 3), torch.zeros(2, 16, 4, 6))
    assert state.img.shape == (2, 6, 64) and state.txt.shape == (2, 5, 8) and state.vec.shape == (2, 3)
    assert state.img_ids[1].tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2]]
    assert state.txt_ids.shape == (2, 5, 3) and not state.txt_ids.any()


def test_schnell_schedule_is_even() -> None:
    assert get_schedule(4) == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_dev_schedule_is_shifted_by_the_number_of_tokens_and_ends_at_zero() -> None:
    times = get_schedule(28, image_tokens=4096)
    assert times[0] == 1.0 and times[-1] == 0.0
    assert all(a > b for a, b in itertools.pairwise(times))
    mu = 1.15
    assert math.isclose(times[14], math.exp(mu) / (math.exp(mu) + 1.0), abs_tol=1e-12)  # t = 1/2
    assert get_schedule(28, 256)[14] < times[14]


def test_schedule_refuses_no_steps() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        get_schedule(0)


class Straight(nn.Module):
    """The velocity field whose flow ends at `target`, whatever the noise."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target, self.calls = target, 0

    def forward(self, img: Tensor, *rest: Tensor) -> Tensor:
        self.calls += 1
        t = rest[3]
        return (img - self.target) / t[:, None, None]


@pytest.mark.parametrize("steps", [1, 4])
def test_denoise_follows_a_straight_flow_to_its_end(steps: int) -> None:
    target = torch.randn(1, 6, 64)
    state = State.new(torch.zeros(1, 5, 8), torch.zeros(1, 3), torch.randn(1, 16, 4, 6))
    field = Straight(target)
    done = list(denoise(field, state, get_schedule(steps), None))
    assert field.calls == steps and [step.index for step in done] == list(range(steps))
    assert done[-1].sigma == 0.0
    assert torch.allclose(done[-1].img, target, atol=1e-5)
    assert all(torch.allclose(step.x0, target, atol=1e-5) for step in done)


def test_denoise_does_not_leak_inference_mode_to_its_caller() -> None:
    state = State.new(torch.zeros(1, 5, 8), torch.zeros(1, 3), torch.randn(1, 16, 4, 6))
    for _ in denoise(Straight(torch.zeros(1, 6, 64)), state, get_schedule(2), None):
        assert not torch.is_inference_mode_enabled()


def test_a_start_on_the_grid_leaves_no_tiny_step() -> None:
    for steps, tokens in ((5, None), (10, None), (28, 4096)):
        times = get_schedule(steps, tokens)
        for index in range(steps):
            rounded = float(torch.tensor(times[index]))  # through float32, as a number typed would be
            assert len(begin_at(times, rounded)) == steps + 1 - index
    times = [1.0, 1.0 - 1e-9, 0.0]  # as a schedule of very many tokens begins
    assert begin_at(times, 1.0) == times and begin_at(times, 1e-6) == [1e-6]
    times = [1.0, 0.5, 0.0]
    assert begin_at(times, 0.0) == [0.0] and begin_at(times, 1.0) == times
    assert begin_at(times, 0.6) == [0.6, 0.5, 0.0] and begin_at(times, 0.5000005) == [0.5000005, 0.0]
    assert begin_at(times, 0.500005) == [0.500005, 0.5, 0.0]
