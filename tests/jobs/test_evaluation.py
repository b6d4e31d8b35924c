"""The evaluation set, the tables of pictures and the pages, without Ray."""

import csv
import io
from dataclasses import astuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.drawing import PlannedBase, Pool
from jobs.evaluate import main as evaluate
from jobs.evaluation.compose import PROMPTS, choose_subjects, read_halves, write_half
from jobs.evaluation.pages import by_method, choose_trades, summarise, trade_figures, write_pages
from jobs.evaluation.pictures import (
    BASE_METHOD,
    SCHEMA,
    DrawingSettings,
    control_pictures,
    draw,
    find_artifacts,
    measured_by,
    plan_drawing,
    read_reference,
)
from jobs.evaluation.scoring import SCHEMA as SCORES
from jobs.evaluation.scoring import by_chance
from jobs.pretrain.packs import PACKS
from jobs.pretrain.scenes import STYLES
from jobs.pretrain.sprites import Sprites, draw_sprites
from objdrive.adapters.artifact import SourceRecord, Sources
from objdrive.adapters.store import ArtifactStore
from objdrive.errors import ObjdriveError
from objdrive.evaluation.layout import around, find_things
from objdrive.evaluation.prompts import EvaluationPrompt, read_prompts
from objdrive.evaluation.reference import Reference
from objdrive.evaluation.summary import spread_per_object
from objdrive.pictures import encode_picture

SHIPPED = read_prompts(PROMPTS)
TWO = [prompt for prompt in SHIPPED if prompt.id in ("grass", "night")]
DRAWING = DrawingSettings(PlannedBase("tiny64", None, "0" * 32), 2, 4.0)


def test_the_halves_are_disjoint_and_hold_at_least_forty_known_classes_with_a_held_out_drawing(tiny64):
    halves = read_halves()
    words = [word for half in halves.values() for word in half]
    assert set(halves) == {"development", "test"}
    assert len(words) == len(set(words)) >= 40
    assert len(halves["development"]) == len(halves["test"])
    assert set(words) <= tiny64.files.classes


def test_a_class_in_both_halves_is_refused(tmp_path):
    path = tmp_path / "halves.yaml"
    path.write_text("development: [mug, vase]\ntest: [kite, mug]\n")
    with pytest.raises(ObjdriveError, match="mug may be in one half only"):
        read_halves(path)


def test_shipped_prompts_try_contexts_sizes_styles_pairs_and_sides_and_say_what_they_show():
    kinds = {prompt.kind for prompt in SHIPPED}
    assert kinds == {"context", "size", "style", "pair", "side"}
    for kind in kinds:
        assert sum(prompt.kind == kind for prompt in SHIPPED) >= 2
    for prompt in SHIPPED:
        said = prompt.text.removeprefix("a photo of ")
        assert prompt.shows.context in said
        assert not prompt.shows.style or said.startswith(prompt.shows.style)
        assert prompt.shows.style in ("", *STYLES)
        assert not prompt.shows.beside or prompt.shows.beside in said
        assert not prompt.shows.side or f"to the {prompt.shows.side} of" in said


def test_second_things_are_of_no_class_of_the_set():
    words = {word for half in read_halves().values() for word in half}
    assert not words & {prompt.shows.beside for prompt in SHIPPED}


def _sprites(rows):
    classes = tuple(dict.fromkeys(word for word, _, _ in rows))
    pictures = np.zeros((len(rows), 128, 128, 4), np.uint8)
    labels = np.array([classes.index(word) for word, _, _ in rows])
    return Sprites(pictures, classes, labels, tuple(s for _, s, _ in rows), tuple(u for _, _, u in rows))


def test_the_same_drawing_in_another_rendering_is_no_rival():
    assert {pack.family for pack in PACKS if pack.name in ("fluent-emoji", "fluent-3d")} == {"fluent"}
    rows = [
        ("key", "noto/key", "train"),
        ("key", "twemoji/key", "near"),
        ("key", "fluent-emoji/key", "held"),
        ("key", "fluent-3d/key", "held"),
        ("key", "emojione/key", "held"),
        ("lock", "noto/lock", "train"),
    ]
    (subject,) = choose_subjects(_sprites(rows), ["key"])
    assert (subject.object_id, subject.row, subject.rivals) == ("key-held", 2, (0, 4))


@pytest.mark.parametrize("use", ["train", "held"])
def test_a_class_without_held_out_drawing_or_without_rival_is_refused(use):
    with pytest.raises(ObjdriveError, match="the class 'key' has"):
        choose_subjects(_sprites([("key", "noto/key", use)]), ["key"])


@pytest.mark.parametrize(
    ("shows", "fault"),
    [
        (None, "says nothing"),
        ({"context": "on the moon"}, "no backdrop"),
        ({"context": "on grass", "style": "a fresco of"}, "a fresco of"),
        ({"context": "on grass", "beside": "tractor"}, "no drawing"),
    ],
)
def test_what_cannot_be_composed_is_refused(shows, fault, tmp_path):
    prompt = EvaluationPrompt(id="a", kind="context", text="a photo of {}", shows=shows)
    with pytest.raises(ObjdriveError, match=fault):
        write_half(draw_sprites(0), ["kite"], [prompt], tmp_path, resolution=64, scenes=3)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    folder = tmp_path_factory.mktemp("half")
    write_half(draw_sprites(0), ["apple", "kite"], TWO, folder, resolution=64, scenes=3)
    return folder


def test_a_half_is_the_same_whenever_it_is_written(half, tmp_path):
    write_half(draw_sprites(0), ["kite"], TWO, tmp_path, resolution=64, scenes=3)
    for name in ("images/kite-held.png", "masks/kite-held.png"):
        assert (tmp_path / name).read_bytes() == (half / name).read_bytes()
    with (half / "manifest.csv").open() as file:
        assert [row["object_id"] for row in csv.DictReader(file)] == ["apple-held", "kite-held"]
    gallery = pq.read_table(half / "gallery.parquet").to_pylist()
    assert len(gallery) == 2 * 3 * len(TWO) * 3
    assert {row["object_id"] for row in gallery} == {"apple-held", "kite-held", ""}


@pytest.fixture
def store(half, tmp_path, tiny64, put_adapter):
    store = ArtifactStore(str(tmp_path / "store"))
    for seed, word in enumerate(("apple", "kite")):
        paths = [str(half / folder / f"{word}-held.png") for folder in ("images", "masks")]
        image, mask = (SourceRecord(uri=path, size=1, mark="") for path in paths)
        put_adapter(store, tiny64, f"{word}-held", seed, class_name=word, sources=Sources(image=image, mask=mask))
    return store


def test_every_method_is_asked_for_the_same_pictures(store, tiny64):
    stores = {"first": store.url, "second": store.url}
    artifacts = find_artifacts(stores, tiny64.fingerprint)
    rows = plan_drawing(stores, artifacts, TWO, seeds=3, base_alone=True)
    asked = {}
    for row in rows:
        asked.setdefault(row["method"], []).append((row["object_id"], row["prompt_id"], row["number"]))
    assert set(asked) == {"first", "second", BASE_METHOD}
    assert len(asked["first"]) == 2 * 2 * 3
    assert asked["first"] == asked["second"] == asked[BASE_METHOD]


def test_stores_that_cannot_be_measured_are_named(store, tmp_path, tiny64):
    with pytest.raises(ObjdriveError, match="'empty' has no artifacts"):
        find_artifacts({"empty": str(tmp_path / "nothing")}, tiny64.fingerprint)
    with pytest.raises(ObjdriveError, match="name its base with --base"):
        find_artifacts({"other": store.url}, "f" * 32)


def test_a_gallery_of_another_resolution_is_refused_before_its_pictures_stand_in_one_table(store, tmp_path, tiny64):
    write_half(draw_sprites(0), ["kite"], TWO, tmp_path, resolution=32, scenes=3)
    artifact = find_artifacts({"a": store.url}, tiny64.fingerprint)["a"]["kite-held"]
    with pytest.raises(ObjdriveError, match="32 pixels wide, the base's 64: compose it with --resolution 64"):
        control_pictures([read_reference(artifact, 64)], TWO, tmp_path / "gallery.parquet")


def test_the_input_has_no_variety_and_composed_scenes_have(store, half, tiny64):
    references = [read_reference(one, 64) for one in measured_by(find_artifacts({"a": store.url}, tiny64.fingerprint))]
    rows = control_pictures(references, TWO, half / "gallery.parquet")
    spreads = {}
    for method in ("copy", "scenes"):
        own = [row for row in rows if row["method"] == method]
        assert {row["number"] for row in own} == {0, 1}
        pictures = [np.asarray(Image.open(io.BytesIO(row["picture"]))) for row in own]
        boxes = [astuple(around(find_things(picture))) for picture in pictures]
        spreads[method] = spread_per_object([row | {"box": box} for row, box in zip(own, boxes, strict=True)])
    assert set(spreads["copy"].values()) == {0.0}
    assert len(spreads["scenes"]) == 2
    assert min(spreads["scenes"].values()) > 0.1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--encoder", "vgg"], "no encoder 'vgg'"),
        (["--encoder", "clip", "--gallery", "HALF/gallery.parquet"], "lacks and-apple"),
        (["--encoder", "clip", "--gallery", "HALF/none.parquet"], "no gallery"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is_drawn(options, said, store, half, tmp_path, capsys):
    options = [option.replace("HALF", str(half)) for option in options]
    assert evaluate(["--store", f"a={store.url}", "--out", str(tmp_path / "out"), *options]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_by_chance_an_object_is_one_of_the_designs_of_its_class(half):
    assert by_chance(half / "gallery.parquet", ["apple-held", "kite-held"]) == pytest.approx(1 / 3)


def test_objects_are_measured_by_the_photos_of_the_first_method_that_has_them(
    store, half, tmp_path, tiny64, put_adapter
):
    other = ArtifactStore(str(tmp_path / "other"))
    image = SourceRecord(uri=str(half / "images" / "apple-held.png"), size=1, mark="")
    for name in ("kite-held", "another"):
        put_adapter(other, tiny64, name, 5, class_name="kite", sources=Sources(image=image))
    artifacts = find_artifacts({"first": store.url, "second": other.url}, tiny64.fingerprint)
    first, second = artifacts["first"], artifacts["second"]
    assert measured_by(artifacts) == [second["another"], first["apple-held"], first["kite-held"]]


def test_controls_are_the_photo_and_a_scene_that_no_features_come_from(store, half, tiny64):
    artifact = find_artifacts({"a": store.url}, tiny64.fingerprint)["a"]["kite-held"]
    rows = control_pictures([read_reference(artifact, 64)], TWO, half / "gallery.parquet")
    assert sorted((row["method"], row["prompt_id"], row["number"]) for row in rows) == [
        (method, prompt, number) for method in ("copy", "scenes") for prompt in ("grass", "night") for number in (0, 1)
    ]
    gallery = pq.read_table(half / "gallery.parquet").to_pylist()
    first = {row["picture"] for row in gallery if row["number"] < 2 and row["object_id"] == "kite-held"}
    assert {row["picture"] for row in rows if row["method"] == "scenes"} == first


def test_pictures_that_are_there_are_not_drawn_again_unless_something_changed(tmp_path):
    blank = np.zeros((8, 8, 3), np.uint8)
    controls = control_pictures([Reference("a", "mug", blank, blank, blank[None])], TWO, None)
    out, pool = tmp_path / "pictures.parquet", Pool(1, 0.0)
    draw([], controls, DRAWING, pool, out)
    assert [row["prompt_id"] for row in pq.read_table(out).to_pylist()] == ["grass", "grass", "night", "night"]
    # Whoever opens it to write replaces the file.
    first = out.stat().st_ino, out.stat().st_mtime_ns
    draw([], controls, DRAWING, pool, out)
    assert (out.stat().st_ino, out.stat().st_mtime_ns) == first
    draw([], controls[:1], DRAWING, pool, out)
    assert [row["prompt_id"] for row in pq.read_table(out).to_pylist()] == ["grass"]


def _score(method, object_id, encoder, **values):
    row = {"method": method, "object_id": object_id, "class_name": "mug", "prompt_id": "grass", "kind": "context"}
    metrics = {"whole": 0.1, "object": 0.2, "text": None, "identity_class": None, "identity_all": None, "context": None}
    features = np.array([1.0, 0.0], np.float32)
    seen = {"number": 0, "encoder": encoder, "box": None, "things": 0, "features": features}
    return row | seen | metrics | values


SCORED = [
    _score(method, object_id, encoder, **values)
    for method, identity, context in (("paper", 1.0, 0.5), ("lora", 0.5, 1.0), ("copy", 1.0, 0.0))
    for object_id in ("a", "b")
    for encoder, values in (
        ("imagenet", {"identity_class": identity, "context": context}),
        ("clip", {"text": 0.7, "identity_class": identity, "context": 1.0}),
    )
]


def test_trades_take_the_encoder_without_a_part_in_the_base():
    similarity, recognition = choose_trades(SCORED)
    assert (similarity.fidelity, similarity.generalization) == (("imagenet", "object"), ("clip", "text"))
    assert (recognition.fidelity, recognition.generalization) == (
        ("imagenet", "identity_class"),
        ("imagenet", "context"),
    )
    only_clip = choose_trades([row for row in SCORED if row["encoder"] == "clip"])
    assert only_clip[0].fidelity == ("clip", "object")
    assert choose_trades([_score("paper", "a", "dino")]) == []


def test_the_base_comes_first_and_controls_come_last():
    rows = [_score(method, "a", "clip") for method in ("copy", "paper", "scenes", BASE_METHOD, "lora")]
    assert list(by_method(rows)) == [BASE_METHOD, "paper", "lora", "copy", "scenes"]


def test_the_summary_holds_every_figure_once():
    rows = summarise(SCORED)
    keys = [(row["method"], row["encoder"], row["metric"], row["kind"]) for row in rows]
    assert len(keys) == len(set(keys))
    found = dict(zip(keys, rows, strict=True))
    assert found["lora", "imagenet", "identity_class", "all"]["value"] == 0.5
    assert found["lora", "", "recognition, scalarised", "all"]["value"] == pytest.approx(2 / 3)
    assert ("lora", "imagenet", "text", "all") not in found
    own = by_method(SCORED)["paper"]
    assert trade_figures(own, choose_trades(SCORED)[1])["fidelity"].objects == 2


def _laid_out(method, *boxes):
    """Scores of one object's pictures with things in these boxes, right in identity and prompt."""
    right = {"identity_class": 1.0, "context": 1.0}
    return [
        _score(method, "a", "imagenet", number=number, box=box, things=1, **right) for number, box in enumerate(boxes)
    ]


def test_variety_is_the_spread_of_layouts_against_the_bases_own():
    left, right, middle = [0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0], [0.25, 0.0, 0.75, 1.0]
    rows = [
        *_laid_out(BASE_METHOD, left, middle),
        *_laid_out("memorised", left, left),
        *_laid_out("free", middle, right),
        *_laid_out("freer", left, right),
        *_laid_out("blank", None, left),
    ]
    found = {(row["method"], row["metric"]): row["value"] for row in summarise(rows)}
    varieties = {method: value for (method, metric), value in found.items() if metric == "variety of layouts"}
    assert varieties == pytest.approx({BASE_METHOD: 1, "memorised": 0, "free": 1, "freer": 1})
    assert found["memorised", "identity, prompts and variety"] == 0
    assert found["free", "identity, prompts and variety"] == pytest.approx(1)
    assert not any("variety" in row["metric"] for row in summarise(rows[2:]))


def test_variety_of_looks_is_that_of_features_against_the_bases_own():
    def looks(method, *features):
        right = {"identity_class": 1.0, "context": 1.0}
        shown = [np.array(one, np.float32) for one in features]
        return [_score(method, "a", "imagenet", number=n, features=one, **right) for n, one in enumerate(shown)]

    # One minus the cosines: 1 for the base; 0; 0.2 over two pairs of three; 0.4.
    rows = [
        *looks(BASE_METHOD, (1, 0), (0, 1)),
        *looks("memorised", (0.6, 0.8), (0.6, 0.8)),
        *looks("mixed", (0.8, 0.6), (1, 0), (1, 0)),
        *looks("free", (0.6, 0.8), (1, 0)),
    ]
    found = {row["method"]: row["value"] for row in summarise(rows) if row["metric"] == "variety of looks"}
    assert found == pytest.approx({BASE_METHOD: 1, "memorised": 0, "mixed": 2 * 0.2 / 3, "free": 0.4}, abs=1e-6)


def test_copied_layouts_and_counts_are_told():
    left, middle = [0.0, 0.0, 0.5, 1.0], [0.25, 0.0, 0.75, 1.0]
    rows = [
        *_laid_out("copy", left),
        *_laid_out("memorised", left, left),
        *_laid_out("free", left, middle, None),
        # Neither a size nor a second object tells what is copied, and of two things asked for two are right.
        _score("free", "a", "imagenet", kind="size", number=3, box=middle, things=2),
        _score("free", "a", "imagenet", kind="pair", number=4, box=middle, things=2),
    ]
    rows[5] |= {"things": 0}
    found = {(row["method"], row["metric"]): row["value"] for row in summarise(rows)}
    assert found["copy", "layout copied"] == found["memorised", "layout copied"] == 1
    assert found["free", "layout copied"] == pytest.approx((1 + 1 / 3) / 2)
    assert [found["free", often] for often in ("drawn once", "drawn several times", "nothing drawn")] == [
        0.5, 0.25, 0.25,
    ]  # fmt: skip


def test_the_page_shows_every_method_and_loads_nothing(tmp_path):
    picture = encode_picture(Image.fromarray(np.full((8, 8, 3), 90, np.uint8)), "PNG")
    rows = [
        {**{name: row.get(name, "") for name in SCHEMA.names}, "picture": picture, "text": "{}"}
        for row in SCORED
        if row["encoder"] == "clip"
    ]
    pictures, scores = tmp_path / "pictures.parquet", tmp_path / "scores.parquet"
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), pictures)
    pq.write_table(pa.Table.from_pylist(SCORED, SCORES), scores)
    out = tmp_path / "out"
    write_pages(out, pictures, scores, TWO, title="<Trade>", facts=[("base", "tiny64")], shown=1)
    page = (out / "report.html").read_text()
    # Two plots; of one object its photo, and a picture for each of two methods.
    assert page.count("<img") == 2 + 1 + 2
    assert "&lt;Trade&gt;" in page
    assert page.count("src=") == page.count('src="data:image/')
    names = {path.name for path in out.iterdir()}
    assert names == {"report.html", "summary.parquet", "sheet.webp"} | {
        f"{trade}.{kind}" for trade in ("similarity", "recognition") for kind in ("svg", "png")
    }
    with Image.open(out / "sheet.webp") as sheet:
        # Photo, two methods and a row's title: the pictures, all of one grey, fill a good part.
        assert (np.abs(np.asarray(sheet.convert("L"), int) - 90) < 4).mean() > 0.3
    first = (out / "similarity.svg").read_bytes()
    write_pages(out, pictures, scores, TWO, title="again", facts=[], shown=0)
    assert (out / "similarity.svg").read_bytes() == first
    assert (out / "report.html").read_text().count("<img") == 2
