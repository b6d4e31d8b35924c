"""The words of prompts: where objects stand in them, and how learned tokens are marked."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from objdrive.adapters.artifact import ArtifactMetadata
from objdrive.errors import InvalidPrompt
from objdrive.training.recipe import Recipe

TOKEN_MARK = "\0"
"""Stands in a prompt where a learned token goes; no prompt of a user's can hold it."""


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt: `ids` (length,) and the `places` of learned tokens in it, in their order."""

    ids: Tensor
    places: tuple[int, ...]


PROMPT = "a photo of {}"


def class_prompt(class_name: str) -> str:
    """The class prompt c_c."""
    return PROMPT.replace("{}", class_name)


def token_phrase(recipe: Recipe, class_name: str) -> str:
    """What ``{}`` in a prompt becomes for an object, `TOKEN_MARK` standing for its learned token."""
    return recipe.phrase.replace("{token}", TOKEN_MARK).replace("{class}", class_name)


def marked_phrase(artifact: ArtifactMetadata) -> str:
    """What ``{}`` becomes for an artifact, `TOKEN_MARK` standing for the learned token."""
    return artifact.phrase.replace(artifact.token, TOKEN_MARK)


def place_objects(prompt: str, class_names: Sequence[str]) -> str:
    """Give every object its place ``{}`` in a prompt that has none.

    A single object takes the place of its class word where that first occurs (as a whole word, in either case), else
    it comes in front: ``"on grass"`` becomes ``"{}, on grass"``. Several come in front in their order, joined by "and".
    A prompt with places, or for no objects, stays as it is.
    """
    if "{}" in prompt or not class_names:
        return prompt
    if len(class_names) == 1:
        word = rf"(?<!\w){re.escape(class_names[0])}(?!\w)"
        placed, found = re.subn(word, "{}", prompt, count=1, flags=re.IGNORECASE)
        if found:
            return placed
    objects = " and ".join(["{}"] * len(class_names))
    return f"{objects}, {prompt}" if prompt.strip() else objects


def fill_prompt(prompt: str, phrases: Sequence[str]) -> str:
    """Put phrases in the places of ``{}``; a single phrase fills all of them.

    Raises:
        InvalidPrompt: the number of places and phrases differ, or the prompt holds a NUL character.
    """
    refuse_mark(prompt)
    pieces = prompt.split("{}")
    places = len(pieces) - 1
    if len(phrases) == 1 and places:
        phrases = list(phrases) * places
    if places != len(phrases):
        raise InvalidPrompt(
            f"the prompt {prompt!r} has {places} places {{}} for {len(phrases)} object(s): name each once, "
            'as in "a photo of {} on grass"'
        )
    return "".join(piece + phrase for piece, phrase in zip(pieces, [*phrases, ""], strict=True))


def refuse_mark(prompt: str) -> None:
    """Raise InvalidPrompt if a user's prompt holds `TOKEN_MARK`."""
    if TOKEN_MARK in prompt:
        raise InvalidPrompt(f"the prompt {prompt!r} holds a NUL character: remove it")
