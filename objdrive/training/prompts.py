"""The prompts of a fine-tune: what a scene's objects are called in it. No PyTorch: jobs start faster."""

from collections.abc import Sequence

from objdrive.base.prompts import class_prompt, fill_prompt, join_objects, marked_phrase
from objdrive.training.recipe import Recipe


def learned_prompt(template: str, phrases: Sequence[str]) -> str:
    """A recipe's template with the phrases of the objects that a view shows (see `marked_phrase`)."""
    return fill_prompt(template, [join_objects(phrases)])


def worded_prompt(class_names: Sequence[str]) -> str:
    """The prompt with class words alone, for what a view shows."""
    return class_prompt(join_objects(class_names))


def longest_prompts(recipe: Recipe, class_names: Sequence[str]) -> list[str]:
    """Prompts of which one is the longest that a scene's fine-tune encodes: views may show all objects at once."""
    phrases = [marked_phrase(recipe.phrase, name) for name in class_names]
    return [worded_prompt(class_names), *(learned_prompt(template, phrases) for template in recipe.prompts)]
