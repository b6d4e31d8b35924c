from itertools import pairwise

import numpy as np
import pytest
from PIL import Image
from random_store import metadata_of

from objdrive.adapters.artifact import SourceRecord, Sources
from objdrive.catalog.geometry import bounding_box
from objdrive.catalog.photos import Photo
from objdrive.errors import ObjdriveError, RowError
from objdrive.sampling.exact import Place, compose, read_photo


def a_photo(size=(96, 64), box=(10, 20, 50, 40)):
    """A textured object before red."""
    image = np.zeros((size[1], size[0], 3), np.uint8)
    image[..., 0] = 255
    left, top, right, bottom = box
    mask = np.zeros((size[1], size[0]), np.float32)
    mask[top:bottom, left:right] = 1
    texture = np.random.default_rng(0).integers(0, 255, (bottom - top, right - left), np.uint8)
    image[top:bottom, left:right] = np.dstack([0 * texture, texture, texture])
    return Photo(image, mask)


class TestPlace:
    @pytest.mark.parametrize(
        ("text", "place"),
        [("0.5", Place(0.5)), ("0.5@0.25,0.75", Place(0.5, 0.25, 0.75)), ("1@.5,.5", Place(1, 0.5, 0.5))],
    )
    def test_is_read(self, text, place):
        assert Place.parse(text) == place

    @pytest.mark.parametrize(
        "text", ["", "big", "0", "1.1", "0.5@", "0.5@1", "0.5@0.2,2", "0.5@0.2,0.3,0.4", "1.2.3", "-1"]
    )
    def test_what_is_no_place_is_refused(self, text):
        with pytest.raises(ObjdriveError, match="SIZE"):
            Place.parse(text)


class TestCompose:
    def test_puts_the_box_where_the_place_says(self):
        cut = compose(a_photo(), Place(0.5, 0.25, 0.75), (200, 100))
        # Half of the shorter side, as wide as twice its height.
        assert bounding_box(cut.kept) == (25, 62, 75, 87)
        assert cut.image.shape == (100, 200, 3)
        assert cut.kept.dtype == np.float32

    def test_keeps_every_pixel_at_the_photos_own_scale(self):
        photo = a_photo()
        cut = compose(photo, Place(0.4, 0.5, 0.5), (100, 100))
        left, top, right, bottom = 30, 40, 70, 60
        inner = np.s_[top + 3 : bottom - 3, left + 3 : right - 3]
        assert (cut.kept[inner] == 1).all()
        assert (cut.image[top:bottom, left:right] == photo.image[20:40, 10:50]).all()

    @pytest.mark.parametrize("size", [0.2, 0.4, 0.9])
    def test_none_of_the_photos_background_comes_along(self, size):
        cut = compose(a_photo(), Place(size, 0.5, 0.5), (100, 100))
        shown = np.asarray(cut.over(Image.new("RGB", (100, 100), (0, 0, 0))))
        assert shown[..., 0].max() <= 2

    def test_the_edge_is_soft_on_the_inner_side(self):
        cut = compose(a_photo(), Place(0.4, 0.5, 0.5), (100, 100))
        assert (cut.kept[:40] == 0).all()
        assert (cut.kept[60:] == 0).all()
        rows = cut.kept[40:45, 50]
        assert 0.5 < rows[0] < 1
        assert all(above <= below for above, below in pairwise(rows))
        assert rows[-1] == 1

    def test_is_laid_over_what_was_drawn(self):
        cut = compose(a_photo(), Place(0.4, 0.5, 0.5), (100, 100))
        drawn = Image.effect_noise((100, 100), 50).convert("RGB")
        shown = np.asarray(cut.over(drawn))
        assert (shown[cut.kept == 0] == np.asarray(drawn)[cut.kept == 0]).all()
        assert (shown[cut.kept == 1] == cut.image[cut.kept == 1]).all()
        assert (cut.canvas.draw == 1 - cut.kept).all()

    def test_stands_alone_before_nothing(self):
        alone = compose(a_photo(), Place(0.4, 0.5, 0.5), (100, 100)).alone
        assert alone.mode == "RGBA"
        assert alone.getpixel((0, 0))[3] == 0
        assert alone.getpixel((50, 50))[3] == 255

    @pytest.mark.parametrize("place", [Place(0.6, 0.1, 0.5), Place(0.6, 0.5, 0.95)])
    def test_an_object_that_reaches_out_is_refused(self, place):
        with pytest.raises(ObjdriveError, match="reaches out"):
            compose(a_photo(), place, (100, 100))


class TestReadPhoto:
    @pytest.fixture
    def artifact(self, small):
        def noted(**sources):
            records = {name: SourceRecord(uri=str(uri), size=None, mark="") for name, uri in sources.items()}
            return metadata_of("mug-1", small).model_copy(update={"sources": Sources(**records)})

        return noted

    def test_reads_where_the_object_was_learned_from(self, tmp_path, artifact):
        photo = a_photo()
        Image.fromarray(photo.image).save(tmp_path / "image.png")
        Image.fromarray(np.rint(255 * photo.mask).astype(np.uint8)).save(tmp_path / "mask.png")
        read = read_photo(artifact(image=tmp_path / "image.png", mask=tmp_path / "mask.png"))
        assert (read.image == photo.image).all()
        assert (read.mask == photo.mask).all()

    def test_says_what_is_gone(self, tmp_path, artifact):
        with pytest.raises(RowError) as gone:
            read_photo(artifact(image=tmp_path / "image.png"))
        assert gone.value.code == "image_missing"
