import numpy as np
import pytest
import torch

from objdrive.base.prompts import TOKEN_MARK
from objdrive.catalog.geometry import object_alone
from objdrive.training.prototype import optimise_prototypes, prototype_targets
from objdrive.training.recipe import make_recipe
from objdrive.training.views import main_picture, to_pixels

OBJECTS = ("rocket-01", "drum-01", "alarm-clock-01")


@pytest.fixture(scope="module")
def class_names(catalog_scene):
    return [catalog_scene(name).objects[0].class_name for name in OBJECTS]


@pytest.fixture(scope="module")
def pictures(tiny64, catalog_scene):
    scenes = [catalog_scene(name) for name in OBJECTS]
    whole = to_pixels(tiny64, [main_picture(tiny64, scene, make_recipe()) for scene in scenes])
    alone = to_pixels(tiny64, [object_alone(scene.image, scene.objects[0].mask, 64) for scene in scenes])
    return whole, alone


@pytest.fixture(scope="module")
def start(tiny64, class_names):
    return torch.stack([tiny64.class_embeddings(name)["clip_l"] for name in class_names])


@pytest.fixture(scope="module")
def targets(tiny64, pictures, class_names):
    return prototype_targets(tiny64, *pictures, class_names)


def losses(base, embeddings, targets):
    """L_PE in numpy."""
    prompt = base.tokenize(f"a photo of {TOKEN_MARK}")
    with torch.no_grad():
        text = base.embed_text([prompt] * len(targets), list(embeddings)).numpy()
    mean = (targets.numpy() / np.linalg.norm(targets, axis=-1, keepdims=True)).mean(axis=1)
    return 1 - (text * mean).sum(axis=1) / np.linalg.norm(text, axis=1) / np.linalg.norm(mean, axis=1)


def test_targets_are_the_picture_the_object_alone_and_the_class(tiny64, pictures, class_names, targets):
    whole, alone = pictures
    assert targets.shape == (3, 3, 128)
    for row, name in enumerate(class_names):
        text = tiny64.embed_text([tiny64.tokenize(f"a photo of {name}")])
        expected = [tiny64.encode_images(whole[row : row + 1]), tiny64.encode_images(alone[row : row + 1]), text]
        torch.testing.assert_close(targets[row], torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_a_prototype_lies_nearer_to_the_object_than_its_class_word(tiny64, start, targets):
    before = losses(tiny64, start, targets)
    found = optimise_prototypes(tiny64, start, targets, steps=20, lr=1e-2)
    after = losses(tiny64, found, targets)
    assert (after < 0.8 * before).all()
    assert not found.requires_grad


def test_each_moves_as_it_would_alone(tiny64, start, targets):
    together = optimise_prototypes(tiny64, start, targets, steps=5, lr=1e-2)
    for row in (slice(row, row + 1) for row in range(len(targets))):
        alone = optimise_prototypes(tiny64, start[row], targets[row], steps=5, lr=1e-2)
        torch.testing.assert_close(together[row], alone, rtol=0, atol=1e-5)


def test_nothing_else_moves(tiny64, start, targets):
    table = tiny64.vocabularies["clip_l"]
    before, first = table.clone(), start.clone()
    optimise_prototypes(tiny64, start, targets, steps=2, lr=1e-2)
    assert torch.equal(table, before)
    assert torch.equal(start, first)
