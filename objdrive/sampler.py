"""Drawing pictures: classifier-free guidance and DDIM over one batch of many objects."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from objdrive.bank import AdapterBank
from objdrive.base import TOKEN_MARK, Base
from objdrive.errors import ObjdriveError

_PIXELS_PER_BATCH = 4 * 512**2


@dataclass(frozen=True)
class Request:
    """One picture to draw.

    Attributes:
        prompt: with ``{}`` wherever an object stands.
        seed: of the starting noise.
        phrases: what each ``{}`` becomes, `TOKEN_MARK` standing for the learned token.
        embeddings: the learned token embedding (d,) of each phrase.
        slot: the bank's slot that adapts the base; None draws with the base alone.
        negative_prompt: what guidance leads away from.
    """

    prompt: str
    seed: int
    phrases: Sequence[str] = ()
    embeddings: Sequence[Tensor] = ()
    slot: int | None = None
    negative_prompt: str = ""


def fill_prompt(prompt: str, phrases: Sequence[str]) -> str:
    """Put phrases in the places of ``{}``; a single phrase fills all of them.

    Raises:
        ObjdriveError: the number of places and phrases differ, or the prompt holds a NUL character.
    """
    _refuse_mark(prompt)
    pieces = prompt.split("{}")
    places = len(pieces) - 1
    if len(phrases) == 1 and places:
        phrases = list(phrases) * places
    if places != len(phrases):
        raise ObjdriveError(
            f"the prompt {prompt!r} has {places} places {{}} for {len(phrases)} object(s): name each once, "
            'as in "a photo of {} on grass"'
        )
    return "".join(piece + phrase for piece, phrase in zip(pieces, [*phrases, ""], strict=True))


def _refuse_mark(prompt: str) -> None:
    if TOKEN_MARK in prompt:
        raise ObjdriveError(f"the prompt {prompt!r} holds a NUL character: remove it")


def starting_noise(base: Base, seeds: Sequence[int]) -> Tensor:
    """(N, C, h, h) normal noise, drawn on the CPU from each request's own seed as stock pipelines do."""
    shape = (1, base.unet.config["in_channels"], base.latent_size, base.latent_size)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.cat(noise).to(base.device)


@torch.no_grad()
def draw_latents(
    base: Base,
    requests: Sequence[Request],
    *,
    bank: AdapterBank | None = None,
    steps: int,
    guidance_scale: float,
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Draw all requests in one batch by DDIM (arXiv 2010.02502) with classifier-free guidance (arXiv 2207.12598).

    Either every request names a slot of `bank` or none does. Each picture depends on its own request alone.

    Returns:
        (N, C, h, h) scaled latents.
    """
    slots = [request.slot for request in requests if request.slot is not None]
    if len(slots) not in (0, len(requests)) or (slots and bank is None):
        raise ValueError("either every request names a slot of a bank or none does")
    states = _guided_states(base, requests)
    scheduler = type(base.scheduler).from_config(base.scheduler.config)
    scheduler.set_timesteps(steps)
    latents = starting_noise(base, [request.seed for request in requests])
    with bank.active(slots) if bank is not None and slots else nullcontext():
        for timestep in scheduler.timesteps:
            doubled = latents.repeat_interleave(2, dim=0)
            output = base.predict(doubled, timestep.expand(len(doubled)).to(base.device), states)
            plain, prompted = output.view(-1, 2, *output.shape[1:]).unbind(dim=1)
            guided = plain + guidance_scale * (prompted - plain)
            latents = scheduler.step(guided, timestep, latents).prev_sample
            on_step()
    return latents


def _guided_states(base: Base, requests: Sequence[Request]) -> Tensor:
    """(2N, L, d): for each request the negative prompt's and the prompt's text states, side by side."""
    prompts, embeddings = [], []
    for request in requests:
        _refuse_mark(request.negative_prompt)
        prompts += [
            base.tokenize(request.negative_prompt),
            base.tokenize(fill_prompt(request.prompt, request.phrases)),
        ]
        tokens = len(prompts[-1].places)
        one = len(request.embeddings) == 1
        embeddings += list(request.embeddings) * tokens if one else list(request.embeddings)
    return base.encode_text(prompts, embeddings)[0]


def draw_pictures(
    base: Base,
    requests: Sequence[Request],
    *,
    bank: AdapterBank | None = None,
    steps: int,
    guidance_scale: float,
    on_step: Callable[[], None] = lambda: None,
) -> list[Image.Image]:
    """Draw requests, with and without a slot, in batches that fit a device; pictures in the requests' order."""
    batch = fitting_batch_size(base)
    plain = [index for index, request in enumerate(requests) if request.slot is None]
    adapted = [index for index, request in enumerate(requests) if request.slot is not None]
    pictures: dict[int, Image.Image] = {}
    for indices in (plain, adapted):
        for first in range(0, len(indices), batch):
            some = indices[first : first + batch]
            latents = draw_latents(
                base,
                [requests[index] for index in some],
                bank=bank,
                steps=steps,
                guidance_scale=guidance_scale,
                on_step=on_step,
            )
            pictures.update(zip(some, to_pictures(base.decode_latents(latents)), strict=True))
            on_step()
    return [pictures[index] for index in range(len(requests))]


def fitting_batch_size(base: Base) -> int:
    """Requests in a batch that fits a device: four pictures of 512 x 512, or as many pixels in smaller ones."""
    return max(1, _PIXELS_PER_BATCH // base.resolution**2)


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """Pictures of pixels (N, 3, R, R) in [0, 1]."""
    arrays = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]
