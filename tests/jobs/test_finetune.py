"""What a worker does with a lease, for real on the embedded base, with as little training as there can be."""

import io
import pickle
import shutil
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image, ImageFilter

from jobs import finetune
from jobs.finetune import FineTune
from jobs.ingest import Checked, Target, check_row, digest_inputs, read_photo
from jobs.leases import LeaseLostError
from jobs.plan import Unit
from jobs.settings import PREVIEW_PROMPTS, FineTuneSettings
from objdrive.adapters.adapter import parse_adapter
from objdrive.adapters.artifact import adapter_digest
from objdrive.adapters.store import ArtifactStore
from objdrive.base.family import STABLE_DIFFUSION
from objdrive.catalog.manifest import read_manifest
from objdrive.errors import ObjdriveError
from objdrive.training.recipe import make_recipe

CATALOG = Path(__file__).parents[2] / "examples" / "catalog"
FAST = ["steps=2", "prototype_steps=1", "class_pool=1", "sample_steps=2"]
SCENE = ("jeans-01", "high-heel-01")


class Workshop:
    """A worker's `FineTune` with its store; pictures are copies of the catalog's."""

    def __init__(self, folder, store_url, fingerprint, *overrides):
        self.store = ArtifactStore(store_url)
        recipe = make_recipe("objdrive", overrides=[*FAST, *overrides])
        self.target = Target(self.store.url, recipe.digest, fingerprint)
        self.settings = FineTuneSettings("tiny64", None, recipe, self.target, group_size=None, cpu_threads=1)
        self.fine_tune = FineTune(self.settings)
        shutil.copytree(CATALOG, folder, dirs_exist_ok=True)
        self.rows = {row.object_id: row for row in read_manifest(str(folder / "manifest.csv"))}

    @property
    def alone(self):
        """Ids of objects that stand alone."""
        return [object_id for object_id, row in self.rows.items() if not row.scene]

    def unit(self, *object_ids, previews=False, **changes):
        """A unit of catalog rows, `changes` made to each of them, in the order of ids."""
        rows = [replace(self.rows[object_id], **changes) for object_id in sorted(object_ids)]
        records = [check_row(row, self.store, self.target) for row in rows]
        assert all(isinstance(record, Checked) for record in records), records
        return Unit(tuple(records), previews)

    def work(self, *units):
        """(outcomes by unit, how often `alive` was called)."""
        calls = Counter()
        outcomes = self.staged(units, lambda done, of: calls.update(["alive"]))
        return outcomes, calls["alive"]

    def staged(self, units, alive):
        """Outcomes by unit, of one stage after the other."""
        job = self.fine_tune.begin(list(units), alive)
        job.prepare()
        job.train()
        return job.commit()

    def adapter(self, object_id):
        metadata, files = self.store.read(object_id)
        return parse_adapter(files, token=metadata.token, family=STABLE_DIFFUSION)

    def copy_row(self, object_id, new_id):
        """The row again under another id, with pictures of its own."""
        row = self.rows[object_id]
        paths = {}
        for role in ("image", "mask"):
            source = Path(getattr(row, role))
            paths[role] = str(shutil.copy(source, source.with_name(f"{new_id}{source.suffix}")))
        self.rows[new_id] = replace(row, object_id=new_id, **paths)


def check_digest(workshop, unit):
    """What the worker will find as the unit's digest, which is its scene's key."""
    members = [read_photo(record.row, record.image, record.mask)[1] for record in unit.rows]
    return adapter_digest(members, **digest_inputs(workshop.target))


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, tiny64):
    folder = tmp_path_factory.mktemp("workshop")
    return Workshop(folder / "catalog", str(folder / "store"), tiny64.fingerprint)


def assert_committed(workshop, object_id, outcome):
    assert (outcome.status, outcome.code, outcome.message) == ("committed", "", "")
    assert workshop.store.current(object_id).digest == outcome.digest
    assert workshop.store.verify(object_id) == []


def assert_not_there(workshop, *object_ids):
    assert [workshop.store.digests(object_id) for object_id in object_ids] == [[]] * len(object_ids)


# Committing


def test_a_lease_is_committed_object_by_object(workshop):
    first, second = workshop.alone[:2]
    outcomes, alive = workshop.work(workshop.unit(first), workshop.unit(second))
    for object_id, (outcome,) in zip((first, second), outcomes, strict=True):
        assert_committed(workshop, object_id, outcome)
        metadata = workshop.store.current(object_id)
        row = workshop.rows[object_id]
        assert (metadata.class_name, metadata.scene, metadata.row) == (row.class_name, "", row.metadata)
        assert [member.object_id for member in metadata.members] == [object_id]
        assert metadata.recipe == workshop.settings.recipe.model_dump(mode="json")
        assert metadata.metrics == outcome.metrics
        assert outcome.metrics["steps"] == 2
        assert [preview.caption for preview in metadata.previews] == ["input"]
    assert not torch.equal(workshop.adapter(first).embeddings["clip_l"], workshop.adapter(second).embeddings["clip_l"])
    assert {tensor.dtype for tensor in workshop.adapter(first).lora.values()} == {torch.float16}
    assert alive > 2 * len(outcomes)


def test_what_is_committed_is_not_trained_again(workshop):
    object_id = workshop.alone[2]
    unit = workshop.unit(object_id)
    ((trained,),), _ = workshop.work(unit)
    before = workshop.store.read(object_id)
    ((again,),), alive = workshop.work(unit)
    assert (again.status, again.digest, again.metrics) == ("already", trained.digest, {})
    assert alive == 1  # of loading: no step followed
    assert workshop.store.read(object_id) == before
    checked = workshop.unit(object_id).rows[0]
    assert (checked.digest, checked.members) == (trained.digest, (object_id,))


def test_what_is_committed_is_made_current_again(workshop):
    object_id = workshop.alone[2]
    unit = workshop.unit(object_id)
    workshop.work(unit)
    metadata, files = workshop.store.read(object_id)
    workshop.store.commit(files, metadata.model_copy(update={"digest": "f" * 32}))
    # Who asked before that comes too late.
    ((outcome,),), _ = workshop.work(unit)
    assert (outcome.status, workshop.store.current(object_id).digest) == ("already", "f" * 32)
    ((outcome,),), _ = workshop.work(workshop.unit(object_id))
    assert outcome.status == "already"
    assert workshop.store.current(object_id).digest == outcome.digest == metadata.digest


def test_an_unknown_class_word_is_a_warning(workshop):
    (known, unknown), _ = workshop.work(
        workshop.unit(workshop.alone[3]), workshop.unit(workshop.alone[4], class_name="flumph")
    )
    assert known[0].warning == ""
    assert "'flumph'" in unknown[0].warning
    assert_committed(workshop, workshop.alone[4], unknown[0])


def test_what_was_assumed_of_a_mask_is_a_warning(workshop, tmp_path):
    object_id = workshop.alone[12]
    with Image.open(workshop.rows[object_id].mask) as mask:
        labels = mask.convert("L").point(lambda value: int(value > 127))
    labels.save(tmp_path / "labels.png")
    ((outcome,),), _ = workshop.work(workshop.unit(object_id, mask=str(tmp_path / "labels.png")))
    assert outcome.status == "committed"
    assert "0 and 1" in outcome.warning


def test_previews_are_part_of_the_artifact(workshop):
    wanted, other = workshop.alone[5:7]
    outcomes, _ = workshop.work(workshop.unit(wanted, previews=True), workshop.unit(other))
    assert_committed(workshop, wanted, outcomes[0][0])
    assert_committed(workshop, other, outcomes[1][0])
    metadata, files = workshop.store.read(wanted)
    captions = ["input", "mask", f"prototype only: {PREVIEW_PROMPTS[0]}", *PREVIEW_PROMPTS]
    assert [preview.caption for preview in metadata.previews] == captions
    assert [preview.kind for preview in metadata.previews] == ["input", "mask", "prototype", *["picture"] * 4]
    pictures = [Image.open(io.BytesIO(files[preview.file])) for preview in metadata.previews]
    assert {picture.format for picture in pictures} == {"WEBP"}
    assert {picture.size for picture in pictures[2:]} == {(64, 64)}
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)
    assert [preview.caption for preview in workshop.store.current(other).previews] == ["input"]


def test_a_mask_that_does_not_follow_the_picture_is_mended_and_that_is_said(workshop):
    workshop.copy_row(workshop.alone[0], "careless")
    path = Path(workshop.rows["careless"].mask)
    with Image.open(path) as exact:
        exact.convert("L").filter(ImageFilter.MaxFilter(31)).save(path)
    ((outcome,),), _ = workshop.work(workshop.unit("careless", previews=True))
    assert "mended (intersection over union: 0." in outcome.warning
    metadata, files = workshop.store.read("careless")
    given, mended = (
        Image.open(io.BytesIO(files[preview.file])).convert("L")
        for preview in metadata.previews
        if preview.kind in ("mask", "mended_mask")
    )
    assert np.asarray(mended).mean() < 0.9 * np.asarray(given).mean()


# Scenes


def test_objects_of_a_scene_share_a_digest_and_a_lora_and_have_a_token_each(workshop):
    single = workshop.alone[11]
    (outcomes, (neighbour,)), _ = workshop.work(workshop.unit(*SCENE, previews=True), workshop.unit(single))
    assert_committed(workshop, single, neighbour)
    assert len({outcome.digest for outcome in outcomes}) == 1
    for object_id, outcome in zip(sorted(SCENE), outcomes, strict=True):
        assert_committed(workshop, object_id, outcome)
        metadata = workshop.store.current(object_id)
        assert metadata.scene == workshop.rows[object_id].scene != ""
        assert [member.object_id for member in metadata.members] == sorted(SCENE)
        assert metadata.token == f"<{object_id}>"
        assert len(metadata.previews) == 3 + len(PREVIEW_PROMPTS)
    one, other = (workshop.adapter(object_id) for object_id in SCENE)
    assert not torch.equal(one.embeddings["clip_l"], other.embeddings["clip_l"])
    assert one.lora.keys() == other.lora.keys()
    assert all(torch.equal(one.lora[name], other.lora[name]) for name in one.lora)
    (again,), alive = workshop.work(workshop.unit(*SCENE))
    assert ([outcome.status for outcome in again], alive) == (["already"] * 2, 1)


def test_a_scene_of_which_one_object_is_missing_is_trained_again(workshop):
    unit = workshop.unit(*SCENE, class_name="shirt")
    ((one, other),), _ = workshop.work(unit)
    gone = sorted(SCENE)[1]
    shutil.rmtree(workshop.store.folder(gone, other.digest))
    (outcomes,), _ = workshop.work(unit)
    assert [outcome.status for outcome in outcomes] == ["already", "committed"]
    assert {outcome.digest for outcome in outcomes} == {one.digest}
    assert_committed(workshop, gone, outcomes[1])


def test_objects_whose_masks_can_not_be_told_apart_fail_together(workshop):
    unit = workshop.unit(*SCENE, mask=workshop.rows[SCENE[0]].mask, class_name="bag")
    (outcomes,), alive = workshop.work(unit)
    assert [(outcome.status, outcome.code) for outcome in outcomes] == [("failed", "scene_overlap")] * 2
    assert all(f"'{object_id}'" in outcomes[0].message for object_id in SCENE)
    assert unit.rows[0].row.where in outcomes[0].message
    assert alive == 1


# Faults


def test_a_source_that_vanished_meanwhile_fails_alone(workshop):
    old, new = workshop.alone[7:9]
    workshop.work(workshop.unit(old))
    for name in ("no-image", "no-mask"):
        workshop.copy_row(new, name)
    units = [workshop.unit(object_id) for object_id in ("no-image", old, new, "no-mask")]
    Path(workshop.rows["no-image"].image).unlink()
    Path(workshop.rows["no-mask"].mask).unlink()
    outcomes, _ = workshop.work(*units)
    assert [(outcome.status, outcome.code) for (outcome,) in outcomes] == [
        ("failed", "image_missing"),
        ("already", ""),
        ("committed", ""),
        ("failed", "mask_missing"),
    ]
    assert workshop.rows["no-image"].where in outcomes[0][0].message
    assert_committed(workshop, new, outcomes[2][0])
    assert_not_there(workshop, "no-image", "no-mask")


def test_a_source_that_was_replaced_meanwhile_is_taken_as_it_is_now(workshop):
    object_id, other = workshop.alone[9:11]
    workshop.copy_row(object_id, "replaced")
    unit = workshop.unit("replaced")
    for role in ("image", "mask"):
        shutil.copy(getattr(workshop.rows[other], role), getattr(workshop.rows["replaced"], role))
    ((outcome,),), _ = workshop.work(unit)
    assert_committed(workshop, "replaced", outcome)
    assert workshop.unit("replaced").rows[0].digest == outcome.digest


class Refusing(MemoryFileSystem):
    """A storage that takes nothing for objects whose ids start with "refused"."""

    protocol = "refusing"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("refusing://", "memory://"))

    def pipe_file(self, path, value, mode="overwrite", **options):
        if "/objects/refused" in path:
            raise PermissionError(13, "access denied", path)
        return super().pipe_file(path, value, mode=mode, **options)


@pytest.fixture
def refusing_workshop(tmp_path, tiny64):
    fsspec.register_implementation("refusing", Refusing, clobber=True)
    yield Workshop(tmp_path / "catalog", "refusing://shop/store", tiny64.fingerprint)
    MemoryFileSystem.store.clear()


def test_an_object_that_the_store_refuses_fails_alone(refusing_workshop):
    workshop = refusing_workshop
    taken, refused = workshop.alone[:2]
    workshop.copy_row(refused, "refused")
    outcomes, _ = workshop.work(workshop.unit("refused"), workshop.unit(taken))
    assert [(outcome.status, outcome.code) for (outcome,) in outcomes] == [
        ("failed", "store_failed"),
        ("committed", ""),
    ]
    assert "access denied" in outcomes[0][0].message
    assert_committed(workshop, taken, outcomes[1][0])
    assert_not_there(workshop, "refused")


def test_a_fine_tune_that_diverges_commits_nothing(tmp_path, tiny64):
    workshop = Workshop(tmp_path / "catalog", str(tmp_path / "store"), tiny64.fingerprint, "lora_lr=1e30", "steps=4")
    object_id = workshop.alone[0]
    ((outcome,),), _ = workshop.work(workshop.unit(object_id))
    assert (outcome.status, outcome.code) == ("failed", "diverged")
    assert "lora_lr" in outcome.message
    assert_not_there(workshop, object_id)


# Settings


def test_another_base_than_the_run_was_planned_for_is_refused(workshop):
    settings = replace(workshop.settings, target=replace(workshop.target, base_fingerprint="0" * 32))
    with pytest.raises(ObjdriveError, match=f"{workshop.target.base_fingerprint}.*{'0' * 32}"):
        FineTune(settings)


def test_the_group_size_is_what_was_asked_for_or_what_fits(workshop):
    assert workshop.fine_tune.group_size >= 1
    assert FineTune(replace(workshop.settings, group_size=5)).group_size == 5


def test_settings_can_be_sent_to_workers(workshop):
    assert pickle.loads(pickle.dumps(workshop.settings)) == workshop.settings


def test_a_lease_without_units_is_fine(workshop):
    assert workshop.work() == ([], 0)


def _raising_for(scene_key, error, real):
    """`personalize`, but a group with this scene raises."""

    def personalize(base, scenes, recipe, **options):
        if any(scene.key == scene_key for scene in scenes):
            raise error
        return real(base, scenes, recipe, **options)

    return personalize


def test_what_a_scene_raises_is_its_own_failure_and_its_neighbours_go_on(workshop, monkeypatch):
    ids = [f"neighbour-{number}" for number in range(5)]
    for new_id, object_id in zip(ids, workshop.alone, strict=False):
        workshop.copy_row(object_id, new_id)
    units = [workshop.unit(object_id) for object_id in ids]
    key = check_digest(workshop, units[2])
    broken = _raising_for(key, ValueError("the image has no colours"), finetune.personalize)
    monkeypatch.setattr(finetune, "personalize", broken)
    outcomes, _ = workshop.work(*units)
    assert [outcome.status for (outcome,) in outcomes] == ["committed"] * 2 + ["failed"] + ["committed"] * 2
    (failure,) = outcomes[2]
    assert failure.code == "fine_tune_failed"
    assert "ValueError: the image has no colours" in failure.message
    assert units[2].rows[0].row.where in failure.message


def test_what_is_raised_while_an_objects_files_are_written_is_its_own_failure(workshop, monkeypatch):
    ids = ("written-0", "written-1")
    for new_id, object_id in zip(ids, workshop.alone, strict=False):
        workshop.copy_row(object_id, new_id)
    real = finetune.adapter_files

    def adapter_files(adapter, *, token, family):
        if "written-0" in token:
            raise ObjdriveError("the tensor down.0 holds NaN")
        return real(adapter, token=token, family=family)

    monkeypatch.setattr(finetune, "adapter_files", adapter_files)
    (first,), (second,) = workshop.work(*(workshop.unit(object_id) for object_id in ids))[0]
    assert (first.code, second.status) == ("fine_tune_failed", "committed")
    assert "the tensor down.0 holds NaN" in first.message


def test_a_lost_lease_and_a_failed_device_are_no_fault_of_a_scene(workshop, monkeypatch):
    workshop.copy_row(workshop.alone[0], "innocent")
    unit = workshop.unit("innocent")
    for error in (LeaseLostError(), torch.AcceleratorError("the device is gone")):
        with monkeypatch.context() as patched:
            patched.setattr(finetune, "personalize", _raising_for(check_digest(workshop, unit), error, None))
            with pytest.raises(type(error)):
                workshop.work(unit)


def test_progress_goes_from_the_first_step_to_the_last(workshop):
    workshop.copy_row(workshop.alone[0], "watched")
    told = []
    workshop.staged([workshop.unit("watched", previews=True)], lambda done, of: told.append((done, of)))
    steps = [done for done, _ in told]
    assert steps == sorted(steps)
    assert {of for _, of in told} == {told[-1][0]}


def test_a_group_that_does_not_fit_is_let_go_before_its_halves_are_tried(workshop, monkeypatch):
    class Held:
        """What a failed group took."""

    alive, sizes, real = weakref.WeakSet(), [], finetune.personalize

    def personalize(base, scenes, recipe, **options):
        held = Held()
        alive.add(held)
        sizes.append(len(scenes))
        assert len(alive) == 1
        if len(scenes) > 1:
            raise torch.OutOfMemoryError("no memory left")
        return real(base, scenes, recipe, **options)

    ids = [f"large-{number}" for number in range(4)]
    for new_id, object_id in zip(ids, workshop.alone, strict=False):
        workshop.copy_row(object_id, new_id)
    monkeypatch.setattr(finetune, "personalize", personalize)
    outcomes, _ = workshop.work(*(workshop.unit(object_id) for object_id in ids))
    assert [outcome.status for (outcome,) in outcomes] == ["committed"] * 4
    assert sizes == [4, 2, 1, 1, 2, 1, 1]
    assert workshop.fine_tune.group_size == 1
