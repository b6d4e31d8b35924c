"""Checking rows against real files and a real store; records as text."""

import os
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.evaluation.pictures import read_reference
from jobs.ingest import Checked, Target, check_row, digest_inputs, pack, read_photo, source_record, unpack
from objdrive.adapters.artifact import EMBEDDING_FILE, ArtifactMetadata, BaseRef, SceneMember, Sources, adapter_digest
from objdrive.adapters.store import ArtifactStore
from objdrive.catalog.decoding import MAX_PIXELS
from objdrive.catalog.manifest import read_manifest
from objdrive.catalog.rows import Reject, Row
from objdrive.catalog.sources import MAX_BYTES, SourceMark
from objdrive.training.recipe import METHOD_VERSION

SIDE = 48


class Shop:
    """Pictures in a folder, and a store that their artifacts are committed to."""

    def __init__(self, folder):
        self.folder = folder
        self.store = ArtifactStore(str(folder / "store"))
        self.target = self.with_recipe("r" * 32)

    def with_recipe(self, digest):
        return Target(self.store.url, digest, base_fingerprint="f" * 32)

    def row(self, object_id="mug", *, image=None, mask=None, class_name="mug", scene=""):
        if image is None:
            image = self.write("mug.png", photo())
        if mask is None:
            mask = self.write("mask.png", disc())
        return Row(object_id, str(image), str(mask), class_name, scene, {"price": 9}, "catalog.csv:17")

    def write(self, name, picture):
        path = self.folder / name
        picture.save(path)
        return path

    def check(self, row, target=None):
        return check_row(row, self.store, target or self.target)

    def commit(self, row, target=None, *, members=()):
        """Commit some artifact under the digest of this row; returns the digest."""
        target = target or self.target
        checked = self.check(row, target)
        members = members or [row.object_id]
        one = read_photo(row, checked.image, checked.mask)[1]
        digest = adapter_digest([one] * len(members), **digest_inputs(target))
        metadata = ArtifactMetadata(
            object_id=row.object_id,
            class_name=row.class_name,
            token=f"<{row.object_id}>",
            phrase=f"<{row.object_id}>",
            digest=digest,
            scene=row.scene,
            members=[SceneMember(object_id=m, class_name="mug", token=f"<{m}>") for m in members],
            base=BaseRef(id="tiny64", fingerprint=target.base_fingerprint),
            recipe={},
            recipe_digest=target.recipe_digest,
            method_version=METHOD_VERSION,
            metrics={},
            sources=Sources(
                image=source_record(checked.image), mask=source_record(checked.mask) if checked.mask else None
            ),
            versions={},
            created="2026-11-22T19:00:00+00:00",
        )
        assert self.store.commit({EMBEDDING_FILE: b"embedding"}, metadata)
        return digest


@pytest.fixture
def shop(tmp_path):
    return Shop(tmp_path)


def photo(side=SIDE, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def disc(side=SIDE, radius=15.0):
    """A white disc on black."""
    y, x = np.mgrid[:side, :side] - side / 2
    return Image.fromarray(((x**2 + y**2 <= radius**2) * 255).astype(np.uint8))


def overwrite(path, data, *, keep_time):
    """Write other bytes of the same size."""
    before = path.stat()
    assert len(data) == before.st_size
    path.write_bytes(data)
    nanoseconds = before.st_mtime_ns + (0 if keep_time else 5_000_000_000)
    os.utime(path, ns=(before.st_atime_ns, nanoseconds))


def touch(path):
    overwrite(path, path.read_bytes(), keep_time=False)


def garbage(path):
    return b"\0" * path.stat().st_size


# Usable rows


def test_a_row_that_can_be_used(shop):
    row = shop.row()
    image, mask = Path(row.image), Path(row.mask)
    checked = shop.check(row)
    assert (checked.row, checked.digest, checked.members) == (row, "", ())
    assert (checked.image.uri, checked.image.size) == (str(image), image.stat().st_size)
    assert (checked.mask.uri, checked.mask.size) == (str(mask), mask.stat().st_size)


def test_a_row_without_a_mask_takes_the_image_s_own_alpha(shop):
    cut_out = photo()
    cut_out.putalpha(disc())
    checked = shop.check(shop.row(image=shop.write("cut.png", cut_out), mask=""))
    assert isinstance(checked, Checked)
    assert checked.mask is None


def before_white(side=SIDE):
    picture = Image.new("RGB", (side, side), "white")
    picture.paste((200, 40, 40), (12, 10, 36, 40))
    return picture


@pytest.mark.parametrize("mask", ["", "auto"])
def test_a_mask_is_taken_from_a_plain_ground(shop, mask):
    row = shop.row(image=shop.write("white.png", before_white()), mask=mask)
    digest = shop.commit(row)
    assert shop.check(row).digest == digest
    busy = shop.check(shop.row(image=shop.write("busy.png", photo()), mask=mask))
    assert busy.code == "mask_absent"


def test_a_mask_from_the_picture_is_another_source_than_its_transparency(shop):
    cut_out = before_white()
    cut_out.putalpha(disc())
    image = shop.write("cut.png", cut_out)
    shop.commit(shop.row(image=image, mask=""))
    assert shop.check(shop.row(image=image, mask="auto")).digest == ""


# Committed rows


def test_a_committed_row_is_known_by_its_sources_marks_and_not_read_again(shop):
    row = shop.row()
    digest = shop.commit(row)
    for source in (Path(row.image), Path(row.mask)):
        overwrite(source, garbage(source), keep_time=True)
    checked = shop.check(row)
    assert (checked.digest, checked.members) == (digest, ("mug",))


@pytest.mark.parametrize("role", ["image", "mask"])
def test_a_touched_source_is_read_again(shop, role):
    row = shop.row()
    digest = shop.commit(row)
    path = Path(getattr(row, role))
    touch(path)
    assert shop.check(row).digest == digest
    overwrite(path, garbage(path), keep_time=False)
    assert shop.check(row).code == f"{role}_invalid"


@pytest.mark.parametrize("role", ["image", "mask"])
def test_a_changed_source_makes_the_row_to_be_trained(shop, role):
    row = shop.row()
    shop.commit(row)
    shop.write("mug.png", photo(seed=1)) if role == "image" else shop.write("mask.png", disc(radius=12))
    checked = shop.check(row)
    assert (checked.digest, checked.members) == ("", ())


def test_another_class_recipe_or_base_makes_the_row_to_be_trained(shop):
    row = shop.row()
    shop.commit(row)
    assert shop.check(shop.row(class_name="cup")).digest == ""
    assert shop.check(row, shop.with_recipe("another")).digest == ""
    assert shop.check(row, Target(shop.store.url, "r" * 32, "another base")).digest == ""


def test_going_back_to_an_earlier_recipe_finds_its_artifact_and_leaves_the_store_as_it_is(shop):
    row = shop.row()
    first = shop.commit(row)
    second = shop.commit(row, shop.with_recipe("another"))
    assert shop.store.current("mug").digest == second
    checked = shop.check(row)
    assert (checked.digest, checked.outdated) == (first, True)
    assert not shop.check(row, shop.with_recipe("another")).outdated
    assert shop.store.current("mug").digest == second


def test_sources_of_which_storage_tells_the_size_alone_are_read_again(shop):
    class Bare(BaseHTTPRequestHandler):
        """Answers without a time and without an ETag."""

        def do_GET(self):
            content = (shop.folder / self.path.strip("/")).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Bare) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            at = f"http://127.0.0.1:{server.server_port}"
            picture = shop.folder / "mug.png"
            photo(seed=0).save(picture, compress_level=0)
            size = picture.stat().st_size
            shop.write("mask.png", disc())
            row = shop.row(image=f"{at}/mug.png", mask=f"{at}/mask.png")
            digest = shop.commit(row)
            assert shop.check(row).digest == digest
            photo(seed=1).save(picture, compress_level=0)
            assert picture.stat().st_size == size
            assert shop.check(row).digest == ""
        finally:
            server.shutdown()


@contextmanager
def signing_storage(folder):
    """Files of a folder by HTTP with ETags, only for those whose address has a signature; yields address and counts."""
    asked = Counter()

    class Storage(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer()

        def do_GET(self):
            self.wfile.write(self.answer())

        def answer(self):
            path, _, query = self.path.partition("?")
            content = (folder / path.strip("/")).read_bytes() if "X-Amz-Signature=" in query else b""
            asked[self.command, path] += 1
            self.send_response(200 if content else 403)
            self.send_header("ETag", f'"{hash(content)}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            return content

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Storage) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()


def signed(address, signature):
    return f"{address}?versionId=3&X-Amz-Date={signature}&X-Amz-Signature=SECRET{signature}"


def test_a_fresh_signature_is_the_same_source_and_none_is_kept(shop):
    shop.write("mug.png", photo())
    shop.write("mask.png", disc())
    with signing_storage(shop.folder) as (at, asked):

        def row(signature):
            return shop.row(image=signed(f"{at}/mug.png", signature), mask=signed(f"{at}/mask.png", signature))

        digest = shop.commit(row(1))
        asked.clear()
        checked = shop.check(row(2))
        assert checked.digest == digest
        assert set(asked) == {("HEAD", "/mug.png"), ("HEAD", "/mask.png")}
        assert shop.store.current("mug").sources.image.uri == f"{at}/mug.png?versionId=3"
        shop.write("mug.png", photo(seed=1))
        assert shop.check(row(2)).digest == ""
        unsigned = shop.check(shop.row(image=f"{at}/mug.png?token=SECRET"))
        assert unsigned.code == "image_missing"
        assert "403" in unsigned.message
        kept = [p for p in (shop.folder / "store").rglob("*") if p.is_file() and b"SECRET" in p.read_bytes()]
        assert kept == []
        assert "SECRET" not in unsigned.message


def test_pictures_inside_of_a_table(shop):
    table = shop.folder / "shop.parquet"
    data = [path.read_bytes() for path in (shop.write("a.png", photo()), shop.write("m.png", disc()))]
    columns = {"object_id": ["mug"], "image": [data[0]], "mask": [{"bytes": data[1], "path": None}]}
    pq.write_table(pa.table(columns | {"class_name": ["mug"]}), table)
    (row,) = read_manifest(str(table))
    assert len(pack(row)) < 500
    digest = shop.commit(row)
    of_files = shop.row(image=shop.folder / "a.png", mask=shop.folder / "m.png")
    assert shop.check(of_files).digest == digest
    assert shop.check(row).digest == digest
    reference = read_reference(shop.store.current("mug"), 32)
    assert reference.object_id == "mug"


def test_a_host_that_is_not_allowed_is_a_fault_of_the_row(shop):
    with signing_storage(shop.folder) as (at, asked):
        target = replace(shop.target, hosts=("cdn.example",))
        reject = shop.check(shop.row(image=signed(f"{at}/mug.png", 1)), target)
        assert (reject.code, sum(asked.values())) == ("source_forbidden", 0)


def test_a_committed_row_of_a_scene_names_the_scene_s_members(shop):
    row = shop.row(scene="table")
    digest = shop.commit(row, members=("cup", "mug"))
    checked = shop.check(row)
    assert (checked.digest, checked.members) == (digest, ("cup", "mug"))
    # One object's pictures do not make a scene's digest: that is for the worker that reads all of them.
    touch(Path(row.image))
    assert shop.check(row).digest == ""


@pytest.mark.parametrize("scene", ["", "shelf"])
def test_a_row_that_left_its_scene_is_to_be_trained(shop, scene):
    shop.commit(shop.row(scene="table"), members=("cup", "mug"))
    assert shop.check(shop.row(scene=scene)).digest == ""


# Rows that can't be used


def missing(shop):
    return shop.folder / "missing.png"


def folder(shop):
    return shop.folder


def text(shop):
    path = shop.folder / "text.png"
    path.write_text("not a picture")
    return path


def truncated(shop):
    path = shop.write("truncated.png", photo())
    path.write_bytes(path.read_bytes()[:-2000])
    return path


def huge_file(shop):
    path = shop.folder / "huge.png"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    return path


def huge_picture(shop):
    return shop.write("bomb.png", Image.new("1", (MAX_PIXELS // 1000 + 1, 1000)))


def tiny(shop):
    return shop.write("tiny.png", photo(8))


def no_mask(shop):
    return ""


def other_size(shop):
    return shop.write("other.png", disc().resize((SIDE, SIDE // 2)))


def black(shop):
    return shop.write("black.png", Image.new("L", (SIDE, SIDE), 0))


def white(shop):
    return shop.write("white.png", Image.new("L", (SIDE, SIDE), 255))


def dot(shop):
    return shop.write("dot.png", disc(radius=3))


@pytest.mark.parametrize(
    ("role", "fault", "code"),
    [
        ("image", missing, "image_missing"),
        ("image", folder, "source_not_file"),
        ("image", text, "image_invalid"),
        ("image", truncated, "image_truncated"),
        ("image", huge_file, "image_too_large"),
        ("image", huge_picture, "image_too_many_pixels"),
        ("image", tiny, "image_too_small"),
        ("mask", missing, "mask_missing"),
        ("mask", folder, "source_not_file"),
        ("mask", text, "mask_invalid"),
        ("mask", huge_file, "mask_too_large"),
        ("mask", huge_picture, "mask_too_many_pixels"),
        ("mask", no_mask, "mask_absent"),
        ("mask", other_size, "mask_size_mismatch"),
        ("mask", black, "mask_empty"),
        ("mask", white, "mask_full"),
        ("mask", dot, "mask_too_small"),
    ],
)
def test_a_fault_is_a_reject_with_its_code_that_says_which_row(shop, role, fault, code):
    reject = shop.check(shop.row(**{role: fault(shop)}))
    assert isinstance(reject, Reject)
    assert (reject.object_id, reject.where, reject.code) == ("mug", "catalog.csv:17", code)
    assert reject.message.startswith("catalog.csv:17: ")


def test_an_unknown_protocol_is_a_fault_of_the_row(shop):
    reject = shop.check(shop.row(image="nosuch://bucket/mug.png"))
    assert (reject.code, reject.object_id) == ("source_unreadable", "mug")


def test_a_store_that_fails_is_a_fault_of_the_row_it_fails_for(shop):
    (shop.folder / "store" / "objects" / "broken" / "current.json").mkdir(parents=True)
    store = ArtifactStore(shop.store.url, attempts=1)
    reject = check_row(shop.row("broken"), store, shop.target)
    assert (reject.object_id, reject.code) == ("broken", "store_failed")
    assert isinstance(check_row(shop.row("whole"), store, shop.target), Checked)


# Records as text

ROW = Row("mug", "s3://in/mug.png", "", "чашка 杯子", "table", {"price": 9.5, "tags": ["a", None]}, "c.csv:1", ("id",))
IMAGE, MASK = SourceMark("s3://in/mug.png", 100, '"etag"'), SourceMark("s3://in/mask.png", 10, "")


@pytest.mark.parametrize(
    "record",
    [
        ROW,
        Checked(ROW, IMAGE, MASK, "0123456789abcdef" * 2, ("cup", "mug")),
        Checked(ROW, IMAGE, None),
        Reject("", "c.csv:2", "encoding", "the row isn't UTF-8: \\udcff"),
    ],
)
def test_records_survive_packing(record):
    packed = pack(record)
    assert "\n" not in packed
    assert unpack(packed) == record
