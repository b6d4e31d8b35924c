"""Drawing pictures: classifier-free guidance over one batch of many objects, every picture at a step of its own."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import groupby

import torch
from PIL import Image
from torch import Tensor

from objdrive.adapters.bank import AdapterBank
from objdrive.base.conditioning import Conditioning
from objdrive.base.prompts import fill_prompt, refuse_mark
from objdrive.base.stable_diffusion import Base
from objdrive.base.steppers import SchedulerName, Stepper
from objdrive.pictures import to_pictures

_PIXELS_PER_BATCH = 4 * 512**2


@dataclass(frozen=True)
class SampleSpec:
    """One picture to draw.

    Attributes:
        prompt: with ``{}`` wherever an object stands.
        seed: of the starting noise.
        phrases: what each ``{}`` becomes, `TOKEN_MARK` standing for the learned token.
        embeddings: for each phrase its learned token's embeddings, (d,) by text encoder.
        slots: the bank's slots that adapt the base, with their scales; none draw with the base alone.
        negative_prompt: what guidance leads away from.
        steps: of the scheduler.
        guidance_scale: 1 draws without guidance.
        scheduler: which solver.
    """

    prompt: str
    seed: int
    phrases: Sequence[str] = ()
    embeddings: Sequence[Mapping[str, Tensor]] = ()
    slots: Mapping[int, float] = field(default_factory=dict)
    negative_prompt: str = ""
    steps: int = field(kw_only=True)
    guidance_scale: float = field(kw_only=True)
    scheduler: SchedulerName = field(default="ddim", kw_only=True)


@dataclass
class Sample:
    """One picture in the making.

    Attributes:
        latents: (1, C, h, h), where it has got to.
        conditioning: the negative prompt and the prompt; without guidance the prompt alone.
        guidance_scale: how far beyond the prompt's prediction to go.
        slots: the bank's slots that adapt the base, with their scales.
        stepper: its way from noise to picture.
    """

    latents: Tensor
    conditioning: Conditioning
    guidance_scale: float
    slots: Mapping[int, float]
    stepper: Stepper


def starting_noise(base: Base, seeds: Sequence[int]) -> Tensor:
    """(N, C, h, h) normal noise, drawn on the CPU from each picture's own seed as stock pipelines do."""
    shape = (1, base.unet.config["in_channels"], base.latent_size, base.latent_size)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.cat(noise).to(base.device)


@torch.no_grad()
def begin(base: Base, spec: SampleSpec) -> Sample:
    """Start a picture: its noise, its encoded prompts and its place before the first step.

    Raises:
        InvalidPrompt: places and objects do not match, or the prompt is too long for the base.
        ObjdriveError: a number of steps that the base cannot take.
    """
    stepper = base.noise.stepper(spec.scheduler, spec.steps)
    refuse_mark(spec.negative_prompt)
    prompt = base.tokenize(fill_prompt(spec.prompt, spec.phrases))
    one = len(spec.embeddings) == 1
    embeddings = list(spec.embeddings) * len(prompt.places) if one else spec.embeddings
    guided = spec.guidance_scale != 1
    prompts = [base.tokenize(spec.negative_prompt), prompt] if guided else [prompt]
    conditioning = base.encode_text(prompts, embeddings)
    return Sample(starting_noise(base, [spec.seed]), conditioning, spec.guidance_scale, spec.slots, stepper)


@torch.no_grad()
def denoise(base: Base, samples: Sequence[Sample], bank: AdapterBank | None = None) -> None:
    """Take every sample one step of its own further, all in one forward pass of the UNet.

    With classifier-free guidance (arXiv 2207.12598) a sample takes two rows of the batch. Each sample depends on
    itself alone, up to rounding.
    """
    counts = [len(sample.conditioning) for sample in samples]
    latents = torch.cat([sample.latents.expand(n, -1, -1, -1) for sample, n in zip(samples, counts, strict=True)])
    timesteps = torch.tensor([sample.stepper.timestep for sample in samples]).repeat_interleave(torch.tensor(counts))
    runs = _in_long_runs([sample.slots for sample, n in zip(samples, counts, strict=True) for _ in range(n)])
    with bank.active(runs) if bank is not None else nullcontext():
        conditioning = Conditioning.cat([sample.conditioning for sample in samples])
        outputs = base.predict(latents, timesteps.to(base.device), conditioning)
    for sample, output in zip(samples, outputs.split(counts), strict=True):
        if len(output) == 2:
            plain, prompted = output.split(1)
            output = plain + sample.guidance_scale * (prompted - plain)
        sample.latents = sample.stepper.step(output, sample.latents)


def _in_long_runs(rows: Sequence[Mapping[int, float]]) -> Sequence[Mapping[int, float]]:
    """A batch's rows in as few equal runs as it can be taken in: they make larger and fewer matrix products."""
    return rows[:: math.gcd(*(len(list(same)) for _, same in groupby(rows)))]


def draw_latents(
    base: Base,
    specs: Sequence[SampleSpec],
    *,
    bank: AdapterBank | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Draw all pictures in one batch. Each depends on its own spec alone.

    Returns:
        (N, C, h, h) scaled latents.
    """
    if bank is None and any(spec.slots for spec in specs):
        raise ValueError("a spec names slots, but there is no bank")
    samples = [begin(base, spec) for spec in specs]
    while rest := [sample for sample in samples if not sample.stepper.done]:
        denoise(base, rest, bank)
        on_step()
    return torch.cat([sample.latents for sample in samples])


def draw_pictures(
    base: Base,
    specs: Sequence[SampleSpec],
    *,
    bank: AdapterBank | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> list[Image.Image]:
    """Draw pictures in batches that fit a device, in the order of `specs`."""
    pictures = []
    batch = fitting_batch_size(base)
    for first in range(0, len(specs), batch):
        latents = draw_latents(base, specs[first : first + batch], bank=bank, on_step=on_step)
        pictures += to_pictures(base.decode_latents(latents))
        on_step()
    return pictures


def fitting_batch_size(base: Base) -> int:
    """Pictures in a batch that fits a device: four pictures of 512 x 512, or as many pixels in smaller ones."""
    return max(1, _PIXELS_PER_BATCH // base.resolution**2)
