import math

import numpy as np
import pytest
import torch

from objdrive.training.losses import background_loss, class_loss, latent_mask, object_loss, prototype_loss


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class TestLatentMask:
    @pytest.mark.parametrize("edge", [4, 8, 32])
    def test_averages_areas(self, edge):
        mask = torch.rand(2, edge, edge, generator=torch.Generator().manual_seed(1))
        step = edge // 4
        expected = [
            [[np.mean(one[y : y + step, x : x + step]) for x in range(0, edge, step)] for y in range(0, edge, step)]
            for one in mask.numpy()
        ]
        np.testing.assert_allclose(latent_mask(mask, 4).numpy(), expected, rtol=1e-6)

    def test_a_line_of_one_pixel_keeps_its_share(self):
        mask = torch.zeros(64, 64)
        mask[:, 13] = 1
        latent = latent_mask(mask[None], 8)[0]
        assert torch.equal(latent[:, 1], torch.full((8,), 1 / 8))
        assert latent.sum() == 1

    def test_a_single_pixel_keeps_its_share(self):
        mask = torch.zeros(1, 64, 64)
        mask[0, 40, 9] = 1
        latent = latent_mask(mask, 8)[0]
        assert latent[5, 1] == latent.sum() == 1 / 64

    def test_the_hard_cut_is_at_one_half(self):
        mask = torch.zeros(1, 8, 8)
        mask[0, :4, :4] = 1
        mask[0, :4, 4:6] = 1
        mask[0, 4:5, :4] = 1
        assert latent_mask(mask, 2)[0].tolist() == [[1, 0.5], [0.25, 0]]
        assert latent_mask(mask, 2, soft=False)[0].tolist() == [[1, 1], [0, 0]]

    def test_the_hard_cut_keeps_the_fullest_place_of_tiny_and_thin_objects(self):
        masks = torch.zeros(2, 16, 16)
        masks[0, 5, 5:7] = 1
        masks[1, :, 3] = 1
        masks[1, 0, 3] = 0
        tiny, thin = latent_mask(masks, 4, soft=False)
        assert torch.nonzero(tiny).tolist() == [[1, 1]]
        assert torch.nonzero(thin).tolist() == [[1, 0], [2, 0], [3, 0]]

    @pytest.mark.parametrize("soft", [True, False])
    def test_an_empty_mask_stays_empty(self, soft):
        assert not latent_mask(torch.zeros(1, 16, 16), 4, soft=soft).any()


class TestObjectLoss:
    def test_is_a_mean_of_squares_by_the_mask(self):
        prediction, target = normal(3, 4, 5, 5), normal(3, 4, 5, 5, seed=1)
        mask = torch.rand(3, 1, 5, 5, generator=torch.Generator().manual_seed(2))
        for n, loss in enumerate(object_loss(prediction, target, mask).tolist()):
            error = weight = 0.0
            for y in range(5):
                for x in range(5):
                    m = float(mask[n, 0, y, x])
                    weight += m
                    error += m * sum(float(target[n, c, y, x] - prediction[n, c, y, x]) ** 2 for c in range(4))
            assert loss == pytest.approx(error / (4 * weight), rel=1e-5)

    def test_with_hard_masks_is_the_papers(self):
        prediction, target = normal(3, 4, 5, 5), normal(3, 4, 5, 5, seed=1)
        mask = (torch.rand(3, 1, 5, 5, generator=torch.Generator().manual_seed(2)) > 0.5).float()
        norms = [np.linalg.norm(one) ** 2 for one in (mask * (target - prediction)).numpy()]
        expected = np.array(norms) / (4 * mask.numpy().sum(axis=(1, 2, 3)))
        np.testing.assert_allclose(object_loss(prediction, target, mask), expected, rtol=1e-5)

    def test_with_a_full_mask_is_the_mean_squared_error(self):
        prediction, target = normal(2, 4, 6, 6), normal(2, 4, 6, 6, seed=1)
        expected = ((prediction - target).numpy() ** 2).mean(axis=(1, 2, 3))
        np.testing.assert_allclose(object_loss(prediction, target, torch.ones(2, 1, 6, 6)), expected, rtol=1e-6)

    def test_does_not_depend_on_the_objects_size(self):
        mask = torch.zeros(2, 1, 8, 8)
        mask[0, 0, 3, 3] = 1
        mask[1] = 1
        error = torch.full((2, 4, 8, 8), 0.5)
        assert object_loss(error, torch.zeros_like(error), mask).tolist() == [0.25, 0.25]

    def test_does_not_see_outside_of_the_mask(self):
        mask = torch.zeros(1, 1, 4, 4)
        mask[..., 2:, 2:] = 1
        prediction = normal(1, 4, 4, 4).requires_grad_(True)
        object_loss(prediction, normal(1, 4, 4, 4, seed=1), mask).sum().backward()
        assert torch.equal(prediction.grad != 0, mask.bool().expand(1, 4, 4, 4))

    def test_an_empty_mask_yields_nan_for_its_own_sample_only(self):
        mask = torch.ones(2, 1, 4, 4)
        mask[0] = 0
        losses = object_loss(normal(2, 4, 4, 4), normal(2, 4, 4, 4, seed=1), mask)
        assert losses.isnan().tolist() == [True, False]


class TestBackgroundLoss:
    def test_is_the_object_loss_of_what_is_not_the_object(self):
        prediction, target = normal(3, 4, 5, 5), normal(3, 4, 5, 5, seed=1)
        mask = torch.rand(3, 1, 5, 5, generator=torch.Generator().manual_seed(2))
        expected = object_loss(prediction, target, 1 - mask)
        torch.testing.assert_close(background_loss(prediction, target, mask), expected)

    def test_of_an_object_that_fills_its_view_is_nothing(self):
        assert background_loss(normal(1, 4, 4, 4), normal(1, 4, 4, 4, seed=1), torch.ones(1, 1, 4, 4)).tolist() == [0]


def test_class_loss_is_the_mean_squared_error_of_each_sample():
    prediction, target = normal(3, 4, 5, 5), normal(3, 4, 5, 5, seed=1)
    expected = ((prediction - target).numpy() ** 2).reshape(3, -1).mean(axis=1)
    np.testing.assert_allclose(class_loss(prediction, target), expected, rtol=1e-6)


class TestPrototypeLoss:
    def test_is_one_minus_the_cosine_to_the_mean_direction(self):
        text, targets = normal(4, 6), normal(4, 3, 6, seed=1)
        for row, loss in enumerate(prototype_loss(text, targets).tolist()):
            t, mean = text[row].numpy().astype(np.float64), np.zeros(6)
            for one in targets[row].numpy().astype(np.float64):
                mean += one / math.sqrt(one @ one) / 3
            assert loss == pytest.approx(1 - t @ mean / math.sqrt((t @ t) * (mean @ mean)), abs=1e-6)

    def test_lengths_do_not_matter(self):
        text, targets = normal(4, 6), normal(4, 3, 6, seed=1)
        longer = targets * torch.tensor([100.0, 1, 0.01]).view(1, 3, 1)
        torch.testing.assert_close(prototype_loss(7 * text, longer), prototype_loss(text, targets))

    def test_runs_from_zero_to_two(self):
        same = normal(1, 6)
        losses = prototype_loss(torch.cat([same, -same]), same.expand(2, 3, 6))
        np.testing.assert_allclose(losses, [0, 2], atol=1e-6)
