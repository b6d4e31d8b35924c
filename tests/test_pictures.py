import io
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from objdrive.pictures import facts_of, picture_file

FACTS = {"prompt": 'a "photo" of <{}> & größer, \x01 — 雪', "seed": "7"}
IPTC = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
NEWSCODES = "http://cv.iptc.org/newscodes/digitalsourcetype/"


def described(data):
    """The picture, and the attributes of its XMP."""
    picture = Image.open(io.BytesIO(data))
    xmp = picture.info["xmp"]
    root = ET.fromstring(xmp if isinstance(xmp, bytes) else xmp.encode())
    [description] = root.iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description")
    return picture, description.attrib


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8))


@pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
def test_every_format_says_that_a_machine_made_it_and_how(picture, kind):
    shown, told = described(picture_file(picture, kind, FACTS))
    assert shown.format == kind.upper()
    assert told[IPTC] == f"{NEWSCODES}trainedAlgorithmicMedia"
    assert told["{urn:objdrive:}seed"] == "7"
    # XML knows no such character as the first of ASCII.
    assert told["{urn:objdrive:}prompt"] == FACTS["prompt"].replace("\x01", "\ufffd")


def test_a_png_has_the_facts_as_text_too(picture):
    shown = Image.open(io.BytesIO(picture_file(picture, "png", FACTS)))
    assert shown.text["Software"] == "objdrive"
    assert shown.text["objdrive:prompt"] == FACTS["prompt"]
    assert facts_of(shown) == FACTS


def test_a_part_that_was_drawn_and_nothing_that_was(picture):
    _, told = described(picture_file(picture, "png", FACTS, source="compositeWithTrainedAlgorithmicMedia"))
    assert told[IPTC] == f"{NEWSCODES}compositeWithTrainedAlgorithmicMedia"
    _, told = described(picture_file(picture, "png", FACTS, source=None))
    assert IPTC not in told


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_nothing_is_lost_at_the_best_quality(picture, kind):
    shown, _ = described(picture_file(picture, kind, FACTS))
    assert (np.asarray(shown.convert("RGB")) == np.asarray(picture)).all()


@pytest.mark.parametrize("kind", ["webp", "jpeg"])
def test_a_lower_quality_is_smaller(picture, kind):
    sizes = [len(picture_file(picture, kind, {}, quality=quality)) for quality in (100, 60, 10)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[2]


def test_a_jpeg_of_what_is_transparent_has_a_white_ground():
    shown, _ = described(picture_file(Image.new("RGBA", (16, 16), (9, 9, 9, 0)), "jpeg", {}))
    assert shown.getpixel((8, 8)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_transparency_is_kept(kind):
    shown, _ = described(picture_file(Image.new("RGBA", (16, 16), (9, 9, 9, 0)), kind, {}))
    assert shown.convert("RGBA").getpixel((8, 8))[3] == 0
