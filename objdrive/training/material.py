"""What one scene brings to its fine-tune: views, prompts, and class pictures where they are kept."""

import math
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from objdrive.base.conditioning import Conditioning, Frame
from objdrive.base.prompts import TokenizedPrompt, class_prompt, marked_phrase
from objdrive.base.stable_diffusion import Base
from objdrive.seeds import seed_of
from objdrive.training.class_pictures import ClassPictures
from objdrive.training.prompts import learned_prompt, worded_prompt
from objdrive.training.recipe import Recipe
from objdrive.training.views import Scene, make_views


@dataclass(frozen=True)
class StepSamples:
    """What one scene draws for one step: S samples, first V views, then those at which the base's prediction is kept.

    Attributes:
        samples: S rows of the scene's `latents`.
        prompts: S rows of its `prompts`, with which the base is asked.
        noise: (S, C, h, h), what is added to them.
        timesteps: (S,), how much of it.
        texts: V prompts, with `TOKEN_MARK` for each object that the view shows.
        shown: for each view the indices of those objects, in the order of their marks.
    """

    samples: list[int]
    prompts: list[int]
    noise: Tensor
    timesteps: Tensor
    texts: list[str]
    shown: list[tuple[int, ...]]


@dataclass(frozen=True)
class SceneMaterial:
    """All that a fine-tune computes once for a scene, and the generator of everything random about it.

    Attributes:
        generator: on the CPU.
        shown: for each view the indices of the objects that it shows.
        phrases: for each object what ``{}`` in a training prompt becomes.
        latents: (R, C, h, h), encoded cuts of the scene's picture, then the pictures of each object's class; none of
            those unless classes are kept.
        frames: of each row of `latents`, how its picture came about.
        weights: (views, 1, h, h), what each place counts in the object-specific loss.
        prompts: encoded prompts: for each view the class words of all that it shows, then the empty prompt, then for
            each object its class prompt.
        class_rows: for each object the rows of its class pictures.
        odds: (T,), how often each timestep is trained on.
        tokens: what prompts have been tokenized so far.
    """

    generator: torch.Generator
    shown: list[tuple[int, ...]]
    phrases: list[str]
    latents: Tensor
    frames: list[Frame]
    weights: Tensor
    prompts: Conditioning
    class_rows: list[range]
    odds: Tensor
    tokens: dict[str, TokenizedPrompt] = field(default_factory=dict)

    @classmethod
    def prepare(cls, base: Base, scene: Scene, recipe: Recipe, class_pictures: ClassPictures) -> "SceneMaterial":
        """Cut and encode the scene's views, and encode the prompts that stay the same."""
        generator = torch.Generator().manual_seed(seed_of(f"{recipe.seed}:{scene.key}"))
        names = [o.class_name for o in scene.objects]
        views = make_views(base, scene, recipe)
        texts = [worded_prompt([names[i] for i in view.shown]) for view in views]
        # Views at other places show the same.
        distinct = list(dict.fromkeys([*texts, "", *map(class_prompt, names)]))
        with torch.no_grad():
            encoded = base.encode_text([base.tokenize(text, negative=not text) for text in distinct])
        rows = [distinct.index(text) for text in [*texts, "", *map(class_prompt, names)]]
        pictures = [class_pictures[name] for name in names] if recipe.keeps_classes else []
        ends = list(accumulate(map(len, pictures), initial=len(views)))
        native = Frame.whole(base.resolution, base.resolution)
        return cls(
            generator=generator,
            shown=[view.shown for view in views],
            phrases=[marked_phrase(recipe.phrase, name) for name in names],
            latents=torch.cat([torch.stack([view.latents for view in views]), *pictures]),
            frames=[*[view.frame for view in views], *[native] * (ends[-1] - len(views))],
            weights=torch.stack([view.weights for view in views]),
            prompts=encoded[torch.tensor(rows, device=base.device)],
            class_rows=[range(*pair) for pair in pairwise(ends)],
            odds=base.noise.timestep_odds(recipe.timesteps, most_noise=recipe.layout_noise or math.inf),
        )

    def next_samples(self, recipe: Recipe) -> StepSamples:
        """The next step's samples; they use the scene's own generator only."""
        views = [self._view(recipe) for _ in range(recipe.views)]
        template = recipe.prompts[self._below(len(recipe.prompts))]
        kept = [self._kept(recipe) for _ in range(recipe.class_samples if recipe.ccr_weight else 0)]
        samples = views + [row for row, _ in kept]
        shown = [self.shown[view] for view in views]
        return StepSamples(
            samples=samples,
            prompts=views + [prompt for _, prompt in kept],
            noise=torch.randn(len(samples), *self.latents.shape[1:], generator=self.generator),
            timesteps=torch.multinomial(self.odds, len(samples), replacement=True, generator=self.generator),
            texts=[learned_prompt(template, [self.phrases[i] for i in objects]) for objects in shown],
            shown=shown,
        )

    def tokenized(self, base: Base, text: str) -> TokenizedPrompt:
        """A tokenized prompt; it is tokenized once."""
        if text not in self.tokens:
            self.tokens[text] = base.tokenize(text)
        return self.tokens[text]

    def _view(self, recipe: Recipe) -> int:
        close = [index for index, shown in enumerate(self.shown) if len(shown) < len(self.phrases)]
        zoomed = bool(close) and self._chance() < recipe.zoom
        among = close if zoomed else [index for index in range(len(self.shown)) if index not in close]
        return among[self._below(len(among))]

    def _kept(self, recipe: Recipe) -> tuple[int, int]:
        """Latents' and prompt's row of a sample at which the base's prediction is kept."""
        no_prompt = len(self.shown)
        if self._chance() < recipe.ccr_unconditional:
            return self._view(recipe), no_prompt
        member = self._below(len(self.phrases))
        pictures = self.class_rows[member]
        return pictures[self._below(len(pictures))], no_prompt + 1 + member

    def _below(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self.generator))

    def _chance(self) -> float:
        return float(torch.rand((), generator=self.generator))
