"""Sources: HTTP servers of all manners, signed addresses, pictures inside of tables."""

import socket
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from objdrive.catalog import parquet, sources
from objdrive.catalog.addresses import Cell, cell_of, redacted, unsigned
from objdrive.catalog.manifest import pieces, read_manifest
from objdrive.catalog.rows import Reject, Row
from objdrive.catalog.sources import SourceMark, read_source, stat_source
from objdrive.errors import ObjdriveError, RowError

CONTENT = bytes(range(256)) * 64
MANIFEST = b"object_id,image,mask,class_name\na,a.png,,mug\n"


class Shop(BaseHTTPRequestHandler):
    """Answers by path: /told, /chunked, /endless (chunks for ever), /to?<address> (a redirect), else 404."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[Counter[str]] = Counter()
    sent = 0

    def do_HEAD(self) -> None:
        if "only-get" in self.path:
            self.send_response(403)
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path, _, query = self.path.partition("?")
        Shop.asked[f"{self.command} {path}"] += 1
        if path == "/to":
            self.send_response(302)
            self.send_header("Location", unquote(query))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        found = path in ("/told", "/chunked", "/endless", "/dated", "/in/c.csv")
        content = MANIFEST if path == "/in/c.csv" else CONTENT
        self.send_response(200 if found else 404)
        if path == "/dated":
            self.send_header("Last-Modified", "yesterday")
        else:
            self.send_header("ETag", '"abc"')
        if path in ("/chunked", "/endless"):
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(content) if found else 0))
        self.end_headers()
        if body and found:
            self.send_body(path, content)

    def send_body(self, path: str, content: bytes) -> None:
        if path not in ("/chunked", "/endless"):
            self.wfile.write(content)
            return
        try:
            while True:
                self.wfile.write(b"%x\r\n" % len(CONTENT) + CONTENT + b"\r\n")
                Shop.sent += len(CONTENT)
                if path == "/chunked":
                    break
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def served() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Shop) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@pytest.fixture
def shop() -> Iterator[str]:
    Shop.asked.clear()
    Shop.sent = 0
    with served() as address:
        yield address


def fault(call: Any) -> RowError:
    with pytest.raises(RowError) as caught:
        call()
    return caught.value


# HTTP


def test_a_server_that_tells_no_size_is_read(shop: str) -> None:
    mark = stat_source(f"{shop}/chunked")
    assert (mark.size, mark.mark) == (None, '"abc"')
    assert read_source(mark) == CONTENT
    assert read_source(stat_source(f"{shop}/told")) == CONTENT


@pytest.mark.parametrize("announced", [None, 10])
def test_what_comes_is_bounded_whatever_is_announced(
    shop: str, monkeypatch: pytest.MonkeyPatch, announced: int | None
) -> None:
    monkeypatch.setattr(sources, "MAX_BYTES", 4 * 2**20)
    error = fault(lambda: read_source(SourceMark(f"{shop}/endless", announced, ""), role="mask"))
    assert error.code == "mask_too_large"
    assert str(4 * 2**20) in str(error)
    # What the sockets' buffers hold was sent, too.
    assert Shop.sent < 40 * 2**20


def test_a_local_file_that_grew_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_BYTES", 1000)
    path = tmp_path / "a.png"
    path.write_bytes(b"x" * 10)
    mark = stat_source(str(path))
    path.write_bytes(b"x" * 2000)
    assert fault(lambda: read_source(mark)).code == "image_too_large"


def test_a_signed_address_of_get_alone_is_read(shop: str) -> None:
    assert read_source(stat_source(f"{shop}/told?only-get=1")) == CONTENT


# Hosts


@pytest.mark.parametrize(
    "address",
    [
        "http://169.254.169.254/latest/meta-data",
        "http://[fd00:ec2:0:0:0:0:0:254]/latest/meta-data",
        "http://[fe80:0:0:0:0:0:0:1]/a.png",
        "http://[0:0:0:0:0:ffff:169.254.169.254]/a.png",
        "http://[64:ff9b:0:0:0:0:a9fe:a9fe]/a.png",
        "http://0xA9FEA9FE/a.png",
    ],
)
def test_link_local_and_metadata_addresses_are_not_asked(shop: str, address: str) -> None:
    for uri in (address, f"{shop}/to?{address}"):
        assert fault(lambda uri=uri: stat_source(uri)).code == "source_forbidden"
        assert fault(lambda uri=uri: read_source(SourceMark(uri, 1, ""))).code == "source_forbidden"


def test_a_name_that_resolves_to_a_metadata_address_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = socket.getaddrinfo

    def rebinding(host: Any, port: Any, *options: Any, **more: Any) -> Any:
        return resolve("169.254.169.254" if host == "innocent.example" else host, port, *options, **more)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    assert fault(lambda: stat_source("http://innocent.example/a.png")).code == "source_forbidden"


def test_only_allowed_hosts_are_asked_redirects_included(shop: str) -> None:
    local = shop.replace("127.0.0.1", "localhost")
    hosts = ("127.0.0.1", "*.shop.example")
    assert read_source(stat_source(f"{shop}/told", hosts=hosts), hosts=hosts) == CONTENT
    for uri in (f"{local}/told", f"{shop}/to?{local}/told"):
        error = fault(lambda uri=uri: stat_source(uri, hosts=hosts))
        assert error.code == "source_forbidden"
        assert "localhost" in str(error)
        assert "*.shop.example" in str(error)
    assert Shop.asked["GET /told"] == 1
    # Others see no restriction of theirs.
    assert read_source(stat_source(f"{shop}/to?{local}/told")) == CONTENT


# Addresses


@pytest.mark.parametrize("path", [r"sub\plain.png", r"C:\photos\plain.png", "C:/photos/plain.png"])
def test_windows_paths_are_named(tmp_path: Path, path: str) -> None:
    manifest = tmp_path / "catalog.csv"
    manifest.write_text(f"object_id,image,mask,class_name\na,{path},,mug\n")
    (row,) = read_manifest(str(manifest))
    error = fault(lambda: stat_source(row.image))
    assert error.code == "image_missing"
    assert "Windows path" in str(error)
    assert "Windows" not in str(fault(lambda: stat_source(f"{tmp_path}/none.png")))


SIGNED = [
    ("https://b.s3.example/a.png?X-Amz-Algorithm=A&X-Amz-Credential=K%2Fx&X-Amz-Date=1&X-Amz-Signature=SECRET", ""),
    ("https://b.s3.example/a.png?versionId=7&X-Amz-Signature=SECRET&X-Amz-Security-Token=SECRET", "?versionId=7"),
    ("https://g.example/a.png?X-Goog-Signature=SECRET&X-Goog-Expires=9", ""),
    ("https://b.s3.example/a.png?AWSAccessKeyId=K&Signature=SECRET&Expires=9", ""),
    ("https://c.example/a.png?Policy=SECRET&Signature=SECRET&Key-Pair-Id=K", ""),
    ("https://z.example/a.png?sv=2024&st=1&se=2&sr=b&sp=r&spr=https&sig=SECRET&v=3", "?v=3"),
    ("https://t.example/a.png?w=640&token=SECRET#top", "?w=640#top"),
    ("https://u:SECRET@t.example/a.png", None),
    ("cell://https://t.example/a.parquet?token=SECRET#17/image", None),
    ("https://t.example/a.png?sp=7&x-oss-process=resize", "?sp=7&x-oss-process=resize"),
    ("s3://bucket/a?token=b.png", "?token=b.png"),
]


@pytest.mark.parametrize(("address", "rest"), SIGNED)
def test_signatures_are_dropped(address: str, rest: str | None) -> None:
    if rest is not None:
        assert unsigned(address) == address.partition("?")[0] + rest
    assert "SECRET" not in unsigned(address)
    assert unsigned(unsigned(address)) == unsigned(address)
    assert "SECRET" not in redacted(f"403, url='{address}', tried twice")
    assert redacted({"x": [address, 5]}) == {"x": [unsigned(address), 5]}


def test_messages_of_the_network_lack_signatures(shop: str) -> None:
    error = fault(lambda: stat_source(f"{shop}/none.png?X-Amz-Signature=SECRET"))
    assert error.code == "image_missing"
    assert "SECRET" not in str(error)
    assert "404" in str(error)


def test_only_an_etag_marks_what_a_signed_address_leads_to(shop: str) -> None:
    assert stat_source(f"{shop}/told?token=1").mark == '"abc"'
    assert stat_source(f"{shop}/dated").mark == "yesterday"
    assert stat_source(f"{shop}/dated?token=1").mark == ""


def test_a_signed_manifest_is_read_and_its_signature_stays_out(shop: str) -> None:
    assert [row.image for row in rows_of(f"{shop}/in/c.csv?token=SECRET")] == [f"{shop}/in/a.png"]
    assert [row.where for row in rows_of(f"{shop}/in/c.csv?token=SECRET")] == ["c.csv:2"]
    with pytest.raises(ObjdriveError) as caught:
        pieces(f"{shop}/in/none.csv?token=SECRET")
    assert "none.csv" in str(caught.value)
    assert "SECRET" not in str(caught.value)


def test_signatures_in_free_columns_and_rejects_stay_out(tmp_path: Path) -> None:
    manifest = tmp_path / "c.csv"
    url = "https://b.s3.example/a.png?X-Amz-Signature=SECRET"
    manifest.write_text(f"object_id,image,mask,class_name,big\na,{url},,mug,{url}\nb,{url}::{url},,mug,{url}\n")
    row, reject = read_manifest(str(manifest))
    assert isinstance(row, Row)
    assert row.image == url
    assert row.metadata == {"big": "https://b.s3.example/a.png"}
    assert isinstance(reject, Reject)
    assert "SECRET" not in reject.message


# Pictures in tables


def picture(row: int, size: int = 100) -> bytes:
    return bytes([row % 256]) * size + str(row).encode()


def table(tmp_path: Path, image: Any, mask: Any = None, **options: Any) -> str:
    count = len(image)
    columns = {"object_id": [f"o{i}" for i in range(count)], "image": image, "class_name": ["mug"] * count}
    columns["mask"] = mask if mask is not None else pa.array([None] * count, pa.binary())
    path = tmp_path / "shop #1.parquet"
    pq.write_table(pa.table(columns), path, **options)
    return str(path)


def rows_of(manifest: str) -> list[Row]:
    rows = list(read_manifest(manifest))
    assert not [row for row in rows if isinstance(row, Reject)]
    return [row for row in rows if isinstance(row, Row)]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_a_column_of_bytes_is_read_as_pictures(tmp_path: Path, kind: Any) -> None:
    masks = pa.array([None if row % 3 else picture(row + 1000) for row in range(50)], kind)
    manifest = table(tmp_path, pa.array([picture(row) for row in range(50)], kind), masks, row_group_size=20)
    rows = rows_of(manifest)
    assert rows[20].image == Cell(manifest, 21, "image").address == f"cell://{manifest}#21/image"
    for index in (49, 3, 0, 20, 21, 19, 48):
        assert read_source(stat_source(rows[index].image)) == picture(index)
        assert (rows[index].mask == "") == bool(index % 3)
        if rows[index].mask:
            assert read_source(stat_source(rows[index].mask, role="mask"), role="mask") == picture(index + 1000)


def test_hugging_face_s_structs(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = [{"bytes": picture(0), "path": "x.png"}, {"bytes": None, "path": "sub/b.png"}]
    masks = [None, {"bytes": picture(9), "path": None}]
    first, second = rows_of(table(tmp_path, pa.array(images, kind), pa.array(masks, kind)))
    assert read_source(stat_source(first.image)) == picture(0)
    assert (first.mask, second.image) == ("", f"{tmp_path}/sub/b.png")
    assert read_source(stat_source(second.mask)) == picture(9)


def test_neither_bytes_nor_path_is_a_missing_image(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([None, {"bytes": None, "path": None}, {"bytes": b"x", "path": None}], kind)
    codes = [row.code if isinstance(row, Reject) else "" for row in read_manifest(table(tmp_path, images))]
    assert codes == ["image_missing_value", "image_missing_value", ""]


def test_a_rerun_touches_no_picture_and_a_changed_table_has_other_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = table(tmp_path, pa.array([picture(row) for row in range(10)]))
    marks = [stat_source(row.image) for row in rows_of(manifest)]
    assert all(mark.mark for mark in marks)
    monkeypatch.setattr(sources, "read_cell", None)
    assert [stat_source(row.image) for row in rows_of(manifest)] == marks
    monkeypatch.undo()
    assert read_source(marks[4]) == picture(4)
    table(tmp_path, pa.array([picture(row + 1) for row in range(10)]))
    changed = stat_source(marks[4].uri)
    assert changed.mark != marks[4].mark
    assert read_source(changed) == picture(5)


def test_pictures_are_read_a_few_at_a_time(tmp_path: Path) -> None:
    size, count = 2**20, 120
    noise = np.random.default_rng(0).bytes(size)
    images = (noise[:-4] + row.to_bytes(4, "big") for row in range(count))
    fields = [("object_id", pa.string()), ("image", pa.binary()), ("mask", pa.binary()), ("class_name", pa.string())]
    schema = pa.schema(fields)
    path = tmp_path / "large.parquet"
    with pq.ParquetWriter(path, schema, use_dictionary=False, write_batch_size=8) as writer:
        # One row group, pages of a few pictures.
        columns = [[f"o{row}" for row in range(count)], list(images), [None] * count, ["mug"] * count]
        whole = pa.table([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)
        writer.write_table(whole, row_group_size=count)
    del columns, whole
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    peak = 0
    for number, row in enumerate(rows_of(str(path))):
        assert read_source(stat_source(row.image))[-4:] == number.to_bytes(4, "big")
        peak = max(peak, pa.total_allocated_bytes() - before)
    _, python_peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 60 * size
    assert python_peak < 20 * size


def test_slow_row_groups_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = table(tmp_path, pa.array([picture(row, 2**16) for row in range(40)]), use_dictionary=False)
    assert pieces(manifest)[0].notes == ()
    monkeypatch.setattr(parquet, "_LARGE_GROUP_BYTES", 2**20)
    (note,) = pieces(manifest)[0].notes
    assert "2 MiB of pictures" in note
    assert "row_group_size" in note


def test_other_columns_of_bytes_are_left_out_and_unmarked_text_is_text(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    columns = {
        "Object ID": [b"a"], "image": ["a.png"], "mask": [""], "class_name": [b"mug"],
        "thumb": [b"\xff\x00"], "price": [3],
    }  # fmt: skip
    pq.write_table(pa.table(columns), path)
    (piece,) = pieces(str(path))
    assert piece.notes == (
        "t.parquet: the column 'Object ID' was taken for object_id",
        "t.parquet: the column 'thumb' holds bytes and is left out",
    )
    (row,) = rows_of(str(path))
    assert (row.object_id, row.class_name, row.metadata) == ("a", "mug", {"price": 3})


def test_rows_can_t_name_cells_of_other_tables(tmp_path: Path) -> None:
    manifest = tmp_path / "catalog.csv"
    manifest.write_text("object_id,image,mask,class_name\na,cell:///etc/x.parquet#1/image,,mug\n")
    (reject,) = read_manifest(str(manifest))
    assert isinstance(reject, Reject)
    assert reject.code == "address_invalid"


@pytest.mark.parametrize(("row", "column"), [(0, "image"), (4, "image"), (1, "mask"), (1, "class_name"), (1, "none")])
def test_a_cell_that_is_not_there_is_unreadable(tmp_path: Path, row: int, column: str) -> None:
    manifest = table(tmp_path, pa.array([picture(row) for row in range(3)]))
    mark = stat_source(Cell(manifest, row, column).address)
    assert fault(lambda: read_source(mark)).code == "source_unreadable"


def test_a_cell_s_address_and_back() -> None:
    cell = Cell("s3://b/x #1.parquet", 17, "a/b#ü")
    assert cell_of(cell.address) == cell
    assert cell_of("/data/a b#1.png") is None
