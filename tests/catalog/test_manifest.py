import datetime
import io
import json
import os
import pickle
import tracemalloc
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from objdrive.catalog.manifest import Piece, pieces, read_manifest, read_piece
from objdrive.catalog.records import MAX_ROW_BYTES
from objdrive.catalog.rows import Reject, Row
from objdrive.errors import ObjdriveError

HEADER = "object_id,image,mask,class_name\n"
GOOD: dict[str, Any] = {"object_id": "mug-1", "image": "a.png", "mask": "m.png", "class_name": "mug"}


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def write_csv(folder: Path, content: str | bytes, name: str = "catalog.csv") -> str:
    data = content.encode() if isinstance(content, str) else content
    (folder / name).write_bytes(data)
    return str(folder / name)


def write_jsonl(folder: Path, *lines: object) -> str:
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (folder / "catalog.jsonl").write_bytes(b"\n".join(texts) + b"\n")
    return str(folder / "catalog.jsonl")


def write_parquet(folder: Path, columns: dict[str, Any], name: str = "part-0.parquet", **options: Any) -> str:
    pq.write_table(pa.table(columns), folder / name, **options)
    return str(folder / name)


def columns_of(count: int, **extra: Any) -> dict[str, Any]:
    return {
        "object_id": [f"o{i}" for i in range(count)],
        "image": [f"{i}.png" for i in range(count)],
        "mask": [None] * count,
        "class_name": ["mug"] * count,
        **extra,
    }


def rows_of(manifest: str) -> list[Row]:
    rows = list(read_manifest(manifest))
    assert not [row for row in rows if isinstance(row, Reject)]
    return [row for row in rows if isinstance(row, Row)]


def the_reject(manifest: str) -> Reject:
    (reject,) = [row for row in read_manifest(manifest) if isinstance(row, Reject)]
    assert reject.message.startswith(reject.where)
    return reject


# Formats


def test_csv_row(tmp_path: Path) -> None:
    manifest = write_csv(
        tmp_path,
        "object_id,image,mask,class_name,scene,price\nmug-1,img/a.png,m.png, coffee \t mug,table-1,3\n",
    )
    assert list(read_manifest(manifest)) == [
        Row(
            "mug-1",
            f"{tmp_path}/img/a.png",
            f"{tmp_path}/m.png",
            "coffee mug",
            "table-1",
            {"price": "3"},
            "catalog.csv:2",
        )
    ]


def test_jsonl_row(tmp_path: Path) -> None:
    manifest = write_jsonl(
        tmp_path,
        {"object_id": 7, "image": "a.png", "class_name": "Mug", "tags": ["x", {"y": None}], "price": 1.5},
    )
    assert list(read_manifest(manifest)) == [
        Row(
            "7",
            f"{tmp_path}/a.png",
            "",
            "Mug",
            "",
            {"tags": ["x", {"y": None}], "price": 1.5},
            "catalog.jsonl:1",
        )
    ]


def test_parquet_row_with_numbers_and_times(tmp_path: Path) -> None:
    columns = {
        "object_id": [12],
        "image": ["a.png"],
        "mask": pa.array([None], pa.string()),
        "class_name": [3],
        "scene": pa.array([None], pa.string()),
        "added": [datetime.date(2024, 2, 29)],
        "seen": pa.array([1], pa.timestamp("ns")),
        "weight": [float("nan")],
        "sold": [True],
    }
    (row,) = rows_of(write_parquet(tmp_path, columns))
    assert (row.object_id, row.class_name, row.mask, row.scene) == ("12", "3", "", "")
    assert row.where == "part-0.parquet:1"
    assert row.metadata == {
        "added": "2024-02-29",
        "seen": "1970-01-01 00:00:00.000000001",
        "weight": None,
        "sold": True,
    }
    json.dumps(row.metadata, allow_nan=False)


def test_formats_agree(tmp_path: Path) -> None:
    body = "".join(f"o{i},{i}.png,,mug\n" for i in range(5))
    files = [
        write_csv(tmp_path, HEADER + body),
        write_jsonl(tmp_path, *({"object_id": f"o{i}", "image": f"{i}.png", "class_name": "mug"} for i in range(5))),
        write_parquet(tmp_path, columns_of(5)),
    ]
    first, *others = [[(r.object_id, r.image, r.mask, r.class_name) for r in rows_of(f)] for f in files]
    assert len(first) == 5
    assert all(other == first for other in others)


@pytest.mark.parametrize("suffix", ["csv", "CSV"])
def test_byte_order_mark_blank_lines_and_windows_line_ends(tmp_path: Path, suffix: str) -> None:
    text = "object_id,image,mask,class_name\r\n\r\na,a.png,,mug\r\n\r\nb,b.png,,mug\r\n"
    manifest = write_csv(tmp_path, b"\xef\xbb\xbf" + text.encode(), f"catalog.{suffix}")
    assert [(row.object_id, row.where) for row in rows_of(manifest)] == [
        ("a", f"catalog.{suffix}:3"),
        ("b", f"catalog.{suffix}:5"),
    ]


def test_byte_order_mark_in_json_lines(tmp_path: Path) -> None:
    manifest = write_jsonl(tmp_path, b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), b"", GOOD)
    assert [row.where for row in rows_of(manifest)] == ["catalog.jsonl:1", "catalog.jsonl:3"]


def test_quoted_line_breaks_count_as_lines(tmp_path: Path) -> None:
    manifest = write_csv(
        tmp_path,
        'object_id,image,mask,class_name,note\na,a.png,,mug,"one\ntwo, ""three"""\nb,b.png,,mug,x\n',
    )
    first, second = rows_of(manifest)
    assert (first.where, first.metadata) == ("catalog.csv:2", {"note": 'one\ntwo, "three"'})
    assert second.where == "catalog.csv:4"


# Tables as other tools write them


PLAIN = ("mug-1", "{folder}/a,b.png", "", "coffee mug", {"price": "3,50"})
SEPARATED = "fields are separated by "


@pytest.mark.parametrize(
    ("content", "notes"),
    [
        ('object_id,image,mask,class_name,price\nmug-1,"a,b.png",,coffee mug,"3,50"\n', []),
        ("object_id;image;mask;class_name;price\nmug-1;a,b.png;;coffee mug;3,50\n", [SEPARATED + "';'"]),
        ("sep=;\r\nobject_id;image;mask;class_name;price\r\nmug-1;a,b.png;;coffee mug;3,50\r\n", [SEPARATED + "';'"]),
        ("object_id\timage\tmask\tclass_name\tprice\nmug-1\ta,b.png\t\tcoffee mug\t3,50\n", [SEPARATED + r"'\t'"]),
        (
            'Object ID,IMAGE,Mask,class-name,price\nmug-1,"a,b.png",,coffee mug,"3,50"\n',
            [f"the column {given!r} was taken for {known}" for given, known in
             (("Object ID", "object_id"), ("IMAGE", "image"), ("Mask", "mask"), ("class-name", "class_name"))],
        ),
        (
            'object_id, image, mask, "class_name", price \nmug-1, "a,b.png", , coffee mug , "3,50"\n',
            ["spaces around fields do not count"],
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_csv_of_other_tools(tmp_path: Path, content: str, notes: list[str], encoding: str) -> None:
    manifest = write_csv(tmp_path, content.encode(encoding))
    (piece,) = pieces(manifest)
    assert list(piece.notes) == [f"catalog.csv: {note}" for note in notes]
    (row,) = rows_of(manifest)
    image = PLAIN[1].format(folder=tmp_path)
    assert (row.object_id, row.image, row.mask, row.class_name, row.metadata) == (PLAIN[0], image, *PLAIN[2:])
    assert row.where == f"catalog.csv:{3 if content.startswith('sep=') else 2}"


def test_utf16_is_read_in_bounded_memory_and_its_broken_characters_cost_one_row(tmp_path: Path) -> None:
    lines = [f"чашка-{i}".replace("чашка", "mug") + ",a.png,,чашка 😀\n" for i in range(20_000)]
    data = (HEADER + "".join(lines[:10_000])).encode("utf-16")
    data += "bad,a.png,,".encode("utf-16-le") + b"\x00\xd8" + "\n".encode("utf-16-le")
    data += "".join(lines[10_000:]).encode("utf-16-le")
    reject = the_reject(write_csv(tmp_path, data))
    assert (reject.object_id, reject.code, reject.where) == ("bad", "encoding", "catalog.csv:10002")
    rows = [row for row in read_manifest(str(tmp_path / "catalog.csv")) if isinstance(row, Row)]
    assert [row.object_id for row in rows] == [f"mug-{i}" for i in range(20_000)]
    assert {row.class_name for row in rows} == {"чашка 😀"}


def test_utf16_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "catalog.jsonl"
    path.write_bytes((json.dumps(GOOD | {"class_name": "größe"}, ensure_ascii=False) + "\n").encode("utf-16"))
    assert rows_of(str(path))[0].class_name == "größe"


def test_names_in_another_case_in_json_lines_are_a_warning_of_the_row(tmp_path: Path) -> None:
    (row,) = rows_of(write_jsonl(tmp_path, {"ID": 5, "Object-Id": "a", "image": "a.png", "class_name": "mug"}))
    assert (row.object_id, row.metadata) == ("a", {"ID": 5})
    assert row.warnings == ("the column 'Object-Id' was taken for object_id",)


@pytest.mark.parametrize("file_format", ["csv", "jsonl"])
def test_text_of_another_encoding_is_named(tmp_path: Path, file_format: str) -> None:
    if file_format == "csv":
        manifest = write_csv(tmp_path, (HEADER + "a,a.png,,Gießkanne\n").encode("cp1252"))
    else:
        line = '{"object_id": "a", "image": "a.png", "class_name": "Gießkanne"}'.encode("cp1252")
        manifest = write_jsonl(tmp_path, line)
    reject = the_reject(manifest)
    assert reject.code == "encoding"
    assert "reads as cp1252: " in reject.message
    assert "Gießkanne" in reject.message


@pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
def test_whole_floats_are_ids_with_a_warning(tmp_path: Path, file_format: str) -> None:
    rows = [GOOD | {"object_id": number, "scene": 7.0} for number in (1001.0, float(2**53 - 1))]
    if file_format == "jsonl":
        manifest = write_jsonl(tmp_path, *rows)
    else:
        manifest = write_parquet(tmp_path, {name: [row[name] for row in rows] for name in rows[0]})
    first, last = rows_of(manifest)
    assert (first.object_id, first.scene, last.object_id) == ("1001", "7", "9007199254740991")
    assert first.warnings == ("the object_id 1001.0 was taken for 1001", "the scene 7.0 was taken for 7")


def test_text_ids_stay_as_they_are(tmp_path: Path) -> None:
    rows = rows_of(write_csv(tmp_path, HEADER + "1001.0,a.png,,mug\n1e3,a.png,,mug\n007,a.png,,mug\n"))
    assert [(row.object_id, row.warnings) for row in rows] == [("1001.0", ()), ("1e3", ()), ("007", ())]


@pytest.mark.parametrize("number", [1001.5, float(2**53)])
def test_other_floats_are_rejects_that_say_what_to_do(tmp_path: Path, number: float) -> None:
    reject = the_reject(write_jsonl(tmp_path, GOOD | {"object_id": number}))
    assert (reject.code, reject.object_id) == ("id_invalid", str(number))
    assert f"object_id {number} is a float" in reject.message
    assert "dtype=str" in reject.message


# Addresses


@pytest.mark.parametrize(
    ("image", "resolved"),
    [
        ("a.png", "{folder}/a.png"),
        ("./x/../a b#.png", "{folder}/a b#.png"),
        ("../a.png", "{parent}/a.png"),
        ("/data/a.png", "/data/a.png"),
        ("s3://bucket/a.png", "s3://bucket/a.png"),
        ("https://shop.example/a.png?w=1", "https://shop.example/a.png?w=1"),
    ],
)
def test_local_addresses(tmp_path: Path, image: str, resolved: str) -> None:
    (row,) = rows_of(write_csv(tmp_path, f"{HEADER}a,{image},{image},mug\n"))
    assert row.image == row.mask == resolved.format(folder=tmp_path, parent=tmp_path.parent)


def test_a_mask_can_be_asked_from_the_picture(tmp_path: Path) -> None:
    auto, file = rows_of(write_csv(tmp_path, f"{HEADER}a,a.png,auto,mug\nb,b.png,./auto,mug\n"))
    assert (auto.mask, file.mask) == ("auto", f"{tmp_path}/auto")


def test_file_urls_and_relative_manifests_are_local_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_csv(tmp_path, HEADER + "a,a.png,,mug\n")
    monkeypatch.chdir(tmp_path)
    for manifest in ("catalog.csv", f"file://{tmp_path}/catalog.csv"):
        assert [row.image for row in rows_of(manifest)] == [f"{tmp_path}/a.png"]


@pytest.mark.parametrize("address", ["memory://shop/c.csv", "memory://shop", "memory://shop/", "memory:///shop/*.csv"])
def test_remote_rows_resolve_to_the_same_storage(memory: MemoryFileSystem, address: str) -> None:
    memory.pipe("/shop/c.csv", (HEADER + "a,../pics/a.png,m.png,mug\n").encode())
    memory.pipe("/pics/a.png", b"picture")
    memory.pipe("/shop/m.png", b"mask")
    (row,) = rows_of(address)
    assert fsspec.open(row.image).open().read() == b"picture"
    assert fsspec.open(row.mask).open().read() == b"mask"


# Folders, globs, pieces


def test_folder_reads_its_manifest_files_in_order(tmp_path: Path) -> None:
    for name in ("b.csv", "a.csv", "_old.csv", ".hidden.csv"):
        write_csv(tmp_path, f"{HEADER}{name[0]}1,a.png,,mug\n", name)
    (tmp_path / "photo.png").write_bytes(b"")
    (tmp_path / "deeper").mkdir()
    write_csv(tmp_path / "deeper", f"{HEADER}deep,a.png,,mug\n")
    assert [row.object_id for row in rows_of(str(tmp_path))] == ["a1", "b1"]


def test_glob(tmp_path: Path) -> None:
    for name in ("part-1.csv", "part-0.csv", "other.csv"):
        write_csv(tmp_path, f"{HEADER}{name[:-4]},a.png,,mug\n", name)
    (tmp_path / "part-x.csv").mkdir()
    write_csv(tmp_path / "part-x.csv", f"{HEADER}deep,a.png,,mug\n", "part-2.csv")
    assert [row.object_id for row in rows_of(f"{tmp_path}/part-*.csv")] == ["part-0", "part-1"]
    deep = rows_of(f"{tmp_path}/**/part-?.csv")
    assert [(row.object_id, row.image) for row in deep] == [
        ("part-0", f"{tmp_path}/a.png"),
        ("part-1", f"{tmp_path}/a.png"),
        ("deep", f"{tmp_path}/part-x.csv/a.png"),
    ]


def test_a_name_with_glob_characters_is_a_file_first(tmp_path: Path) -> None:
    manifest = write_csv(tmp_path, HEADER + "a,a.png,,mug\n", "catalog[1].csv")
    assert [row.where for row in rows_of(manifest)] == ["catalog[1].csv:2"]


def test_parquet_pieces_cover_all_rows_once(tmp_path: Path) -> None:
    count = 130_000
    manifest = write_parquet(tmp_path, columns_of(count), row_group_size=20_000)
    found = pieces(manifest)
    assert [piece.row_groups for piece in found] == [(0, 1, 2), (3, 4, 5), (6,)]
    assert [piece.first_row for piece in found] == [1, 60_001, 120_001]
    (last,) = [row for row in islice(read_piece(found[1]), 59_999, 60_000)]
    assert (last.object_id, last.where) == ("o119999", "part-0.parquet:120000")
    assert [row.object_id for row in read_piece(found[2])] == [f"o{i}" for i in range(120_000, count)]


def test_pieces_pickle(tmp_path: Path) -> None:
    write_parquet(tmp_path, columns_of(3))
    write_csv(tmp_path, HEADER + "a,a.png,,mug\n")
    found = pieces(str(tmp_path))
    assert [piece.format for piece in found] == ["csv", "parquet"]
    assert pickle.loads(pickle.dumps(found)) == found


@pytest.mark.parametrize("rows", [0, 1])
def test_empty_manifests(tmp_path: Path, rows: int) -> None:
    write_csv(tmp_path, HEADER)
    write_jsonl(tmp_path)
    write_parquet(tmp_path, pa.table(columns_of(1)).slice(0, rows).to_pydict() if rows else empty_columns())
    assert len(rows_of(str(tmp_path))) == rows


def empty_columns() -> dict[str, Any]:
    return {name: pa.array([], pa.string()) for name in ("object_id", "image", "mask", "class_name")}


# What is wrong with a whole manifest


def fifo(folder: Path) -> str:
    os.mkfifo(folder / "pipe.csv")
    return str(folder / "pipe.csv")


def truncated_parquet(folder: Path) -> str:
    manifest = write_parquet(folder, columns_of(1000))
    data = Path(manifest).read_bytes()
    Path(manifest).write_bytes(data[: len(data) // 2])
    return manifest


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda d: f"{d}/none.csv", ["none.csv", "no manifest"]),
        (lambda d: f"{d}/*.csv", ["*.csv", "no manifest"]),
        (lambda d: str(d), ["no manifest file", ".parquet", ".csv", ".jsonl"]),
        (lambda d: write_csv(d, HEADER, "catalog.xlsx"), ["catalog.xlsx", ".parquet", ".csv", ".jsonl"]),
        (lambda d: f"zip://c.csv::{d}/c.zip", ["chained"]),
        (lambda d: "nonesuch://bucket/c.csv", ["nonesuch"]),
        (
            lambda d: write_csv(d, "object_id,image,class_name\n"),
            ["catalog.csv", "lacks", "mask", "'class_name'"],
        ),
        (lambda d: write_csv(d, "object_id;image;class_name\n"), ["lacks", "mask", "'class_name'"]),
        (lambda d: write_csv(d, "Image,image,IMAGE,object_id,MASK,Mask,class_name\n"), ["more than one", "'mask'"]),
        (lambda d: write_csv(d, ""), ["object_id, image, mask, class_name", "[]"]),
        (lambda d: write_csv(d, "object_id,image,mask,class_name,image\n"), ["more than one", "'image'"]),
        (lambda d: write_csv(d, "object_id,image,mask,class_name,größe\n".encode("cp1252")), ["cp1252: 'größe'"]),
        (lambda d: write_csv(d, '"object_id,image\n'), ["header", "CSV"]),
        (
            lambda d: write_parquet(d, {"object_id": ["a"], "image": ["a.png"]}),
            ["part-0", "mask, class_name"],
        ),
        (lambda d: write_csv(d, "no parquet at all", "x.parquet"), ["x.parquet", "can't be read"]),
        (truncated_parquet, ["part-0.parquet", "can't be read"]),
        (fifo, ["pipe.csv", "regular file"]),
    ],
)
def test_manifest_faults(tmp_path: Path, make: Any, says: list[str]) -> None:
    with pytest.raises(ObjdriveError) as caught:
        pieces(make(tmp_path))
    for text in says:
        assert text in str(caught.value)


def test_parquet_with_corrupt_pages_is_named(tmp_path: Path) -> None:
    manifest = write_parquet(tmp_path, columns_of(5000), compression="none", use_dictionary=False)
    data = bytearray(Path(manifest).read_bytes())
    data[4:2000] = b"\xff" * 1996
    Path(manifest).write_bytes(data)
    with pytest.raises(ObjdriveError, match=r"part-0\.parquet"):
        list(read_manifest(manifest))


def test_file_that_vanishes_between_listing_and_reading() -> None:
    with pytest.raises(ObjdriveError, match=r"gone\.csv"):
        list(read_piece(Piece("/nowhere/gone.csv", "csv")))


# What is wrong with a row


BAD_VALUES = [
    ({"object_id": ""}, "id_invalid", "''"),
    ({"object_id": None}, "id_invalid", "object_id"),
    ({"object_id": "../x"}, "id_invalid", "'../x'"),
    ({"object_id": "-x"}, "id_invalid", "'-x'"),
    ({"object_id": "mug 1"}, "id_invalid", "'mug 1'"),
    ({"object_id": "mug\n"}, "id_invalid", r"'mug\n'"),
    ({"object_id": "größe-1"}, "id_invalid", "größe-1"),
    ({"object_id": "x" * 129}, "id_invalid", "x" * 129),
    ({"object_id": "x" * 300}, "id_invalid", "x" * 150),
    ({"object_id": "a\0b"}, "id_invalid", r"'a\x00b'"),
    ({"image": ""}, "image_missing_value", "''"),
    ({"image": " "}, "image_missing_value", "' '"),
    ({"image": None}, "image_missing_value", "image"),
    ({"image": "zip://a.png::http://x/y.zip"}, "address_invalid", "::"),
    ({"image": "a\0.png"}, "address_invalid", r"a\x00.png"),
    ({"mask": "simplecache::s3://b/m.png"}, "address_invalid", "mask"),
    ({"class_name": ""}, "class_invalid", "empty"),
    ({"class_name": " \t"}, "class_invalid", "empty"),
    ({"class_name": None}, "class_invalid", "empty"),
    ({"class_name": "m" * 65}, "class_invalid", "m" * 65),
    ({"class_name": "mug\x07"}, "class_invalid", r"mug\x07"),
    ({"class_name": "mug {}"}, "class_invalid", "mug {}"),
    ({"scene": "../table"}, "scene_invalid", "'../table'"),
]


@pytest.mark.parametrize(("change", "code", "says"), BAD_VALUES)
@pytest.mark.parametrize("file_format", ["csv", "jsonl", "parquet"])
def test_row_faults(tmp_path: Path, file_format: str, change: dict[str, Any], code: str, says: str) -> None:
    rows = [GOOD | {"scene": ""}, GOOD | {"scene": ""} | change, GOOD | {"scene": ""}]
    names = [*GOOD, "scene"]
    if file_format == "csv":
        body = "".join(",".join('"' + (row[n] or "") + '"' for n in names) + "\n" for row in rows)
        manifest, where = write_csv(tmp_path, ",".join(names) + "\n" + body), "catalog.csv:3"
    elif file_format == "jsonl":
        manifest, where = write_jsonl(tmp_path, *rows), "catalog.jsonl:2"
    else:
        manifest = write_parquet(tmp_path, {n: [row[n] for row in rows] for n in names})
        where = "part-0.parquet:2"
    reject = the_reject(manifest)
    # A CSV file can't say null.
    if not (file_format == "csv" and None in change.values()):
        assert says in reject.message
    assert (reject.code, reject.where) == (code, where)
    assert reject.object_id.isprintable()
    assert len(reject.object_id) <= 128
    assert len(list(read_manifest(manifest))) == 3


@pytest.mark.parametrize("length", [1, 128])
def test_longest_and_shortest_ids_are_taken(tmp_path: Path, length: int) -> None:
    assert rows_of(write_jsonl(tmp_path, GOOD | {"object_id": "x" * length}))[0].object_id == "x" * length


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"{", "json_invalid"),
        (b"[1]", "json_invalid"),
        (b'"text"', "json_invalid"),
        (b"[" * 100_000, "json_invalid"),
        (b'{"object_id": ' + b"9" * 5000 + b"}", "json_invalid"),
        (
            b'{"object_id": "a", "image": "a", "class_name": "c", "x": ' + b"[" * 700 + b"]" * 700 + b"}",
            "json_invalid",
        ),
        (b'{"object_id": "' + b"x" * MAX_ROW_BYTES + b'"}', "json_invalid"),
        (b'{"object_id": "caf\xe9"}', "encoding"),
        (b'{"object_id": "a", "image": "\\ud800", "class_name": "mug"}', "encoding"),
        (b'{"object_id": "a", "image": "a", "class_name": "mug", "note": ["\\ud800"]}', "encoding"),
        (b'{"object_id": "a", "image": "a.png"}', "columns_missing"),
        (b'{"object_id": "a", "class_name": "mug"}', "columns_missing"),
        (b'{"image": "a.png", "class_name": "mug"}', "columns_missing"),
        (b'{"object_id": {"$oid": 1}, "image": "a.png", "class_name": "mug"}', "id_invalid"),
        (b'{"object_id": 1.5, "image": "a.png", "class_name": "mug"}', "id_invalid"),
        (b'{"object_id": "a", "image": {"bytes": ""}, "class_name": "mug"}', "address_invalid"),
        (b'{"object_id": "a", "image": "a.png", "class_name": true}', "class_invalid"),
    ],
)
def test_json_lines_faults_cost_one_row(tmp_path: Path, line: bytes, code: str) -> None:
    manifest = write_jsonl(tmp_path, GOOD, line, GOOD)
    reject = the_reject(manifest)
    assert (reject.code, reject.where) == (code, "catalog.jsonl:2")
    assert [row.where for row in read_manifest(manifest)] == [f"catalog.jsonl:{i}" for i in (1, 2, 3)]
    reject.message.encode()


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"caf\xe9,a.png,,mug", "encoding"),
        (b"a,a.png,,mug,extra", "columns_missing"),
        (b"a,a.png", "columns_missing"),
        (b'a,a.png,,"mug', "csv_invalid"),
        (b'a,a.png,,"mu"g', "csv_invalid"),
        (b"a,a.png,," + b"m" * 140_000, "csv_invalid"),
        (b"a,a.png,," + b"m" * (3 * MAX_ROW_BYTES), "csv_invalid"),
        (b"a," * MAX_ROW_BYTES, "csv_invalid"),
    ],
)
@pytest.mark.parametrize("rows_after", [1, 3000])
def test_csv_faults_cost_one_row(tmp_path: Path, line: bytes, code: str, rows_after: int) -> None:
    good = b"ok,a.png,,mug\n"
    manifest = write_csv(tmp_path, HEADER.encode() + good + line + b"\n" + good * rows_after)
    reject = the_reject(manifest)
    assert (reject.code, reject.where) == (code, "catalog.csv:3")
    assert [row.where for row in read_manifest(manifest)] == [f"catalog.csv:{i + 2}" for i in range(rows_after + 2)]
    reject.message.encode()


def test_csv_encoding_fault_still_tells_the_id(tmp_path: Path) -> None:
    reject = the_reject(write_csv(tmp_path, HEADER.encode() + b"mug-9,caf\xe9.png,,mug\n"))
    assert (reject.object_id, reject.code) == ("mug-9", "encoding")


def test_parquet_text_that_is_not_utf8_costs_one_row(tmp_path: Path) -> None:
    raw = pa.array([b"a.png", b"caf\xe9.png", b"c.png"], pa.binary())
    text = pa.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2])
    manifest = write_parquet(tmp_path, columns_of(3, image=text))
    reject = the_reject(manifest)
    assert (reject.code, reject.where) == ("encoding", "part-0.parquet:2")
    assert [row.object_id for row in read_manifest(manifest) if isinstance(row, Row)] == ["o0", "o2"]


# Streaming


class CountingFile(io.FileIO):
    taken = 0

    def readinto(self, buffer: Any) -> int | None:
        count = super().readinto(buffer)
        CountingFile.taken += count or 0
        return count


class CountingFileSystem(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """Local files that count what is read of them."""

    protocol = "counting"

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        return {"name": path, "size": Path(path).stat().st_size, "type": "file"}

    def open(self, path: str, mode: str = "rb", **kwargs: Any) -> CountingFile:
        return CountingFile(self._strip_protocol(path))


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> type[CountingFile]:
    fsspec.register_implementation("counting", CountingFileSystem, clobber=True)
    monkeypatch.setattr(CountingFile, "taken", 0)
    return CountingFile


@pytest.mark.parametrize("name", ["catalog.csv", "catalog.jsonl", "catalog.parquet"])
def test_reading_streams(tmp_path: Path, counting: type[CountingFile], name: str) -> None:
    count = 8_000
    note = "n" * 1500
    path = tmp_path / name
    if name.endswith(".csv"):
        body = "".join(f"o{i},{i}.png,,mug,{note}\n" for i in range(count))
        path.write_text("object_id,image,mask,class_name,note\n" + body)
    elif name.endswith(".jsonl"):
        line = {**GOOD, "note": note}
        path.write_text("".join(json.dumps(line | {"object_id": f"o{i}"}) + "\n" for i in range(count)))
    else:
        # One row group, as pyarrow writes a million rows by default, and without a dictionary.
        notes = [f"{i}{note}" for i in range(count)]
        pq.write_table(pa.table(columns_of(count, note=notes)), path, compression="none", use_dictionary=False)
    size = path.stat().st_size
    assert size > 10_000_000

    reading = read_manifest(f"counting://{path}")
    assert [row.object_id for row in islice(reading, 3)] == ["o0", "o1", "o2"]
    assert 0 < counting.taken < size / 4

    arrow_before = pa.total_allocated_bytes()
    tracemalloc.start()
    arrow_peak = max(pa.total_allocated_bytes() for _ in reading)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size / 4
    assert arrow_peak - arrow_before < size / 4
    assert counting.taken >= size * 0.9
