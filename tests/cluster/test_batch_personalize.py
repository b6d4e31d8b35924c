"""The job as a user runs it: bad rows, reruns, dry runs, scenes, exit statuses."""

import os
import re
import shutil
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import s3fs
from conftest import CATALOG, Finished, Job, assert_whole, commits, write_manifest
from monitoring import scraped
from PIL import Image

from objdrive.adapters.index import read_index
from objdrive.adapters.store import ArtifactStore

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]

StartJob = Callable[..., Job]
GOOD = sorted(
    [
        *("good", "half-the-size", "last", "ones-and-zeros", "unknown-class"),
        *("tiff", "avif", "bmp", "gif", "jp2", "webp"),
        *("looks-inverted", "red-on-black", "auto", "no-mask-plain", "stored-pixels"),
        *("own-transparency", "sixteen-bits", "signed"),
    ]
)


def bomb() -> bytes:
    """A PNG of a few hundred bytes that says it has 30,000 x 30,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def write_mask(path: Path, size: tuple[int, int], box: tuple[int, int, int, int]) -> Path:
    mask = np.zeros((size[1], size[0]), np.uint8)
    left, top, right, bottom = box
    mask[top:bottom, left:right] = 255
    Image.fromarray(mask).save(path)
    return path


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[str]:
    """The test's folder, by HTTP; its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def bad_manifest(tmp_path: Path, shop: str) -> tuple[Path, list[tuple[str, str]]]:
    """A manifest with good rows among bad ones of every kind; object ids and reason codes."""
    image, good_mask = tmp_path / "drum.jpg", tmp_path / "drum.png"
    shutil.copy(CATALOG / "images" / "drum-01.jpg", image)
    shutil.copy(CATALOG / "masks" / "drum-01.png", good_mask)
    width, height = Image.open(image).size
    (tmp_path / "text.jpg").write_text("this is not an image")
    (tmp_path / "cut.jpg").write_bytes(image.read_bytes()[:3000])
    (tmp_path / "bomb.png").write_bytes(bomb())
    write_mask(tmp_path / "small.png", (width // 2, height // 3), (10, 10, 50, 50))
    write_mask(tmp_path / "empty.png", (width, height), (0, 0, 0, 0))
    write_mask(tmp_path / "full.png", (width, height), (0, 0, width, height))
    labels = np.zeros((height, width), np.uint8)
    labels[50:150, 50:150], labels[200:300, 200:300] = 80, 160
    Image.fromarray(labels).save(tmp_path / "labels.png")
    binary = np.asarray(Image.open(good_mask).convert("L")) >= 128
    Image.fromarray(binary.astype(np.uint8)).save(tmp_path / "ones.png")
    Image.open(good_mask).convert("L").resize((width // 2, height // 2)).save(tmp_path / "half.png")
    for suffix in ("tiff", "avif", "bmp", "gif", "jp2", "webp"):
        Image.open(image).save(tmp_path / f"drum.{suffix}")
    inverted = np.where(binary, 0, 255).astype(np.uint8)
    Image.fromarray(inverted).save(tmp_path / "inverted.png")
    red = np.zeros((height, width, 3), np.uint8)
    red[binary, 0] = 255
    Image.fromarray(red).save(tmp_path / "red.png")
    packshot = np.array(Image.open(image).convert("RGB"))
    packshot[~binary] = 255
    Image.fromarray(packshot).save(tmp_path / "packshot.png")
    turned = Image.open(image).crop((0, 0, width, height - 64)).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    Image.open(good_mask).convert("L").crop((0, 0, width, height - 64)).transpose(Image.Transpose.ROTATE_90).save(
        tmp_path / "stored.png"
    )
    write_mask(tmp_path / "six.png", (width, height), (40, 40, 43, 42))
    colours = np.array(Image.open(image).convert("RGB"))
    Image.fromarray(np.dstack([colours, np.where(binary, 255, 0).astype(np.uint8)])).save(tmp_path / "cutout.png")
    cv2.imwrite(str(tmp_path / "deep.png"), colours[..., ::-1].astype(np.uint16) * 257)
    Image.open(image).resize((8, 8)).save(tmp_path / "tiny.png")
    rows = [
        ("good", "drum.jpg", "drum.png", "drum", ""),
        ("unknown-class", "drum.jpg", "drum.png", "zither", ""),
        ("ones-and-zeros", "drum.jpg", "ones.png", "drum", ""),
        ("half-the-size", "drum.jpg", "half.png", "drum", ""),
        *((kind, f"drum.{kind}", "drum.png", "drum", "") for kind in ("tiff", "avif", "bmp", "gif", "jp2", "webp")),
        ("looks-inverted", "drum.jpg", "inverted.png", "drum", ""),
        ("red-on-black", "drum.jpg", "red.png", "drum", ""),
        ("auto", "packshot.png", "auto", "drum", ""),
        ("no-mask-plain", "packshot.png", "", "drum", ""),
        ("stored-pixels", "turned.jpg", "stored.png", "drum", ""),
        ("own-transparency", "cutout.png", "", "drum", ""),
        ("sixteen-bits", "deep.png", "drum.png", "drum", ""),
        ("signed", f"{shop}/drum.jpg?X-Amz-Signature=SECRET", f"{shop}/drum.png?sig=SECRET", "drum", ""),
        ("signed-away", f"{shop}/nowhere.jpg?token=SECRET", "drum.png", "drum", "image_missing"),
        ("folder", ".", "drum.png", "drum", "source_not_file"),
        ("tiny", "tiny.png", "drum.png", "drum", "image_too_small"),
        ("braces", "drum.jpg", "drum.png", "mug {}", "class_invalid"),
        ("labels", "drum.jpg", "labels.png", "drum", "mask_labels"),
        ("windows", "photos\\drum.jpg", "drum.png", "drum", "image_missing"),
        ("metadata", "http://169.254.169.254/latest/drum.jpg", "drum.png", "drum", "source_forbidden"),
        ("long-class", "drum.jpg", "drum.png", "washing machine " * 4, "class_too_long"),
        ("no-file", "nowhere.jpg", "drum.png", "drum", "image_missing"),
        ("no-mask-file", "drum.jpg", "nowhere.png", "drum", "mask_missing"),
        ("no-image", "text.jpg", "drum.png", "drum", "image_invalid"),
        ("truncated", "cut.jpg", "drum.png", "drum", "image_truncated"),
        ("bomb", "bomb.png", "drum.png", "drum", "image_too_many_pixels"),
        ("other-size", "drum.jpg", "small.png", "drum", "mask_size_mismatch"),
        ("empty", "drum.jpg", "empty.png", "drum", "mask_empty"),
        ("full", "drum.jpg", "full.png", "drum", "mask_full"),
        ("six-pixels", "drum.jpg", "six.png", "drum", "mask_too_small"),
        ("no-alpha", "drum.jpg", "", "drum", "mask_absent"),
        ("../x", "drum.jpg", "drum.png", "drum", "id_invalid"),
        ("", "drum.jpg", "drum.png", "drum", "id_invalid"),
        ("x" * 300, "drum.jpg", "drum.png", "drum", "id_invalid"),
        ("nul\0", "drum.jpg", "drum.png", "drum", "id_invalid"),
    ]
    lines = [f"{object_id},{picture},{mask},{name},," for object_id, picture, mask, name, _ in rows]
    lines += ["good,drum.jpg,drum.png,drum,,", "good,drum.jpg,drum.png,guitar,,"]
    lines += ["twin-a,drum.jpg,drum.png,drum,twins,", "twin-b,drum.jpg,drum.png,guitar,twins,"]
    lines += ["far-a,drum.jpg,drum.png,drum,far,", "far-b,drum.bmp,drum.png,guitar,far,"]
    text = "object_id,image,mask,class_name,scene,price\n" + "\n".join(lines) + "\n"
    path = tmp_path / "manifest.csv"
    path.write_bytes(text.encode() + b"latin-1,drum.jpg,drum.png,caf\xe9,,3\nlast,drum.jpg,drum.png,drum,,7\n")
    # What is not printable or too long in an id is made so, and cut.
    shown = {"nul\0": "nul\\x00", "x" * 300: "x" * 128}
    reasons = [(shown.get(object_id, object_id), code) for object_id, _, _, _, code in rows if code]
    return path, [*reasons, ("latin-1", "encoding")]


def test_every_bad_row_is_rejected_with_its_reason_and_the_good_ones_are_committed(
    start_job: StartJob, bad_manifest: tuple[Path, list[tuple[str, str]]]
) -> None:
    manifest, reasons = bad_manifest
    job = start_job(manifest, "--workers", "2")
    done = job.finish()
    assert done.status == 3, done.output
    assert_whole(job.store, GOOD)
    assert "worker_lost" not in {line["code"] for line in done.rejects}
    expected = [*reasons, ("good", "duplicate_id"), ("twin-a", "scene_overlap"), ("twin-b", "scene_overlap")]
    expected += [("far-a", "scene_image_differs"), ("far-b", "scene_image_differs")]
    assert sorted((line["object_id"], line["code"]) for line in done.rejects) == sorted(expected)
    assert all(line["where"].startswith("manifest.csv:") and line["where"] in line["message"] for line in done.rejects)
    statuses = {(line["object_id"], line["status"]) for line in done.results}
    assert statuses == {(o, "committed") for o in GOOD} | {("good", "repeated")}
    by_id = {line["object_id"]: line for line in done.results}
    assert "zither" in by_id["unknown-class"]["warning"]
    assert "the lighter is taken" in by_id["ones-and-zeros"]["warning"]
    assert "resampled" in by_id["half-the-size"]["warning"]
    assert "looks inverted" in by_id["looks-inverted"]["warning"]
    assert "ground is plain" in by_id["no-mask-plain"]["warning"]
    assert "EXIF orientation" in by_id["stored-pixels"]["warning"]
    assert by_id["last"]["price"] == "7"
    assert "mask_size_mismatch" in done.report
    assert done.report.count("data:image/webp;base64") >= len(GOOD) * 7
    written = [path.read_bytes() for path in job.store.rglob("*") if path.is_file()]
    assert not any(b"SECRET" in content for content in [*written, done.output.encode()])
    assert_measured(done)


def assert_measured(done: Finished) -> None:
    """Ray's node exports what the run's tables say."""
    run_id = re.search(r"/runs/([^/]+)/report\.html", done.output)[1]
    exported = scraped([node["MetricsExportPort"] for node in ray.nodes()])

    def values(name: str, label: str) -> Counter[str]:
        counted: Counter[str] = Counter()
        for labels, value in exported[f"ray_objdrive_run_{name}_total"]:
            if labels["run"] == run_id:
                counted[labels.get(label, "")] += int(value)
        return counted

    lines = [*done.results, *done.rejects]
    assert values("rows_read", "").total() == len(lines)
    assert values("rejects", "reason") == Counter(line["code"] for line in done.rejects)
    rows = values("rows", "status")
    assert rows["rejected"] + rows["failed"] == len(done.rejects)
    assert {status: count for status, count in rows.items() if status not in ("rejected", "failed")} == Counter(
        line["status"] for line in done.results
    )
    events = values("events", "event")
    assert 2 <= events["leased"] == events["finished"]
    # No worker died, stood still or failed.
    assert {event for event, count in events.items() if count} == {"leased", "finished"}
    [buckets] = [
        value
        for labels, value in exported["ray_objdrive_run_object_seconds_bucket"]
        if labels["run"] == run_id and labels["le"] == "+Inf"
    ]
    assert buckets == rows["committed"]
    # A run that has just ended had no lease left.
    for gauge in ("leases", "rows_in_work"):
        assert [value for labels, value in exported[f"ray_objdrive_run_{gauge}"] if labels["run"] == run_id] == [0]


def test_a_rerun_over_a_committed_manifest_reads_no_image_and_trains_nothing(
    start_job: StartJob, tmp_path: Path
) -> None:
    catalog = tmp_path / "catalog"
    shutil.copytree(CATALOG, catalog)
    lines = (catalog / "manifest.csv").read_text().splitlines()
    manifest = catalog / "some.csv"
    manifest.write_text("\n".join([*lines[:6], ""]))
    first = start_job(manifest, "--workers", "2").finish()
    assert first.status == 0, first.output
    ids = [line.split(",")[0] for line in lines[1:6]]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").glob("objects/*/*/*")}
    # Whoever reads these pictures now reads garbage.
    for folder in ("images", "masks"):
        for path in (catalog / folder).iterdir():
            status = path.stat()
            path.write_bytes(b"?" * status.st_size)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    second = start_job(manifest, "--workers", "2").finish()
    assert second.status == 0, second.output
    assert {line["status"] for line in second.results} == {"already"}
    assert sorted(line["object_id"] for line in second.results) == sorted(ids)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    # The two scenes of the catalog: one adapter each, in the folder of each of its objects.
    digests = commits(tmp_path / "store")
    assert digests["jeans-01"] == digests["high-heel-01"]
    assert digests["umbrella-01"] == digests["hiking-boot-01"]
    store = ArtifactStore(str(tmp_path / "store"))
    scene = store.current("jeans-01")
    assert scene is not None
    assert [member.object_id for member in scene.members] == ["high-heel-01", "jeans-01"]


def test_a_dry_run_checks_everything_and_writes_nothing(
    start_job: StartJob, bad_manifest: tuple[Path, list[tuple[str, str]]], tmp_path: Path
) -> None:
    manifest, _ = bad_manifest
    done = start_job(manifest, "--dry-run", "--allow-rejects").finish()
    assert done.status == 0, done.output
    assert "to train" in done.output
    assert "1 x mask_size_mismatch" in done.output
    assert not (tmp_path / "store").exists()


def test_a_manifest_without_a_column_is_refused(start_job: StartJob, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, ["a"], header="object_id,picture,mask,class_name")
    done = start_job(manifest).finish()
    assert done.status == 2
    assert "image" in done.output
    assert "picture" in done.output


def test_a_catalog_in_a_bucket(start_job: StartJob, tmp_path: Path) -> None:
    storage = s3fs.S3FileSystem()
    storage.mkdir("shop")
    storage.mkdir("adapters")
    rows = []
    for name in ("drum-01", "key-01"):
        storage.put_file(str(CATALOG / "images" / f"{name}.jpg"), f"shop/spring/{name}.jpg")
        storage.put_file(str(CATALOG / "masks" / f"{name}.png"), f"shop/spring/{name}.png")
        row = {"object_id": name, "image": f"{name}.jpg", "mask": f"{name}.png", "class_name": name[:-3], "price": 7.5}
        rows.append(row)
    with storage.open("shop/spring/manifest.parquet", "wb") as file:
        pq.write_table(pa.Table.from_pylist(rows), file)
    url = "s3://adapters/spring"
    first = start_job("s3://shop/spring/*.parquet", "--workers", "1", store=url)
    assert first.process.wait(240) == 0, first.output()
    store = ArtifactStore(url)
    assert list(store.object_ids()) == ["drum-01", "key-01"]
    assert [problem for object_id in store.object_ids() for problem in store.verify(object_id)] == []
    (results,) = storage.glob("adapters/spring/runs/*/results.parquet")
    with storage.open(results, "rb") as file:
        assert pq.read_table(file).column("price").to_pylist() == [7.5, 7.5]
    index = read_index(store)
    assert index is not None
    assert [row for rows in index.batches() for row in rows] == [
        ("drum-01", "drum", "drum-01\ndrum"),
        ("key-01", "key", "key-01\nkey"),
    ]
