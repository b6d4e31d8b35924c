"""Two and three objects of one photo, in drawn pictures: is each of them there, with its own features?

Usage: ``python benchmarks/scenes.py --out FOLDER`` (``--smoke`` tries it out in minutes, on plain shapes).

Objects are photographed together, and fine-tuned together as scenes, and apart. Pictures with all of them are looked at
through windows of several sizes. An object has its *identity* if, of all designs of its class, it is the one that
agrees most with some window. A picture *shows all* if for each of its objects there is a window to which nothing in the
gallery, of whatever class, is nearer: features of one object on another, or an object that is left out, fail it.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from comparing import (
    SMOKE_PROMPTS,
    Contender,
    add_choices,
    cell,
    fine_tune,
    have_cluster,
    have_gallery,
    parser,
)
from PIL import Image

from jobs.drawing import Pool
from jobs.evaluation.compose import MANIFEST_FILE, PROMPTS, Subject, choose_subjects, compose_group, read_halves
from jobs.evaluation.pages import SHEET_FILE
from jobs.evaluation.pictures import BASE_METHOD, SCENES
from jobs.evaluation.scoring import Scorer, read_gallery
from jobs.pretrain.folders import Folders
from jobs.pretrain.sprites import Sprites, draw_sprites, have_sprites
from objdrive.adapters.adapter import parse_adapter
from objdrive.adapters.bank import AdapterBank
from objdrive.adapters.store import ArtifactStore
from objdrive.base.prompts import marked_phrase
from objdrive.base.stable_diffusion import Base
from objdrive.evaluation.encoders import Encoder, load_encoder
from objdrive.evaluation.plots import plot_sheet
from objdrive.evaluation.prompts import EvaluationPrompt, read_prompts
from objdrive.evaluation.reference import Gallery
from objdrive.evaluation.ruler import cut_windows, embed
from objdrive.evaluation.scores import Array
from objdrive.evaluation.summary import figure
from objdrive.pictures import as_pixels, encode_picture
from objdrive.sampling.sampler import Layout, SampleSpec, draw_pictures
from objdrive.seeds import seed_of
from objdrive.training.recipe import make_recipe

RECIPES = ("paper", "objdrive")
SIZES = (2, 3)
APART = ", apart"
"""What tells methods whose objects were fine-tuned one by one, from the same photo."""
WINDOWS = (
    (0.0, 0.0, 1.0),
    *((left, top, 0.6) for left, top in product((0.0, 0.2, 0.4), (0.1, 0.3))),
    *((left, top, 0.42) for left, top in product((0.0, 0.29, 0.58), (0.1, 0.29, 0.48))),
)
"""Where one of several objects may be: (left, top, side) in parts of a picture's edge."""


@dataclass(frozen=True)
class Group:
    """Objects that are photographed together."""

    name: str
    subjects: tuple[Subject, ...]


@dataclass(frozen=True)
class Effort:
    """How much is done: groups of each size, recipes with their overrides, drawing steps, the prompts, the encoder."""

    groups: int
    recipes: tuple[str, ...]
    overrides: tuple[str, ...]
    sample_steps: int
    prompts: tuple[EvaluationPrompt, ...]
    encoder: str


class SceneJudge:
    """Tells which objects of a group a picture shows."""

    def __init__(self, encoder: Encoder, gallery: Gallery) -> None:
        self._encoder, self._gallery = encoder, gallery
        self._classes = np.array([design.class_name for design in gallery.designs])

    def measure(self, pictures: Sequence[Image.Image], group: Group, prompts: Sequence[EvaluationPrompt]) -> Array:
        """(2,): mean identity of the group's objects, and share of pictures that show all of them."""
        pixels = as_pixels(np.stack([np.asarray(picture) for picture in pictures]))
        features, _ = embed(self._encoder, cut_windows(pixels, WINDOWS))
        windows = features.reshape(len(pictures), len(WINDOWS), -1)
        found = [self._look(some, group, prompt) for some, prompt in zip(windows, prompts, strict=True)]
        return np.array([np.mean([own for own, _ in found]), np.mean([there.all() for _, there in found])])

    def _look(self, windows: Array, group: Group, prompt: EvaluationPrompt) -> tuple[np.ndarray, np.ndarray]:
        """Of each object of the group: has it its identity, and is it the nearest of all in some window."""
        nearness = windows @ self._gallery.objects[:, self._gallery.prompts.index(prompt.id)].T
        rows = np.array([self._gallery.row(one.object_id) for one in group.subjects])
        best = nearness.max(axis=0)
        own = [
            self._nearest_of_class(best, one.class_name) == row for one, row in zip(group.subjects, rows, strict=True)
        ]
        return np.array(own), np.isin(rows, nearness.argmax(axis=1))

    def _nearest_of_class(self, best: Array, class_name: str) -> int:
        return int(np.where(self._classes == class_name, best, -np.inf).argmax())


class Studio:
    """Draws groups in every way that is compared."""

    def __init__(self, base: Base, sprites: Sprites, effort: Effort) -> None:
        self._base, self._sprites, self._effort = base, sprites, effort
        self._recipe = make_recipe(tuning=base.files.tuning)

    def composed(self, group: Group) -> list[Image.Image]:
        """The most that can be reached."""
        drawings = [Image.fromarray(self._sprites.pictures[one.row]) for one in group.subjects]
        prompts = self._effort.prompts
        contexts = [(prompt.id, prompt.shows.context if prompt.shows else None) for prompt in prompts]
        return [
            compose_group(drawings, f"{group.name}:{name}", context=context, resolution=self._base.resolution)[0]
            for name, context in contexts
        ]

    def base_alone(self, group: Group) -> list[Image.Image]:
        words = [one.class_name for one in group.subjects]
        return draw_pictures(self._base, [self._request(group, prompt, words) for prompt in self._effort.prompts])

    def personalized(self, group: Group, store: ArtifactStore) -> list[Image.Image]:
        read = [store.read(one.object_id) for one in group.subjects]
        adapters = [parse_adapter(files, token=artifact.token, family=self._base.family) for artifact, files in read]
        phrases = [marked_phrase(artifact.phrase, artifact.class_name, token=artifact.token) for artifact, _ in read]
        embeddings = [adapter.embeddings for adapter in adapters]
        rank = max(adapter.rank for adapter in adapters)
        with AdapterBank(self._base.unet, self._base.family.lora_targets, slots=len(adapters), rank=rank) as bank:
            for slot, adapter in enumerate(adapters):
                bank.load(slot, adapter.lora)
            own = [{slot: 1.0} for slot in range(len(adapters))]
            layout = Layout.of([a.layout_noise for a, _ in read], [one.class_name for one in group.subjects], own)
            # All objects of a scene have the same LoRA.
            slots = own[0] if read[0][0].scene else dict.fromkeys(range(len(adapters)), 1.0)
            requests = [
                self._request(group, prompt, phrases, embeddings, slots, layout) for prompt in self._effort.prompts
            ]
            return draw_pictures(self._base, requests, bank=bank)

    def _request(
        self,
        group: Group,
        prompt: EvaluationPrompt,
        phrases: Sequence[str],
        embeddings: Sequence[Mapping[str, torch.Tensor]] = (),
        slots: Mapping[int, float] | None = None,
        layout: Layout | None = None,
    ) -> SampleSpec:
        text = prompt.text.replace("{}", " and ".join(["{}"] * len(phrases)))
        seed = seed_of(f"{group.name}:{prompt.id}")
        how = {"steps": self._effort.sample_steps, "guidance_scale": self._recipe.guidance_scale}
        return SampleSpec(text, seed, phrases, embeddings, slots or {}, layout=layout, **how)


def run(out: Path, sprites: Sprites, class_names: Sequence[str], base: Base, effort: Effort) -> None:
    """Fine-tune what is not fine-tuned yet, draw, look, and write ``results.md`` and sheets of pictures."""
    gallery_file = have_gallery(out / "set", sprites, class_names, effort.prompts, base.resolution)
    gallery, encoder = _judge_by(gallery_file, base, effort)
    judge = SceneJudge(encoder, gallery)
    subjects = choose_subjects(sprites, class_names)
    lines = ["# Several objects in a picture", "", _describe(base, effort), ""]
    lines += ["| objects | method | identity in its class | shows all | scenes |", "|---" * 5 + "|"]
    studio = Studio(base, sprites, effort)
    for size in SIZES:
        groups = list(group_subjects(subjects, size))[: effort.groups]
        photos = out / "photos" / f"{size}"
        manifests = {name: photograph(groups, sprites, photos, together=not name) for name in ("", APART)}
        contenders = [
            Contender(f"{recipe} {size}{name}", manifest, recipe, effort.overrides)
            for recipe in effort.recipes
            for name, manifest in manifests.items()
        ]
        stores = [ArtifactStore(fine_tune(out, one, base.name)) for one in contenders]
        drawn = {BASE_METHOD: {group.name: studio.base_alone(group) for group in groups}}
        for contender, store in zip(contenders, stores, strict=True):
            there = set(store.object_ids())
            whole = [group for group in groups if all(one.object_id in there for one in group.subjects)]
            drawn[contender.name] = {group.name: studio.personalized(group, store) for group in whole}
        drawn[SCENES] = {group.name: studio.composed(group) for group in groups}
        (out / f"{size}-{SHEET_FILE}").write_bytes(_sheet(groups, drawn, photos, effort.prompts))
        for method, pictures in drawn.items():
            means = {
                one.name: judge.measure(pictures[one.name], one, effort.prompts)
                for one in groups
                if one.name in pictures
            }
            identity, shown = (figure({name: values[[axis]] for name, values in means.items()}) for axis in (0, 1))
            lines.append(f"| {size} | {method} | {cell(identity)} | {cell(shown)} | {len(means)} |")
        (out / "results.md").write_text("\n".join(lines) + "\n")
    print(f"results {out / 'results.md'}")


def group_subjects(subjects: Sequence[Subject], size: int) -> Iterator[Group]:
    """Neighbours in the list, each in one group."""
    for first in range(0, len(subjects) - size + 1, size):
        members = tuple(subjects[first : first + size])
        yield Group("-".join(one.object_id.removesuffix("-held") for one in members), members)


def photograph(groups: Sequence[Group], sprites: Sprites, folder: Path, *, together: bool) -> Path:
    """The manifest of photos of groups: each a scene if they are to be fine-tuned together, else each object alone."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [("object_id", "image", "mask", "class_name", "scene")]
    for group in groups:
        drawings = [Image.fromarray(sprites.pictures[one.row]) for one in group.subjects]
        image, masks = compose_group(drawings, group.name)
        image.save(folder / f"{group.name}.png")
        for one, mask in zip(group.subjects, masks, strict=True):
            scene = group.name if together else ""
            rows.append((one.object_id, f"{group.name}.png", f"{one.object_id}-mask.png", one.class_name, scene))
            mask.save(folder / rows[-1][2])
    manifest = folder / (MANIFEST_FILE if together else f"apart-{MANIFEST_FILE}")
    with manifest.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return manifest


def _judge_by(gallery: Path, base: Base, effort: Effort) -> tuple[Gallery, Encoder]:
    pool = Pool(workers=max(1, torch.get_num_threads()), gpus=0.0)
    scorer = Scorer(effort.encoder, base.name, None, base.fingerprint)
    # Not by the scorer: what draws and looks here may use every core.
    return read_gallery(gallery, effort.prompts, scorer, pool), load_encoder(effort.encoder, base=base.name)


def _sheet(
    groups: Sequence[Group],
    drawn: Mapping[str, Mapping[str, Sequence[Image.Image]]],
    photos: Path,
    prompts: Sequence[EvaluationPrompt],
) -> bytes:
    """Every group by every method, each in another prompt."""
    rows = []
    for number, group in enumerate(groups):
        place = number % len(prompts)
        title = prompts[place].naming(" and ".join(one.class_name for one in group.subjects))
        pictures = [encode_picture(of[group.name][place], "PNG") if group.name in of else b"" for of in drawn.values()]
        rows.append((title, [(photos / f"{group.name}.png").read_bytes(), *pictures]))
    return plot_sheet(["photo", *drawn], rows)


def _describe(base: Base, effort: Effort) -> str:
    return (
        f"Base `{base.name}`, a picture in each of {len(effort.prompts)} contexts, judged by {effort.encoder}. "
        "Intervals: 95%, bootstrap over scenes. `base` is the base alone with the class words, `scenes` are composed "
        "pictures."
    )


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    add_choices(options, RECIPES)
    options.add_argument("--groups", type=int, default=11, help="scenes of each size (11)")
    options.add_argument("--smoke", action="store_true", help="plain shapes, two steps: tries it all out")
    arguments = options.parse_args()
    have_cluster()
    base = Base.load(arguments.base, device="cpu")
    out, recipes = arguments.out.absolute() / arguments.half, tuple(arguments.recipe or RECIPES)
    steps = make_recipe(tuning=base.files.tuning).sample_steps
    if arguments.smoke:
        sprites = draw_sprites(0)
        effort = Effort(1, RECIPES[1:], ("steps=2",), 2, read_prompts(SMOKE_PROMPTS), "clip")
        run(out / "smoke", sprites, ("apple", "book", "kite"), base, effort)
    else:
        sprites = have_sprites(Folders(arguments.data))
        contexts = tuple(prompt for prompt in read_prompts(PROMPTS) if prompt.kind == "context")
        effort = Effort(arguments.groups, recipes, (), steps, contexts, "imagenet")
        run(out, sprites, read_halves()[arguments.half], base, effort)


if __name__ == "__main__":
    main()
