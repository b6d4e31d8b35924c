from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from objdrive.catalog.photos import Photo
from objdrive.errors import ObjdriveError
from objdrive.sampling.edits import Edit

GREEN = (0, 255, 0)


def noise(size, mode="RGB", seed=0):
    bands = len(mode)
    pixels = np.random.default_rng(seed).integers(0, 200, (size[1], size[0], bands), np.uint8)
    if mode == "RGBA":
        pixels[..., 3] = 255
    return Image.fromarray(pixels)


def a_mask(size, box, alpha=0):
    """Transparent in a box."""
    mask = Image.new("RGBA", size, (0, 0, 0, 255))
    mask.paste((0, 0, 0, alpha), box)
    return mask


def drawn(edge=64):
    return Image.new("RGB", (edge, edge), GREEN)


def changed(edit, result):
    """(H, W) bool: where the picture is another."""
    return (np.asarray(result) != np.asarray(edit.picture)).any(axis=-1)


class TestPlace:
    def test_is_where_the_mask_is_transparent(self):
        edit = Edit.of(noise((100, 80)), a_mask((100, 80), (20, 30, 50, 60)))
        assert edit.box == (20, 30, 50, 60)
        assert edit.place.getpixel((20, 30)) == 255
        assert edit.place.getpixel((19, 30)) == 0

    def test_is_where_the_picture_is_transparent_without_a_mask(self):
        picture = noise((100, 80), "RGBA")
        picture.paste((0, 0, 0, 0), (20, 30, 50, 60))
        edit = Edit.of(picture, None)
        assert edit.box == (20, 30, 50, 60)
        assert edit.picture.mode == "RGB"
        # What nothing is known of looks like what is next to it, not black.
        assert edit.picture.getpixel((20, 45)) == picture.getpixel((19, 45))[:3]

    @pytest.mark.parametrize(
        ("mask", "said"),
        [
            (a_mask((100, 79), (0, 0, 9, 9)), "100 x 79"),
            (Image.new("L", (100, 80)), "no transparency"),
            (a_mask((100, 80), (0, 0, 0, 0)), "nothing in it is transparent"),
            (a_mask((100, 80), (0, 0, 9, 9), alpha=200), "nothing in it is transparent"),
            (None, "image: has no transparency"),
        ],
    )
    def test_what_tells_no_place_is_refused(self, mask, said):
        with pytest.raises(ObjdriveError, match=said):
            Edit.of(noise((100, 80)), mask)


class TestWindow:
    @pytest.mark.parametrize(
        ("box", "window"),
        [
            ((40, 40, 60, 50), (38, 34, 61, 57)),
            ((0, 0, 20, 20), (0, 0, 23, 23)),
            ((190, 90, 200, 100), (188, 88, 200, 100)),
            ((20, 10, 100, 90), (16, 6, 105, 95)),
            ((20, 10, 180, 90), (20, -30, 180, 130)),
            ((0, 0, 200, 100), (0, -50, 200, 150)),
        ],
    )
    def test_is_a_square_around_the_place(self, box, window):
        assert Edit.of(noise((200, 100)), a_mask((200, 100), box)).window == window

    @pytest.mark.parametrize("name", ["mask", "image"])
    def test_one_of_too_many_pixels_is_refused(self, name):
        size = (8001, 16)
        mask = a_mask(size, (0, 0, *size))
        with pytest.raises(ObjdriveError, match=f"{name}: .* 8001 x 8001 pixels, more than 64000000"):
            Edit.of(*((noise(size), mask) if name == "mask" else (mask, None)))
        # As wide a picture is drawn into where the place is small.
        assert Edit.of(noise(size), a_mask(size, (0, 0, 9, 9))).window == (0, 0, 10, 10)

    def test_what_lies_beyond_the_picture_is_drawn(self):
        canvas = Edit.of(noise((200, 100)), a_mask((200, 100), (0, 0, 200, 100))).canvas(64)
        assert (canvas.draw == 1).all()
        canvas = Edit.of(noise((200, 100)), a_mask((200, 100), (20, 20, 180, 90))).canvas(160)
        assert (canvas.draw[:30] == 1).all()
        assert (canvas.draw[31:49] == 0).all()


class TestCanvas:
    def test_shows_the_window_and_its_place(self):
        edit = Edit.of(noise((200, 100)), a_mask((200, 100), (60, 40, 92, 72)))
        canvas = edit.canvas(36)
        assert edit.window == (58, 38, 94, 74)
        assert (canvas.image == np.asarray(edit.picture)[38:74, 58:94]).all()
        expected = np.zeros((36, 36))
        expected[2:34, 2:34] = 1
        assert (canvas.draw == expected).all()


class TestFinish:
    @pytest.mark.parametrize("mode", ["RGB", "RGBA"])
    @pytest.mark.parametrize(
        "box", [(60, 40, 92, 72), (0, 0, 200, 100), (20, 10, 180, 90), (150, 60, 200, 100), (3, 3, 5, 5)]
    )
    def test_outside_of_the_place_the_picture_is_the_same_to_the_bit(self, mode, box):
        edit = Edit.of(noise((200, 100), mode), a_mask((200, 100), box))
        result = edit.finish(drawn())
        inside = np.zeros((100, 200), bool)
        inside[box[1] : box[3], box[0] : box[2]] = True
        assert result.mode == mode
        assert not changed(edit, result)[~inside].any()
        assert changed(edit, result)[inside].mean() > 0.9

    def test_the_seam_is_soft_on_the_inner_side(self):
        edit = Edit.of(Image.new("RGB", (512, 512)), a_mask((512, 512), (128, 128, 384, 384)))
        row = np.asarray(edit.finish(drawn()))[256, :, 1].astype(int)
        assert (row[:128] == 0).all()
        assert 0 < row[128] < 64
        assert (np.diff(row[127:140]) >= 0).all()
        assert (row[140:372] == 255).all()

    def test_at_the_pictures_own_edge_there_is_no_seam(self):
        edit = Edit.of(Image.new("RGB", (128, 128)), a_mask((128, 128), (64, 0, 128, 128)))
        shown = np.asarray(edit.finish(drawn()))[..., 1]
        assert (shown[:, 80:] == 255).all()

    def test_a_mask_that_is_half_transparent_mixes(self):
        mask = a_mask((128, 128), (32, 32, 96, 96))
        mask.paste((0, 0, 0, 127), (64, 32, 96, 96))
        edit = Edit.of(Image.new("RGB", (128, 128)), mask)
        assert np.asarray(edit.finish(drawn()))[64, 80, 1] == 128

    def test_every_shape_of_a_place_stays_within(self):
        rng = np.random.default_rng(1)
        for _ in range(20):
            alpha = np.where(rng.random((40, 60)) < 0.1, 0, 255).astype(np.uint8)
            mask = Image.fromarray(np.dstack([np.zeros((40, 60, 3), np.uint8), alpha]))
            edit = Edit.of(noise((60, 40)), mask)
            assert not changed(edit, edit.finish(drawn()))[alpha == 255].any()


class TestExact:
    @pytest.fixture
    def photo(self):
        image = np.full((50, 50, 3), 255, np.uint8)
        image[10:30, 5:45] = np.random.default_rng(2).integers(0, 255, (20, 40, 3), np.uint8)
        mask = np.zeros((50, 50), np.float32)
        mask[10:30, 5:45] = 1
        return Photo(image, mask)

    def test_the_objects_own_pixels_stand_in_the_place(self, photo):
        edit = Edit.of(noise((200, 100)), a_mask((200, 100), (60, 30, 100, 90))).exact(photo)
        result = np.asarray(edit.finish(drawn()))
        # At the photo's own scale, on the place's lower edge.
        assert (result[72:88, 62:98] == photo.image[12:28, 7:43]).all()
        assert (result[40:60, 65:95] == GREEN).all()
        assert not changed(edit, result)[:, :60].any()

    def test_they_are_kept_while_the_rest_is_drawn(self, photo):
        edit = Edit.of(noise((200, 100)), a_mask((200, 100), (60, 30, 100, 90))).exact(photo)
        canvas = edit.canvas(67)
        left, top = edit.window[:2]
        own = np.s_[72 - top : 88 - top, 62 - left : 98 - left]
        assert edit.window[2] - left == 67
        assert (canvas.draw[own] == 0).all()
        assert (canvas.image[own] == photo.image[12:28, 7:43]).all()
        assert (canvas.draw[40 - top : 60 - top, 65 - left : 95 - left] == 1).all()

    def test_the_places_own_shape_bounds_it(self, photo):
        edit = Edit.of(noise((200, 100)), a_mask((200, 100), (60, 30, 100, 90)))
        shape = edit.place.copy()
        shape.paste(0, (80, 80, 100, 90))
        shaped = replace(edit, place=shape).exact(photo)
        result = shaped.finish(drawn())
        assert not changed(shaped, result)[80:90, 80:100].any()

    def test_a_small_hole_among_specks_shows_it_whole_and_is_drawn(self, photo):
        mask = a_mask((300, 300), (200, 100, 240, 140))
        mask.putpixel((0, 0), (0, 0, 0, 254))
        mask.putpixel((299, 299), (0, 0, 0, 254))
        edit = Edit.of(noise((300, 300)), mask).exact(photo)
        result = np.asarray(edit.finish(drawn()))
        assert (result[122:138, 202:238] == photo.image[12:28, 7:43]).all()
        canvas = edit.canvas(300)
        assert (canvas.draw[101:119, 201:239] == 1).all()
        assert (canvas.draw[122:138, 202:238] == 0).all()

    def test_what_the_finished_picture_does_not_show_is_not_drawn_around(self, photo):
        ring = a_mask((100, 100), (20, 20, 80, 80))
        ring.paste((0, 0, 0, 255), (21, 21, 79, 79))
        edit = Edit.of(noise((100, 100)), ring).exact(photo)
        left, top, right, _ = edit.window
        canvas = edit.canvas(right - left)
        seen = np.s_[22 - top : 78 - top, 22 - left : 78 - left]
        assert (canvas.image[seen] == np.asarray(edit.picture)[22:78, 22:78]).all()

    def test_its_edge_is_soft_where_it_meets_the_places_box(self, photo):
        edit = Edit.of(noise((200, 100)), a_mask((200, 100), (60, 30, 100, 90))).exact(photo)
        assert edit.cut_out is not None
        assert edit.cut_out.kept.shape == (60, 40)
        for edge in (edit.cut_out.kept[-1], edit.cut_out.kept[40:, 0], edit.cut_out.kept[40:, -1]):
            assert (edge < 0.9).all()
        assert (edit.cut_out.kept[44:56, 4:36] == 1).all()

    def test_the_pictures_own_edge_cuts_it_off(self, photo):
        edit = Edit.of(noise((40, 60)), a_mask((40, 60), (0, 0, 40, 60))).exact(photo)
        assert edit.cut_out is not None
        assert (edit.cut_out.kept[44:] == 1).all()
