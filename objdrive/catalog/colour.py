"""Colours: what a picture's ICC profile means, in sRGB."""

import io

import numpy as np
from PIL import Image, ImageCms

# Of 256; as far apart, nobody sees a difference.
_SAME = 2
_LATTICE = 9
_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}
_SRGB = ImageCms.createProfile("sRGB")


class ProfileError(Exception):
    """A picture's colour profile can't be used; the text says why."""


def to_srgb(picture: Image.Image, profile: bytes) -> Image.Image:
    """The picture's colours in sRGB, by the perceptual intent of its ICC profile.

    Args:
        picture: mode RGB, RGBA, L or CMYK.
        profile: ICC profile.

    Returns:
        Mode RGB, or RGBA with the same alpha channel; the picture itself if its profile is sRGB's (to 2 of 256 levels).

    Raises:
        ProfileError: it is broken, or meant for pictures of another kind.
    """
    colours = picture.convert("RGB") if picture.mode == "RGBA" else picture
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if space != _SPACES[colours.mode]:
            raise ProfileError(f"it is for {space} pictures, this one is {colours.mode}")
        transform = ImageCms.buildTransform(
            source, _SRGB, colours.mode, "RGB", renderingIntent=ImageCms.Intent.PERCEPTUAL
        )
        if colours.mode != "CMYK" and _changes_nothing(transform, colours.mode):
            return picture
        converted = ImageCms.applyTransform(colours, transform)
    except (ImageCms.PyCMSError, OSError) as error:
        raise ProfileError(str(error)) from error
    assert converted is not None  # It is only for transforms in place.
    if picture.mode == "RGBA":
        converted.putalpha(picture.getchannel("A"))
    return converted


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether it leaves all colours of a lattice as they are; writers of sRGB profiles differ in their last digits."""
    levels = np.linspace(0, 255, _LATTICE).astype(np.uint8)
    of_colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    lattice = levels[None] if mode == "L" else of_colours
    before = Image.fromarray(lattice)
    after = ImageCms.applyTransform(before, transform)
    difference = np.asarray(before.convert("RGB")).astype(int) - np.asarray(after)
    return int(np.abs(difference).max()) <= _SAME
