import os
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from objdrive.catalog.sources import MAX_BYTES, Role, SourceMark, read_source, stat_source
from objdrive.errors import RowError


def code_of(call: Callable[[], object]) -> tuple[str, str]:
    with pytest.raises(RowError) as caught:
        call()
    return caught.value.code, str(caught.value)


# Sources


def test_source_is_marked_and_read(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"picture")
    mark = stat_source(str(path))
    assert (mark.uri, mark.size) == (str(path), 7)
    assert read_source(mark) == b"picture"
    assert stat_source(str(path)) == mark
    os.utime(path, (1, 1))
    assert stat_source(str(path)).mark != mark.mark


def test_memory_source_and_links(tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe("/shop/a.png", b"picture")
    (tmp_path / "a.png").write_bytes(b"picture")
    (tmp_path / "link.png").symlink_to("a.png")
    for uri in ("memory://shop/a.png", f"file://{tmp_path}/a.png", str(tmp_path / "link.png")):
        mark = stat_source(uri)
        assert mark.mark
        assert read_source(mark) == b"picture"


def fifo(folder: Path) -> str:
    os.mkfifo(folder / "pipe.png")
    return str(folder / "pipe.png")


def linked_fifo(folder: Path) -> str:
    (folder / "link.png").symlink_to(fifo(folder))
    return str(folder / "link.png")


def below_a_file(folder: Path) -> str:
    (folder / "a.png").write_bytes(b"")
    return f"{folder}/a.png/b.png"


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda d: f"{d}/none.png", "{role}_missing"),
        (below_a_file, "{role}_missing"),
        (lambda d: "memory://none/none.png", "{role}_missing"),
        (lambda d: str(d), "source_not_file"),
        (lambda d: "/dev/zero", "source_not_file"),
        (fifo, "source_not_file"),
        (linked_fifo, "source_not_file"),
        (lambda d: f"{d}/{'x' * 300}.png", "source_unreadable"),
        (lambda d: "nonesuch://bucket/a.png", "source_unreadable"),
    ],
)
@pytest.mark.parametrize("role", ["image", "mask"])
def test_source_faults(tmp_path: Path, make: Callable[[Path], str], code: str, role: Role) -> None:
    uri = make(tmp_path)
    found, message = code_of(lambda: stat_source(uri, role=role))
    assert found == code.format(role=role)
    assert f"the {role} {uri!r}" in message


@pytest.mark.parametrize("role", ["image", "mask"])
def test_read_faults(tmp_path: Path, role: Role) -> None:
    huge = tmp_path / "huge.png"
    with huge.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    found, message = code_of(lambda: read_source(stat_source(str(huge)), role=role))
    assert found == f"{role}_too_large"
    assert str(MAX_BYTES + 1) in message

    gone = SourceMark(str(tmp_path / "gone.png"), 1, "")
    assert code_of(lambda: read_source(gone, role=role))[0] == f"{role}_missing"

    # A regular file whose first page isn't mapped: reading it is an I/O error.
    broken = stat_source("/proc/self/mem", role=role)
    found, message = code_of(lambda: read_source(broken, role=role))
    assert found == "source_unreadable"
    assert "OSError" in message
