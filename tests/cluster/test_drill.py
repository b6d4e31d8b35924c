"""Whole runs on several nodes, some of which are lost, cut off or late. Only the training is light."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from conftest import LIGHT, Job, assert_whole, commits, started_jobs, wait_for_commits, write_manifest
from drill import Drill, drill_cluster

from jobs.ingest import Target, check_row, digest_inputs, read_photo
from objdrive.adapters.artifact import adapter_digest
from objdrive.adapters.store import ArtifactStore
from objdrive.base.files import find_base
from objdrive.catalog.manifest import read_manifest
from objdrive.training.recipe import METHOD_VERSION, make_recipe

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]

StartJob = Callable[..., Job]
IDS = [f"object-{number:02}" for number in range(8)]
ALONE = ("--group-size", "1", "--previews", "0")
PATIENCE = 300
IN_HAND = 3
"""Groups that a worker holds at most: one is prepared, one trained, one committed."""


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drill]:
    with drill_cluster(tmp_path_factory.mktemp("home")) as drill:
        yield drill


@pytest.fixture
def drill(head: Drill) -> Iterator[Drill]:
    yield head
    head.remove_all()


@pytest.fixture
def start(drill: Drill, tmp_path: Path) -> Iterator[StartJob]:
    with started_jobs(drill.address, tmp_path, Path(__file__).with_name("light_job.py")) as start:
        yield lambda manifest, *options, **where: start(manifest, *ALONE, *options, fast=LIGHT, **where)


class Hold:
    """Lets the writer of one file of a store stand still before it writes."""

    def __init__(self, tmp_path: Path, match: str) -> None:
        self.store = f"flaky://{tmp_path}/store"
        self._faults = tmp_path / "store.faults"
        self._faults.mkdir()
        (self._faults / "rules.json").write_text(f'[{{"match": "{match}", "hold": "hold"}}]')
        (self._faults / "hold").touch()

    def wait(self, job: Job) -> int:
        """Until a writer stands still; its process."""
        until(lambda: (self._faults / "held").exists() and (self._faults / "held").read_text(), job)
        return int((self._faults / "held").read_text())

    def release(self) -> None:
        (self._faults / "hold").unlink()


def until(there: Callable[[], object], job: Job) -> None:
    deadline = time.monotonic() + PATIENCE
    while not there():
        assert job.process.poll() is None, job.output()
        assert time.monotonic() < deadline, job.output()
        time.sleep(0.1)


def test_a_run_ends_without_the_node_that_it_lost(drill: Drill, start: StartJob, tmp_path: Path) -> None:
    drill.add()
    lost = drill.add()
    job = start(write_manifest(tmp_path, IDS), "--workers", "2")
    wait_for_commits(job, 2)
    lost.kill()
    done = job.finish()
    assert done.status == 0, done.output
    assert_whole(job.store, IDS)
    assert sorted(line["object_id"] for line in done.results) == IDS


def test_a_node_that_joins_later_does_the_work_of_the_one_that_died(
    drill: Drill, start: StartJob, tmp_path: Path
) -> None:
    hold = Hold(tmp_path, "objects/object-02/")
    nodes = [drill.add(), drill.add()]
    job = start(write_manifest(tmp_path, IDS), "--workers", "2", store=hold.store)
    busy = hold.wait(job)
    (other,) = [node for node in nodes if not node.runs(busy)]
    other.kill()
    # The worker that is left does nothing for now: who does all but what that one holds has joined.
    assert len(commits(job.store)) < len(IDS) - IN_HAND
    drill.add()
    wait_for_commits(job, len(IDS) - IN_HAND)
    hold.release()
    done = job.finish()
    assert done.status == 0, done.output
    assert_whole(job.store, IDS)


def test_the_late_commit_of_a_node_that_was_cut_off_does_not_win_over_a_newer_one(
    drill: Drill, start: StartJob, tmp_path: Path
) -> None:
    hold = Hold(tmp_path, "artifact.json")
    cut_off = drill.add()
    manifest = write_manifest(tmp_path, IDS[:1])
    first = start(manifest, "--workers", "1", store=hold.store)
    writer = hold.wait(first)
    cut_off.cut_off()
    hold.release()
    drill.add()
    newer = tmp_path / "newer.csv"
    newer.write_text(manifest.read_text().rpartition(",")[0] + ",guitar\n")
    done = start(newer, "--workers", "1", store=hold.store).finish()
    assert done.status == 0, done.output
    store = ArtifactStore(str(first.store))
    current = store.current(IDS[0])
    assert current is not None
    assert current.class_name == "guitar"
    # The writer is back before Ray can end it.
    psutil.Process(writer).resume()
    until(lambda: len(store.digests(IDS[0])) == 2, first)
    cut_off.bring_back()
    late = first.finish()
    assert late.status == 0, late.output
    assert late.results[0]["digest"] != current.digest
    assert store.current(IDS[0]) == current
    assert store.verify(IDS[0]) == []


def test_workers_wait_for_gpus_and_fit_their_nodes(drill: Drill, start: StartJob, tmp_path: Path) -> None:
    drill.add(cpus=2)
    manifest = write_manifest(tmp_path, IDS[:2])
    job = start(manifest, "--gpus-per-worker", "2")
    until(lambda: "waiting for 1 worker(s) of 2 GPU(s) and a core each" in job.output(), job)
    assert "the cluster has room for 0" in job.output()
    assert "1 node(s) of 2 core(s) and 0 GPU(s)" in job.output()
    drill.add(cpus=4, gpus=3)
    done = job.finish()
    assert done.status == 0, done.output
    assert "workers     1 of 2 GPU(s); 1 GPU(s) stay idle" in done.output
    assert_whole(job.store, IDS[:2])
    never = start(manifest, "--gpus-per-worker", "4", store=str(tmp_path / "other"))
    status = never.process.wait(PATIENCE)
    assert status == 2, never.output()
    assert "--gpus-per-worker 4: no worker fits a node, the largest has 3 GPU(s)" in never.output()


def test_of_two_versions_of_the_method_the_new_one_is_made_and_the_old_one_kept(
    drill: Drill, start: StartJob, tmp_path: Path
) -> None:
    drill.add()
    manifest = write_manifest(tmp_path, IDS[:2])
    done = start(manifest, "--limit", "1").finish()
    assert done.status == 0, done.output
    store = ArtifactStore(str(tmp_path / "store"))
    made, files = store.read(IDS[0])
    assert made.method_version == METHOD_VERSION
    # The second object as an earlier release left it.
    base = find_base("tiny64")
    recipe = make_recipe("objdrive", tuning=base.tuning, overrides=list(LIGHT))
    target = Target(store.url, recipe.digest, base.fingerprint())
    row = list(read_manifest(str(manifest)))[1]
    checked = check_row(row, store, target)
    assert not checked.digest
    member = read_photo(row, checked.image, checked.mask)[1]
    old = adapter_digest([member], **digest_inputs(target) | {"method_version": METHOD_VERSION - 1})
    about = {"object_id": IDS[1], "digest": old, "method_version": METHOD_VERSION - 1, "class_name": row.class_name}
    store.commit(files, made.model_copy(update=about))
    done = start(manifest).finish()
    assert done.status == 0, done.output
    assert {line["object_id"]: line["status"] for line in done.results} == {IDS[0]: "already", IDS[1]: "committed"}
    assert store.current(IDS[0]) == made
    current = store.current(IDS[1])
    assert current is not None
    assert (current.method_version, store.digests(IDS[1])) == (METHOD_VERSION, sorted([old, current.digest]))
    assert store.verify(IDS[1]) == []
