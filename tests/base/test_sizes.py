import pytest

from objdrive.base.sizes import Sizes, parse_size
from objdrive.errors import ObjdriveError

SDXL = Sizes(native=1024, step=64)


@pytest.mark.parametrize("size", [(1024, 1024), (832, 1216), (1536, 1024), (1024, 2048), (256, 256)])
def test_sizes_in_steps_up_to_the_budget_are_drawn(size):
    SDXL.check(size)


def test_the_native_size_is_drawn_whatever_the_step():
    Sizes(native=60, step=8).check((60, 60))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((1000, 1024), "size=1000x1024: width and height must be multiples of 64"),
        ((2048, 1088), "size=2048x1088 has 2228224 pixels, at most 2097152 are drawn"),
        ((192, 1024), "size=192x1024: width and height must be at least 256"),
    ],
)
def test_others_are_refused_with_what_to_do(size, message):
    with pytest.raises(ObjdriveError, match=message):
        SDXL.check(size)


def test_a_size_is_read_with_its_width_first():
    assert parse_size("832x1216") == (832, 1216)


@pytest.mark.parametrize("text", ["832", "832x", "0x64", "832X1216", "832x1216 ", "-8x8", "100000x8"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ObjdriveError, match="must read WIDTHxHEIGHT"):
        parse_size(text)
