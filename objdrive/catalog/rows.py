"""Rows of a manifest, and their rules."""

import json
import math
import posixpath
import re
import unicodedata
from dataclasses import dataclass
from typing import Any, Literal

from objdrive.errors import RowError

REQUIRED_COLUMNS = ("object_id", "image", "mask", "class_name")
AUTO_MASK: Literal["auto"] = "auto"
"""In place of a mask's address: the mask is taken from the picture."""
MAX_CLASS_LENGTH = 64
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True)
class Row:
    """One object; its row keeps the manifest's rules, and none of its files has been opened yet.

    `mask` ``""`` stands for the image's own alpha channel or, without one, for what stands before a plain ground, and
    `AUTO_MASK` for the latter in any case; `scene` ``""`` for no scene. `metadata` holds the
    free columns as JSON values (dates and such as text, NaN as None). `where` is the manifest file and the
    line (CSV, JSON Lines) or row (Parquet) in it, counted from 1, as in ``"catalog.csv:17"``.
    """

    object_id: str
    image: str
    mask: str
    class_name: str
    scene: str
    metadata: dict[str, Any]
    where: str


@dataclass(frozen=True)
class Reject:
    """One row that breaks a rule: a stable reason `code`, and a `message` that names row and value.

    `object_id` is what the row says, made printable and cut to 128 characters; ``""`` if it can't be told.
    """

    object_id: str
    where: str
    code: str
    message: str


def row_or_reject(fields: dict[str, Any], where: str, address: str) -> Row | Reject:
    """The row that a record's `fields` (column to value) make in the manifest at `address`, or why they make none."""
    try:
        return _make_row({name: _plain(value) for name, value in fields.items()}, where, address)
    except RowError as error:
        return Reject(_printable(fields.get("object_id")), where, error.code, f"{where}: {error}")
    except RecursionError:
        return Reject("", where, "json_invalid", f"{where}: the row's values are nested too deeply")


def _make_row(fields: dict[str, Any], where: str, address: str) -> Row:
    missing = [name for name in REQUIRED_COLUMNS if name not in fields]
    if missing:
        raise RowError("columns_missing", f"the row lacks {', '.join(missing)}; it has {shown(list(fields))}")
    if not is_utf8(fields):
        raise RowError("encoding", f"the row holds text that isn't UTF-8: {shown(fields)}")
    return Row(
        object_id=_identifier(fields.pop("object_id"), "object_id", "id_invalid"),
        image=_image_address(fields.pop("image"), address),
        mask=_mask_address(fields.pop("mask"), address),
        class_name=_class_name(fields.pop("class_name")),
        scene=_scene(fields.pop("scene", None)),
        metadata=fields,
        where=where,
    )


def _identifier(value: Any, column: str, code: str) -> str:
    text = _text(value, column, code)
    if not _ID.fullmatch(text):
        raise RowError(
            code,
            f"{column} {shown(value)} must be 1 to 128 of the characters A-Z a-z 0-9 . _ - "
            "and start with a letter or a digit",
        )
    return text


def _scene(value: Any) -> str:
    return "" if value is None or value == "" else _identifier(value, "scene", "scene_invalid")


def _class_name(value: Any) -> str:
    name = " ".join(_text(value, "class_name", "class_invalid").split())
    if not name:
        raise RowError("class_invalid", "class_name is empty: name the class with a word, such as 'mug'")
    if len(name) > MAX_CLASS_LENGTH:
        raise RowError(
            "class_invalid",
            f"class_name {shown(name)} is longer than {MAX_CLASS_LENGTH} characters",
        )
    if any(c in "{}" or unicodedata.category(c) == "Cc" for c in name):
        raise RowError("class_invalid", f"class_name {shown(name)} must have no control character and no {{ or }}")
    return name


def _image_address(value: Any, manifest: str) -> str:
    image = _text(value, "image", "address_invalid")
    if not image.strip():
        raise RowError("image_missing_value", f"image is {shown(value)}: give the address of the object's photo")
    return _resolve(image, "image", manifest)


def _mask_address(value: Any, manifest: str) -> str:
    mask = _text(value, "mask", "address_invalid")
    return AUTO_MASK if mask.strip() == AUTO_MASK else _resolve(mask, "mask", manifest)


def _resolve(value: str, column: str, manifest: str) -> str:
    """Resolve a relative address against the manifest file's folder; absolute paths, URLs and "" stay."""
    if "::" in value or "\0" in value:
        raise RowError("address_invalid", f"{column} {shown(value)} must be a path or URL without '::' or NUL")
    if not value.strip():
        return ""
    if value.startswith("/") or _URL.match(value):
        return value
    scheme, separator, path = manifest.rpartition("://")
    return scheme + separator + posixpath.normpath(posixpath.join(posixpath.dirname(path), value))


def _text(value: Any, column: str, code: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RowError(code, f"{column} {shown(value)} must be text, not {type(value).__name__}")
    return str(value)


def _plain(value: Any) -> Any:
    """The value as JSON can say it."""
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return str(value)


def is_utf8(value: Any) -> bool:
    """Whether all text in a JSON value can be written as UTF-8; undecodable bytes come as lone surrogates."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: Any) -> str:
    """A value in a message, cut to 200 characters."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"


def _printable(value: Any) -> str:
    # repr() escapes whatever can't be printed, lone surrogates included.
    return "" if value is None else repr(str(value))[1:-1][:128]
