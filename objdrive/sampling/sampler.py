"""Drawing pictures: classifier-free guidance over one batch of many objects, every picture at a step of its own.

With a `Layout` the base alone draws first, with class words, while noise is so high that only the layout is decided.
Where it attends to the words tells where each object goes; there, and only there, its adapter draws the rest.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from itertools import groupby

import torch
from PIL import Image
from torch import Tensor

from objdrive.adapters.bank import AdapterBank
from objdrive.base.attention import watch_attention
from objdrive.base.conditioning import Conditioning, Frame
from objdrive.base.memory import share_bytes
from objdrive.base.prompts import fill_prompt, phrase_places, refuse_mark, text_places
from objdrive.base.sizes import Size
from objdrive.base.stable_diffusion import Base
from objdrive.base.steppers import SchedulerName, Stepper
from objdrive.base.transfers import on_device
from objdrive.pictures import to_pictures
from objdrive.sampling.inpainting import Canvas, Known
from objdrive.sampling.negatives import NegativePrompts
from objdrive.sampling.regions import asks_for_several, find_regions

_PIXELS_ON_PROCESSOR = 4 * 512**2
_MOST_PIXELS = 16 * 512**2
"""Of a batch: with guidance these are up to 48 rows of a denoising step, which keep any card busy."""
_BYTES_PER_PIXEL = 4 * 256 * 4
"""While a batch is decoded: four maps of 256 channels in float32, as SD's and SDXL's autoencoders have them."""


@dataclass(frozen=True)
class Layout:
    """How the base lays a picture out for adapters to draw in.

    Attributes:
        noise: the level, as `NoiseProcess.level` has it, down to which the base draws alone; it takes the first step
            in any case.
        class_names: for each phrase of the prompt what stands in its place meanwhile.
        slots: for each phrase the bank's slots that draw it afterwards, with their scales.
    """

    noise: float
    class_names: Sequence[str]
    slots: Sequence[Mapping[int, float]]

    @classmethod
    def of(
        cls, noises: Iterable[float | None], class_names: Sequence[str], slots: Sequence[Mapping[int, float]]
    ) -> "Layout | None":
        """The layout for objects of whose artifacts each tells its ``layout_noise``; None if none of them does.

        The lowest holds for all: above it some adapter was not trained.
        """
        told = [noise for noise in noises if noise is not None]
        return cls(min(told), class_names, slots) if told else None


@dataclass(frozen=True)
class SampleSpec:
    """One picture to draw.

    Attributes:
        prompt: with ``{}`` wherever an object stands.
        seed: of the starting noise.
        phrases: what each ``{}`` becomes, `TOKEN_MARK` standing for the learned token.
        embeddings: for each phrase its learned token's embeddings, (d,) by text encoder.
        slots: the bank's slots that adapt the base at every step, with their scales; none draw with the base alone.
        layout: how the base lays the picture out; none: `slots` adapt it from the first step on.
        negative_prompt: what guidance leads away from.
        steps: of the scheduler.
        guidance_scale: 1 draws without guidance.
        scheduler: which solver.
        size: width and height in pixels; None: the base's native square.
        canvas: the picture to draw into; none: an empty one. A single object in it is drawn wherever it is drawn.
    """

    prompt: str
    seed: int
    phrases: Sequence[str] = ()
    embeddings: Sequence[Mapping[str, Tensor]] = ()
    slots: Mapping[int, float] = field(default_factory=dict)
    layout: Layout | None = field(default=None, kw_only=True)
    negative_prompt: str = ""
    steps: int = field(kw_only=True)
    guidance_scale: float = field(kw_only=True)
    scheduler: SchedulerName = field(default="ddim", kw_only=True)
    size: Size | None = field(default=None, kw_only=True)
    canvas: Canvas | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Row:
    """A prompt in the network's batch: `conditioning` without a batch axis, and the slots that adapt the base to it."""

    conditioning: Conditioning
    slots: Mapping[int, float]


@dataclass(frozen=True)
class _Plan:
    """A layout on its way: the base's own row, where its prompt names each object, and where its other words are."""

    noise: float
    worded: Row
    places: Sequence[Sequence[int]]
    others: Sequence[int]


@dataclass
class Sample:
    """One picture in the making.

    Attributes:
        latents: (1, C, h, w), where it has got to.
        negative: the encoded prompt that guidance leads away from, without a batch axis; none without guidance.
        rows: what is drawn; the rows of several share the picture by `shares`.
        shares: (len(rows), h, w), how much of each place each row has; None: there is one row.
        known: the places that are kept as a picture has them; None: all is drawn.
        guidance_scale: how far beyond the prompt's prediction to go.
        stepper: its way from noise to picture.
        plan: what its layout is drawn by; None: no layout, or it stands.
    """

    latents: Tensor
    negative: Conditioning | None
    rows: Sequence[Row]
    guidance_scale: float
    stepper: Stepper
    plan: _Plan | None = None
    shares: Tensor | None = None
    known: Known | None = None

    @property
    def batch(self) -> list[Row]:
        """The rows of the next step: what guidance leads each away from, if there is guidance, then what is drawn."""
        rows = [self.plan.worded] if self.plan else list(self.rows)
        negative = self.negative
        # By the row's own slots: an adapter's guidance is the difference that the prompt makes to it.
        away = [] if negative is None else [Row(negative, row.slots) for row in rows]
        return away + rows

    def lays_out_last(self, base: Base) -> bool:
        """Whether the layout stands after the next step."""
        following = self.stepper.following
        return self.plan is not None and (following is None or base.noise.level(following) <= self.plan.noise)

    def settle(self, maps: Tensor) -> None:
        """Share the picture out by the attention (L, e, f) to the words of the layout's prompt."""
        assert self.plan is not None
        if self.plan.places:
            # What stands in a kept place is no object of this drawing.
            maps = maps if self.known is None else self.known.within(maps)
            words = torch.stack([maps[list(places)].mean(dim=0) for places in self.plan.places])
            shares = find_regions(words, maps[list(self.plan.others)], self.latents.shape[-2:]).to(self.latents)
            rows = [*self.rows, self.plan.worded]
            taken = [index for index, share in enumerate(shares) if share.any()]
            self.rows = [rows[index] for index in taken]
            self.shares = shares[taken] if len(taken) > 1 else None
        self.plan = None


def starting_noise(base: Base, seeds: Sequence[int], size: Size | None = None) -> Tensor:
    """(N, C, h, w) normal noise, drawn on the CPU from each picture's own seed as stock pipelines do."""
    shape = (1, *base.latent_shape(size or base.sizes.square))
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.cat(noise).to(base.device)


@torch.no_grad()
def begin(base: Base, spec: SampleSpec, negatives: NegativePrompts) -> Sample:
    """Start a picture: its noise, its encoded prompts and its place before the first step.

    Args:
        base: what draws.
        spec: the picture.
        negatives: of that base, shared by pictures.

    Raises:
        InvalidPrompt: places and objects do not match, or the prompt is too long for the base.
        ObjdriveError: a number of steps that the base cannot take, or a size that it does not draw.
    """
    size = spec.size or base.sizes.square
    base.sizes.check(size)
    stepper = base.noise.stepper(spec.scheduler, spec.steps)
    refuse_mark(spec.negative_prompt)
    away = base.tokenize(spec.negative_prompt, negative=True)
    named = _prompts(spec)
    prompts = [base.tokenize(one.text) for one in named]
    embeddings = [vectors for one in named for vectors in one.embeddings]
    whole = Frame.whole(height=size[1], width=size[0])
    encoded = base.encode_text(prompts, embeddings).framed([whole] * len(prompts))
    rows = [Row(encoded[place], one.slots) for place, one in enumerate(named)]
    latents = starting_noise(base, [spec.seed], size)
    negative = None if spec.guidance_scale == 1 else negatives.encode(away).framed([whole])
    known = None if spec.canvas is None else Known.of(base, spec.canvas, latents)
    if known:
        latents = known.hold(latents, base.noise, stepper.timestep)
    if spec.layout is None:
        return Sample(latents, negative, rows, spec.guidance_scale, stepper, known=known)
    # Of one object that is asked for more than once, or into a picture's place, no place belongs to the base.
    alone = len(spec.phrases) == 1 and (known is not None or asks_for_several(spec.prompt))
    places = [] if alone else phrase_places(base.tokenizer, spec.prompt, spec.layout.class_names)
    others = set(text_places(base.tokenizer, named[-1].text)).difference(*places)
    plan = _Plan(spec.layout.noise, rows.pop(), places, sorted(others))
    return Sample(latents, negative, rows, spec.guidance_scale, stepper, plan, known=known)


@dataclass(frozen=True)
class _Prompt:
    """A filled prompt, the embeddings of the learned tokens in it, and the slots that adapt the base to it."""

    text: str
    embeddings: Sequence[Mapping[str, Tensor]]
    slots: Mapping[int, float]


def _prompts(spec: SampleSpec) -> list[_Prompt]:
    """The prompts that a picture is drawn by; with a layout one for each object, and last the base's own."""
    if spec.layout is None or len(spec.phrases) == 1:
        repeats = spec.prompt.count("{}") if len(spec.embeddings) == 1 else 1
        slots = spec.slots if spec.layout is None else spec.layout.slots[0]
        prompts = [_Prompt(fill_prompt(spec.prompt, spec.phrases), list(spec.embeddings) * repeats, slots)]
    else:
        prompts = [
            _Prompt(fill_prompt(spec.prompt, _all_but(spec.layout.class_names, index, phrase)), [vectors], slots)
            for index, (phrase, vectors, slots) in enumerate(
                zip(spec.phrases, spec.embeddings, spec.layout.slots, strict=True)
            )
        ]
    if spec.layout is not None:
        prompts.append(_Prompt(fill_prompt(spec.prompt, spec.layout.class_names), [], {}))
    return prompts


def _all_but(class_names: Sequence[str], index: int, phrase: str) -> list[str]:
    """Class words, but for one object its phrase: a row that draws one object knows no other's token."""
    return [phrase if other == index else name for other, name in enumerate(class_names)]


@torch.no_grad()
def denoise(base: Base, samples: Sequence[Sample], bank: AdapterBank | None = None) -> None:
    """Take every sample, all of one size, one step of its own further, all in one forward pass of the UNet.

    With classifier-free guidance (arXiv 2207.12598) a sample takes two rows of the batch for each of its regions.
    Each sample depends on itself alone, up to rounding.
    """
    batches = [sample.batch for sample in samples]
    rows = [(index, row) for index, batch in enumerate(batches) for row in batch]
    # Equal slots side by side: they make larger and fewer matrix products.
    order = sorted(range(len(rows)), key=lambda place: sorted(rows[place][1].slots.items()))
    batch = [rows[place] for place in order]
    latents = torch.cat([samples[index].latents for index, _ in batch])
    timesteps = on_device([samples[index].stepper.timestep for index, _ in batch], base.device)
    conditioning = Conditioning.stack([row.conditioning for _, row in batch])
    settling = [sample.lays_out_last(base) for sample in samples]
    with ExitStack() as stack:
        if bank is not None:
            stack.enter_context(_adapted(base, bank, [row.slots for _, row in batch], timesteps))
        maps = stack.enter_context(watch_attention(base.unet)) if any(settling) else None
        outputs = base.predict(latents, timesteps, conditioning)
    back = iter(sorted(range(len(order)), key=order.__getitem__))
    places = [[next(back) for _ in batch] for batch in batches]
    wholes = _guided(samples, outputs, places)
    if maps is not None:
        for sample, own, settles in zip(samples, places, settling, strict=True):
            if settles:
                sample.settle(maps.of_row(own[-1]))
    steppers = [sample.stepper for sample in samples]
    stepped = Stepper.step(steppers, wholes, torch.cat([sample.latents for sample in samples]))
    for sample, latents in zip(samples, stepped.split(1), strict=True):
        sample.latents = latents
        if sample.known:
            reached = None if sample.stepper.done else sample.stepper.timestep
            sample.latents = sample.known.hold(latents, base.noise, reached)


def _guided(samples: Sequence[Sample], outputs: Tensor, places: Sequence[Sequence[int]]) -> Tensor:
    """The network's output for each of N pictures, (N, C, h, w), all in a few operations.

    Args:
        samples: the pictures.
        outputs: (R, C, h, w), for the rows of all of them.
        places: for each picture where the rows of its `batch` are.
    """
    counts = [len(own) // (1 if sample.negative is None else 2) for sample, own in zip(samples, places, strict=True)]
    # Without guidance a row is led away from itself, by a scale of 1: it stays as it is.
    away = [place for own, count in zip(places, counts, strict=True) for place in own[:count]]
    prompted = [place for own, count in zip(places, counts, strict=True) for place in own[-count:]]
    scales = [float(sample.guidance_scale) for sample, count in zip(samples, counts, strict=True) for _ in range(count)]
    led = outputs[on_device([away, prompted], outputs.device)]
    guided = torch.lerp(led[0], led[1], on_device(scales, outputs.device)[:, None, None, None])
    if max(counts) == 1:
        return guided
    return torch.cat(
        [
            own if sample.shares is None else (sample.shares[:, None] * own).sum(dim=0, keepdim=True)
            for sample, own in zip(samples, guided.split(counts), strict=True)
        ]
    )


def _adapted(
    base: Base, bank: AdapterBank, rows: Sequence[Mapping[int, float]], timesteps: Tensor
) -> AbstractContextManager[None]:
    """The rows of a batch at `timesteps` (N,), each adapted by its slots."""
    return bank.active(_in_long_runs(rows), (timesteps, len(base.noise.alphas)))


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
    """Draw all pictures, of one size, in one batch. Each depends on its own spec alone.

    Returns:
        (N, C, h, w) scaled latents.
    """
    if bank is None and any(spec.slots or (spec.layout and any(spec.layout.slots)) for spec in specs):
        raise ValueError("a spec names slots, but there is no bank")
    negatives = NegativePrompts(base)
    samples = [begin(base, spec, negatives) for spec in specs]
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
    for size, alike in groupby(specs, key=lambda spec: spec.size or base.sizes.square):
        batch, same = fitting_batch_size(base, size), list(alike)
        for first in range(0, len(same), batch):
            latents = draw_latents(base, same[first : first + batch], bank=bank, on_step=on_step)
            pictures += to_pictures(base.decode_latents(latents))
            on_step()
    return pictures


def fitting_batch_size(base: Base, size: Size | None = None) -> int:
    """Pictures of a size in a batch that fits a device, or this process's share of it."""
    width, height = size or base.sizes.square
    pixels = pixels_at_once(share_bytes(base.device)) if base.device.type == "cuda" else _PIXELS_ON_PROCESSOR
    return max(1, pixels // (width * height))


def pixels_at_once(share: int) -> int:
    """Pixels of a batch for a process that may take so many bytes of a GPU: a quarter of them is for decoding.

    The rest is for weights and adapters.
    """
    return min(_MOST_PIXELS, share // 4 // _BYTES_PER_PIXEL)
