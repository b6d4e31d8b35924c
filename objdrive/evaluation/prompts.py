"""Prompts to evaluate with."""

from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from objdrive.errors import ObjdriveError

Kind = Literal["context", "size", "style", "pair", "side"]
WITH_COMPANY = ("pair", "side")
"""Kinds of prompts that ask for a second thing."""


class Shown(BaseModel):
    """What a prompt asks to be seen, as far as an evaluation set composes it: words of the base's captions.

    `side` is where the object stands beside the second thing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    context: str
    size: Literal["", "small", "large"] = ""
    style: str = ""
    beside: str = ""
    side: Literal["", "left", "right"] = ""

    @model_validator(mode="after")
    def _side_of_something(self) -> Self:
        if self.side and not self.beside:
            raise ValueError(f"side={self.side} needs `beside`: say what the object stands to the {self.side} of")
        return self


class EvaluationPrompt(BaseModel):
    """A prompt to evaluate with.

    Attributes:
        id: names it in tables.
        kind: what it tries; a picture's prompt is recognised among the prompts of its kind, but for the kind ``side``:
            there the object must be on the side that `shows` names.
        text: with ``{}`` where the object stands.
        shows: how an evaluation set composes reference pictures for it; none needs any.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[a-z0-9-]+$")
    kind: Kind
    text: str
    shows: Shown | None = None

    @field_validator("text")
    @classmethod
    def _one_place(cls, text: str) -> str:
        if text.count("{}") != 1:
            raise ValueError(f"the prompt {text!r} must hold {{}} exactly once: it stands for the object")
        return text

    @model_validator(mode="after")
    def _sides_are_shown(self) -> Self:
        if self.kind == "side" and not (self.shows and self.shows.side):
            raise ValueError(f"the prompt {self.id!r} is of the kind side: say in `shows` which side it asks for")
        return self

    def naming(self, class_name: str) -> str:
        """The text with the class word in the object's place."""
        return self.text.replace("{}", class_name)


def read_prompts(path: Path) -> tuple[EvaluationPrompt, ...]:
    """Read a YAML list of prompts.

    Raises:
        ObjdriveError: it cannot be read, is empty, holds something else, or two prompts share an id.
    """
    try:
        listed = yaml.safe_load(path.read_text())
        prompts = tuple(EvaluationPrompt.model_validate(one) for one in listed or ())
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValidationError, TypeError) as error:
        raise ObjdriveError(f"the prompts {str(path)!r} can't be read: {error}") from error
    ids = [prompt.id for prompt in prompts]
    repeated = sorted({one for one in ids if ids.count(one) > 1})
    if not prompts or repeated:
        fault = f"the ids {', '.join(repeated)} stand there more than once" if repeated else "it lists none"
        raise ObjdriveError(f"the prompts {str(path)!r}: {fault}")
    return prompts
