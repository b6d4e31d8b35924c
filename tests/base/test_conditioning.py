import numpy as np
import pytest
import torch

from objdrive.base.conditioning import Conditioning

PARTS = ("states", "pooled", "time_ids")


def conditioning(count, seed, *, large=True):
    """Of `count` prompts; as a larger family has it, with all parts."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(count, 5, 3, generator=generator)
    if not large:
        return Conditioning(states)
    return Conditioning(states, torch.randn(count, 4, generator=generator), torch.rand(count, 6, generator=generator))


def arrays(one):
    return {name: getattr(one, name).detach().numpy() for name in PARTS if getattr(one, name) is not None}


def assert_equal(one, expected):
    assert arrays(one).keys() == expected.keys()
    for name, array in arrays(one).items():
        np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize("large", [True, False], ids=["all parts", "states alone"])
class TestEveryPart:
    @pytest.mark.parametrize("index", [0, slice(1, 3), [2, 0, 2], (slice(None), None)])
    def test_is_indexed(self, large, index):
        one = conditioning(3, 0, large=large)
        assert_equal(one[index], {name: array[index] for name, array in arrays(one).items()})

    def test_is_indexed_by_a_tensor(self, large):
        one = conditioning(3, 0, large=large)
        rows = np.array([[2, 0], [1, 1]])
        assert_equal(one[torch.from_numpy(rows)], {name: array[rows] for name, array in arrays(one).items()})

    def test_is_stacked_joined_and_flattened(self, large):
        parts = [conditioning(2, seed, large=large) for seed in (0, 1, 2)]
        stacked = {name: np.stack([arrays(part)[name] for part in parts]) for name in arrays(parts[0])}
        assert_equal(Conditioning.stack(parts), stacked)
        joined = {name: np.concatenate(list(array)) for name, array in stacked.items()}
        assert_equal(Conditioning.cat(parts), joined)
        assert_equal(Conditioning.stack(parts).flatten(), joined)
        side = {name: np.concatenate([array, array[:, :1]], axis=1) for name, array in stacked.items()}
        together = Conditioning.stack(parts)
        assert_equal(Conditioning.cat([together, together[:, :1]], dim=1), side)
        assert [len(one) for one in (together, together.flatten(), together[0])] == [3, 6, 2]

    def test_is_expanded(self, large):
        one = conditioning(1, 0, large=large)
        assert_equal(one.expand(3), {name: np.repeat(array, 3, axis=0) for name, array in arrays(one).items()})

    def test_moves(self, large):
        moved = conditioning(2, 0, large=large).to("meta").to(torch.float16)
        for part in (getattr(moved, name) for name in PARTS):
            assert part is None or (part.device.type, part.dtype) == ("meta", torch.float16)

    def test_is_a_leaf_with_gradients_of_its_own(self, large):
        source = conditioning(2, 0, large=large)
        source.states.requires_grad_(True)
        leaf = source[:1].as_leaf()
        assert_equal(leaf, arrays(source[:1]))
        sum(getattr(leaf, name).sum() for name in arrays(leaf)).backward()
        assert source.states.grad is None
        assert all((getattr(leaf, name).grad == 1).all() for name in arrays(leaf))


def test_parts_of_different_families_do_not_mix():
    with pytest.raises(ValueError, match="different families"):
        Conditioning.cat([conditioning(1, 0), conditioning(1, 1, large=False)])
