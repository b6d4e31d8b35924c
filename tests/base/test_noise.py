import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from objdrive.base.noise import NoiseProcess
from objdrive.errors import ObjdriveError

KINDS = ("epsilon", "v_prediction")


def process(kind):
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, prediction_type=kind)
    return NoiseProcess.of(scheduler, "cpu")


def drawn(*shape):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator) for _ in range(2))


@pytest.mark.parametrize("kind", KINDS)
class TestNoiseProcess:
    def test_says_what_the_network_predicts(self, kind):
        assert process(kind).predicts_velocity == (kind == "v_prediction")

    def test_adds_noise_as_diffusers_does(self, kind):
        one, timesteps = process(kind), torch.tensor([3, 500, 999])
        latents, noise = drawn(3, 2, 4, 4)
        expected = one.scheduler.add_noise(latents, noise, timesteps)
        torch.testing.assert_close(one.add_noise(latents, noise, timesteps), expected)

    def test_timesteps_have_as_many_axes_as_samples(self, kind):
        one, timesteps = process(kind), torch.tensor([[3, 500, 999], [0, 7, 100]])
        latents, noise = drawn(2, 3, 1, 4, 4)
        for call in (one.add_noise, one.target):
            flat = call(latents.flatten(0, 1), noise.flatten(0, 1), timesteps.flatten())
            torch.testing.assert_close(call(latents, noise, timesteps), flat.unflatten(0, (2, 3)), rtol=0, atol=0)

    @pytest.mark.parametrize("name", ["ddim", "dpmsolver++"])
    def test_who_answers_with_the_target_is_led_back_to_the_latents(self, kind, name):
        one = process(kind)
        latents, noise = drawn(1, 2, 4, 4)
        stepper = one.stepper(name, 4)
        at = torch.tensor([stepper.timestep])
        noised = one.add_noise(latents, noise, at)
        stepper.step(one.target(latents, noise, at), noised)
        torch.testing.assert_close(stepper.predicted, latents, rtol=1e-3, atol=1e-3)

    def test_steps_as_diffusers_does(self, kind):
        one, (latents, output) = process(kind), drawn(1, 2, 4, 4)
        theirs = DPMSolverMultistepScheduler.from_config(one.scheduler.config)
        theirs.set_timesteps(3)
        ours = one.stepper("dpmsolver++", 3)
        for timestep in theirs.timesteps:
            assert ours.timestep == timestep
            expected = theirs.step(output, timestep, latents).prev_sample
            latents = ours.step(output, latents)
            torch.testing.assert_close(latents, expected, rtol=0, atol=0)

    def test_refuses_more_steps_than_there_are(self, kind):
        one = process(kind)
        assert one.stepper("ddim", one.most_steps).steps == one.most_steps == 998
        with pytest.raises(ObjdriveError, match="steps=999 must be at least 1 and at most 998"):
            one.stepper("ddim", 999)

    def test_log_normal_odds_are_those_of_the_noise_levels(self, kind):
        one = process(kind)
        odds = one.timestep_odds("log-normal").double().numpy()
        a = one.scheduler.alphas_cumprod.double().numpy()
        level = np.log(np.sqrt((1 - a) / a))
        # The share of a normal distribution of levels that lies between two timesteps.
        below = np.array([math.erf((x - 0.5) / math.sqrt(2)) / 2 for x in level])
        between = np.diff(below)
        expected = between / between.sum()
        np.testing.assert_allclose(np.cumsum(odds)[:-1], np.cumsum(expected), atol=5e-3)

    def test_uniform_ones_are_all_alike(self, kind):
        odds = process(kind).timestep_odds("uniform")
        assert odds.shape == (1000,)
        assert len(odds.unique()) == 1
        timesteps = torch.tensor([[0, 999]])
        assert process(kind).loss_weights(timesteps, "uniform").tolist() == [[1, 1]]

    def test_log_normal_losses_are_the_velocity_s(self, kind):
        one, timesteps = process(kind), torch.tensor([10, 400, 900])
        latents, noise = drawn(3, 2, 4, 4)
        guess, _ = drawn(3, 2, 4, 4)
        guess = guess.flip(0)
        noised = one.add_noise(latents, noise, timesteps)
        a = one.alphas[timesteps][:, None, None, None]
        # Whatever the network predicts, it implies a noise and a picture, and those a velocity.
        if kind == "epsilon":
            implied, picture = guess, (noised - (1 - a).sqrt() * guess) / a.sqrt()
        else:
            implied, picture = a.sqrt() * guess + (1 - a).sqrt() * noised, a.sqrt() * noised - (1 - a).sqrt() * guess
        velocity_error = (a.sqrt() * (implied - noise) - (1 - a).sqrt() * (picture - latents)).square().mean((1, 2, 3))
        error = (guess - one.target(latents, noise, timesteps)).square().mean((1, 2, 3))
        weighted = one.loss_weights(timesteps, "log-normal") * error
        torch.testing.assert_close(weighted, velocity_error, rtol=1e-3, atol=1e-4)
