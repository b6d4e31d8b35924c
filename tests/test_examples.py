"""The example catalog: its manifest, pictures and masks agree, and cover what they should."""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

CATALOG = Path(__file__).parents[1] / "examples" / "catalog"
HELD_OUT = {
    "high heel",
    "hiking boot",
    "jeans",
    "scarf",
    "drum",
    "skateboard",
    "key",
    "phone",
    "couch",
    "bathtub",
    "bicycle",
    "rocket",
    "sailboat",
    "rose",
    "cupcake",
    "ice cream",
}
"""The classes whose design in this catalog the embedded base has never seen."""

with (CATALOG / "manifest.csv").open(newline="", encoding="utf-8") as file:
    ROWS = list(csv.DictReader(file))
each_row = pytest.mark.parametrize("row", ROWS, ids=[row["object_id"] for row in ROWS])


def stored_image(row: dict[str, str]) -> Image.Image:
    with Image.open(CATALOG / row["image"]) as image:
        image.load()
        return image


def upright_image(row: dict[str, str]) -> Image.Image:
    return ImageOps.exif_transpose(stored_image(row))


def mask_of(row: dict[str, str]) -> Image.Image:
    if not row["mask"]:
        return upright_image(row).getchannel("A")
    with Image.open(CATALOG / row["mask"]) as mask:
        mask.load()
        return mask


def test_manifest_has_24_objects_in_22_pictures_two_of_them_scenes():
    assert list(ROWS[0]) == ["object_id", "image", "mask", "class_name", "scene", "title", "price"]
    assert len(ROWS) == len({row["object_id"] for row in ROWS}) == 24
    assert len({row["image"] for row in ROWS}) == 22
    scenes = [(row["scene"], row["image"]) for row in ROWS if row["scene"]]
    assert sorted(Counter(scenes).values()) == [2, 2]
    assert all(row["title"] and float(row["price"]) > 0 for row in ROWS)


def test_classes_are_the_held_out_ones_and_eight_that_the_base_does_not_know():
    classes = Counter(row["class_name"] for row in ROWS)
    assert set(classes.values()) == {1}
    assert set(classes) >= HELD_OUT
    assert len(set(classes) - HELD_OUT) == 8


def test_folder_holds_what_the_manifest_names_and_nothing_else():
    named = {row["image"] for row in ROWS} | {row["mask"] for row in ROWS if row["mask"]}
    there = {str(p.relative_to(CATALOG)) for name in ("images", "masks") for p in (CATALOG / name).iterdir()}
    assert there == named
    assert sum((CATALOG / name).stat().st_size for name in there) < 2_500_000


@each_row
def test_image_and_mask_agree(row):
    image, mask = upright_image(row), mask_of(row)
    assert min(image.size) >= 320
    assert max(image.size) <= 512
    assert mask.mode == "L"
    assert mask.size == image.size
    assert mask.getextrema() == (0, 255)


@each_row
def test_mask_lies_on_the_object(row):
    """The object's own outline is an edge in the picture; the same outline elsewhere is not."""
    image, mask = upright_image(row), mask_of(row)
    if not row["mask"]:
        image = Image.composite(image, Image.new("RGBA", image.size, "white"), mask)
    colors = np.asarray(image.convert("RGB"), np.float32)
    alpha = np.asarray(mask, np.float32) / 255
    here = outline_contrast(colors, alpha)
    assert here > 2.5 * outline_contrast(colors, np.roll(alpha, (24, -24), (0, 1)))


def outline_contrast(colors: np.ndarray, alpha: np.ndarray) -> float:
    """Mean colour step across the outline of `alpha`, per unit of its step."""
    total = weight = 0.0
    for axis in (0, 1):
        step = np.abs(np.diff(alpha, axis=axis))
        total += float((np.abs(np.diff(colors, axis=axis)).mean(-1) * step).sum())
        weight += float(step.sum())
    return total / weight


def test_objects_take_from_under_5_to_over_40_percent_of_the_frame():
    shares = [np.asarray(mask_of(row), np.float32).mean() / 255 for row in ROWS]
    assert min(shares) < 0.05
    assert max(shares) > 0.40


def test_masks_of_a_scene_do_not_overlap():
    for scene in {row["scene"] for row in ROWS} - {""}:
        first, second = (np.asarray(mask_of(row)) for row in ROWS if row["scene"] == scene)
        assert not np.minimum(first, second).any()


def test_formats_are_those_of_a_real_shop():
    images = {row["image"]: (row, stored_image(row)) for row in ROWS}
    assert Counter(Path(name).suffix for name in images) == {".jpg": 17, ".webp": 3, ".png": 2}
    cut_out = [name for name, (row, _) in images.items() if not row["mask"]]
    assert all(images[name][1].mode == "RGBA" for name in cut_out)
    assert [Path(name).suffix for name in cut_out] == [".png", ".png"]
    turned = [image for _, image in images.values() if image.getexif().get(ExifTags.Base.Orientation, 1) != 1]
    assert len(turned) == 1
    assert turned[0].width > turned[0].height, "a portrait picture, stored lying"
