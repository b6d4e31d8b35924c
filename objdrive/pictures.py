"""Pictures as pixels, as Pillow's images and as files."""

import io
import re
from collections.abc import Mapping
from typing import Any, Literal
from xml.sax.saxutils import quoteattr

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

PictureFormat = Literal["png", "webp", "jpeg"]
DigitalSource = Literal["trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"]
"""How a picture came to be, in IPTC's words: a network made all of it, or a part."""

BEST = 100
"""The quality of a picture file, of 100, by default."""

_SOURCES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_XMP_CHUNK = "XML:com.adobe.xmp"
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmp:CreatorTool="objdrive" '
    'xmlns:objdrive="urn:objdrive:" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" {attributes}/>'
    '</rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)


def as_pixels(pictures: NDArray[np.uint8]) -> Tensor:
    """(N, 3, H, W) in [0, 1] of pictures (N, H, W, 3) uint8."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def as_bytes(pixels: Tensor) -> Tensor:
    """(N, H, W, 3) uint8 of pixels (N, 3, H, W) in [0, 1], where they are."""
    return (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def as_images(pictures: Tensor) -> list[Image.Image]:
    """Pictures of what `as_bytes` yields, on the CPU."""
    return [Image.fromarray(array) for array in pictures.numpy()]


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """Pictures of pixels (N, 3, R, R) in [0, 1]."""
    return as_images(as_bytes(pixels).cpu())


def encode_picture(picture: Image.Image, kind: str, **options: Any) -> bytes:
    """A picture as a file of that kind (``PNG``, ``WEBP``), with options of Pillow's writer."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def picture_file(
    picture: Image.Image,
    kind: PictureFormat,
    facts: Mapping[str, str],
    *,
    source: DigitalSource | None = "trainedAlgorithmicMedia",
    quality: int = BEST,
) -> bytes:
    """A picture as a file that says what made it.

    The facts stand in XMP, in a PNG also in its text chunks. The XMP has IPTC's `DigitalSourceType` too, by which
    shops and search engines tell pictures that a machine made.

    Args:
        picture: in mode RGB, or RGBA; a JPEG of the latter has a white ground.
        kind: PNG is without loss, and so is WebP at the best quality.
        facts: what made it, by names of letters and underscores.
        source: None: nothing in it was drawn.
        quality: 0 to 100, of WebP and JPEG.
    """
    xmp = _xmp(facts, source)
    if kind == "png":
        return encode_picture(picture, "PNG", pnginfo=_text_chunks(facts, xmp))
    if kind == "webp":
        return encode_picture(picture, "WEBP", quality=quality, lossless=quality == BEST, xmp=xmp.encode())
    if picture.mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return encode_picture(picture.convert("RGB"), "JPEG", quality=quality, subsampling="4:4:4", xmp=xmp.encode())


def facts_of(png: Image.Image) -> dict[str, str]:
    """What `picture_file` wrote into a PNG's text chunks."""
    texts: dict[str, str] = getattr(png, "text", {})
    return {name.removeprefix("objdrive:"): str(value) for name, value in texts.items() if name.startswith("objdrive:")}


def _text_chunks(facts: Mapping[str, str], xmp: str) -> PngInfo:
    info = PngInfo()
    for name, value in {"Software": "objdrive", **{f"objdrive:{name}": value for name, value in facts.items()}}.items():
        info.add_itxt(name, value)
    info.add_itxt(_XMP_CHUNK, xmp)
    return info


def _xmp(facts: Mapping[str, str], source: DigitalSource | None) -> str:
    attributes = {f"objdrive:{name}": _NOT_XML.sub("\ufffd", value) for name, value in facts.items()}
    if source:
        attributes["Iptc4xmpExt:DigitalSourceType"] = _SOURCES + source
    return _XMP.format(attributes=" ".join(f"{name}={quoteattr(value)}" for name, value in attributes.items()))
