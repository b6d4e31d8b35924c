"""Icon packs from the npm registry: which, under what licence, and their icons as pictures."""

import io
import json
import re
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from objdrive.errors import ObjdriveError

EDGE = 128
"""Pixels along an edge of an icon's picture."""


@dataclass(frozen=True)
class Pack:
    """One npm package of icons.

    Attributes:
        name: what `classes.yaml` and messages call it.
        family: packs whose icons are the same drawings in other colours or shading share one.
        package: name and version in the registry.
        licence: SPDX id of the art.
        credit: whose art it is.
        url: where it comes from.
    """

    name: str
    family: str
    package: str
    licence: str
    credit: str
    url: str


PACKS = (
    Pack(
        "noto",
        "noto",
        "@iconify-json/noto@1.2.9",
        "Apache-2.0",
        "Noto Emoji, Copyright Google LLC",
        "https://github.com/googlefonts/noto-emoji",
    ),
    Pack(
        "noto-v1",
        "noto-v1",
        "@iconify-json/noto-v1@1.2.5",
        "Apache-2.0",
        "Noto Emoji (first version), Copyright Google Inc.",
        "https://github.com/googlefonts/noto-emoji",
    ),
    Pack(
        "twemoji",
        "twemoji",
        "@iconify-json/twemoji@1.2.5",
        "CC-BY-4.0",
        "Twemoji, Copyright Twitter, Inc. and other contributors",
        "https://github.com/jdecked/twemoji",
    ),
    Pack(
        "emojione",
        "emojione",
        "@iconify-json/emojione@1.2.3",
        "CC-BY-4.0",
        "Emoji One (version 2), Ranks.com Inc., by way of EmojiTwo",
        "https://github.com/EmojiTwo/emojitwo",
    ),
    Pack(
        "fluent-emoji",
        "fluent",
        "@iconify-json/fluent-emoji@1.2.7",
        "MIT",
        "Fluent Emoji (colour), Copyright (c) Microsoft Corporation",
        "https://github.com/microsoft/fluentui-emoji",
    ),
    Pack(
        "fluent-emoji-flat",
        "fluent",
        "@iconify-json/fluent-emoji-flat@1.2.6",
        "MIT",
        "Fluent Emoji (flat), Copyright (c) Microsoft Corporation",
        "https://github.com/microsoft/fluentui-emoji",
    ),
    Pack(
        "fluent-3d",
        "fluent",
        "@lobehub/fluent-emoji-3d@1.1.0",
        "MIT",
        "Fluent Emoji (3D), Copyright (c) Microsoft Corporation; package Copyright (c) 2023 LobeHub",
        "https://github.com/lobehub/fluent-emoji",
    ),
    Pack(
        "fxemoji",
        "fxemoji",
        "@iconify-json/fxemoji@1.2.2",
        "Apache-2.0",
        "Firefox OS Emoji, Copyright Mozilla Foundation",
        "https://github.com/mozilla/fxemoji",
    ),
    Pack(
        "streamline-emojis",
        "streamline-emojis",
        "@iconify-json/streamline-emojis@1.2.4",
        "CC-BY-4.0",
        "Streamline Emojis, by Streamline",
        "https://github.com/webalys-hq/streamline-vectors",
    ),
    Pack(
        "flat-color-icons",
        "flat-color-icons",
        "@iconify-json/flat-color-icons@1.2.3",
        "MIT",
        "Flat Color Icons, Copyright Icons8",
        "https://github.com/icons8/flat-color-icons",
    ),
)


def fetch(pack: Pack, cache: Path) -> Path:
    """The package's archive in `cache`, fetched by ``npm pack`` unless it is there.

    Raises:
        ObjdriveError: npm is missing or fails.
    """
    # npm's own naming: @scope/name@1.2.3 lies in scope-name-1.2.3.tgz.
    name, _, version = pack.package.rpartition("@")
    archive = cache / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
    if archive.is_file():
        return archive
    cache.mkdir(parents=True, exist_ok=True)
    command = ["npm", "pack", pack.package, "--silent"]
    try:
        subprocess.run(command, cwd=cache, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise ObjdriveError(f"icon packs are fetched by npm, which is not installed; or put {archive} there") from None
    except subprocess.CalledProcessError as error:
        raise ObjdriveError(f"{' '.join(command)} failed: {error.stderr.strip()}; or put {archive} there") from error
    return archive


class Icons:
    """The icons of one pack; a context manager, since its archive stays open."""

    def __init__(self, pack: Pack, archive: Path, codes: dict[str, str]) -> None:
        """Open a package's archive; `codes` gives the code point of an icon's name (for packs named by those)."""
        self.pack = pack
        self._tar = tarfile.open(archive)  # noqa: SIM115
        names = self._tar.getnames()
        self._sets = json.load(self._open("package/icons.json")) if "package/icons.json" in names else None
        self._codes = {} if self._sets else _spelled(codes, names)
        found = self._sets["icons"] if self._sets else self._codes
        self._by_name: dict[str, list[str]] = {}
        for name in found:
            self._by_name.setdefault(_plain(name), []).append(name)

    def __enter__(self) -> "Icons":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._tar.close()

    @property
    def codes(self) -> dict[str, str]:
        """Code point by name, if the pack tells."""
        if "package/chars.json" not in self._tar.getnames():
            return {}
        return {name: code for code, name in json.load(self._open("package/chars.json")).items()}

    def find(self, names: list[str]) -> Iterator[str]:
        """The pack's icons of any of these names, or of ``pack/name``."""
        for name in names:
            pack, _, icon = name.rpartition("/")
            if pack in ("", self.pack.name):
                yield from self._by_name.get(_plain(icon), ())

    def draw(self, name: str) -> np.ndarray:
        """(EDGE, EDGE, 4) uint8: an icon with its alpha channel, cropped to what shows and centred."""
        return _fit(self._picture(name))

    def _picture(self, name: str) -> Image.Image:
        if self._sets is None:
            return Image.open(self._open(f"package/assets/{self._codes[name]}.webp")).convert("RGBA")
        # Only whoever makes a base needs it.
        import resvg_py

        icon = self._sets["icons"][name]
        left, top = icon.get("left", 0), icon.get("top", 0)
        width = icon.get("width", self._sets.get("width", 16))
        height = icon.get("height", self._sets.get("height", 16))
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
        )
        png = resvg_py.svg_to_bytes(svg_string=svg, width=2 * EDGE, height=2 * EDGE)
        return Image.open(io.BytesIO(bytes(png))).convert("RGBA")

    def _open(self, member: str) -> io.BytesIO:
        file = self._tar.extractfile(member)
        if file is None:
            raise ObjdriveError(f"the archive of {self.pack.package} holds no file {member}")
        return io.BytesIO(file.read())


def _spelled(codes: dict[str, str], members: list[str]) -> dict[str, str]:
    """By icon name, the code point as this archive's files spell it, of the icons that it has."""
    there = {Path(member).stem for member in members}
    # Some packages write the selector U+FE0F out, some leave it out.
    found = {name: next((c for c in (code, f"{code}-fe0f") if c in there), "") for name, code in codes.items()}
    return {name: code for name, code in found.items() if code}


def _plain(name: str) -> str:
    return re.sub(r"\d+$", "", name.replace("-", "")).lower()


def _fit(picture: Image.Image) -> np.ndarray:
    box = picture.getchannel("A").point(lambda value: 255 if value > 16 else 0).getbbox()
    shown = picture.crop(box)
    scale = (EDGE - 4) / max(shown.size)
    size = (max(1, round(shown.width * scale)), max(1, round(shown.height * scale)))
    shown = shown.resize(size, Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (EDGE, EDGE))
    square.paste(shown, ((EDGE - size[0]) // 2, (EDGE - size[1]) // 2))
    return np.asarray(square)
