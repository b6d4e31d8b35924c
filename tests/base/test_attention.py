"""Maps of cross-attention, against diffusers' own computation of it."""

import pytest
import torch

from objdrive.base.attention import watch_attention


@pytest.fixture(scope="module")
def seen(tiny64):
    """(maps, the network's output with and without being watched)."""
    prompts = tiny64.encode_text([tiny64.tokenize(text) for text in ("a photo of a drum", "a rose on grass")])
    latents = torch.randn((2, 8, 16, 16), generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([700, 400])
    with torch.no_grad(), watch_attention(tiny64.unet) as maps:
        watched = tiny64.predict(latents, timesteps, prompts)
    with torch.no_grad():
        plain = tiny64.predict(latents, timesteps, prompts)
    return maps, watched, plain


def test_watching_changes_nothing(seen, tiny64):
    _, watched, plain = seen
    assert torch.equal(watched, plain)
    assert not any(layer._forward_hooks for layer in tiny64.unet.modules())


def test_every_place_shares_its_attention_among_the_tokens(seen, tiny64):
    maps, *_ = seen
    for row in (0, 1):
        found = maps.of_row(row)
        assert found.shape == (tiny64.tokenizer.model_max_length, 8, 8)
        assert torch.allclose(found.sum(dim=0), torch.ones(8, 8), atol=1e-4)
    assert not torch.allclose(maps.of_row(0), maps.of_row(1), atol=1e-3)


def test_maps_are_the_layers_own(tiny64):
    """The mean of what diffusers' layers compute themselves, by their own ``get_attention_scores``."""
    prompt = tiny64.encode_text([tiny64.tokenize("a photo of a drum")])
    latents = torch.randn((1, 8, 16, 16), generator=torch.Generator().manual_seed(1))
    inputs, hooks = {}, []
    for name, layer in tiny64.unet.named_modules():
        if name.endswith(".attn2"):
            keep = lambda layer, args, kwargs, name=name: inputs.update({name: args[0]})  # noqa: E731
            hooks.append(layer.register_forward_pre_hook(keep, with_kwargs=True))
    with torch.no_grad(), watch_attention(tiny64.unet) as maps:
        tiny64.predict(latents, torch.tensor([500]), prompt)
        for hook in hooks:
            hook.remove()
        scores = []
        for name, hidden in inputs.items():
            if hidden.shape[1] == 64:
                layer = tiny64.unet.get_submodule(name)
                query, key = (
                    layer.head_to_batch_dim(project(x))
                    for project, x in ((layer.to_q, hidden), (layer.to_k, prompt.states))
                )
                scores.append(layer.get_attention_scores(query, key).mean(dim=0))
    expected = torch.stack(scores).mean(dim=0).T.reshape(-1, 8, 8)
    # The layers were called again with the same inputs: what is noted last is the same.
    assert torch.allclose(maps.of_row(0), expected, atol=1e-5)
