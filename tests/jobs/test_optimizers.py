"""Which weights each optimiser of the pretraining steps, and by how much."""

import copy

import pytest
import torch
from torch import nn

from jobs.pretrain.config import Training
from jobs.pretrain.optimizers import KernelMuon, hidden_weights, make_optimizers


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3)
        self.norm = nn.GroupNorm(2, 8)
        self.words = nn.Embedding(5, 8)
        self.middle = nn.Conv2d(8, 8, 3)
        self.dense = nn.Linear(8, 8)
        self.conv_out = nn.Conv2d(8, 3, 3)


def with_gradients(part: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for weight in part.parameters():
        weight.grad = torch.randn(weight.shape, generator=generator)
    return part


def test_muon_is_for_what_is_inside_a_network():
    assert hidden_weights(Part()) == {"middle.weight", "dense.weight"}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_trainable_weight_moves_and_no_other(optimizer):
    part = with_gradients(Part())
    part.dense.requires_grad_(False)
    before = {name: weight.detach().clone() for name, weight in part.named_parameters()}
    optimizers = make_optimizers(part, Training(batch=1, lr=1e-2, share=1, optimizer=optimizer))
    assert len(optimizers) == (2 if optimizer == "muon" else 1)
    for each in optimizers:
        each.step()
    moved = {name for name, weight in part.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if not name.startswith("dense")}


def test_a_kernel_steps_along_the_nearest_orthogonal_matrix_as_far_as_adamw_would():
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(16, 8, 3, 3).contiguous(memory_format=torch.channels_last))
    before = kernel.detach().clone()
    kernel.grad = torch.randn_like(kernel)
    muon = KernelMuon([kernel], lr=0.1, weight_decay=0.0)
    muon.step()
    step = (before - kernel.detach()).flatten(1)
    # Independently, by singular values; Muon's five iterations bring those near 1, from 0.7 to 1.2.
    left, _, right = torch.linalg.svd(kernel.grad.flatten(1), full_matrices=False)
    assert torch.nn.functional.cosine_similarity(step.flatten(), (left @ right).flatten(), dim=0) > 0.98
    scale = 0.1 * 0.2 * 72**0.5
    values = torch.linalg.svdvals(step) / scale
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert kernel.is_contiguous(memory_format=torch.channels_last)


def test_muon_goes_on_from_its_state_and_from_weights_changed_meanwhile():
    torch.manual_seed(0)
    first, second = (nn.Parameter(torch.zeros(4, 4)) for _ in range(2))
    before = KernelMuon([first], lr=0.1, weight_decay=0.1)
    first.grad = torch.randn(4, 4)
    before.step()
    after = KernelMuon([second], lr=0.1, weight_decay=0.1)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    with torch.no_grad():
        second.copy_(first)
    first.grad = second.grad = torch.randn(4, 4)
    before.step()
    after.step()
    assert torch.equal(first, second)
