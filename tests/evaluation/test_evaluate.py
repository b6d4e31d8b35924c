"""Checks of the ruler that a broken one would fail: what is known to be right, wrong or copied is measured as such."""

import csv
import functools
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from jobs.evaluation.compose import MANIFEST_FILE, PROMPTS, compose_prompt, write_half
from jobs.evaluation.pictures import decode_pictures
from jobs.pretrain.sprites import EDGE, Sprites, draw_sprites
from objdrive.catalog.geometry import object_alone
from objdrive.catalog.photos import decode_photo
from objdrive.errors import ObjdriveError
from objdrive.evaluation.encoders import identify, load_encoder
from objdrive.evaluation.prompts import EvaluationPrompt, Shown, read_prompts
from objdrive.evaluation.reference import MEASURED, Design, Gallery, Reference
from objdrive.evaluation.ruler import WINDOWS, Asked, Ruler, cut_windows, embed
from objdrive.pictures import as_pixels
from objdrive.sampling.sampler import SampleSpec, draw_pictures

CATALOG = Path(__file__).parents[2] / "examples" / "catalog"
CONTEXTS = ("grass", "night", "cloth")
ALIKE = ("snow", "water", "night", "sunset", "flowers", "hills")
TOYS = ("drum-01", "skateboard-01", "rocket-01", "sailboat-01")


class Bench:
    """A half of an evaluation set with its ruler, and what the ruler makes of pictures."""

    def __init__(self, sprites, class_names, prompt_ids, encoder, folder):
        self.encoder, self.sprites = encoder, sprites
        self.prompts = [prompt for prompt in read_prompts(PROMPTS) if prompt.id in prompt_ids]
        write_half(sprites, class_names, self.prompts, folder, resolution=64, scenes=4)
        with (folder / MANIFEST_FILE).open() as file:
            self.references = [self._reference(row, folder) for row in csv.DictReader(file)]
        table = pq.read_table(folder / "gallery.parquet")
        self.shown = table.drop_columns("picture").to_pylist()
        self.pictures = decode_pictures(table["picture"])
        known = [row for row, one in enumerate(self.shown) if one["number"] >= MEASURED]
        designs = [Design(*(self.shown[row][key] for key in ("design", "class_name", "object_id"))) for row in known]
        features = embed(encoder, as_pixels(self.pictures[known]))
        names = [self.shown[row]["prompt_id"] for row in known]
        self.gallery = Gallery.of(list(zip(designs, names, strict=True)), *features)
        self.ruler = Ruler(encoder, self.references, self.prompts, self.gallery)

    @staticmethod
    def _reference(row, folder):
        image, mask = ((folder / row[key]).read_bytes() for key in ("image", "mask"))
        photo = decode_photo(image, mask, name=row["object_id"])
        return Reference.of(row["object_id"], row["class_name"], photo, 64)

    @functools.cached_property
    def scenes(self):
        """Scores of composed pictures of the objects themselves."""
        return self.composed(lambda one: one["number"] == 0 and one["object_id"])

    @functools.cached_property
    def rivals(self):
        """Scores of composed pictures of other designs of the objects' classes."""
        return self.composed(lambda one: one["number"] == 0 and not one["object_id"])

    def composed(self, wanted, objects=None):
        """Scores of some composed pictures, as if they were drawn for each class's object."""
        rows = [row for row, one in enumerate(self.shown) if wanted(one)]
        objects = objects or {one.class_name: one.object_id for one in self.references}
        asked = [Asked(objects[self.shown[row]["class_name"]], self.shown[row]["prompt_id"]) for row in rows]
        return self.ruler.measure(self.encoder, as_pixels(self.pictures[rows]), asked)

    def of_each(self, view):
        """Scores of a view of each object's photo, given as the picture for every prompt."""
        asked = [Asked(one.object_id, prompt.id) for one in self.references for prompt in self.prompts]
        pictures = np.stack([view(one) for one in self.references for _ in self.prompts])
        return self.ruler.measure(self.encoder, as_pixels(pictures), asked)


def mean(scores, metric):
    return float(np.mean([getattr(score, metric) for score in scores]))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Shapes in three colours each, to the embedded base's own CLIP."""
    encoder = load_encoder("clip", base="tiny64")
    return Bench(draw_sprites(0), ("apple", "book", "kite"), CONTEXTS, encoder, tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """Two of the catalog's drawings in each of two classes, to the network of ImageNet."""
    pictures = np.stack([_cut_out(name) for name in TOYS])
    sources = tuple(f"catalog/{name}" for name in TOYS)
    sprites = Sprites(pictures, ("toy", "ride"), np.array([0, 1, 1, 0]), sources, ("held", "held", "train", "train"))
    encoder = load_encoder("imagenet", base="tiny64")
    return Bench(sprites, ("toy", "ride"), CONTEXTS[:2], encoder, tmp_path_factory.mktemp("toys"))


def _cut_out(name):
    with (CATALOG / "manifest.csv").open() as file:
        row = next(row for row in csv.DictReader(file) if row["object_id"] == name)
    image, mask = (CATALOG / row["image"]).read_bytes(), (CATALOG / row["mask"]).read_bytes()
    photo = decode_photo(image, mask, name=name)
    shape = np.repeat((photo.mask * 255).astype(np.uint8)[..., None], 3, axis=2)
    alpha = object_alone(shape, photo.mask, EDGE, background=0)[..., :1]
    return np.concatenate([object_alone(photo.image, photo.mask, EDGE), alpha], axis=2)


@pytest.fixture(params=["shapes", "toys"])
def bench(request):
    return request.getfixturevalue(request.param)


def test_the_reference_against_itself_scores_one(bench):
    assert mean(bench.of_each(lambda one: one.whole), "whole") == pytest.approx(1, abs=1e-5)
    assert mean(bench.of_each(lambda one: one.crop), "object") == pytest.approx(1, abs=1e-5)
    assert mean(bench.of_each(lambda one: one.alone[1]), "object") == pytest.approx(1, abs=1e-5)


def test_the_object_in_context_is_told_from_another_design_of_its_class(bench):
    assert mean(bench.scenes, "identity_class") >= 0.8
    assert mean(bench.scenes, "identity_all") >= 0.8
    assert mean(bench.rivals, "identity_class") <= 0.2
    assert mean(bench.scenes, "object") > mean(bench.rivals, "object") + 0.05


def test_the_context_is_recognised_whatever_the_design(bench):
    assert mean(bench.scenes, "context") >= 0.9
    assert mean(bench.rivals, "context") >= 0.9


def test_the_context_is_recognised_where_something_else_is_drawn(toys, tmp_path):
    """The better part of a method's pictures are of things that resemble the object, and not of the object."""
    bench = Bench(toys.sprites, ("toy", "ride"), ALIKE, toys.encoder, tmp_path)
    first, second = bench.references
    others = {first.class_name: second.object_id, second.class_name: first.object_id}
    assert mean(bench.composed(lambda one: one["number"] == 0, others), "context") >= 0.9


def test_copying_the_input_is_faithful_and_never_in_context(bench):
    copied = bench.of_each(lambda one: one.whole)
    assert mean(copied, "whole") > mean(bench.scenes, "whole") + 0.2
    assert mean(copied, "object") > mean(bench.scenes, "object")
    # The same answer to every prompt is right for one of them.
    assert mean(copied, "context") == pytest.approx(1 / len(bench.prompts))


def test_copying_the_input_says_less_of_the_prompt_than_a_scene_does(shapes):
    assert mean(shapes.of_each(lambda one: one.whole), "text") < mean(shapes.scenes, "text") - 0.2


def test_the_base_without_personalization_has_chance_identity_and_the_right_context(shapes, tiny64):
    asked = [Asked(one.object_id, prompt.id) for one in shapes.references for prompt in shapes.prompts] * 2
    words = {one.object_id: one.class_name for one in shapes.references}
    texts = {prompt.id: prompt.text for prompt in shapes.prompts}
    requests = [
        SampleSpec(texts[one.prompt_id], seed, (words[one.object_id],), steps=10, guidance_scale=4.0)
        for seed, one in enumerate(asked)
    ]
    drawn = np.stack([np.asarray(picture) for picture in draw_pictures(tiny64, requests)])
    scores = shapes.ruler.measure(shapes.encoder, as_pixels(drawn), asked)
    hits, count = int(sum(score.identity_class for score in scores)), len(scores)
    tail = sum(math.comb(count, k) * 2 ** (count - k) for k in range(hits, count + 1)) / 3**count
    assert tail > 0.01, f"{hits} of {count} among three designs is more than chance"
    assert mean(scores, "context") >= 0.9


def test_pictures_of_noise_have_chance_identity_and_context():
    """By an encoder whose features mean nothing: what is left is how the ruler counts."""

    class Blind:
        reads_text = True
        object_width = None
        rng = np.random.default_rng(0)

        def images(self, pixels):
            return as_pixels(self.rng.integers(0, 255, (len(pixels), 1, 24, 3), np.uint8)).flatten(1) - 0.5

        def texts(self, texts):
            return self.images(texts)

    prompts = [prompt for prompt in read_prompts(PROMPTS) if prompt.id in CONTEXTS]
    blank = np.zeros((64, 64, 3), np.uint8)
    references = [Reference(f"{n}", f"class {n % 3}", blank, blank, blank[None]) for n in range(12)]
    designs = [Design(f"design {n}", f"class {n % 3}", f"{n}" if n < 12 else "") for n in range(24)]
    shown = [(design, prompt.id) for design in designs for prompt in prompts]
    encoder = Blind()
    features = encoder.images(shown).numpy()
    ruler = Ruler(encoder, references, prompts, Gallery.of(shown, features, features))
    asked = [Asked(one.object_id, prompt.id) for one in references for prompt in prompts] * 30
    scores = ruler.measure(encoder, as_pixels(np.stack([blank] * len(asked))), asked)
    # Of 1080 pictures the share is within four standard errors of chance.
    for metric, chance in (("identity_class", 1 / 8), ("identity_all", 1 / 12), ("context", 1 / 3)):
        assert mean(scores, metric) == pytest.approx(chance, abs=4 * math.sqrt(chance * (1 - chance) / len(asked)))


def test_without_a_gallery_objects_of_a_class_are_told_from_each_other(shapes):
    first, second, _ = shapes.references
    same_class = Reference(second.object_id, first.class_name, second.whole, second.crop, second.alone)
    ruler = Ruler(shapes.encoder, [first, same_class], shapes.prompts)
    scores = ruler.measure(shapes.encoder, as_pixels(first.alone), [Asked(first.object_id, "grass")] * 3)
    assert mean(scores, "identity_class") == mean(scores, "identity_all") == 1
    alone = Ruler(shapes.encoder, [first], shapes.prompts)
    (score,) = alone.measure(shapes.encoder, as_pixels(first.alone[:1]), [Asked(first.object_id, "grass")])
    assert score.identity_class is None
    assert score.identity_all is None


def test_windows_find_an_object_at_the_side():
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[13:51, 0:38] = np.random.default_rng(0).integers(0, 255, (38, 38, 3))
    windows = cut_windows(as_pixels(picture[None]))
    assert windows.shape == (len(WINDOWS), 3, 64, 64)
    filled = (windows > 0).float().mean(dim=(1, 2, 3))
    assert int(filled.argmax()) == WINDOWS.index((0.0, 0.2, 0.6))
    assert np.array_equal((windows[0] * 255).round().permute(1, 2, 0).numpy(), picture)


@pytest.mark.parametrize("bench", ["toys"], indirect=True)
def test_an_object_on_the_asked_side_is_told_from_one_on_the_other(bench):
    sides = {
        side: EvaluationPrompt(
            id=side,
            kind="side",
            text=f"a photo of {{}} to the {side} of a ride",
            shows=Shown(context="on grass", beside="ride", side=side),
        )
        for side in ("left", "right")
    }
    toy = next(one for one in bench.references if one.class_name == "toy")
    sprite, other = (Image.fromarray(bench.sprites.pictures[row]) for row in (0, 1))
    ruler = Ruler(bench.encoder, [toy], list(sides.values()))
    for asked in sides:
        for shown, prompt in sides.items():
            rng = np.random.default_rng(0)
            pictures = np.stack([compose_prompt(sprite, prompt.shows, rng, 64, [other]) for _ in range(4)])
            scores = ruler.measure(bench.encoder, as_pixels(pictures), [Asked(toy.object_id, asked)] * 4)
            assert {score.context for score in scores} == {float(asked == shown)}


def test_a_gallery_that_lacks_what_is_asked_is_refused(shapes):
    prompts = list(read_prompts(PROMPTS))
    with pytest.raises(ObjdriveError, match=r"lacks and-apple, .*wall, water"):
        Ruler(shapes.encoder, shapes.references, prompts, shapes.gallery)
    designs = [Design(name, "mug", "") for name in "ab"]
    with pytest.raises(ObjdriveError, match=r"no picture of 'b' for the prompt 'sand'"):
        Gallery.of([(designs[0], "grass"), (designs[0], "sand"), (designs[1], "grass")], np.eye(3), np.eye(3))


@pytest.mark.parametrize(
    ("listed", "fault"),
    [
        ("[]", "it lists none"),
        ("- {id: a, kind: context, text: on grass}", "exactly once"),
        ("- {id: a, kind: mood, text: 'sad {}'}", "kind"),
        ("- {id: a, kind: side, text: 'left, {}'}", "say in `shows` which side"),
        ("- {id: a, kind: side, text: '{}', shows: {context: on sand, side: left}}", "side=left needs `beside`"),
        ("- {id: a, kind: style, text: '{}'}\n- {id: a, kind: style, text: 'a {}'}", "a stand there more than once"),
        ("a: b: c", "can't be read"),
        ("7", "can't be read"),
    ],
)
def test_prompts_that_make_no_sense_are_refused(listed, fault, tmp_path):
    path = tmp_path / "prompts.yaml"
    path.write_text(listed)
    with pytest.raises(ObjdriveError, match=fault):
        read_prompts(path)


class TestEncoders:
    @pytest.mark.parametrize("name", ["dino", "vgg", "clip:", "", "imagenet:b"])
    def test_unknown_names_are_refused_with_those_there_are(self, name):
        with pytest.raises(ObjdriveError, match="imagenet"):
            load_encoder(name, base="tiny64")

    def test_a_model_that_cannot_be_had_is_named(self, tmp_path):
        with pytest.raises(ObjdriveError, match=r"dino:.*cannot be had"):
            load_encoder(f"dino:{tmp_path}", base="tiny64")

    def test_a_clip_by_folder_agrees_with_the_same_clip_as_the_base_s_own(self, sd15, tmp_path):
        snapshot, folder = sd15[0], shutil.copytree(sd15[1], tmp_path / "clip")
        CLIPTokenizer.from_pretrained(snapshot / "tokenizer").save_pretrained(folder)
        assert CLIPModel.from_pretrained(folder).config.projection_dim == 24
        named, own = load_encoder(f"clip:{folder}", base=""), load_encoder("clip", base=str(snapshot), clip=str(folder))
        pixels = as_pixels(np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), np.uint8))
        assert np.allclose(embed(named, pixels), embed(own, pixels), atol=1e-5)
        texts = ["a photo of a mug", "a teapot on grass in the night sky"]
        assert np.allclose(named.texts(texts), own.texts(texts), atol=1e-5)

    @pytest.mark.parametrize("kind", ["vit", "dinov2"])
    def test_a_dino_by_folder_gives_the_class_token(self, kind, tmp_path):
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
        vit = (
            ViTModel(ViTConfig(**sizes, intermediate_size=32)) if kind == "vit" else Dinov2Model(Dinov2Config(**sizes))
        )
        vit.save_pretrained(tmp_path)
        encoder = load_encoder(f"dino:{tmp_path}", base="")
        assert not encoder.reads_text
        pixels = as_pixels(np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), np.uint8))
        mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        normed = (pixels - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)
        expected = vit.eval()(pixel_values=normed).last_hidden_state[:, 0]
        assert np.allclose(encoder.images(pixels), expected.detach(), atol=1e-5)
        with pytest.raises(ObjdriveError, match="reads no text"):
            encoder.texts(["a mug"])

    def test_the_base_s_clip_goes_by_the_base(self):
        assert identify("clip", "abc") != identify("clip", "abd")
        assert identify("imagenet", "abc") == identify("imagenet", "abd")


def test_the_photo_of_the_set_shows_the_drawing_under_its_mask(shapes, tmp_path):
    write_half(draw_sprites(0), ("kite",), shapes.prompts, tmp_path, resolution=64, scenes=3)
    image = np.asarray(Image.open(tmp_path / "images" / "kite-held.png")).astype(float)
    mask = np.asarray(Image.open(tmp_path / "masks" / "kite-held.png")) == 255
    colour = draw_sprites(0).pictures[8, EDGE // 2, EDGE // 2, :3]
    assert 0.05 < mask.mean() < 0.3
    assert np.abs(image[mask] - colour).mean() < 3
    assert np.abs(image[~mask] - colour).mean() > 20
