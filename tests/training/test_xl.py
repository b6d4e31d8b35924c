"""Fine-tunes of a base with two text encoders, which is told of sizes and crops."""

import bases
import numpy as np
import pytest
import torch

from objdrive.adapters.bank import AdapterBank
from objdrive.base.conditioning import Frame
from objdrive.base.stable_diffusion import Base
from objdrive.catalog.geometry import Window
from objdrive.training.checkpointing import checkpointed
from objdrive.training.embeddings import starting_embeddings
from objdrive.training.inputs import GroupMaterial
from objdrive.training.material import SceneMaterial
from objdrive.training.objective import group_losses
from objdrive.training.personalize import personalize
from objdrive.training.recipe import make_recipe
from objdrive.training.views import Scene, SceneObject, cut_frame, make_views

CHANGES = ["steps=6", "prototype_steps=3", "placements=2", "rank=2", "warmup_steps=0", "timesteps=uniform"]
RECIPE = make_recipe(overrides=CHANGES)


def scene(name, class_name="mug", seed=0):
    image = np.random.default_rng(seed).integers(0, 255, (96, 128, 3), np.uint8)
    mask = np.zeros((96, 128), np.float32)
    mask[20:80, 30:90] = 1
    return Scene(name, image, (SceneObject(name, class_name, mask),))


@pytest.fixture(scope="module", params=[False, True], ids=["one image tower", "two image towers"])
def xl(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("xl")
    snapshot, clip = bases.written(folder, bases.write_sdxl, seeing=request.param)
    return Base.load(str(snapshot), clip=str(clip), device="cpu")


def test_a_group_gives_each_what_it_would_get_alone(xl):
    scenes = [scene("one"), scene("two", "teapot", seed=1)]
    together = personalize(xl, scenes, RECIPE)
    for one, result in zip(scenes, together, strict=True):
        [alone] = personalize(xl, [one], RECIPE)
        ours, theirs = result.adapters[0], alone.adapters[0]
        assert set(ours.embeddings) == {"clip_l", "clip_g"}
        for name, vector in ours.embeddings.items():
            torch.testing.assert_close(vector, theirs.embeddings[name], rtol=0, atol=1e-4)
        for name, weight in ours.lora.items():
            torch.testing.assert_close(weight, theirs.lora[name], rtol=0, atol=1e-4)


def test_both_vectors_are_learned_and_a_prototype_is_sought_where_pictures_are_compared(xl):
    start = starting_embeddings(xl, [scene("one")], RECIPE)[0]
    words = xl.class_embeddings("mug")
    moved = {name: not torch.allclose(start[name][0], words[name]) for name in words}
    assert moved == {"clip_l": True, "clip_g": "clip_g" in xl.joint_encoders}
    [result] = personalize(xl, [scene("one")], RECIPE)
    for name, vector in result.adapters[0].embeddings.items():
        assert not torch.allclose(vector, result.prototypes[0][name], atol=1e-5)


@pytest.mark.parametrize("xl", [False], indirect=True, ids=["one image tower"])
def test_a_fine_tune_lowers_its_losses(xl):
    short, long = (
        personalize(xl, [scene("one")], make_recipe(overrides=[*CHANGES, f"steps={steps}", "lora_lr=1e-2"]))[0].metrics
        for steps in (1, 60)
    )
    # Means over all steps: the later ones must be far lower.
    assert long["loss_object"] < 0.97 * short["loss_object"]


def gradients(base, checkpointing):
    material = SceneMaterial.prepare(base, scene("one"), RECIPE, None)
    embeddings = {
        name: torch.nn.Parameter(vectors[None])
        for name, vectors in starting_embeddings(base, [scene("one")], RECIPE)[0].items()
    }
    inputs = next(GroupMaterial(base, [material], 1, RECIPE).steps())
    with AdapterBank(base.unet, base.family.lora_targets, slots=1, rank=2) as bank:
        bank.initialise(0, torch.Generator().manual_seed(1))
        if checkpointing:
            with checkpointed(base, bank):
                losses = group_losses(base, bank, embeddings, inputs, RECIPE)
                sum(losses).sum().backward()
        else:
            sum(group_losses(base, bank, embeddings, inputs, RECIPE)).sum().backward()
        return [value.grad.clone() for value in (*embeddings.values(), bank.values)]


def test_activations_that_are_computed_anew_are_adapted_as_they_were(xl):
    kept, anew = gradients(xl, False), gradients(xl, True)
    assert any(gradient.abs().max() > 1e-6 for gradient in kept)
    for one, other in zip(kept, anew, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    assert not xl.unet.is_gradient_checkpointing


class TestFrames:
    def test_a_crop_says_where_it_was_cut_from(self):
        frame = cut_frame(Window(left=100, top=50, side=200), (300, 400), 1024, whole=False)
        assert frame == Frame((300, 400), (256, 512), (1024, 1024))

    def test_what_reaches_outside_of_the_photo_lacks_nothing_there(self):
        frame = cut_frame(Window(left=-10, top=-20, side=400), (300, 400), 1024, whole=False)
        assert frame.corner == (0, 0)

    def test_an_object_on_a_plain_ground_is_a_picture_of_its_own(self):
        frame = cut_frame(Window(left=100, top=50, side=200.4), (300, 400), 1024, whole=True)
        assert frame == Frame((200, 200), (0, 0), (1024, 1024))

    def test_views_carry_them_to_the_network(self, xl):
        photo = make_recipe(overrides=["plain_ground=false", "placements=1", "least_fill=0.9"])
        [view] = make_views(xl, scene("one"), photo)
        assert view.frame.original == (96, 128)
        assert min(view.frame.corner) > 0
        material = SceneMaterial.prepare(xl, scene("one"), photo, None)
        asked = next(GroupMaterial(xl, [material], 1, photo).steps()).asked
        assert asked.time_ids.tolist() == [[list(view.frame.ids)] * (photo.views + photo.class_samples)]
        assert asked.states[0, : photo.views].any()
        assert not asked.states[0, photo.views :].any()
