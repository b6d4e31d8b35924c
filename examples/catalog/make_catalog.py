"""Makes the example catalog: composes icon art on procedural backdrops, with masks and a manifest.

    python examples/catalog/make_catalog.py [--package DIR_OR_TGZ]

Needs Pillow and numpy, and ``npm`` unless the icon package is at hand already. The same package and the same
versions of Pillow and numpy give the same bytes at every run.
"""

import argparse
import csv
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageDraw, ImageFilter

PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
CATALOG = Path(__file__).resolve().parent

ICONS = {
    "high heel": "1f460",
    "hiking boot": "1f97e",
    "jeans": "1f456",
    "scarf": "1f9e3",
    "drum": "1f941",
    "skateboard": "1f6f9",
    "key": "1f511",
    "phone": "1f4f1",
    "couch": "1f6cb-fe0f",
    "bathtub": "1f6c1",
    "bicycle": "1f6b2",
    "rocket": "1f680",
    "sailboat": "26f5",
    "rose": "1f339",
    "cupcake": "1f9c1",
    "ice cream": "1f366",
    "umbrella": "2602-fe0f",
    "alarm clock": "23f0",
    "paper lantern": "1f3ee",
    "lifebuoy": "1f6df",
    "abacus": "1f9ee",
    "stethoscope": "1fa7a",
    "nesting doll": "1fa86",
    "hourglass": "231b",
}
"""Class name to the code points that name its icon. The embedded base knows the first 16, not the last 8."""

Pixels = NDArray[np.floating]
Color = tuple[int, int, int]
Backdrop = Callable[[Generator, int, int], Pixels]
"""Draws a (height, width, 3) backdrop, 0 to 255, from a generator, a width and a height."""

LANCZOS, BICUBIC = Image.Resampling.LANCZOS, Image.Resampling.BICUBIC
TURN_CLOCKWISE = 6
"""EXIF orientation: the viewer turns the stored pixels by 90 degrees clockwise."""


# Backdrops ----------------------------------------------------------------------------------------


def _plain(color: Color, width: int, height: int) -> Pixels:
    return np.ones((height, width, 3), np.float32) * np.array(color, np.float32)


def _noise(rng: Generator, width: int, height: int, cell_x: float, cell_y: float) -> Pixels:
    """Smooth noise (height, width, 1) of unit scale whose blobs are about `cell_x` by `cell_y` pixels."""
    shape = (max(2, round(height / cell_y) + 1), max(2, round(width / cell_x) + 1))
    grid = Image.fromarray(rng.standard_normal(shape).astype(np.float32))
    return np.asarray(grid.resize((width, height), BICUBIC))[..., None]


def paper(color: Color) -> Backdrop:
    """Coloured paper seen from above."""

    def draw(rng: Generator, width: int, height: int) -> Pixels:
        fibre = 1.2 * _noise(rng, width, height, 2, 2) + 1.2 * _noise(rng, width, height, 80, 80)
        return _plain(color, width, height) + fibre

    return draw


def wood(color: Color) -> Backdrop:
    """Planks, seen from above."""

    def draw(rng: Generator, width: int, height: int) -> Pixels:
        grain = 0.09 * _noise(rng, width, height, 90, 2.2) + 0.05 * _noise(rng, width, height, 14, 1)
        rings = 0.05 * np.sin(9 * _noise(rng, width, height, 170, 26))
        tone = 1 + grain + rings
        plank = height / 5
        for index in range(6):
            top, bottom = round((index - 0.4) * plank), round((index + 0.6) * plank)
            tone[max(0, top) : max(0, bottom)] *= 1 + rng.uniform(-0.1, 0.1)
            if 0 < top < height:
                tone[top : top + 2] *= 0.5
                tone[top + 2 : top + 3] *= 1.12
        return _plain(color, width, height) * tone

    return draw


def linen(color: Color) -> Backdrop:
    """Woven cloth with soft folds."""

    def draw(rng: Generator, width: int, height: int) -> Pixels:
        rows = rng.standard_normal((height, 1, 1)) * np.cos(np.arange(height) * np.pi / 2)[:, None, None]
        columns = rng.standard_normal((1, width, 1)) * np.cos(np.arange(width) * np.pi / 2)[None, :, None]
        slubs = _noise(rng, width, height, 22, 2) + _noise(rng, width, height, 2, 22)
        folds = _noise(rng, width, height, 130, 90)
        return _plain(color, width, height) * (1 + 0.022 * (rows + columns) + 0.02 * slubs + 0.035 * folds)

    return draw


def gingham(color: Color) -> Backdrop:
    """A white and coloured checked cloth."""

    def draw(rng: Generator, width: int, height: int) -> Pixels:
        check = 34
        across = (np.arange(width) // check % 2)[None, :, None]
        down = (np.arange(height) // check % 2)[:, None, None]
        dye = (across + down) / 2 * (1 + 0.06 * _noise(rng, width, height, 2, 2))
        white = _plain((246, 243, 238), width, height)
        return white + dye * (_plain(color, width, height) - white) + 3 * _noise(rng, width, height, 120, 80)

    return draw


def grass(rng: Generator, width: int, height: int) -> Pixels:
    """A lawn, blade by blade, light ones last."""
    image = Image.new("RGB", (width, height), (44, 92, 34))
    draw = ImageDraw.Draw(image)
    count = width * height // 22
    for depth in np.linspace(0, 1, count):
        x, y = rng.uniform(0, width), rng.uniform(0, height + 14)
        lean, length = rng.uniform(-5, 5), rng.uniform(8, 18)
        light = 0.55 + 0.45 * depth + rng.uniform(-0.12, 0.12)
        color = tuple(round(channel * light) for channel in (112, 176, 66))
        draw.line((x, y, x + lean, y - length), fill=color, width=2)
    return np.asarray(image.filter(ImageFilter.GaussianBlur(0.7)), np.float32)


def brick(rng: Generator, width: int, height: int) -> Pixels:
    """A wall of red bricks."""
    image = Image.new("RGB", (width, height), (196, 186, 172))
    draw = ImageDraw.Draw(image)
    brick_w, brick_h, joint = 76, 28, 4
    for row in range(height // brick_h + 1):
        for column in range(-1, width // brick_w + 1):
            x, y = column * brick_w + row % 2 * brick_w // 2, row * brick_h
            light = rng.normal(1, 0.09)
            color = tuple(round(channel * light) for channel in (168, 84, 64))
            draw.rounded_rectangle((x, y, x + brick_w - joint, y + brick_h - joint), radius=2, fill=color)
    rough = 6 * _noise(rng, width, height, 2, 2) + 5 * _noise(rng, width, height, 9, 9)
    return np.asarray(image.filter(ImageFilter.GaussianBlur(0.8)), np.float32) + rough


def tiles(color: Color) -> Backdrop:
    """Glazed square tiles with light joints."""

    def draw(rng: Generator, width: int, height: int) -> Pixels:
        side, joint = 64, 3
        rows, columns = height // side + 1, width // side + 1
        tones = rng.normal(1, 0.035, (rows, columns, 1)).repeat(side, 0).repeat(side, 1)[:height, :width]
        glaze = _plain(color, width, height) * tones + 2 * _noise(rng, width, height, 40, 40)
        is_joint = (np.arange(height)[:, None] % side < joint) | (np.arange(width)[None, :] % side < joint)
        return np.where(is_joint[..., None], np.float32(232), glaze)

    return draw


def marble(rng: Generator, width: int, height: int) -> Pixels:
    """Polished white marble with grey veins."""
    warp = _noise(rng, width, height, 150, 110) + 0.45 * _noise(rng, width, height, 45, 45)
    warp = warp + 0.15 * _noise(rng, width, height, 12, 12)
    fine = _noise(rng, width, height, 60, 80) + 0.4 * _noise(rng, width, height, 18, 18)
    veins: Pixels = 34 * np.exp(-np.abs(warp) * 14) + 16 * np.exp(-np.abs(fine) * 20)
    return _plain((236, 236, 235), width, height) - veins + 4 * _noise(rng, width, height, 90, 90)


def sand(rng: Generator, width: int, height: int) -> Pixels:
    """Beach sand with ripples."""
    rows = np.arange(height, dtype=np.float32)[:, None, None]
    ripples: Pixels = np.sin(rows * 2 * np.pi / 46 + 1.6 * _noise(rng, width, height, 130, 90))
    grain = 7 * _noise(rng, width, height, 1, 1) + 4 * _noise(rng, width, height, 3, 3)
    return _plain((222, 198, 152), width, height) + 8 * ripples + grain


def concrete(rng: Generator, width: int, height: int) -> Pixels:
    """Smooth cast concrete."""
    clouds = 5 * _noise(rng, width, height, 110, 110) + 3 * _noise(rng, width, height, 30, 30)
    grain = 3 * _noise(rng, width, height, 1, 1) + 2 * _noise(rng, width, height, 4, 4)
    return _plain((172, 172, 168), width, height) + clouds + grain


def standing(wall: Backdrop, floor: Backdrop, horizon: float) -> Backdrop:
    """A wall, and a floor in perspective that starts at `horizon`, a share of the height."""

    def draw(rng: Generator, width: int, height: int) -> Pixels:
        edge = round(height * horizon)
        picture = np.concatenate([wall(rng, width, edge), _tilted(floor, rng, width, height - edge)])
        corner = np.exp(-np.abs(np.arange(height) - edge) / (0.05 * height))[:, None, None]
        return picture * (1 - 0.16 * corner)

    return draw


def _tilted(surface: Backdrop, rng: Generator, width: int, height: int) -> Pixels:
    """The surface tilted back: its far edge is drawn at scale 1, its near edge twice as large."""
    flat = Image.fromarray(_bytes(surface(rng, width, 2 * height)))
    near = 1 / height
    coefficients = (1, near * width / 2, 0, 0, 4, 0, 0, near)
    tilted = flat.transform((width, height), Image.Transform.PERSPECTIVE, coefficients, BICUBIC)
    return np.asarray(tilted, np.float32)


def _bytes(pixels: Pixels) -> NDArray[np.uint8]:
    return pixels.round().clip(0, 255).astype(np.uint8)


# The catalog --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """One product in a picture.

    `extent` is the share of the frame that its bounding box fills, along the side where it fills more;
    `center` is the middle of that box as shares of width and height; `tilt` is in degrees, counter-clockwise.
    """

    object_id: str
    class_name: str
    title: str
    price: str
    extent: float
    center: tuple[float, float] = (0.5, 0.5)
    tilt: float = 0


@dataclass(frozen=True)
class Picture:
    """One picture. Without a `backdrop` it is a cut-out packshot, whose own alpha channel is the mask.

    `upright` products stand on a floor, the others lie on what is seen from above. A `sideways` picture is
    stored turned, with the EXIF flag that sets it upright.
    """

    file: str
    size: tuple[int, int]
    backdrop: Backdrop | None
    products: tuple[Product, ...]
    scene: str = ""
    upright: bool = False
    sideways: bool = False


PINK, TEAL, SKY, SLATE = (243, 196, 205), (88, 160, 158), (158, 198, 228), (72, 84, 98)
CREAM, BUTTER, SAGE, LILAC = (240, 231, 214), (246, 218, 128), (150, 176, 142), (196, 182, 224)
OAK, WALNUT, PINE = (188, 138, 88), (112, 76, 54), (216, 176, 124)

PICTURES = (
    Picture(
        "outfit-01.jpg",
        (512, 384),
        linen((222, 214, 200)),
        (
            Product("jeans-01", "jeans", "Straight-Leg Jeans, Mid Blue", "79.00", 0.78, (0.29, 0.5), 4),
            Product("high-heel-01", "high heel", "Slip-On High Heel, Cherry Red", "119.00", 0.44, (0.73, 0.56), -6),
        ),
        scene="outfit-01",
    ),
    Picture(
        "rainy-day-01.jpg",
        (480, 360),
        concrete,
        (
            Product("umbrella-01", "umbrella", "Crook-Handle Umbrella, Violet", "34.50", 0.66, (0.7, 0.45), 8),
            Product("hiking-boot-01", "hiking boot", "Nubuck Hiking Boot, Amber", "149.00", 0.38, (0.25, 0.66)),
        ),
        scene="rainy-day-01",
    ),
    Picture(
        "scarf-01.jpg",
        (400, 400),
        wood(OAK),
        (Product("scarf-01", "scarf", "Fringed Wool Scarf, Scarlet", "45.00", 0.74, (0.52, 0.5), 5),),
    ),
    Picture(
        "drum-01.jpg",
        (384, 384),
        standing(paper(TEAL), paper((104, 176, 172)), 0.72),
        (Product("drum-01", "drum", "Snare Drum with Sticks, Red", "239.00", 0.85, (0.5, 0.5)),),
        upright=True,
    ),
    Picture(
        "skateboard-01.jpg",
        (480, 360),
        grass,
        (Product("skateboard-01", "skateboard", "Maple Skateboard, Midnight", "89.90", 0.62, (0.55, 0.48), 7),),
    ),
    Picture(
        "key-01.jpg",
        (512, 512),
        marble,
        (Product("key-01", "key", "House Key Blank, Brass", "4.20", 0.16, (0.62, 0.58), -8),),
    ),
    Picture(
        "phone-01.jpg",
        (360, 360),
        paper(BUTTER),
        (Product("phone-01", "phone", "Smartphone 128 GB, Indigo", "399.00", 0.86, (0.5, 0.49), -3),),
    ),
    Picture(
        "couch-01.jpg",
        (480, 360),
        standing(paper(SAGE), wood(PINE), 0.66),
        (Product("couch-01", "couch", "Two-Seat Couch with Reading Lamp, Blue", "899.00", 0.72, (0.46, 0.5)),),
        upright=True,
    ),
    Picture(
        "bathtub-01.png",
        (420, 420),
        None,
        (Product("bathtub-01", "bathtub", "Freestanding Bathtub, White", "1290.00", 0.84),),
    ),
    Picture(
        "bicycle-01.jpg",
        (512, 384),
        standing(brick, concrete, 0.7),
        (Product("bicycle-01", "bicycle", "City Bicycle, Red and Yellow", "549.00", 0.6, (0.57, 0.6)),),
        upright=True,
    ),
    Picture(
        "rocket-01.jpg",
        (448, 448),
        paper(SKY),
        (Product("rocket-01", "rocket", "Toy Rocket, White and Red", "24.90", 0.42, (0.36, 0.42), 4),),
    ),
    Picture(
        "sailboat-01.jpg",
        (480, 384),
        sand,
        (Product("sailboat-01", "sailboat", "Model Sailboat, Yellow Sail", "59.00", 0.46, (0.6, 0.45), -4),),
    ),
    Picture(
        "rose-01.jpg",
        (360, 480),
        wood(WALNUT),
        (Product("rose-01", "rose", "Long-Stem Rose, Red", "3.50", 0.6, (0.47, 0.5), -7),),
        sideways=True,
    ),
    Picture(
        "cupcake-01.jpg",
        (448, 448),
        standing(paper(CREAM), gingham((90, 150, 200)), 0.6),
        (Product("cupcake-01", "cupcake", "Raspberry Cupcake with Sprinkles", "3.90", 0.56, (0.45, 0.54)),),
        upright=True,
    ),
    Picture(
        "ice-cream-01.webp",
        (360, 480),
        paper(PINK),
        (Product("ice-cream-01", "ice cream", "Soft Ice Cream, Vanilla", "2.80", 0.4, (0.55, 0.45), 6),),
    ),
    Picture(
        "alarm-clock-01.webp",
        (400, 400),
        standing(paper(SLATE), wood(OAK), 0.68),
        (Product("alarm-clock-01", "alarm clock", "Twin-Bell Alarm Clock, Red", "29.00", 0.5, (0.55, 0.53)),),
        upright=True,
    ),
    Picture(
        "paper-lantern-01.jpg",
        (320, 448),
        paper((58, 74, 122)),
        (Product("paper-lantern-01", "paper lantern", "Striped Paper Lantern", "12.50", 0.34, (0.56, 0.4)),),
    ),
    Picture(
        "lifebuoy-01.jpg",
        (512, 384),
        tiles((120, 186, 208)),
        (Product("lifebuoy-01", "lifebuoy", "Lifebuoy with Grab Line", "64.00", 0.64, (0.4, 0.54), 8),),
    ),
    Picture(
        "abacus-01.png",
        (384, 384),
        None,
        (Product("abacus-01", "abacus", "Counting Abacus, Four Rows", "19.90", 0.85),),
    ),
    Picture(
        "stethoscope-01.webp",
        (480, 360),
        linen((196, 214, 208)),
        (Product("stethoscope-01", "stethoscope", "Clinic Stethoscope, Indigo", "72.00", 0.66, (0.47, 0.5), -5),),
    ),
    Picture(
        "nesting-doll-01.jpg",
        (384, 512),
        standing(paper(LILAC), marble, 0.58),
        (Product("nesting-doll-01", "nesting doll", "Painted Nesting Doll", "38.00", 0.2, (0.4, 0.6)),),
        upright=True,
    ),
    Picture(
        "hourglass-01.jpg",
        (360, 360),
        gingham((206, 84, 78)),
        (Product("hourglass-01", "hourglass", "Ten-Minute Hourglass", "16.00", 0.52, (0.56, 0.47), 6),),
    ),
)


# Composition --------------------------------------------------------------------------------------


def cut_out(icon: Image.Image, product: Product, size: tuple[int, int]) -> Image.Image:
    """The product alone on a transparent frame of `size`, in its place, size and tilt."""
    turned = icon.rotate(product.tilt, BICUBIC, expand=True)
    body = turned.crop(turned.getchannel("A").point(lambda alpha: 255 * (alpha > 16)).getbbox())
    scale = product.extent * min(size[0] / body.width, size[1] / body.height)
    body = body.resize((round(body.width * scale), round(body.height * scale)), LANCZOS)
    left, top = (round(c * s - b / 2) for c, s, b in zip(product.center, size, body.size, strict=True))
    return _placed(body, size, left, top)


def shadow(alpha: Image.Image, upright: bool) -> Pixels:
    """How dark the surface gets (height, width, 1), 0 to 1: a soft cast shadow and a tight contact."""
    left, top, right, bottom = box = alpha.getbbox() or (0, 0, *alpha.size)
    body = alpha.crop(box)
    reach = max(body.size)
    if upright:
        depth = max(2, round(0.16 * body.height))
        cast = _placed(body.resize((body.width, depth)), alpha.size, left, bottom - depth // 2)
        foot_top = bottom - max(2, round(0.05 * body.height))
        foot = alpha.crop((left, foot_top, right, bottom))
        contact = _placed(foot, alpha.size, left, foot_top + round(0.012 * reach))
    else:
        cast = _placed(body, alpha.size, left + round(0.03 * reach), top + round(0.05 * reach))
        contact = _placed(body, alpha.size, left + round(0.006 * reach), top + round(0.012 * reach))
    soft = np.asarray(cast.filter(ImageFilter.GaussianBlur(0.04 * reach)), np.float32) / 255
    tight = np.asarray(contact.filter(ImageFilter.GaussianBlur(0.012 * reach)), np.float32) / 255
    return (1 - (1 - 0.42 * soft) * (1 - 0.34 * tight))[..., None]


def _placed(part: Image.Image, size: tuple[int, int], left: int, top: int) -> Image.Image:
    frame = Image.new(part.mode, size)
    frame.paste(part, (left, top))
    return frame


def photograph(picture: Picture, backdrop: Backdrop, cut_outs: Sequence[Image.Image]) -> Image.Image:
    """The products on the backdrop, lit from the upper left, with a little sensor noise."""
    width, height = picture.size
    rng = np.random.default_rng(zlib.crc32(picture.file.encode()))
    surface = backdrop(rng, width, height)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    across, down = x / width - 0.5, y / height - 0.5
    light = 1.03 - 0.12 * (across + down) - 0.16 * (across**2 + down**2)
    pixels = surface * light[..., None]
    for layer in cut_outs:
        pixels = pixels * (1 - shadow(layer.getchannel("A"), picture.upright))
    photo = Image.fromarray(_bytes(pixels))
    for layer in cut_outs:
        photo.paste(layer, mask=layer.getchannel("A"))
    grain = rng.normal(0, 1.4, (height, width, 1)).astype(np.float32)
    return Image.fromarray(_bytes(np.asarray(photo, np.float32) + grain))


def packshot(layer: Image.Image) -> Image.Image:
    """The cut-out with white under its transparent pixels, for readers that drop the alpha channel."""
    hidden = layer.getchannel("A").point(lambda alpha: 255 * (alpha == 0))
    shot = layer.copy()
    shot.paste((255, 255, 255, 0), mask=hidden)
    return shot


def save_image(image: Image.Image, path: Path, sideways: bool) -> None:
    """Write `image` in the format of the path's suffix; `sideways` as a camera held upright stores it."""
    if path.suffix == ".png":
        image.save(path, optimize=True)
    elif path.suffix == ".webp":
        image.save(path, quality=90, method=6)
    elif sideways:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = TURN_CLOCKWISE
        stored = image.transpose(Image.Transpose.ROTATE_90)
        stored.save(path, quality=90, optimize=True, exif=exif)
    else:
        image.save(path, quality=90, optimize=True)


def write_picture(picture: Picture, icons: dict[str, Image.Image]) -> list[dict[str, str]]:
    """Write the picture and its masks; return its manifest rows."""
    layers = [cut_out(icons[product.class_name], product, picture.size) for product in picture.products]
    backdrop = picture.backdrop
    image = photograph(picture, backdrop, layers) if backdrop else packshot(layers[0])
    save_image(image, CATALOG / "images" / picture.file, picture.sideways)
    rows = []
    for product, layer in zip(picture.products, layers, strict=True):
        mask = f"masks/{product.object_id}.png" if backdrop else ""
        if mask:
            layer.getchannel("A").save(CATALOG / mask, optimize=True)
        rows.append(
            {
                "object_id": product.object_id,
                "image": f"images/{picture.file}",
                "mask": mask,
                "class_name": product.class_name,
                "scene": picture.scene,
                "title": product.title,
                "price": product.price,
            }
        )
    return rows


# The icon package ---------------------------------------------------------------------------------


def fetch_package(folder: Path) -> Path:
    """Download the icon package with npm into `folder`; return the archive."""
    npm = shutil.which("npm")
    if npm is None:
        sys.exit(f"npm is not on the path: install Node.js, or name a copy of {PACKAGE} with --package")
    subprocess.run(
        [npm, "pack", PACKAGE, "--silent", "--pack-destination", str(folder)],
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return next(folder.glob("*.tgz"))


def read_icons(package: Path) -> dict[str, Image.Image]:
    """Icons by class name, RGBA, from the package's archive or from the folder that it unpacks to."""
    names = {class_name: f"assets/{code}.webp" for class_name, code in ICONS.items()}
    if package.is_dir():
        data = {class_name: (package / name).read_bytes() for class_name, name in names.items()}
    else:
        with tarfile.open(package) as archive:
            data = {class_name: _member(archive, f"package/{name}") for class_name, name in names.items()}
    return {class_name: Image.open(BytesIO(content)).convert("RGBA") for class_name, content in data.items()}


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        sys.exit(f"{name} in the package is not a file; expected the archive of {PACKAGE}")
    return file.read()


def make_catalog(package: Path) -> None:
    """Write images, masks and manifest anew from the icons in `package`."""
    icons = read_icons(package)
    for name in ("images", "masks"):
        shutil.rmtree(CATALOG / name, ignore_errors=True)
        (CATALOG / name).mkdir()
    rows = [row for picture in PICTURES for row in write_picture(picture, icons)]
    with (CATALOG / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Make the example catalog anew.")
    parser.add_argument(
        "--package", type=Path, help=f"{PACKAGE}: its .tgz, or the folder it unpacks to (default: npm pack)"
    )
    package = parser.parse_args().package
    if package:
        make_catalog(package)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_catalog(fetch_package(Path(folder)))


if __name__ == "__main__":
    main()
