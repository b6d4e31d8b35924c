"""Rows become tasks: what is repeated, refused, committed already, put together, and how much memory that takes."""

from collections import Counter
from dataclasses import replace

import psutil
import pytest

from jobs.ingest import Checked
from jobs.plan import MAX_SCENE, plan
from objdrive.catalog.rows import Reject, Row
from objdrive.catalog.sources import SourceMark

DIGEST = "0123456789abcdef" * 2
OTHER_DIGEST = "fedcba9876543210" * 2


def checked(object_id, *, line=1, image="mug.png", scene="", class_name="mug", digest="", members=(), **metadata):
    row = Row(object_id, image, "mask.png", class_name, scene, metadata, f"catalog.csv:{line}")
    return Checked(row, SourceMark(image, 100, "m"), SourceMark("mask.png", 10, "m"), digest, members)


def committed(object_id, **fields):
    return checked(object_id, **{"digest": DIGEST, "members": (object_id,), **fields})


class Planned:
    """What became of records."""

    def __init__(self, records, previews=0, prompt_fault=lambda names: ""):
        self.rejects, self.committed, self.repeats = [], [], []
        self.tasks = list(
            plan(
                records,
                previews=previews,
                prompt_fault=prompt_fault,
                on_reject=self.rejects.append,
                on_committed=self.committed.append,
                on_repeat=self.repeats.append,
            )
        )

    @property
    def units(self):
        return [[record.row.object_id for record in task.payload.rows] for task in self.tasks]

    @property
    def previewed(self):
        return [task.key for task in self.tasks if task.payload.previews]

    @property
    def codes(self):
        return {reject.object_id: reject.code for reject in self.rejects}


def ids(records):
    return [record.row.object_id for record in records]


def test_a_row_is_a_task_in_manifest_order():
    records = [checked("b"), checked("a"), checked("c", price=3)]
    planned = Planned(records)
    assert planned.units == [["b"], ["a"], ["c"]]
    assert [task.key for task in planned.tasks] == ["b", "a", "c"]
    assert [task.payload.rows for task in planned.tasks] == [(record,) for record in records]


def test_rows_that_were_rejected_before_are_passed_on():
    reject = Reject("a", "catalog.csv:1", "mask_empty", "the mask is empty")
    planned = Planned([reject, checked("a")])
    assert planned.rejects == [reject]
    assert planned.units == [["a"]]


def test_another_signature_is_no_other_source():
    first, second, other = (
        f"https://b.example/{name}?X-Amz-Signature=SECRET{number}" for name, number in (("a", 1), ("a", 2), ("b", 3))
    )
    planned = Planned([checked("a", image=first), checked("a", image=second), checked("a", image=other)])
    assert ids(planned.repeats) == ["a"]
    assert planned.codes == {"a": "duplicate_id"}
    rows = [checked("a", image=first, scene="s"), checked("b", image=second, scene="s")]
    assert Planned(rows).units == [["a", "b"]]
    rejects = Planned([*rows, checked("c", image=other, scene="s")]).rejects
    assert {reject.code for reject in rejects} == {"scene_image_differs"}
    assert not [reject for reject in rejects if "SECRET" in reject.message]


def test_without_a_mark_of_the_content_another_signature_may_be_another_source():
    records = [checked("a", image=f"https://b.example/get?token={n}") for n in (1, 2)]
    records = [replace(record, image=replace(record.image, mark="")) for record in records]
    assert Planned(records).codes == {"a": "duplicate_id"}


def test_rows_are_planned_before_the_manifest_is_read_to_its_end():
    def records():
        yield checked("a")
        raise AssertionError("read on")

    nothing = {name: None for name in ("on_reject", "on_committed", "on_repeat")}
    assert next(plan(records(), previews=0, prompt_fault=lambda names: "", **nothing)).key == "a"


# Duplicates


def test_a_row_that_says_the_same_again_is_repeated_and_not_trained_again():
    planned = Planned([checked("a", line=1), checked("b", line=2), checked("a", line=3, price=9)])
    assert planned.units == [["a"], ["b"]]
    assert [record.row.where for record in planned.repeats] == ["catalog.csv:3"]
    assert planned.rejects == []


@pytest.mark.parametrize("change", [{"image": "cup.png"}, {"class_name": "cup"}, {"scene": "table"}])
def test_a_row_that_says_something_else_of_the_same_object_is_rejected(change):
    planned = Planned([checked("a", line=1), checked("a", line=2, **change)])
    assert planned.units == [["a"]]
    assert planned.tasks[0].payload.rows[0].row.where == "catalog.csv:1"
    (reject,) = planned.rejects
    assert (reject.object_id, reject.where, reject.code) == ("a", "catalog.csv:2", "duplicate_id")
    assert "catalog.csv:1" in reject.message


def test_duplicates_of_committed_rows_and_of_scene_rows_are_found_too():
    planned = Planned(
        [
            committed("a", line=1),
            checked("b", line=2, scene="table"),
            checked("a", line=3, image="cup.png"),
            checked("b", line=4, scene="table"),
            checked("b", line=5, scene="shelf"),
        ]
    )
    assert [(reject.where, reject.code) for reject in planned.rejects] == [
        ("catalog.csv:3", "duplicate_id"),
        ("catalog.csv:5", "duplicate_id"),
    ]
    assert [record.row.where for record in planned.repeats] == ["catalog.csv:4"]
    assert planned.units == [["b"]]


# Scenes


def test_scenes_wait_for_the_end_and_come_in_the_order_of_their_ids():
    records = [
        checked("s2-b", scene="s2"),
        checked("s1-b", scene="s1"),
        checked("alone-2"),
        checked("s1-a", scene="s1"),
        checked("alone-1"),
        checked("s2-a", scene="s2"),
    ]
    planned = Planned(records)
    assert planned.units == [["alone-2"], ["alone-1"], ["s1-a", "s1-b"], ["s2-a", "s2-b"]]
    assert [task.key for task in planned.tasks] == ["alone-2", "alone-1", "s1-a", "s2-a"]
    assert planned.tasks[2].payload.rows == (records[3], records[1])


def test_a_scene_of_two_images_is_rejected_whole():
    planned = Planned(
        [checked("a", scene="s", image="1.png"), checked("b", scene="s", image="2.png"), checked("c", scene="t")]
    )
    assert planned.codes == {"a": "scene_image_differs", "b": "scene_image_differs"}
    assert all("'1.png'" in reject.message and "'2.png'" in reject.message for reject in planned.rejects)
    assert planned.units == [["c"]]


def test_a_scene_may_be_of_so_many_objects_and_no_more():
    fits = [checked(f"a{i}", scene="fits") for i in range(MAX_SCENE)]
    too_large = [checked(f"b{i}", scene="large", line=i) for i in range(MAX_SCENE + 1)]
    planned = Planned(fits + too_large)
    assert planned.units == [ids(fits)]
    assert planned.codes == dict.fromkeys(ids(too_large), "scene_too_large")
    assert {reject.where for reject in planned.rejects} == {record.row.where for record in too_large}
    assert f"it has {MAX_SCENE + 1} objects" in planned.rejects[0].message


# What is committed


def test_committed_rows_make_no_task():
    planned = Planned([committed("a"), checked("b"), committed("c")])
    assert planned.units == [["b"]]
    assert ids(planned.committed) == ["a", "c"]


def test_an_object_that_was_committed_in_a_scene_is_trained_when_it_stands_alone():
    assert Planned([committed("a", members=("a", "b"))]).units == [["a"]]


def test_committed_scenes_make_no_task():
    scene = [committed(name, scene="s", members=("a", "b")) for name in "ba"]
    planned = Planned(scene)
    assert planned.units == []
    assert ids(planned.committed) == ["a", "b"]


@pytest.mark.parametrize(
    "second",
    [
        checked("b", scene="s"),
        committed("b", scene="s", members=("a", "b"), digest=OTHER_DIGEST),
        committed("b", scene="s", members=("a", "b", "c")),
    ],
    ids=["one is missing", "of two fine-tunes", "of a larger scene"],
)
def test_scenes_that_are_not_committed_as_they_stand_are_trained_whole(second):
    planned = Planned([committed("a", scene="s", members=("a", "b")), second])
    assert planned.units == [["a", "b"]]
    assert planned.committed == []


# Previews


@pytest.mark.parametrize(("wanted", "previewed"), [(0, []), (1, ["a"]), (3, ["a", "b", "s1"]), (4, ["a", "b", "s1"])])
def test_the_first_objects_to_train_get_previews(wanted, previewed):
    records = [
        committed("z"),
        checked("a"),
        checked("b"),
        checked("s1", scene="s"),
        checked("s2", scene="s"),
        checked("t", scene="t"),
    ]
    assert Planned(records, previews=wanted).previewed == previewed


# Memory

ROWS = 50_000


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("scene_of", "trained"),
    [(lambda number: "", ROWS), (lambda number: f"scene-{number // 2}", ROWS), (lambda number: "default", 0)],
    ids=["single objects", "scenes", "a scene that should not be one"],
)
def test_memory_does_not_grow_with_the_manifest(scene_of, trained):
    records = (
        checked(f"object-{number}", line=number, scene=scene_of(number), title="A mug to drink from")
        for number in range(ROWS)
    )
    rejected = Counter()
    process, seen = psutil.Process(), []

    def weighed(items):
        for number, item in enumerate(items):
            if number % 1000 == 0:
                seen.append(process.memory_info().rss)
            yield item

    tasks = plan(
        weighed(records),
        previews=0,
        prompt_fault=lambda names: "",
        on_reject=lambda reject: rejected.update([reject.code]),
        on_committed=pytest.fail,
        on_repeat=pytest.fail,
    )
    assert sum(len(task.payload.rows) for task in weighed(tasks)) == trained
    assert rejected.total() == ROWS - trained
    assert process.memory_info().rss - seen[0] < 10 * 2**20
    assert max(seen) - seen[0] < 10 * 2**20


def test_class_words_that_the_base_can_not_read_are_rejected_a_scene_as_a_whole():
    asked = []

    def prompt_fault(names):
        asked.append(names)
        return "81 tokens" if "long" in names or len(names) > 2 else ""

    records = [checked("a", class_name="long"), checked("b")]
    records += [checked(name, scene="s", class_name="mug") for name in ("c", "d", "e")]
    planned = Planned(records, prompt_fault=prompt_fault)
    assert planned.units == [["b"]]
    assert [(reject.object_id, reject.code) for reject in planned.rejects] == [
        (name, "class_too_long") for name in ("a", "c", "d", "e")
    ]
    assert all("81 tokens" in reject.message and reject.where in reject.message for reject in planned.rejects)
    assert ["mug"] * 3 in asked
