import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import nn

from objdrive.adapters.bank import AdapterBank
from objdrive.base.family import STABLE_DIFFUSION
from objdrive.errors import ObjdriveError

LORA_TARGETS = STABLE_DIFFUSION.lora_targets
WIDTHS = {"attn.to_q": (5, 7), "attn.to_out.0": (7, 3)}


class Network(nn.Module):
    """Two target layers and one that is none, in a row, so that the result shows every one of them."""

    def __init__(self):
        super().__init__()
        self.attn = nn.Module()
        self.attn.to_q = nn.Linear(5, 7)
        self.attn.to_out = nn.ModuleList([nn.Linear(7, 3, bias=False)])
        self.last = nn.Linear(3, 3)

    def forward(self, x):
        return self.last(self.attn.to_out[0](self.attn.to_q(x)))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Network().requires_grad_(False)


@pytest.fixture
def unet(small_unet):
    torch.manual_seed(0)
    return small_unet(12).requires_grad_(False)


def unet_inputs(samples):
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(samples, 4, 8, 8, generator=generator),
        torch.arange(samples) * 100,
        torch.randn(samples, 6, 12, generator=generator),
    )


def random_lora(shapes, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    lora = {}
    for name, (inside, outside) in shapes.items():
        lora[f"{name}.lora_A.weight"] = torch.randn(rank, inside, generator=generator)
        lora[f"{name}.lora_B.weight"] = torch.randn(outside, rank, generator=generator)
    return lora


def by_hand(network, x, lora):
    """The network's answer to one sample (..., 5) with W x + b + B A x in each target layer, in numpy."""
    for name in WIDTHS:
        layer = network.get_submodule(name)
        a, b = (lora[f"{name}.lora_{half}.weight"].numpy() for half in "AB")
        bias = layer.bias.numpy() if layer.bias is not None else 0
        x = x @ layer.weight.numpy().T + bias + (x @ a.T) @ b.T
    return x @ network.last.weight.numpy().T + network.last.bias.numpy()


class TestForward:
    @pytest.mark.parametrize("slots", [[0, 1, 2], [2, 0], [1, 1, 0, 2, 2], [2, 2, 0, 0, 2, 2], [1, 1], [1]])
    @pytest.mark.parametrize("run", [1, 3])
    @pytest.mark.parametrize("shape", [(5,), (4, 5)])
    def test_each_sample_gets_its_own_adapter(self, network, slots, run, shape):
        loras = [random_lora(WIDTHS, 2, seed) for seed in range(3)]
        x = torch.randn(len(slots) * run, *shape, generator=torch.Generator().manual_seed(9))
        with AdapterBank(network, LORA_TARGETS, slots=3, rank=2) as bank:
            for slot, lora in enumerate(loras):
                bank.load(slot, lora)
            with bank.active(slots), torch.no_grad():
                got = network(x)
        for sample, answer in enumerate(got):
            expected = by_hand(network, x[sample].numpy(), loras[slots[sample // run]])
            np.testing.assert_allclose(answer, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("run", [1, 2])
    def test_a_sample_may_have_several_adapters_with_scales_or_none(self, network, run):
        loras = [random_lora(WIDTHS, rank, seed) for seed, rank in enumerate((2, 1, 2))]
        mixes = [{}, {}, {0: 1.0}, {2: 0.5, 1: -1.5}, {2: 0.5, 1: -1.5}, {1: 0.0}, {0: 1.0, 1: 1.0, 2: 1.0}]
        x = torch.randn(len(mixes) * run, 4, 5, generator=torch.Generator().manual_seed(9))
        with AdapterBank(network, LORA_TARGETS, slots=3, rank=2) as bank:
            for slot, lora in enumerate(loras):
                bank.load(slot, lora)
            with bank.active(mixes), torch.no_grad():
                got = network(x)
        for sample, answer in enumerate(got):
            stacked = {}
            for name, (inside, outside) in WIDTHS.items():
                stacked[f"{name}.lora_A.weight"] = torch.zeros(1, inside)
                stacked[f"{name}.lora_B.weight"] = torch.zeros(outside, 1)
            for slot, scale in mixes[sample // run].items():
                for name in WIDTHS:
                    a, b = (f"{name}.lora_{half}.weight" for half in "AB")
                    stacked[a] = torch.cat([stacked[a], loras[slot][a]])
                    stacked[b] = torch.cat([stacked[b], scale * loras[slot][b]], dim=1)
            np.testing.assert_allclose(answer, by_hand(network, x[sample].numpy(), stacked), rtol=1e-4, atol=1e-5)

    def test_a_least_rank_is_what_is_left_of_an_adapter_at_the_noisiest_timestep(self, network):
        # Two of T-LoRA's, of ranks 4 and 3 and least ranks 1 and 2, and a plain one, in a bank of rank 4.
        loras = [random_lora(WIDTHS, rank, seed) for seed, rank in enumerate((4, 3, 4))]
        kept = {0: (4, 3, 4), 3: (3, 2, 4), 5: (2, 2, 4), 9: (1, 2, 4)}
        x = torch.randn(3 * len(kept), 4, 5, generator=torch.Generator().manual_seed(9))
        with AdapterBank(network, LORA_TARGETS, slots=3, rank=4) as bank:
            for slot, least_rank in enumerate((1, 2, None)):
                bank.load(slot, loras[slot], least_rank=least_rank)
            assert bank.rank_varies([2, 1])
            assert not bank.rank_varies([2])
            runs = [slot for _ in kept for slot in range(3)]
            with pytest.raises(ValueError, match="pass timesteps"), bank.active(runs):
                pass
            timesteps = torch.tensor(list(kept)).repeat_interleave(3)
            with bank.active(runs, (timesteps, 10)), torch.no_grad():
                got = network(x)
        for sample, answer in enumerate(got):
            rank = list(kept.values())[sample // 3][sample % 3]
            first = {
                name: value[:rank] if "lora_A" in name else value[:, :rank] for name, value in loras[sample % 3].items()
            }
            np.testing.assert_allclose(answer, by_hand(network, x[sample].numpy(), first), rtol=1e-4, atol=1e-5)

    def test_a_least_rank_holds_for_each_sample_of_a_run_in_gradients_too(self):
        torch.manual_seed(0)
        block = nn.ModuleDict({"conv1": nn.Conv2d(3, 5, 3, padding=1), "to_q": nn.Linear(5, 4)})
        network = nn.ModuleDict({"block": block}).requires_grad_(False)
        conv, linear = block["conv1"], block["to_q"]
        x, timesteps, kept = torch.randn(4, 3, 6, 6), torch.tensor([0, 9, 5, 0]), (3, 1, 2, 3)
        with AdapterBank(network, LORA_TARGETS, slots=2, rank=3) as bank:
            shapes = {key: value.shape for key, value in bank.export(0).items()}
            loras = [{key: torch.randn(shape) for key, shape in shapes.items()} for _ in range(2)]
            for slot in range(2):
                bank.load(slot, loras[slot], least_rank=1)
            with bank.active([0, 1], (timesteps, 10)):
                got = linear(conv(x).movedim(1, -1))
            got.pow(2).sum().backward()
            with torch.no_grad():
                bank.values.copy_(bank.values.grad)
            gradients = [bank.export(slot) for slot in range(2)]
        for slot, lora in enumerate(loras):
            down, up, a, b = leaves = [value.requires_grad_() for value in lora.values()]
            loss = 0.0
            for sample in (2 * slot, 2 * slot + 1):
                r = kept[sample]
                kernel = conv.weight + (up[:, :r].flatten(1) @ down[:r].flatten(1)).view_as(conv.weight)
                maps = F.conv2d(x[sample], kernel, conv.bias, padding=1).movedim(0, -1)
                expected = maps @ (linear.weight + b[:, :r] @ a[:r]).T + linear.bias
                torch.testing.assert_close(got[sample], expected, rtol=1e-3, atol=1e-3)
                loss = loss + expected.pow(2).sum()
            for mine, theirs in zip(gradients[slot].values(), torch.autograd.grad(loss, leaves), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-2)

    def test_equals_pefts_own_injection(self, unet):
        with AdapterBank(unet, LORA_TARGETS, slots=2, rank=3) as bank:
            generator = torch.Generator().manual_seed(1)
            empty = bank.export(1)
            lora = {key: 0.1 * torch.randn(value.shape, generator=generator) for key, value in empty.items()}
            bank.load(1, lora)
            with bank.active([1]), torch.no_grad():
                got = unet(*unet_inputs(2)).sample
        plain = unet(*unet_inputs(2)).sample
        unet.add_adapter(LoraConfig(r=3, lora_alpha=3, target_modules=list(LORA_TARGETS)))
        state = unet.state_dict()
        theirs = {key.replace(".default.", "."): value for key, value in state.items() if ".lora_" in key}
        assert theirs.keys() == lora.keys()
        unet.load_state_dict(state | {key.replace(".weight", ".default.weight"): lora[key] for key in lora})
        with torch.no_grad():
            expected = unet(*unet_inputs(2)).sample
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        assert (expected - plain).abs().max() > 0.01

    @pytest.mark.parametrize("stride", [1, 2])
    def test_a_convolution_is_adapted_as_one_with_the_sum_of_kernels(self, stride):
        torch.manual_seed(0)
        network = nn.ModuleDict({"block": nn.ModuleDict({"conv1": nn.Conv2d(3, 5, 3, stride=stride, padding=1)})})
        layer, x = network["block"]["conv1"], torch.randn(6, 3, 8, 8)
        downs, ups = torch.randn(2, 2, 3, 3, 3), torch.randn(2, 5, 2)
        kernels = layer.weight + (ups @ downs.flatten(2)).view(2, 5, 3, 3, 3)
        with AdapterBank(network, LORA_TARGETS, slots=2, rank=2) as bank, torch.no_grad():
            for slot in range(2):
                lora = {"lora_A.weight": downs[slot], "lora_B.weight": ups[slot][..., None, None]}
                bank.load(slot, {f"block.conv1.{key}": value for key, value in lora.items()})
                assert all(torch.equal(value, lora[key[12:]]) for key, value in bank.export(slot).items())
            with bank.active([1, 0, {0: 1.0, 1: -0.5}]):
                got = layer(x.contiguous(memory_format=torch.channels_last))
        mixed = kernels[0] - 0.5 * (kernels[1] - layer.weight)
        for run, kernel in enumerate((kernels[1], kernels[0], mixed)):
            part = slice(2 * run, 2 * run + 2)
            expected = F.conv2d(x[part], kernel, layer.bias, stride=stride, padding=1)
            torch.testing.assert_close(got[part], expected.detach(), rtol=1e-4, atol=1e-4)

    def test_gradients_stay_in_their_slots(self, network):
        with AdapterBank(network, LORA_TARGETS, slots=3, rank=2) as bank:
            for slot in range(3):
                bank.load(slot, random_lora(WIDTHS, 2, slot))
            with bank.active([0, 1, 2]):
                network(torch.ones(6, 5))[2:4].sum().backward()
        gradient = bank.values.grad
        assert gradient[1].count_nonzero() > 0.9 * gradient[1].numel()
        assert not gradient[[0, 2]].any()


class TestPlain:
    def test_outside_of_active_the_network_is_bit_identical(self, network):
        x = torch.randn(4, 5)
        plain = network(x)
        with AdapterBank(network, LORA_TARGETS, slots=1, rank=2) as bank:
            bank.load(0, random_lora(WIDTHS, 2, 0))
            assert torch.equal(network(x), plain)
            with bank.active([0]):
                assert not torch.equal(network(x), plain)
            assert torch.equal(network(x), plain)
            with bank.active([{}, {}]):
                assert torch.equal(network(x), plain)
            with pytest.raises(KeyError), bank.active([0]):
                raise KeyError
            assert torch.equal(network(x), plain)

    def test_a_slot_as_initialised_changes_nothing(self, network):
        x = torch.randn(4, 5)
        with AdapterBank(network, LORA_TARGETS, slots=1, rank=2) as bank:
            bank.initialise(0, torch.Generator().manual_seed(0))
            with bank.active([0]):
                adapted = network(x)
        assert torch.equal(adapted, network(x))

    def test_a_closed_bank_leaves_no_trace(self, network):
        before = network.state_dict().keys()
        with AdapterBank(network, LORA_TARGETS, slots=1, rank=2) as bank:
            assert network.state_dict().keys() == before
            bank.load(0, random_lora(WIDTHS, 2, 0))
        x = torch.randn(4, 5)
        plain = network(x)
        with bank.active([0]):
            assert torch.equal(network(x), plain)

    def test_active_runs_nest(self, network):
        x = torch.randn(2, 5)
        with AdapterBank(network, LORA_TARGETS, slots=2, rank=2) as bank:
            for slot in range(2):
                bank.load(slot, random_lora(WIDTHS, 2, slot))
            with bank.active([0]):
                outer = network(x)
                with bank.active([1]):
                    assert not torch.equal(network(x), outer)
                assert torch.equal(network(x), outer)


class TestSlots:
    def test_export_gives_back_what_was_loaded(self, network):
        lora = random_lora(WIDTHS, 2, 0)
        with AdapterBank(network, LORA_TARGETS, slots=3, rank=2) as bank:
            bank.load(1, lora)
            exported = bank.export(1)
            bank.load(1, {})
            assert not any(value.any() for value in bank.export(1).values())
        assert exported.keys() == lora.keys()
        assert all(torch.equal(exported[key], lora[key]) for key in lora)

    def test_a_smaller_rank_is_padded_and_draws_the_same(self, network):
        lora, x = random_lora(WIDTHS, 2, 0), torch.randn(4, 5)
        answers = []
        for rank in (2, 5):
            with AdapterBank(network, LORA_TARGETS, slots=1, rank=rank) as bank:
                # What the slot held before must not shine through the padding.
                bank.load(0, random_lora(WIDTHS, rank, 1))
                bank.load(0, lora)
                with bank.active([0]):
                    answers.append(network(x))
        torch.testing.assert_close(answers[0], answers[1])

    def test_layers_that_an_adapter_lacks_add_nothing(self, network):
        lora = random_lora({"attn.to_q": WIDTHS["attn.to_q"]}, 2, 0)
        with AdapterBank(network, LORA_TARGETS, slots=1, rank=2) as bank:
            bank.load(0, random_lora(WIDTHS, 2, 1))
            bank.load(0, lora)
            exported = bank.export(0)
        assert torch.equal(exported["attn.to_q.lora_A.weight"], lora["attn.to_q.lora_A.weight"])
        assert not exported["attn.to_out.0.lora_A.weight"].any()
        assert not exported["attn.to_out.0.lora_B.weight"].any()

    def test_initialise_starts_as_lora_does_from_the_generator_alone(self, network):
        banks = []
        for slot in (0, 2):
            with AdapterBank(network, LORA_TARGETS, slots=3, rank=64) as bank:
                bank.load(slot, random_lora(WIDTHS, 64, 1))
                bank.initialise(slot, torch.Generator().manual_seed(4))
                banks.append(bank.export(slot))
        assert all(torch.equal(banks[0][key], banks[1][key]) for key in banks[0])
        for name, (inside, _) in WIDTHS.items():
            down = banks[0][f"{name}.lora_A.weight"]
            assert 0.9 / inside**0.5 < down.abs().max() <= 1 / inside**0.5
            assert abs(down.mean()) < 0.1
            assert not banks[0][f"{name}.lora_B.weight"].any()

    def test_rank_zero_holds_nothing_and_changes_nothing(self, network):
        x = torch.randn(4, 5)
        with AdapterBank(network, LORA_TARGETS, slots=2, rank=0) as bank:
            bank.initialise(0, torch.Generator())
            bank.load(1, {})
            with bank.active([0, 1]):
                adapted = network(x)
        assert torch.equal(adapted, network(x))


class TestRefusals:
    def test_before_anything_is_overwritten(self, network):
        lora = random_lora(WIDTHS, 2, 0)
        with AdapterBank(network, LORA_TARGETS, slots=1, rank=2) as bank:
            bank.load(0, lora)
            for bad in (random_lora(WIDTHS, 3, 1), random_lora(WIDTHS | {"attn.to_k": (5, 7)}, 2, 1)):
                with pytest.raises(ObjdriveError):
                    bank.check(bad)
                with pytest.raises(ObjdriveError):
                    bank.load(0, bad)
            exported = bank.export(0)
        assert all(torch.equal(exported[key], lora[key]) for key in lora)

    def test_of_a_layer_that_the_base_lacks(self, network):
        with (
            AdapterBank(network, LORA_TARGETS, slots=1, rank=2) as bank,
            pytest.raises(ObjdriveError, match=r"layers that the base lacks, such as 'attn\.to_k'"),
        ):
            bank.load(0, random_lora({"attn.to_k": (5, 7)}, 2, 0))

    @pytest.mark.parametrize(
        ("shapes", "rank", "message"),
        [
            ({"attn.to_q": (6, 7)}, 2, r"'attn\.to_q': weights of shape \(2, 6\) do not fit rank 2 and width 5"),
            ({"attn.to_q": (5, 8)}, 2, r"'attn\.to_q': weights of shape \(2, 8\) do not fit rank 2 and width 7"),
            ({"attn.to_q": (5, 7)}, 3, r"'attn\.to_q': weights of shape \(3, 5\) do not fit rank 2 and width 5"),
        ],
    )
    def test_of_shapes_that_do_not_fit(self, network, shapes, rank, message):
        with AdapterBank(network, LORA_TARGETS, slots=1, rank=2) as bank, pytest.raises(ObjdriveError, match=message):
            bank.load(0, random_lora(shapes, rank, 0))

    def test_of_a_batch_that_does_not_split(self, network):
        with (
            AdapterBank(network, LORA_TARGETS, slots=2, rank=2) as bank,
            bank.active([0, 1]),
            pytest.raises(ValueError, match="a batch of 3 does not split into 2 equal runs"),
        ):
            network(torch.ones(3, 5))
