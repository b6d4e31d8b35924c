"""The `objdrive` command on a store of real artifacts."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.ingest import Target, check_row
from jobs.plan import Unit
from jobs.settings import FineTuneSettings
from jobs.worker import make_fine_tune
from objdrive.adapters.artifact import LORA_FILE, METADATA_FILE
from objdrive.adapters.store import ArtifactStore
from objdrive.base.files import EMBEDDED
from objdrive.catalog.manifest import read_manifest
from objdrive.cli import main
from objdrive.training.recipe import make_recipe

MANIFEST = Path(__file__).parents[1] / "examples" / "catalog" / "manifest.csv"
FAST = ["steps=2", "prototype_steps=1", "class_pool=1", "sample_steps=2"]
PROMPT = "a photo of {} on grass"


@pytest.fixture(scope="module")
def filled(tmp_path_factory, tiny64):
    """A folder with a store of two objects."""
    folder = tmp_path_factory.mktemp("filled")
    store = ArtifactStore(str(folder))
    recipe = make_recipe(overrides=FAST)
    target = Target(store.url, recipe.digest, tiny64.fingerprint)
    rows = [row for row in read_manifest(str(MANIFEST)) if not row.scene][:2]
    units = [Unit((check_row(row, store, target),), previews=False) for row in rows]
    settings = FineTuneSettings("tiny64", None, recipe, target, group_size=2, cpu_threads=1)
    job = make_fine_tune(settings, 0.0).begin(units, lambda done, of: None)
    job.prepare()
    job.train()
    outcomes = job.commit()
    assert [outcome.status for (outcome,) in outcomes] == ["committed"] * 2
    return folder


@pytest.fixture
def store(filled, tmp_path):
    """A store of one's own with the same artifacts."""
    return ArtifactStore(str(shutil.copytree(filled, tmp_path / "store")))


@pytest.fixture
def ids(store):
    return list(store.object_ids())


@pytest.fixture
def run(capsys):
    """Call it with the command's words: (exit status, standard output, standard error)."""

    def run(*words):
        capsys.readouterr()
        try:
            status = main([str(word) for word in words])
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def generate(run, store, ids, tmp_path):
    """Draw the first object with more options; a later option overrides an earlier one."""

    def generate(*options):
        given = ["--store", store.url, "--object", ids[0], "--prompt", PROMPT, "--out", tmp_path / "out"]
        return run("generate", *given, *options)

    return generate


def damage(store, object_id):
    path = Path(store.folder(object_id, store.current(object_id).digest)) / LORA_FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return path


def supersede(store, object_id):
    """Commit the object's artifact again under another digest; returns the old one's folder."""
    metadata, files = store.read(object_id)
    assert store.commit(files, metadata.model_copy(update={"digest": "f" * 32}))
    return Path(store.folder(object_id, metadata.digest))


def age(folder, hours):
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - hours * 3600,) * 2)


def pixels(path):
    return np.asarray(Image.open(path), dtype=int)


# store


def test_ls_lists_the_objects(run, store, ids):
    status, output, _ = run("store", "ls", store.url)
    lines = [line.split("\t") for line in output.splitlines()]
    assert status == 0
    assert [line[0] for line in lines] == ids
    for object_id, line in zip(ids, lines, strict=True):
        artifact = store.current(object_id)
        assert line[1:] == [artifact.digest, artifact.class_name, "tiny64", artifact.created]


def test_ls_tells_of_an_object_without_a_current_artifact(run, store, ids):
    (Path(store.url) / "objects" / ids[0] / "current.json").unlink()
    status, output, _ = run("store", "ls", store.url)
    assert status == 0
    assert output.splitlines()[0] == f"{ids[0]}\t(no current artifact)"


def test_show_prints_what_is_known_of_an_object(run, store, ids):
    status, output, _ = run("store", "show", store.url, ids[1])
    assert status == 0
    assert json.loads(output) == store.current(ids[1]).model_dump(mode="json")


@pytest.mark.parametrize("object_id", ["unknown", "../secrets"])
def test_show_of_an_object_that_is_not_there(run, store, object_id):
    status, output, error = run("store", "show", store.url, object_id)
    assert (status, output) == (2, "")
    assert repr(object_id) in error


def test_verify_finds_nothing_wrong_with_a_whole_store(run, store, ids):
    assert run("store", "verify", store.url)[:2] == (0, "2 object(s), 0 problem(s)\n")
    assert run("store", "verify", store.url, ids[1])[:2] == (0, "1 object(s), 0 problem(s)\n")


def test_verify_names_damaged_files(run, store, ids):
    path = damage(store, ids[0])
    status, output, _ = run("store", "verify", store.url)
    problem, summary = output.splitlines()
    assert status == 1
    assert f"{path} is damaged" in problem
    assert summary == "2 object(s), 1 problem(s)"
    assert run("store", "verify", store.url, ids[1])[0] == 0


def test_verify_of_an_object_that_is_not_there_is_a_problem(run, store):
    status, output, _ = run("store", "verify", store.url, "unknown")
    assert status == 1
    assert "no artifact of 'unknown'" in output


def test_gc_removes_what_is_superseded_and_old(run, store, ids):
    old = supersede(store, ids[0])
    assert run("store", "gc", store.url)[1].startswith("0 removed")
    age(old, hours=2)
    assert run("store", "gc", store.url)[1].startswith("0 removed")
    # Readers may be at it still: it is old, but was superseded a moment ago.
    assert run("store", "gc", store.url, "--older-than", 1)[1].startswith("0 removed")
    age(old.parent, hours=2)
    status, output, _ = run("store", "gc", store.url, "--older-than", 1, "--dry-run")
    assert status == 0
    assert output.splitlines()[0] == str(old)
    assert output.splitlines()[1].startswith("1 would be removed")
    assert old.is_dir()
    status, output, _ = run("store", "gc", store.url, "--older-than", 1)
    assert output.splitlines()[0] == str(old)
    assert output.splitlines()[1].startswith("1 removed")
    assert not old.exists()
    assert run("store", "verify", store.url)[0] == 0
    assert list(store.object_ids()) == ids


@pytest.fixture
def unreadable(store, ids):
    """The first object, of which the storage can't tell the current artifact."""
    path = Path(store.url) / "objects" / ids[0] / "current.json"
    path.unlink()
    path.mkdir()
    return path


def test_ls_goes_on_after_an_object_that_cannot_be_read(run, store, ids, unreadable):
    status, output, _ = run("store", "ls", store.url)
    bad, good = output.splitlines()
    assert status == 1
    assert bad.startswith(f"{ids[0]}\t(")
    assert str(unreadable) in bad
    assert good.startswith(f"{ids[1]}\t{store.current(ids[1]).digest}")


def test_verify_goes_on_after_an_object_that_cannot_be_read(run, store, ids, unreadable):
    damaged = damage(store, ids[1])
    status, output, _ = run("store", "verify", store.url)
    bad, problem, summary = output.splitlines()
    assert status == 1
    assert str(unreadable) in bad
    assert f"{damaged} is damaged" in problem
    assert summary == "2 object(s), 2 problem(s)"


def test_gc_goes_on_after_an_object_that_cannot_be_read(run, store, ids, unreadable):
    digest = next(path.name for path in unreadable.parent.iterdir() if len(path.name) == 32)
    kept = shutil.copytree(unreadable.parent / digest, unreadable.parent / ("e" * 32))
    old = supersede(store, ids[1])
    age(Path(store.url), hours=48)
    status, output, _ = run("store", "gc", store.url)
    bad, removed, summary = output.splitlines()
    assert status == 1
    assert str(unreadable) in bad
    assert removed == str(old)
    assert summary.startswith("1 removed, 1 object(s) failed in ")
    assert kept.is_dir()


def test_ls_ends_quietly_when_nobody_reads_on(store, ids):
    command = f"{shlex.quote(sys.executable)} -m objdrive.cli store ls {shlex.quote(store.url)} | head -n 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False)
    assert done.stdout.startswith(ids[0])
    assert done.stderr == ""


# generate


def test_generate_writes_pictures_and_says_where(generate, ids, tmp_path):
    status, output, _ = generate("--n", 3, "--seed", 7, "--out", tmp_path / "new" / "folder")
    paths = [tmp_path / "new" / "folder" / f"{ids[0]}-{seed}.png" for seed in (7, 8, 9)]
    assert status == 0
    assert output.splitlines() == [str(path) for path in paths]
    assert sorted((tmp_path / "new" / "folder").iterdir()) == paths
    pictures = [Image.open(path) for path in paths]
    assert [(picture.format, picture.mode, picture.size) for picture in pictures] == [("PNG", "RGB", (64, 64))] * 3
    assert len({picture.tobytes() for picture in pictures}) == 3


def test_generate_draws_other_sizes(generate, ids, tmp_path):
    assert generate("--size", "40x96", "--out", tmp_path / "tall")[0] == 0
    with Image.open(tmp_path / "tall" / f"{ids[0]}-0.png") as picture:
        assert picture.size == (40, 96)


def test_a_seed_draws_the_same_picture_again_alone_or_with_others(generate, ids, tmp_path):
    generate("--seed", 7, "--out", tmp_path / "alone")
    generate("--seed", 7, "--out", tmp_path / "again")
    generate("--seed", 6, "--n", 2, "--out", tmp_path / "together")
    alone, again, together = (tmp_path / name / f"{ids[0]}-7.png" for name in ("alone", "again", "together"))
    assert alone.read_bytes() == again.read_bytes()
    assert np.abs(pixels(alone) - pixels(together)).max() <= 1


@pytest.mark.parametrize(
    "options",
    [
        ("--steps", 3),
        ("--guidance-scale", 1.5),
        ("--negative-prompt", "snow"),
        ("--prompt", "a photo of {} in the snow"),
    ],
)
def test_options_change_the_picture(generate, ids, tmp_path, options):
    assert generate()[0] == 0
    assert generate(*options, "--out", tmp_path / "other")[0] == 0
    assert not np.array_equal(
        pixels(tmp_path / "out" / f"{ids[0]}-0.png"), pixels(tmp_path / "other" / f"{ids[0]}-0.png")
    )


def test_objects_are_drawn_by_their_own_adapters(generate, ids, tmp_path):
    for object_id in ids:
        assert generate("--object", object_id)[0] == 0
    first, second = (pixels(tmp_path / "out" / f"{object_id}-0.png") for object_id in ids)
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--prompt", "a photo on grass"), ["'a photo on grass'", "{}", '"a photo of {} on grass"']),
        (("--prompt", "word " * 200 + "{}"), ["shorten it"]),
        (("--object", "unknown"), ["'unknown'"]),
        (("--object", "../secrets"), ["'../secrets'"]),
        (("--store", "/nowhere"), ["/nowhere"]),
        (("--n", 0), ["--n", "at least 1"]),
        (("--n", "two"), ["--n", "'two'"]),
        (("--size", "big"), ["'big'", "WIDTHxHEIGHT"]),
        (("--size", "63x64"), ["size=63x64", "multiples of 8"]),
        (("--size", "128x128"), ["size=128x128", "at most 8192"]),
        (("--steps", 0), ["sample_steps", "0"]),
        (("--steps", 5000), ["sample_steps", "5000"]),
        (("--guidance-scale", "nan"), ["guidance_scale"]),
        (("--seed", 2**64), [str(2**64), "63 bits"]),
        (("--out", MANIFEST), [str(MANIFEST), "folder"]),
    ],
)
def test_generate_says_what_was_wrong(generate, tmp_path, options, words):
    status, output, error = generate(*options)
    assert (status, output) == (2, "")
    assert all(word in error for word in words), error
    assert "Traceback" not in error
    assert not list(tmp_path.glob("out/*"))


def test_generate_refuses_a_damaged_artifact(generate, store, ids):
    path = damage(store, ids[0])
    status, _, error = generate()
    assert status == 2
    assert f"{path} is damaged" in error
    assert generate("--object", ids[1])[0] == 0


def test_generate_draws_an_artifact_whose_recipe_has_fields_of_another_version(generate, store, ids, tmp_path):
    path = Path(store.folder(ids[0], store.current(ids[0]).digest)) / METADATA_FILE
    metadata = json.loads(path.read_text())
    metadata["recipe"] |= {"view_pool": 5}
    path.write_text(json.dumps(metadata))
    assert generate()[0] == 0
    assert len(list(tmp_path.glob("out/*"))) == 1


@pytest.fixture
def other_base(tmp_path):
    """The embedded base with another schedule: same shapes, another fingerprint."""
    folder = tmp_path / "other-base"
    folder.mkdir()
    for path in (EMBEDDED / "tiny64").iterdir():
        if path.name != "scheduler":
            (folder / path.name).symlink_to(path)
    (folder / "scheduler").mkdir()
    config = json.loads((EMBEDDED / "tiny64" / "scheduler" / "scheduler_config.json").read_text())
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | {"beta_end": 0.013}))
    return folder


def test_generate_refuses_another_base(generate, store, ids, other_base):
    status, _, error = generate("--base", other_base)
    assert status == 2
    assert store.current(ids[0]).base.fingerprint in error
    assert str(other_base) in error
    assert "--base" in error


def test_generate_takes_the_same_base_from_elsewhere(generate, ids, tmp_path):
    shutil.copytree(EMBEDDED / "tiny64", tmp_path / "moved")
    assert generate("--base", tmp_path / "moved")[0] == 0


@pytest.mark.parametrize("words", [(), ("store",), ("store", "mv"), ("draw",)])
def test_wrong_usage_is_told(run, words):
    status, _, error = run(*words)
    assert status == 2
    assert error.startswith("usage: objdrive")
