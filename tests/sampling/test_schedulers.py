import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from objdrive.base.steppers import Stepper, most_steps
from objdrive.errors import ObjdriveError

SHAPE = (1, 2, 3, 3)


def scheduler(prediction):
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type=prediction,
    )


def network(x, timestep):
    """Stands for a UNet: anything smooth that depends on both."""
    return np.tanh(1.5 * x + timestep / 700) - 0.3 * x


def alphas():
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return np.cumprod(1 - betas)


def clean(x, timestep, prediction, alpha):
    """The predicted x_0 and noise, of `alpha` the cumulative product."""
    output = network(x, timestep)
    if prediction == "epsilon":
        return (x - np.sqrt(1 - alpha) * output) / np.sqrt(alpha), output
    return np.sqrt(alpha) * x - np.sqrt(1 - alpha) * output, np.sqrt(alpha) * output + np.sqrt(1 - alpha) * x


def ddim_by_hand(x, steps, prediction):
    """Equation 12 of arXiv 2010.02502 with sigma = 0."""
    cumulative, stride = alphas(), 1000 // steps
    for timestep in (np.arange(steps) * stride)[::-1] + 1:
        before = timestep - stride
        following = cumulative[before] if before >= 0 else cumulative[0]
        x0, noise = clean(x, timestep, prediction, cumulative[timestep])
        x = np.sqrt(following) * x0 + np.sqrt(1 - following) * noise
    return x


def dpmsolver_by_hand(x, steps, prediction):
    """Algorithm 2 of arXiv 2211.01095 (2M), of first order at both ends."""
    cumulative = alphas()
    timesteps = (np.arange(steps + 1) * (1000 // (steps + 1)))[::-1][:-1] + 1
    level = np.log(np.sqrt(cumulative / (1 - cumulative)))
    earlier, last_h = None, None
    for index, timestep in enumerate(timesteps):
        alpha = cumulative[timestep]
        x0, _ = clean(x, timestep, prediction, alpha)
        if index == steps - 1:
            return x0
        h = level[timesteps[index + 1]] - level[timestep]
        mixed = x0
        if earlier is not None:
            mixed = x0 + (x0 - earlier) * h / (2 * last_h)
        following = cumulative[timesteps[index + 1]]
        x = np.sqrt((1 - following) / (1 - alpha)) * x - np.sqrt(following) * np.expm1(-h) * mixed
        earlier, last_h = x0, h
    raise AssertionError("no steps")


BY_HAND = {"ddim": ddim_by_hand, "dpmsolver++": dpmsolver_by_hand}


def noise(seed):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def advance(stepper, x):
    return Stepper.step([stepper], torch.from_numpy(network(x.numpy(), stepper.timestep)), x)


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
class TestStepper:
    @pytest.mark.parametrize("steps", [1, 2, 3, 14, 25, 50])
    def test_follows_the_papers(self, name, prediction, steps):
        stepper, x = Stepper(scheduler(prediction), name, steps), noise(0)
        while not stepper.done:
            x = advance(stepper, x)
        expected = BY_HAND[name](noise(0).double().numpy(), steps, prediction)
        np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-4)
        assert stepper.taken == stepper.steps == steps

    def test_requests_at_different_steps_do_not_touch_each_other(self, name, prediction):
        shared = scheduler(prediction)
        waiting = [(Stepper(shared, name, steps), noise(steps)) for steps in (4, 9, 6)]
        ends = {}
        while waiting:
            # One more step for each, so that every one is at a step of its own.
            outputs = torch.cat([torch.from_numpy(network(x.numpy(), one.timestep)) for one, x in waiting])
            steppers = [stepper for stepper, _ in waiting]
            stepped = Stepper.step(steppers, outputs, torch.cat([x for _, x in waiting]))
            waiting = list(zip(steppers, stepped.split(1), strict=True))
            ends |= {stepper.steps: x for stepper, x in waiting if stepper.done}
            waiting = [(stepper, x) for stepper, x in waiting if not stepper.done]
        for steps, x in ends.items():
            expected = BY_HAND[name](noise(steps).double().numpy(), steps, prediction)
            np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-4)

    def test_the_kind_of_solver_in_a_config_does_not_count(self, name, prediction):
        own = scheduler(prediction)
        told = {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, "solver_type": "heun"}
        other = DDIMScheduler.from_config({**own.config, **told})
        (stepper, x), (expected, y) = ((Stepper(one, name, 6), noise(0)) for one in (other, own))
        while not stepper.done:
            x, y = advance(stepper, x), advance(expected, y)
            assert torch.equal(x, y)

    def test_sees_where_the_way_ends(self, name, prediction):
        stepper, x = Stepper(scheduler(prediction), name, 5), noise(0)
        with pytest.raises(ValueError, match="no step has been taken yet"):
            _ = stepper.predicted
        expected, _ = clean(x.numpy(), stepper.timestep, prediction, alphas()[stepper.timestep])
        advance(stepper, x)
        np.testing.assert_allclose(stepper.predicted, expected, rtol=1e-4, atol=1e-4)

    def test_takes_as_many_steps_as_it_says(self, name, prediction):
        most = most_steps(scheduler(prediction))
        stepper, x = Stepper(scheduler(prediction), name, most), noise(0)
        for _ in range(most):
            x = advance(stepper, x)
        assert x.isfinite().all()

    @pytest.mark.parametrize("steps", [-1, 0, 999])
    def test_refuses_other_numbers_of_steps(self, name, prediction, steps):
        with pytest.raises(ObjdriveError, match=rf"steps={steps} must be at least 1 and at most 998"):
            Stepper(scheduler(prediction), name, steps)
