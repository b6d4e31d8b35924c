"""Rows of a manifest, and their rules."""

import json
import math
import re
import unicodedata
from dataclasses import dataclass
from typing import Any, Literal

from objdrive.catalog.addresses import Cell, is_cell, redacted, resolve
from objdrive.errors import RowError

REQUIRED_COLUMNS = ("object_id", "image", "mask", "class_name")
AUTO_MASK: Literal["auto"] = "auto"
"""In place of a mask's address: the mask is taken from the picture."""
MAX_CLASS_LENGTH = 64
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_EXACT_FLOATS = 2**53


@dataclass(frozen=True)
class Row:
    """One object; its row keeps the manifest's rules, and none of its files has been opened yet.

    `mask` ``""`` stands for the image's own alpha channel or, without one, for what stands before a plain ground, and
    `AUTO_MASK` for the latter in any case; `scene` ``""`` for no scene. `metadata` holds the free columns as JSON
    values (dates and such as text, NaN as None; addresses without their signatures). `where` is the manifest file and
    the line (CSV, JSON Lines) or row (Parquet) in it, counted from 1, as in ``"catalog.csv:17"``. `warnings` say what
    was assumed to read the row.
    """

    object_id: str
    image: str
    mask: str
    class_name: str
    scene: str
    metadata: dict[str, Any]
    where: str
    warnings: tuple[str, ...] = ()


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
    """The row that a record's `fields` (column to value) make in the manifest at `address`, or why they make none.

    A reader of tables gives a `Cell` for an image or mask that the table itself holds.
    """
    cells = {name: value.address for name, value in fields.items() if isinstance(value, Cell)}
    try:
        plain = {name: _plain(value) for name, value in fields.items() if name not in cells}
        return _make_row(plain, cells, where, address)
    except RowError as error:
        return Reject(_printable(fields.get("object_id")), where, error.code, f"{where}: {error}")
    except RecursionError:
        return Reject("", where, "json_invalid", f"{where}: the row's values are nested too deeply")


def _make_row(fields: dict[str, Any], cells: dict[str, str], where: str, address: str) -> Row:
    missing = [name for name in REQUIRED_COLUMNS if name not in {**fields, **cells}]
    if missing:
        raise RowError("columns_missing", f"the row lacks {', '.join(missing)}; it has {shown(list(fields))}")
    if not is_utf8(fields):
        hint = reads_as([value for value in fields.values() if isinstance(value, str)])
        raise RowError("encoding", f"the row holds text that isn't UTF-8{hint}: {shown(fields)}; save it as UTF-8")
    object_id, scene = fields.pop("object_id"), fields.pop("scene", None)
    return Row(
        object_id=_identifier(object_id, "object_id", "id_invalid"),
        image=cells.get("image") or _image_address(fields.pop("image"), address),
        mask=cells.get("mask") or _mask_address(fields.pop("mask"), address),
        class_name=_class_name(fields.pop("class_name")),
        scene="" if scene is None or scene == "" else _identifier(scene, "scene", "scene_invalid"),
        metadata=redacted(fields),
        where=where,
        warnings=tuple(
            f"the {column} {value!r} was taken for {int(value)}"
            for column, value in (("object_id", object_id), ("scene", scene))
            if isinstance(value, float)
        ),
    )


def known_columns(names: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """Columns by the names that manifests use, whatever their case, spaces and dashes, and notes on those renamed."""
    known = [*REQUIRED_COLUMNS, "scene"]
    renamed = [re.sub(r"[\s_-]+", "_", name.strip()).lower() for name in names]
    found = [new if new in known and new not in names else name for name, new in zip(names, renamed, strict=True)]
    notes = (f"the column {name!r} was taken for {new}" for name, new in zip(names, found, strict=True) if name != new)
    return found, tuple(notes)


def reads_as(texts: list[str]) -> str:
    """For a message: how text that isn't UTF-8 (undecodable bytes as lone surrogates) reads as cp1252, if it does."""
    for text in texts:
        if not is_utf8(text):
            try:
                return f", but reads as cp1252: {shown(text.encode('utf-8', 'surrogateescape').decode('cp1252'))}"
            except UnicodeError:
                break
    return ""


def _identifier(value: Any, column: str, code: str) -> str:
    if isinstance(value, float):
        if not value.is_integer() or abs(value) >= _EXACT_FLOATS:
            raise RowError(
                code,
                f"{column} {shown(value)} is a float, which may not be the number that it once was: "
                "export the column as text (pandas: read it with dtype=str)",
            )
        value = int(value)
    text = _text(value, column, code)
    if not _ID.fullmatch(text):
        raise RowError(
            code,
            f"{column} {shown(value)} must be 1 to 128 of the characters A-Z a-z 0-9 . _ - "
            "and start with a letter or a digit",
        )
    return text


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
    if "::" in value or "\0" in value or is_cell(value):
        raise RowError("address_invalid", f"{column} {shown(value)} must be a path or URL without '::' or NUL")
    return resolve(value, manifest) if value.strip() else ""


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
    """A value in a message, without signatures, cut to 200 characters."""
    text = redacted(repr(value))
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"


def _printable(value: Any) -> str:
    # repr() escapes whatever can't be printed, lone surrogates included.
    return "" if value is None else redacted(repr(str(value)))[1:-1][:128]
