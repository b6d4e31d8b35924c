"""The prompts file: what every object of a catalog is drawn by."""

import re
from collections import Counter
from typing import Any

import fsspec
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from objdrive.base.prompts import refuse_mark
from objdrive.errors import ObjdriveError

_ID_PATTERN = r"^[a-z0-9][a-z0-9-]{0,63}$"
_LONGEST_SLUG = 48


class Prompt(BaseModel):
    """A prompt of a prompts file.

    Attributes:
        id: names it in the index, in files and on the contact sheet.
        text: with ``{}`` wherever the object stands.
        classes: the class words of the objects that it is for; empty: it is for all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=_ID_PATTERN)
    text: str
    classes: tuple[str, ...] = ()

    @field_validator("text")
    @classmethod
    def _names_the_object(cls, text: str) -> str:
        if "{}" not in text:
            raise ValueError(f"the prompt {text!r} must hold {{}}: it stands for the object")
        try:
            refuse_mark(text)
        except ObjdriveError as error:
            raise ValueError(str(error)) from error
        return text

    def is_for(self, class_name: str) -> bool:
        """Whether objects of that class are drawn by it."""
        return not self.classes or class_name in self.classes


def read_prompts(address: str) -> tuple[Prompt, ...]:
    """Read a YAML list of prompts: texts, or mappings with ``text`` and perhaps ``id`` and ``classes``.

    Without an id, a prompt's words are its id.

    Raises:
        ObjdriveError: the file can't be read, is no such list, is empty, or two prompts share an id.
    """
    try:
        with fsspec.open(address, encoding="utf-8", mode="rt") as file:
            listed = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError) as error:
        raise ObjdriveError(f"the prompts {address} can't be read: {error}") from error
    if not isinstance(listed, list) or not listed:
        raise ObjdriveError(
            f'the prompts {address} must be a YAML list with at least one prompt, such as "- a photo of {{}} on grass"'
        )
    prompts = tuple(_prompt(entry, f"{address}, entry {number}") for number, entry in enumerate(listed, 1))
    repeated = sorted(name for name, count in Counter(prompt.id for prompt in prompts).items() if count > 1)
    if repeated:
        raise ObjdriveError(
            f"the prompts {address}: the ids {', '.join(repeated)} are there more than once: change one"
        )
    return prompts


def _prompt(entry: Any, where: str) -> Prompt:
    # {} alone is YAML's empty mapping: a text that begins with it must be quoted.
    fields = {"text": entry} if isinstance(entry, str) else entry
    if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
        raise ObjdriveError(
            f"{where}: {entry!r} must be a text, or a mapping such as {{text: 'a photo of {{}} on grass'}}; "
            "put quotes around a text that begins with {}"
        )
    try:
        return Prompt.model_validate({"id": _slug(fields["text"]), **fields})
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise ObjdriveError(f"{where}: {faults}") from error


def _slug(text: str) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return words[:_LONGEST_SLUG].strip("-") or "prompt"
