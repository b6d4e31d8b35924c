"""The words of prompts: where objects stand in them, and how learned tokens are marked."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from objdrive.errors import InvalidPrompt

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

TOKEN_MARK = "\0"
"""Stands in a prompt where a learned token goes; no prompt of a user's can hold it."""


@dataclass(frozen=True)
class TokenizedPrompt:
    """A tokenized prompt.

    Attributes:
        ids: of its tokens, with the start and the end; each text encoder pads them in its own way.
        places: of learned tokens among them, in their order.
        absent: it stands for no prompt at all, and the base was trained to see zeros there.
    """

    ids: tuple[int, ...]
    places: tuple[int, ...]
    absent: bool = False


def token_ids(tokenizer: "CLIPTokenizer", text: str) -> tuple[list[int], list[int]]:
    """The ids of a text with its start and its end, and the places of learned tokens, for which `TOKEN_MARK` stands.

    Raises:
        InvalidPrompt: the text is longer than the text encoder reads.
    """
    ids, places = [tokenizer.bos_token_id], []
    for index, piece in enumerate(text.split(TOKEN_MARK)):
        if index:
            places.append(len(ids))
            ids.append(0)
        ids += tokenizer(piece, add_special_tokens=False, verbose=False).input_ids
    ids.append(tokenizer.eos_token_id)
    length = tokenizer.model_max_length
    if len(ids) > length:
        shown = text.replace(TOKEN_MARK, "{}")
        raise InvalidPrompt(f"the prompt {shown!r} takes {len(ids)} tokens, the base reads {length}: shorten it")
    return ids, places


def phrase_places(tokenizer: "CLIPTokenizer", prompt: str, phrases: Sequence[str]) -> list[tuple[int, ...]]:
    """Where the tokens of each phrase stand when it fills its ``{}`` (see `fill_prompt`), the start being place 0.

    A single phrase that fills several places has the tokens of all of them.
    """
    pieces = prompt.split("{}")
    filling = list(phrases) * (len(pieces) - 1) if len(phrases) == 1 else list(phrases)
    text, places = "", []
    for piece, phrase in zip(pieces, filling, strict=False):
        before = _count_tokens(tokenizer, text + piece)
        text += piece + phrase
        places.append(tuple(range(1 + before, 1 + max(_count_tokens(tokenizer, text), before + 1))))
    return [tuple(place for one in places for place in one)] if len(phrases) == 1 else places


def text_places(tokenizer: "CLIPTokenizer", text: str) -> range:
    """Where the tokens of a whole prompt stand, the start being place 0."""
    return range(1, 1 + _count_tokens(tokenizer, text))


def _count_tokens(tokenizer: "CLIPTokenizer", text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def class_prompt(class_name: str) -> str:
    """The class prompt c_c; with `TOKEN_MARK` in the class word's place the prompt c_p of a learned token."""
    return f"a photo of {class_name}"


def join_objects(phrases: Sequence[str]) -> str:
    """How a prompt names several objects that it shows together."""
    return " and ".join(phrases)


def marked_phrase(phrase: str, class_name: str, *, token: str = "{token}") -> str:
    """What ``{}`` in a prompt becomes for an object, `TOKEN_MARK` standing for its learned token.

    Args:
        phrase: a recipe's, such as ``"{token} {class}"``, or an artifact's, such as ``"<mug-1> mug"``.
        class_name: what ``{class}`` in it becomes.
        token: what stands in it for the learned token.
    """
    return phrase.replace(token, TOKEN_MARK).replace("{class}", class_name)


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
    objects = join_objects(["{}"] * len(class_names))
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
            f"the prompt {prompt!r} has {places} places {{}} for {len(phrases)} object(s): "
            + (
                f'name each once, as in "{class_prompt(join_objects(["{}"] * len(phrases)))} on grass"'
                if phrases
                else "leave {} out"
            )
        )
    return "".join(piece + phrase for piece, phrase in zip(pieces, [*phrases, ""], strict=True))


def refuse_mark(prompt: str) -> None:
    """Raise InvalidPrompt if a user's prompt holds `TOKEN_MARK`."""
    if TOKEN_MARK in prompt:
        raise InvalidPrompt(f"the prompt {prompt!r} holds a NUL character: remove it")
