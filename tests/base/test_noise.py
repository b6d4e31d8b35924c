import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from objdrive.base.noise import NoiseProcess, add_noise, timestep_odds, velocity, velocity_weight
from objdrive.base.steppers import Stepper
from objdrive.errors import ObjdriveError

KINDS = ("epsilon", "v_prediction")


def process(kind):
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, prediction_type=kind)
    return NoiseProcess.of(scheduler, "cpu")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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
        Stepper.step([stepper], one.target(latents, noise, at), noised)
        torch.testing.assert_close(stepper.predicted, latents, rtol=1e-3, atol=1e-3)

    def test_steps_as_diffusers_does(self, kind):
        one, (latents, output) = process(kind), drawn(1, 2, 4, 4)
        theirs = DPMSolverMultistepScheduler.from_config(one.scheduler.config)
        theirs.set_timesteps(3)
        ours = one.stepper("dpmsolver++", 3)
        for timestep in theirs.timesteps:
            assert ours.timestep == timestep
            expected = theirs.step(output, timestep, latents).prev_sample
            latents = Stepper.step([ours], output, latents)
            torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)

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


class TestPureFunctions:
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    timesteps = torch.tensor([0, 1, 250, 999])

    def test_add_noise_is_diffusers(self):
        latents, noise = normal(4, 4, 3, 3), normal(4, 4, 3, 3, seed=1)
        alphas = self.scheduler.alphas_cumprod[self.timesteps]
        expected = self.scheduler.add_noise(latents, noise, self.timesteps)
        torch.testing.assert_close(add_noise(latents, noise, alphas), expected)

    def test_velocity_is_diffusers(self):
        latents, noise = normal(4, 4, 3, 3), normal(4, 4, 3, 3, seed=1)
        alphas = self.scheduler.alphas_cumprod[self.timesteps]
        expected = self.scheduler.get_velocity(latents, noise, self.timesteps)
        torch.testing.assert_close(velocity(latents, noise, alphas), expected)

    def test_a_weighted_error_of_the_noise_is_that_of_the_velocity(self):
        latents, noise, guess = normal(4, 4, 3, 3), normal(4, 4, 3, 3, seed=1), normal(4, 4, 3, 3, seed=2)
        alphas = self.scheduler.alphas_cumprod[self.timesteps]
        a = alphas.view(-1, 1, 1, 1)
        guessed_latents = (add_noise(latents, noise, alphas) - (1 - a).sqrt() * guess) / a.sqrt()
        expected = (velocity(guessed_latents, guess, alphas) - velocity(latents, noise, alphas)).square()
        weights = velocity_weight(alphas, velocity=False).view(-1, 1, 1, 1)
        torch.testing.assert_close(weights * (guess - noise).square(), expected, rtol=1e-3, atol=1e-4)
        assert velocity_weight(alphas, velocity=True).tolist() == [1, 1, 1, 1]

    def test_timesteps_are_drawn_so_that_noise_levels_are_log_normal(self):
        alphas = self.scheduler.alphas_cumprod
        odds = timestep_odds(alphas)
        level = [math.log(math.sqrt((1 - alpha) / alpha)) for alpha in alphas.tolist()]
        normal_levels = NormalDist(0.5, 1.0)
        inside = normal_levels.cdf(level[-1]) - normal_levels.cdf(level[0])
        for low, high in ((0, 250), (250, 500), (500, 750), (750, 999)):
            expected = (normal_levels.cdf(level[high]) - normal_levels.cdf(level[low])) / inside
            assert float(odds[low:high].sum()) == pytest.approx(expected, abs=0.003)

    def test_no_timestep_is_drawn_at_which_nothing_is_kept(self):
        odds = timestep_odds(torch.cat([self.scheduler.alphas_cumprod, torch.zeros(1)]))
        assert odds.isfinite().all()
        assert float(odds[-1]) < 1e-6


def test_a_noise_level_is_the_noise_for_each_part_of_the_picture():
    one = process("epsilon")
    clean, noise = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    for timestep in (0, 400, 999):
        at = torch.tensor([timestep])
        share, rest = one.add_noise(clean, noise, at), one.add_noise(noise, clean, at)
        assert one.level(timestep) == pytest.approx(float(share / rest), rel=1e-4)


@pytest.mark.parametrize("choice", ["uniform", "log-normal"])
def test_nothing_is_trained_above_the_most_noise(choice):
    one = process("epsilon")
    odds, all_odds = one.timestep_odds(choice, most_noise=4.5), one.timestep_odds(choice)
    below = torch.tensor([one.level(timestep) <= 4.5 for timestep in range(1000)])
    assert 0 < int(below.sum()) < 1000
    assert not odds[~below].any()
    assert torch.equal(odds[below], all_odds[below])
