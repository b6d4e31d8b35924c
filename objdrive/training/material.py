"""What one scene brings to its fine-tune: views, prompts, and class pictures where they are kept."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from objdrive.base.conditioning import Conditioning, Frame
from objdrive.base.prompts import class_prompt, marked_phrase
from objdrive.base.stable_diffusion import Base
from objdrive.seeds import seed_of
from objdrive.training.class_pictures import ClassPictures
from objdrive.training.prompts import learned_prompt, worded_prompt
from objdrive.training.recipe import Recipe
from objdrive.training.views import Scene, View, make_views


@dataclass(frozen=True)
class StepSamples:
    """What one scene brings to one step: S samples, first V views, then those at which the base's prediction is kept.

    Attributes:
        clean: (S, C, h, h) latents.
        noise: (S, C, h, h), what is added to them.
        timesteps: (S,), how much of it.
        weights: (V, 1, h, h), what each place counts in the object-specific loss.
        texts: V prompts, with `TOKEN_MARK` for each object that the view shows.
        shown: for each view the indices of those objects, in the order of their marks.
        frames: of each view.
        worded: V encoded prompts that say the class words in the tokens' places.
        kept: S - V encoded prompts, of the samples after the views.
    """

    clean: Tensor
    noise: Tensor
    timesteps: Tensor
    weights: Tensor
    texts: list[str]
    shown: list[tuple[int, ...]]
    frames: list[Frame]
    worded: Conditioning
    kept: Conditioning


@dataclass(frozen=True)
class SceneMaterial:
    """All that a fine-tune computes once for a scene, and the generator of everything random about it.

    Attributes:
        generator: on the CPU.
        views: encoded cuts of the scene's picture.
        phrases: for each object what ``{}`` in a training prompt becomes.
        class_latents: for each object (class_pool, C, h, h) pictures of its class; none unless classes are kept.
        class_prompts: for each object its encoded class prompt.
        worded: for each view the encoded class prompt of all that it shows.
        no_prompt: the encoded empty prompt, without a batch axis.
        odds: (T,), how often each timestep is trained on.
    """

    generator: torch.Generator
    views: list[View]
    phrases: list[str]
    class_latents: list[Tensor]
    class_prompts: Conditioning
    worded: Conditioning
    no_prompt: Conditioning
    odds: Tensor

    @classmethod
    def prepare(cls, base: Base, scene: Scene, recipe: Recipe, class_pictures: ClassPictures) -> "SceneMaterial":
        """Cut and encode the scene's views, and encode the prompts that stay the same."""
        generator = torch.Generator().manual_seed(seed_of(f"{recipe.seed}:{scene.key}"))
        names = [o.class_name for o in scene.objects]
        views = make_views(base, scene, recipe)
        words = [worded_prompt([names[i] for i in view.shown]) for view in views]
        with torch.no_grad():
            class_prompts = base.encode_text([base.tokenize(class_prompt(name)) for name in names])
            worded = base.encode_text([base.tokenize(text) for text in words])
            no_prompt = base.encode_text([base.tokenize("", negative=True)])
        return cls(
            generator=generator,
            views=views,
            phrases=[marked_phrase(recipe.phrase, name) for name in names],
            class_latents=[class_pictures[name] for name in names] if recipe.keeps_classes else [],
            class_prompts=class_prompts,
            worded=worded,
            no_prompt=no_prompt[0],
            odds=base.noise.timestep_odds(recipe.timesteps, most_noise=recipe.layout_noise or math.inf),
        )

    def next_samples(self, recipe: Recipe) -> StepSamples:
        """The next step's samples; they use the scene's own generator only."""
        chosen = [self._view(recipe) for _ in range(recipe.views)]
        views = [self.views[index] for index in chosen]
        frames = [view.frame for view in views]
        template = recipe.prompts[self._below(len(recipe.prompts))]
        kept = [self._kept(recipe) for _ in range(recipe.class_samples if recipe.ccr_weight else 0)]
        clean = torch.stack([view.latents for view in views] + [latents for latents, _ in kept])
        return StepSamples(
            clean=clean,
            noise=torch.randn(clean.shape, generator=self.generator),
            timesteps=torch.multinomial(self.odds, len(clean), replacement=True, generator=self.generator),
            weights=torch.stack([view.weights for view in views]),
            texts=[self._text(template, view) for view in views],
            shown=[view.shown for view in views],
            frames=frames,
            worded=self.worded[chosen].framed(frames),
            kept=Conditioning.stack([prompt for _, prompt in kept]) if kept else self.class_prompts[:0],
        )

    def _view(self, recipe: Recipe) -> int:
        close = [index for index, view in enumerate(self.views) if len(view.shown) < len(self.phrases)]
        zoomed = bool(close) and self._chance() < recipe.zoom
        among = close if zoomed else [index for index in range(len(self.views)) if index not in close]
        return among[self._below(len(among))]

    def _kept(self, recipe: Recipe) -> tuple[Tensor, Conditioning]:
        """Latents and prompt of a sample at which the base's prediction is kept."""
        if self._chance() < recipe.ccr_unconditional:
            view = self.views[self._view(recipe)]
            return view.latents, self.no_prompt.framed([view.frame])
        member = self._below(len(self.class_prompts))
        pictures = self.class_latents[member]
        return pictures[self._below(len(pictures))], self.class_prompts[member]

    def _below(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self.generator))

    def _chance(self) -> float:
        return float(torch.rand((), generator=self.generator))

    def _text(self, template: str, view: View) -> str:
        return learned_prompt(template, [self.phrases[i] for i in view.shown])
