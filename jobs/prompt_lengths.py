"""Whether a base can read the prompts that a row's fine-tune takes, found out by its tokenizer alone."""

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from jobs.settings import PREVIEW_PROMPTS
from objdrive.base.files import BaseFiles
from objdrive.base.prompts import fill_prompt, marked_phrase, token_ids
from objdrive.errors import InvalidPrompt
from objdrive.training.prompts import longest_prompts
from objdrive.training.recipe import Recipe

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

_REMEMBERED = 10_000


class PromptLengths:
    """Counts the tokens of the prompts of scenes; each list of class words once.

    Args:
        base: whose tokenizer counts.
        recipe: whose prompts are counted, besides those of previews.
    """

    def __init__(self, base: BaseFiles, recipe: Recipe) -> None:
        self._base = base
        self._recipe = recipe
        self._fault_of = lru_cache(_REMEMBERED)(self._find_fault)

    def fault(self, class_names: Sequence[str]) -> str:
        """Why a scene of these class words can't be fine-tuned; empty if it can."""
        return self._fault_of(tuple(class_names))

    @cached_property
    def _tokenizer(self) -> "CLIPTokenizer":
        # Not for a manifest that is committed already: it takes a second.
        from transformers import CLIPTokenizer

        return CLIPTokenizer.from_pretrained(self._base.snapshot / "tokenizer")

    def _find_fault(self, class_names: tuple[str, ...]) -> str:
        phrases = [marked_phrase(self._recipe.phrase, name) for name in class_names]
        previews = [fill_prompt(prompt, [phrase]) for prompt in PREVIEW_PROMPTS for phrase in phrases]
        for prompt in (*longest_prompts(self._recipe, class_names), *previews):
            try:
                token_ids(self._tokenizer, prompt)
            except InvalidPrompt as error:
                words = ", ".join(map(repr, dict.fromkeys(class_names)))
                advice = "put fewer objects into the scene, or " if len(class_names) > 1 else ""
                return f"{error}; {advice}give a shorter class_name than {words}"
        return ""
