"""A catalog's pictures without Ray: prompts, objects, plan, index, what a worker does, the contact sheet."""

import hashlib
import io
import re
import shutil
import tempfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.batch_generate import main
from jobs.drawing import Drawer, PlannedBase, Pool
from jobs.generation.draw import OUTCOME, DrawBlock, blocks
from jobs.generation.index import SCHEMA, IndexWriter, drop_repeated, indexed_keys
from jobs.generation.objects import Selection
from jobs.generation.plan import Plan
from jobs.generation.prompts import Prompt, read_prompts
from jobs.generation.run import GenerationRun
from jobs.generation.settings import GenerationSettings
from jobs.generation.sheet import write_rejects, write_sheet
from jobs.room import Workers, WorkersRequest
from objdrive.adapters.artifact import LORA_FILE, ArtifactKey, SourceRecord, Sources
from objdrive.adapters.storage import open_files
from objdrive.adapters.store import ArtifactStore
from objdrive.errors import ObjdriveError, RowError
from objdrive.evaluation.encoders import BaseClip
from objdrive.evaluation.prompts import EvaluationPrompt
from objdrive.evaluation.reference import Reference
from objdrive.evaluation.ruler import Asked, Ruler
from objdrive.generate import generate
from objdrive.pictures import as_pixels
from objdrive.sampling.exact import Place, around, compose, read_photo
from objdrive.sampling.requests import DrawRequest, Picture

ROOT = Path(__file__).parents[2]
CATALOG = ROOT / "examples" / "catalog"
GRASS = Prompt(id="grass", text="a photo of {} on grass")
TEAPOTS = Prompt(id="tea", text="{} and tea", classes=("teapot",))


@pytest.fixture
def prompts_file(tmp_path):
    """Call it with a text: a prompts file that holds it."""

    def prompts_file(text):
        path = tmp_path / "prompts.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return prompts_file


class TestPrompts:
    def test_texts_and_mappings(self, prompts_file):
        read = read_prompts(
            prompts_file(
                "- a photo of {} on grass\n- {id: tea, text: '{} and tea', classes: [teapot]}\n- '{}, Größe 7'\n"
            )
        )
        assert read == (
            Prompt(id="a-photo-of-on-grass", text=GRASS.text),
            TEAPOTS,
            Prompt(id="gr-e-7", text="{}, Größe 7"),
        )
        assert read[0].is_for("teapot")
        assert read[1].is_for("teapot")
        assert not read[1].is_for("mug")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "must be a YAML list with at least one prompt"),
            ("a: b", "must be a YAML list"),
            ("[]", "must be a YAML list"),
            ("- [", "can't be read"),
            ("- on grass", r"entry 1: text: .*'on grass' must hold {}"),
            ("- a photo of {}\n- {}", "entry 2: {} must be a text, or a mapping"),
            ("- 7", "entry 1: 7 must be a text"),
            ('- "a\\0{}"', "NUL"),
            ("- {text: 'a {}', id: Grass}", "entry 1: id: "),
            ("- {text: 'a {}', class: mug}", "entry 1: class: Extra inputs"),
            ("- a photo of {}\n- a photo, of {}", "the ids a-photo-of are there more than once"),
        ],
    )
    def test_what_is_wrong_is_said(self, prompts_file, text, message):
        with pytest.raises(ObjdriveError, match=message):
            read_prompts(prompts_file(text))

    def test_a_file_that_is_not_there(self, tmp_path):
        with pytest.raises(ObjdriveError, match=re.escape(f"the prompts {tmp_path}/no.yaml can't be read")):
            read_prompts(f"{tmp_path}/no.yaml")

    def test_the_example_has_twelve_contexts_for_every_object(self):
        read = read_prompts(str(CATALOG / "prompts.yaml"))
        assert len(read) == 12
        assert not any(prompt.classes for prompt in read)


@pytest.fixture(scope="module")
def filled(tmp_path_factory, tiny64, put_adapter):
    """A store of two mugs and a teapot."""
    store = ArtifactStore(str(tmp_path_factory.mktemp("store")))
    for seed, (object_id, word) in enumerate([("mug-1", "mug"), ("mug-2", "mug"), ("pot", "teapot")]):
        put_adapter(store, tiny64, object_id, seed, class_name=word, rank=16 if word == "teapot" else 4)
    return store


def select(store, fingerprint, named="", classes=()):
    return list(Selection(named, classes, fingerprint).artifacts(store))


class TestSelection:
    def test_all_some_and_those_of_a_class(self, filled, tiny64):
        by = {"store": filled, "fingerprint": tiny64.fingerprint}
        assert [one for one, _ in select(**by)] == ["mug-1", "mug-2", "pot"]
        assert [one for one, _ in select(**by, named="pot, mug-1")] == ["pot", "mug-1"]
        assert [one for one, _ in select(**by, classes=("teapot",))] == ["pot"]

    def test_a_manifest(self, filled, tiny64, tmp_path):
        path = tmp_path / "some.csv"
        path.write_text("object_id,image,mask,class_name\npot,a.png,,teapot\n,b.png,,mug\ngone,c.png,,mug\n")
        (pot, artifact), (_, nameless), (gone, why) = select(filled, tiny64.fingerprint, str(path))
        assert (pot, artifact.class_name, gone) == ("pot", "teapot", "gone")
        assert (nameless.code, why.code) == ("id_invalid", "unknown_object")
        assert str(nameless).startswith("some.csv:3: ")

    def test_an_artifact_of_another_base(self, filled):
        ((_, why),) = select(filled, "0" * 32, "pot")
        assert (why.code, "name its base with --base" in str(why)) == ("wrong_base", True)

    @pytest.mark.parametrize("named", ["mug 1", "mug,,pot", "../pot,x"])
    def test_what_is_neither_ids_nor_a_manifest(self, named, filled, tiny64):
        with pytest.raises(ObjdriveError, match=r"neither an object id nor a manifest|no manifest"):
            select(filled, tiny64.fingerprint, named)


@pytest.fixture
def plan(filled, tiny64, tmp_path):
    """Call it: a plan of the store's objects, by default with two prompts and two seeds."""
    opened = []

    def plan(
        *, known=(), prompts=(GRASS, TEAPOTS), seeds=(7, 8), out=tmp_path / "out", place=None, kind="webp", store=filled
    ):
        base = PlannedBase("tiny64", None, tiny64.fingerprint)
        settings = GenerationSettings(base, store.url, str(out), kind, place=place)
        made = Plan(settings, prompts, seeds, steps=2, guidance_scale=None)
        opened.append(made)
        made.know(known)
        for object_id, artifact in select(store, tiny64.fingerprint):
            made.add(object_id, artifact)
        return made

    yield plan
    for one in opened:
        one.close()


class TestPlan:
    def test_every_object_by_every_prompt_that_is_for_it_with_every_seed(self, plan):
        rows = plan().to_draw(0, 100)
        assert [(row["object_id"], row["prompt_id"], row["seed"]) for row in rows] == [
            *(("mug-1", "grass", seed) for seed in (7, 8)),
            *(("mug-2", "grass", seed) for seed in (7, 8)),
            *(("pot", prompt, seed) for prompt in ("grass", "tea") for seed in (7, 8)),
        ]
        assert len({row["path"] for row in rows}) == len({row["key"] for row in rows}) == 8
        assert re.fullmatch(r"pictures/mug-1/grass-7-[0-9a-f]{12}\.webp", rows[0]["path"])

    def test_what_the_index_has_is_not_drawn(self, plan):
        keys = [row["key"] for row in plan().to_draw(0, 100)]
        again = plan(known=[(key, False) for key in keys[:5]], seeds=(7, 8, 9))
        assert again.counts == {"already": 5, "to draw": 7}
        assert not {row["key"] for row in again.to_draw(0, 100)} & set(keys[:5])

    def test_an_object_that_is_named_twice_is_drawn_once(self, plan, filled, tiny64):
        made = plan()
        for object_id, artifact in select(filled, tiny64.fingerprint, "pot"):
            made.add(object_id, artifact)
        assert (made.objects, made.counts["to draw"]) == (3, 8)

    def test_rows_come_in_waves_that_miss_none(self, plan):
        made, seen, after = plan(), [], 0
        while rows := made.to_draw(after, 3):
            after = rows[-1]["id"]
            seen += [row["key"] for row in rows]
            made.drawn([(row["id"], "drawn") for row in rows])
        assert len(set(seen)) == len(seen) == made.counts["drawn"] == 8
        assert made.to_draw(0, 3) == []

    def test_a_prompt_that_is_for_no_object_is_named(self, plan):
        kites = Prompt(id="kites", text="{} in the wind", classes=("kite",))
        assert plan(prompts=(GRASS, kites)).idle_prompts() == [kites]

    def test_a_fault_of_an_object_is_one_line(self, plan):
        made = plan()
        made.add("gone", RowError("unknown_object", "there is no 'gone'"))
        assert list(made.faults()) == [
            {
                "object_id": "gone",
                "prompt_id": None,
                "seed": None,
                "code": "unknown_object",
                "message": "there is no 'gone'",
            }
        ]
        assert (made.counts["failed"], made.reasons) == (1, {"unknown_object": 1})


class TestBlocks:
    @staticmethod
    def _sizes(objects, least):
        rows = [{"object_id": name, "id": number} for name, count in objects for number in range(count)]
        return [[row["object_id"] for row in block.to_pylist()] for block in blocks(rows, least)]

    def test_an_object_stays_in_one_block(self):
        assert self._sizes([("a", 3), ("b", 3), ("c", 3)], 4) == [["a"] * 3 + ["b"] * 3, ["c"] * 3]

    def test_one_of_very_many_rows_does_not(self):
        assert [len(block) for block in self._sizes([("a", 21)], 4)] == [16, 5]

    def test_objects_of_one_row_share_a_block(self):
        assert self._sizes([(name, 1) for name in "abcde"], 3) == [["a", "b", "c"], ["d", "e"]]


class TestIndex:
    def test_keys_come_back(self, tmp_path):
        files = open_files(str(tmp_path / "out"), 1)
        writer = IndexWriter(files, "run-1")
        assert list(indexed_keys(files)) == []
        for number in range(3):
            writer.add(
                {name: number if name in ("seed", "size") else None for name in SCHEMA.names} | {"key": f"{number}"}
            )
        writer.flush()
        writer.flush()
        assert list(indexed_keys(files)) == [[("0", False), ("1", False), ("2", False)]]
        (part,) = (tmp_path / "out" / "index").iterdir()
        assert pq.read_schema(part) == SCHEMA

    def test_a_part_that_is_cut_off_is_named(self, tmp_path):
        files = open_files(str(tmp_path), 1)
        files.replace("index/run-1-000000.parquet", b"PAR1 and no more")
        with pytest.raises(ObjdriveError, match=r"run-1-000000\.parquet can't be read .*: remove it"):
            list(indexed_keys(files))

    def test_bytes_of_a_key_that_are_wrong_are_named(self, tmp_path):
        files = open_files(str(tmp_path), 1)
        writer = IndexWriter(files, "run-1")
        writer.add(dict.fromkeys(SCHEMA.names) | {"key": "a-key"})
        writer.flush()
        (part,) = (tmp_path / "index").iterdir()
        for wrong in (b"\xff-key", b"b-key"):
            files.replace(f"index/{part.name}", part.read_bytes().replace(b"a-key", wrong, 1))
            with pytest.raises(ObjdriveError, match=r"run-1-000000\.parquet can't be read .*: remove it"):
                list(indexed_keys(files))

    def test_a_part_that_another_run_drops_meanwhile_is_passed_over(self, tmp_path, monkeypatch):
        files = open_files(str(tmp_path), 1)
        for run_id in ("run-1", "run-2"):
            writer = IndexWriter(files, run_id)
            writer.add(dict.fromkeys(SCHEMA.names) | {"key": run_id})
            writer.flush()
        listed = files.files("index")
        files.remove("index/run-1-000000.parquet")
        monkeypatch.setattr(files, "files", lambda folder: listed)
        assert list(indexed_keys(files)) == [[("run-2", False)]]

    def test_of_a_key_stays_the_newest_row_with_scores(self, tmp_path, plan):
        files = open_files(str(tmp_path), 1)
        for number, (key, score, sha256) in enumerate(
            [("a", None, "1"), ("a", 0.5, "2"), ("b", None, "3"), ("b", None, "4"), ("a", None, "5"), ("c", None, "6")]
        ):
            writer = IndexWriter(files, f"run-{number}")
            writer.add(dict.fromkeys(SCHEMA.names) | {"key": key, "score_whole": score, "sha256": sha256})
            writer.flush()
        made = plan()
        for keys in indexed_keys(files):
            made.know(keys)
        assert made.has_repeated()
        drop_repeated(files, made.stays)
        left = [pq.read_table(part).to_pylist()[0] for part in sorted((tmp_path / "index").iterdir())]
        assert [row["sha256"] for row in left] == ["2", "4", "6"]


@pytest.fixture(scope="module")
def drawer(tiny64):
    return Drawer(PlannedBase("tiny64", None, tiny64.fingerprint), Pool(1, 0.0))


class TestWorker:
    @pytest.fixture
    def work(self, drawer, monkeypatch):
        """Call it with a plan: all its rows as a worker leaves them."""
        monkeypatch.setattr("jobs.generation.draw.Drawer", lambda base, pool: drawer)

        def work(plan):
            worker = DrawBlock(plan.settings, Pool(1, 0.0))
            return [row for block in blocks(plan.to_draw(0, 100), 64) for row in worker(block).to_pylist()]

        return work

    def test_pictures_are_at_their_addresses_and_are_found_there(self, plan, work, tmp_path):
        rows = work(plan())
        assert {row["status"] for row in rows} == {"drawn"}
        for row in rows:
            data = (tmp_path / "out" / row["path"]).read_bytes()
            assert (row["sha256"], row["size"]) == (hashlib.sha256(data).hexdigest(), len(data))
            picture = Image.open(io.BytesIO(data))
            assert (picture.format, picture.size) == ("WEBP", (row["width"], row["height"])) == ("WEBP", (64, 64))
        assert len({row["sha256"] for row in rows}) == len(rows)

        cut = tmp_path / "out" / rows[0]["path"]
        whole = cut.read_bytes()
        cut.write_bytes(whole[: len(whole) // 2])
        again = {row["id"]: row for row in work(plan())}
        assert again.pop(rows[0]["id"])["status"] == "drawn"
        assert cut.read_bytes() == whole
        assert {row["status"] for row in again.values()} == {"found"}
        assert {row["sha256"] for row in again.values()} == {row["sha256"] for row in rows[1:]}

    def test_a_seed_draws_what_objdrive_generate_draws(self, plan, work, filled, tmp_path):
        (row, *_) = work(plan(kind="png"))
        (expected,) = generate(filled, "mug-1", GRASS.text, seeds=[7], steps=2)
        with Image.open(tmp_path / "out" / row["path"]) as picture:
            # In a batch with others, rounding differs.
            assert np.abs(np.asarray(picture, int) - np.asarray(expected, int)).max() <= 1

    def test_a_fault_is_of_its_row_alone(self, plan, work, filled, tmp_path):
        store = ArtifactStore(str(shutil.copytree(filled.url, tmp_path / "store")))
        lora = Path(store.folder("mug-2", store.current("mug-2").digest)) / LORA_FILE
        lora.write_bytes(lora.read_bytes()[:-9])
        long = Prompt(id="long", text="a photo of {}" + " very" * 90)
        rows = work(plan(prompts=(GRASS, long), seeds=(7,), store=store))
        assert {(row["object_id"], row["prompt_id"]): row["code"] for row in rows} == {
            ("mug-1", "grass"): None,
            ("mug-1", "long"): "invalid_prompt",
            ("mug-2", "grass"): "corrupt_artifact",
            ("mug-2", "long"): "corrupt_artifact",
            ("pot", "grass"): None,
            ("pot", "long"): "invalid_prompt",
        }

    def test_pictures_that_come_late_in_a_call_are_those_of_their_requests(self, drawer, filled):
        """A higher rank than the engine's makes it start anew in the midst of a call."""
        keys = [filled.current(one) for one in ("mug-1", "pot", "mug-2")]
        asked = [DrawRequest("a photo of {}", 3, (_key(one),), steps=2, guidance_scale=1.0) for one in keys]
        together = list(drawer.draw(filled.url, asked))
        assert [picture.objects[0].object_id for picture in together] == ["mug-1", "pot", "mug-2"]
        for request, picture in zip(asked, together, strict=True):
            (alone,) = drawer.draw(filled.url, [request])
            assert isinstance(alone, Picture)
            assert (alone.latents - picture.latents).abs().max() < 1e-3


class TestExact:
    @pytest.fixture
    def store(self, tmp_path, tiny64, put_adapter):
        """A store of two objects with photos, the second one's of which goes away."""
        store = ArtifactStore(str(tmp_path / "store"))
        for seed, object_id in enumerate(("alarm-clock-01", "drum-01")):
            files = [tmp_path / f"{object_id}{kind}.png" for kind in ("", "-mask")]
            Image.open(next((CATALOG / "images").glob(f"{object_id}.*"))).save(files[0])
            files[1].write_bytes((CATALOG / "masks" / f"{object_id}.png").read_bytes())
            image, mask = (SourceRecord(uri=str(path), size=path.stat().st_size, mark="") for path in files)
            put_adapter(store, tiny64, object_id, seed, sources=Sources(image=image, mask=mask))
        return store

    def test_a_product_keeps_its_own_pixels_and_one_whose_photo_is_gone_is_a_line(
        self, store, drawer, tiny64, tmp_path, monkeypatch
    ):
        monkeypatch.setattr("jobs.generation.draw.Drawer", lambda base, pool: drawer)
        base, place = PlannedBase("tiny64", None, tiny64.fingerprint), Place(0.5, 0.4, 0.5)
        settings = GenerationSettings(base, store.url, str(tmp_path / "out"), "png", place=place)
        with closing(Plan(settings, (GRASS,), (7, 8), steps=2, guidance_scale=None)) as plan:
            for object_id, artifact in select(store, tiny64.fingerprint):
                plan.add(object_id, artifact)
            (tmp_path / "drum-01.png").unlink()
            (block,) = blocks(plan.to_draw(0, 10), 64)
        rows = DrawBlock(settings, Pool(1, 0.0))(block).to_pylist()
        assert {(row["object_id"], row["code"]) for row in rows} == {
            ("alarm-clock-01", None),
            ("drum-01", "image_missing"),
        }
        cut_out = compose(read_photo(store.current("alarm-clock-01")), place, (64, 64))
        own = cut_out.kept == 1
        assert own.sum() > 100
        pictures = [np.asarray(Image.open(tmp_path / "out" / row["path"])) for row in rows if not row["code"]]
        assert len(pictures) == 2
        for picture in pictures:
            assert (picture[own] == cut_out.image[own]).all()
        outside = cut_out.kept == 0
        assert (pictures[0][outside] != pictures[1][outside]).any()
        # As the API draws it: by the base alone, from which the product's adapter differs.
        plain = DrawRequest(
            GRASS.text,
            7,
            (_key(store.current("alarm-clock-01")),),
            steps=2,
            guidance_scale=rows[0]["guidance_scale"],
        )
        (alone,) = drawer.draw(store.url, [replace(around(plain, "alarm clock"), canvas=cut_out.canvas)])
        expected = np.asarray(cut_out.over(alone.image), int)
        assert np.abs(pictures[0].astype(int) - expected).max() <= 1
        (adapted,) = drawer.draw(store.url, [replace(plain, canvas=cut_out.canvas)])
        assert np.abs(np.asarray(cut_out.over(adapted.image), int) - expected).max() > 8

    def test_scores_are_the_rulers_where_there_is_a_photo(self, store, drawer, tiny64, tmp_path, monkeypatch):
        monkeypatch.setattr("jobs.generation.draw.Drawer", lambda base, pool: drawer)
        base = PlannedBase("tiny64", None, tiny64.fingerprint)
        settings = GenerationSettings(base, store.url, str(tmp_path / "out"), "png", scored=True)
        two = Prompt(id="two", text="{} on sand, beside another {}")
        (tmp_path / "drum-01.png").unlink()
        with closing(Plan(settings, (GRASS, two), (7,), steps=2, guidance_scale=None)) as plan:
            for object_id, artifact in select(store, tiny64.fingerprint):
                plan.add(object_id, artifact)
            (block,) = blocks(plan.to_draw(0, 10), 64)
        rows = DrawBlock(settings, Pool(1, 0.0))(block).to_pylist()
        clock = {row["prompt_id"]: row for row in rows if row["object_id"] == "alarm-clock-01"}
        reference = Reference.of("alarm-clock-01", "mug", read_photo(store.current("alarm-clock-01")), 64)
        for prompt_id, text in (("grass", GRASS.text), ("two", "{} on sand, beside another mug")):
            asked = EvaluationPrompt(id=prompt_id, kind="context", text=text)
            encoder = BaseClip(tiny64)
            with Image.open(tmp_path / "out" / clock[prompt_id]["path"]) as picture:
                pixels = as_pixels(np.array(picture)[None])
            ruler = Ruler(encoder, [reference], [asked])
            (expected,) = ruler.measure(encoder, pixels, [Asked("alarm-clock-01", prompt_id)])
            for name in ("whole", "object", "text"):
                assert clock[prompt_id][f"score_{name}"] == pytest.approx(getattr(expected, name), abs=1e-4)
        drum = [row for row in rows if row["object_id"] == "drum-01"]
        assert {(row["status"], row["score_whole"]) for row in drum} == {("drawn", None)}

    def test_pictures_that_are_not_square_have_scores(self, store, drawer, tiny64, tmp_path, monkeypatch):
        monkeypatch.setattr("jobs.generation.draw.Drawer", lambda base, pool: drawer)
        base = PlannedBase("tiny64", None, tiny64.fingerprint)
        settings = GenerationSettings(base, store.url, str(tmp_path / "out"), "png", size=(96, 64), scored=True)
        with closing(Plan(settings, (GRASS,), (7,), steps=2, guidance_scale=None)) as plan:
            for object_id, artifact in select(store, tiny64.fingerprint):
                plan.add(object_id, artifact)
            (block,) = blocks(plan.to_draw(0, 10), 64)
        rows = DrawBlock(settings, Pool(1, 0.0))(block).to_pylist()
        assert {(row["width"], row["height"]) for row in rows} == {(96, 64)}
        assert all(-1 <= row["score_whole"] <= 1 for row in rows)

    def test_a_rerun_scores_what_has_no_scores_and_draws_nothing(self, store, drawer, tiny64, tmp_path, monkeypatch):
        monkeypatch.setattr("jobs.generation.draw.Drawer", lambda base, pool: drawer)
        monkeypatch.setattr("jobs.generation.run.find_workers", lambda request, on_wait: Workers(1, 1, 0.0))
        monkeypatch.setattr(GenerationRun, "_drawn", _in_this_process)
        files = open_files(str(tmp_path / "out"), 1)
        (tmp_path / "drum-01.png").rename(tmp_path / "away.png")

        def run(run_id, *, scored):
            base = PlannedBase("tiny64", None, tiny64.fingerprint)
            settings = GenerationSettings(base, store.url, files.url, "png", scored=scored)
            with closing(Plan(settings, (GRASS,), (7, 8), steps=2, guidance_scale=None)) as plan:
                run = GenerationRun(plan, files, run_id)
                run.find(Selection("", (), tiny64.fingerprint), store)
                run.work_off(WorkersRequest())
                return dict(plan.counts)

        def rows():
            parts = sorted((tmp_path / "out/index").iterdir())
            return [row for part in parts for row in pq.read_table(part).to_pylist()]

        run("run-1", scored=False)
        first = {row["key"]: row for row in rows()}
        assert {row["score_whole"] for row in first.values()} == {None}
        counts = run("run-2", scored=True)
        assert {name: count for name, count in counts.items() if count} == {"found": 4, "scored": 2}
        now = {row["key"]: row for row in rows()}
        # Each picture once, and as it was.
        assert len(rows()) == 4
        assert {key: row["sha256"] for key, row in now.items()} == {key: row["sha256"] for key, row in first.items()}
        assert {row["object_id"] for row in now.values() if row["score_whole"] is not None} == {"alarm-clock-01"}
        # The photo is back.
        (tmp_path / "away.png").rename(tmp_path / "drum-01.png")
        counts = run("run-3", scored=True)
        assert (counts["already"], counts["found"]) == (2, 2)
        assert len(rows()) == 4
        assert all(row["score_whole"] is not None for row in rows())
        assert run("run-4", scored=True) == {"already": 4, "to draw": 0}

        # The photo is gone again, and so is the index; then a picture's file, which is drawn anew and has one line.
        (tmp_path / "drum-01.png").unlink()
        shutil.rmtree(tmp_path / "out/index")
        run("run-5", scored=True)
        (row, _) = (row for row in rows() if row["object_id"] == "drum-01")
        (part,) = (tmp_path / "out/index").iterdir()
        stale = [one | {"sha256": "stale"} if one == row else one for one in rows()]
        pq.write_table(pa.Table.from_pylist(stale, SCHEMA), part)
        Path(row["address"]).unlink()
        assert run("run-6", scored=True)["drawn"] == 1
        assert len(rows()) == 4
        (again,) = (one for one in rows() if one["key"] == row["key"])
        assert again["sha256"] == hashlib.sha256(Path(row["address"]).read_bytes()).hexdigest()

    def test_pictures_of_another_place_are_others(self, plan):
        keys = [plan(place=place).to_draw(0, 1)[0]["key"] for place in (None, Place(), Place(0.5))]
        assert len(set(keys)) == 3

    def test_pictures_around_own_pixels_are_of_a_version(self, plan, monkeypatch):
        before = [plan(place=place).to_draw(0, 1)[0]["key"] for place in (None, Place())]
        monkeypatch.setattr("jobs.generation.settings.AROUND_VERSION", 99)
        after = [plan(place=place).to_draw(0, 1)[0]["key"] for place in (None, Place())]
        assert before[0] == after[0]
        assert before[1] != after[1]

    def test_a_place_without_exact_is_refused(self, filled, prompts_file, tmp_path, capsys):
        words = [filled.url, "--prompts", prompts_file("- a {}"), "--out", str(tmp_path / "out"), "--place", "0.5"]
        assert main(words) == 2
        assert "give --exact too" in capsys.readouterr().err


def _in_this_process(run, wave, pool):
    worker = DrawBlock(run.plan.settings, pool)
    return iter([row for block in wave for row in worker(block).to_pylist()])


def _key(artifact):
    return ArtifactKey(artifact.object_id, artifact.digest)


class TestSheet:
    @pytest.fixture
    def sheet(self, plan, tmp_path):
        """Call it with how many pictures to show: the pages by name."""

        def sheet(most=1000, seeds=range(40)):
            made = plan(seeds=seeds)
            rows = made.to_draw(0, 1000)
            made.drawn([(row["id"], "drawn") for row in rows[:-1]])
            made.failed(rows[-1] | {"code": "drawing_failed", "message": "<no> luck"})
            files = open_files(str(tmp_path / "sheet"), 1)
            write_rejects(files, "run-1", made)
            write_sheet(files, "run-1", made, [("store", "a & b")], most)
            folder = tmp_path / "sheet" / "runs" / "run-1"
            return {path.name: path.read_text() for path in folder.glob("*.html")}, pq.read_table(
                folder / "rejects.parquet"
            ).to_pylist()

        return sheet

    def test_every_picture_is_on_a_page_of_each_order(self, sheet):
        pages, rejects = sheet()
        for order in ("object", "prompt"):
            names = sorted(name for name in pages if name.startswith(f"by-{order}"))
            shown = [link for name in names for link in re.findall(r'src="([^"]+)"', pages[name])]
            assert len(set(shown)) == len(shown) == 159
            assert all(link.startswith("../../pictures/") for link in shown)
            assert names == [f"by-{order}-00001.html", f"by-{order}-00002.html"]
            assert f'href="{names[1]}">next' in pages[names[0]]
            assert f'href="{names[0]}">previous' in pages[names[1]]
            assert ">next</a>" not in pages[names[1]]
            assert all(name in pages["index.html"] for name in names)
        assert "&lt;no&gt; luck" in pages["index.html"]
        assert [one["code"] for one in rejects] == ["drawing_failed"]

    def test_the_front_says_that_not_all_are_shown(self, sheet):
        pages, _ = sheet(most=10)
        assert "first 10 of 159 pictures" in pages["index.html"]
        assert len(re.findall("<img", pages["by-object-00001.html"])) == 10

    def test_nothing_drawn_is_a_front_alone(self, plan, tmp_path):
        files = open_files(str(tmp_path / "sheet"), 1)
        write_sheet(files, "run-1", plan(), [], 10)
        assert [path.name for path in (tmp_path / "sheet").rglob("*") if path.is_file()] == ["index.html"]


class TestCommand:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--n", "0"], "must be a whole number of at least 1"),
            (["--seed", "-1"], "must be a whole number of at most 18 digits"),
            (["--format", "gif"], "invalid choice"),
            (["--guidance-scale", "0.5"], "must be a number of at least 1"),
            (["--workers", "many"], "give a number, or MIN:MAX"),
            (["--objects", "a b"], "neither an object id nor a manifest"),
            (["--out", "memory://x"], "memory is not shared"),
            (["--base", "nosuch"], "no base 'nosuch'"),
        ],
    )
    def test_bad_values(self, options, message, filled, prompts_file, tmp_path, capsys):
        words = [filled.url, "--prompts", prompts_file("- a {}"), "--out", str(tmp_path / "out"), *options]
        try:
            status = main(words)
        except SystemExit as exit:
            status = exit.code
        assert status == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_a_dry_run_counts_and_writes_nothing(self, filled, prompts_file, tmp_path, capsys):
        prompts = prompts_file("- a {}\n- {text: 'a {} in the wind', classes: [kite]}\n")
        words = [filled.url, "--prompts", prompts, "--out", str(tmp_path / "out"), "--n", "2", "--dry-run"]
        assert main([*words, "--objects", "mug-1,pot"]) == 0
        output = capsys.readouterr().out
        assert "2 objects, 2 prompts: 4 pictures to draw, 0 there already" in output
        assert "the prompt a-in-the-wind is for no object here: kite" in output
        assert main([*words, "--objects", "mug-1,gone"]) == 3
        assert not (tmp_path / "out").exists()

    def test_the_bases_own_square_is_one_size_named_or_not(self, filled, prompts_file, tiny64, tmp_path, monkeypatch):
        sizes = []
        settings = GenerationSettings

        def noted(*args):
            sizes.append(settings(*args).size)
            return settings(*args)

        monkeypatch.setattr("jobs.batch_generate.GenerationSettings", noted)
        words = [filled.url, "--prompts", prompts_file("- a {}"), "--out", str(tmp_path / "out"), "--dry-run"]
        for options in ([], ["--size", f"{tiny64.resolution}x{tiny64.resolution}"], ["--size", "96x64"]):
            assert main([*words, *options]) == 0
        assert sizes == [None, None, (96, 64)]

    def test_an_empty_store_is_told(self, prompts_file, tmp_path, capsys):
        (tmp_path / "empty" / "objects").mkdir(parents=True)
        words = [str(tmp_path / "empty"), "--prompts", prompts_file("- a {}"), "--out", str(tmp_path / "out")]
        assert main(words) == 2
        assert "has no such objects" in capsys.readouterr().err


def test_outcomes_have_all_that_the_index_holds():
    assert set(SCHEMA.names) - {"address"} <= set(OUTCOME.names)


def test_a_plan_leaves_no_file_behind(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with closing(plan()):
        assert list(tmp_path.glob("objdrive-plan-*"))
    assert not list(tmp_path.glob("objdrive-plan-*"))
