"""Class words that a base can't read, told by its tokenizer before anything is trained."""

import logging

import pytest

from jobs.prompt_lengths import PromptLengths
from jobs.settings import PREVIEW_PROMPTS
from objdrive.base.files import find_base
from objdrive.base.prompts import fill_prompt, marked_phrase, token_ids
from objdrive.errors import InvalidPrompt
from objdrive.training.material import SceneMaterial
from objdrive.training.recipe import make_recipe

WASHING_MACHINE = "Стиральная машина с вертикальной загрузкой"  # noqa: RUF001


@pytest.fixture(scope="module")
def lengths():
    return PromptLengths(find_base("tiny64"), make_recipe("objdrive"))


def test_a_class_word_of_too_many_tokens_is_told_with_count_limit_and_advice(lengths):
    fault = lengths.fault([WASHING_MACHINE])
    assert "tokens, the base reads 32" in fault
    assert f"give a shorter class_name than {WASHING_MACHINE!r}" in fault
    assert "fewer objects" not in fault


def test_the_tokenizer_itself_says_nothing_of_lengths(caplog):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        assert PromptLengths(find_base("tiny64"), make_recipe("objdrive")).fault([WASHING_MACHINE])
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.messages == []


def test_the_prompts_of_a_scene_are_counted_as_a_whole(lengths):
    assert lengths.fault(["alarm clock"] * 2) == ""
    assert "put fewer objects into the scene" in lengths.fault(["alarm clock"] * 5)


@pytest.mark.parametrize("count", range(1, 7))
def test_what_passes_can_be_trained_and_previewed_and_what_does_not_can_not(count, lengths, tiny64, catalog_scene):
    recipe = make_recipe("objdrive")
    names = ["alarm clock"] * count
    phrases = [marked_phrase(recipe.phrase, name) for name in names]

    def encode_all():
        for template in recipe.prompts:
            tiny64.tokenize(fill_prompt(template, [" and ".join(phrases)]))
        tiny64.tokenize("a photo of " + " and ".join(names))
        for prompt in PREVIEW_PROMPTS:
            tiny64.tokenize(fill_prompt(prompt, [phrases[0]]))

    if lengths.fault(names):
        with pytest.raises(InvalidPrompt):
            encode_all()
    else:
        encode_all()


def test_every_prompt_of_a_scenes_material_is_no_longer_than_those_counted(tiny64, catalog_scene, monkeypatch):
    recipe = make_recipe("objdrive", overrides=["ccr_weight=0", "mend_masks=false"])
    counted = []
    monkeypatch.setattr("jobs.prompt_lengths.token_ids", lambda tokenizer, text: counted.append(text))
    scene = catalog_scene("jeans-01", "high-heel-01")
    PromptLengths(find_base("tiny64"), recipe).fault([one.class_name for one in scene.objects])
    longest = max(len(token_ids(tiny64.tokenizer, text)[0]) for text in counted)
    encoded = []
    real = type(tiny64).tokenize

    def noted(base, text, **options):
        encoded.append(text)
        return real(base, text, **options)

    monkeypatch.setattr(type(tiny64), "tokenize", noted)
    material = SceneMaterial.prepare(tiny64, scene, recipe, None)
    encoded += [text for _ in range(50) for text in material.next_samples(recipe).texts]
    assert max(len(token_ids(tiny64.tokenizer, text)[0]) for text in encoded) <= longest
