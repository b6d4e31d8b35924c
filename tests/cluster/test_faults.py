"""Faults, injected for real into whole runs: afterwards every good object is committed exactly once.

Where a fault does not strike the training, the training is light.
"""

import json
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import (
    FAST,
    Finished,
    Job,
    StoreWatch,
    assert_nothing_left_running,
    assert_whole,
    ray_processes,
    wait_for_commits,
    write_manifest,
)

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]

StartJob = Callable[..., Job]
IDS = [f"object-{number:02}" for number in range(10)]
# Long enough that a fault strikes in mid-group.
SLOW = (*FAST[1:], "steps=12")
SECOND_GROUP = 3
"""Commits after which a run in groups of two knows of the first two: a worker takes no lease before it has told."""


def kill_a_worker() -> None:
    busiest = max(ray_processes("ray::RayTrainWorker"), key=lambda process: process.cpu_times().user)
    busiest.kill()


def kill_the_queue() -> None:
    for queue in ray_processes("ray::QueueActor"):
        queue.kill()


def suspend_a_worker() -> None:
    busiest = max(ray_processes("ray::RayTrainWorker"), key=lambda process: process.cpu_times().user)
    busiest.suspend()


def test_a_run_survives_a_killed_worker_a_killed_queue_and_a_suspended_worker(
    start_job: StartJob, tmp_path: Path
) -> None:
    manifest = write_manifest(tmp_path, IDS)
    with StoreWatch(tmp_path / "store") as watch:
        job = start_job(manifest, "--group-size", "2", "--workers", "2", "--stall-seconds", "15", fast=SLOW)
        for commits_before, strike in ((1, kill_a_worker), (4, kill_the_queue), (7, suspend_a_worker)):
            wait_for_commits(job, commits_before)
            strike()
        done = job.finish()
    assert done.status == 0, done.output
    assert_whole(job.store, IDS)
    assert sorted(line["object_id"] for line in done.results) == IDS
    assert done.rejects == []
    assert watch.faults == []
    assert watch.looks > 0
    assert_nothing_left_running()


def test_a_killed_driver_is_a_rerun(start_light_job: StartJob, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, IDS)
    with StoreWatch(tmp_path / "store") as watch:
        job = start_light_job(manifest, "--group-size", "2", "--workers", "2")
        wait_for_commits(job, 2)
        job.process.send_signal(signal.SIGKILL)
        job.process.wait()
        # Ray ends the dead driver's actors; what they still commit before that counts.
        deadline = time.monotonic() + 60
        while ray_processes("ray::RayTrainWorker") and time.monotonic() < deadline:
            time.sleep(0.2)
        first = {path: path.stat().st_mtime_ns for path in job.store.glob("objects/*/*/artifact.json")}
        assert 0 < len(first) < len(IDS)
        done = start_light_job(manifest, "--group-size", "2", "--workers", "2").finish()
    assert done.status == 0, done.output
    assert_whole(job.store, IDS)
    assert {path: path.stat().st_mtime_ns for path in first} == first
    statuses = [line["status"] for line in done.results]
    assert (statuses.count("already"), statuses.count("committed")) == (len(first), len(IDS) - len(first))
    assert watch.faults == []


def test_two_runs_at_once_commit_every_object_once(start_light_job: StartJob, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, IDS[:6])
    with StoreWatch(tmp_path / "store") as watch:
        jobs = [start_light_job(manifest, "--group-size", "3", "--workers", "1") for _ in range(2)]
        runs = [job.finish() for job in jobs]
    assert [run.status for run in runs] == [0, 0], runs[0].output + runs[1].output
    assert_whole(tmp_path / "store", IDS[:6])
    committed = [line["object_id"] for run in runs for line in run.results if line["status"] == "committed"]
    assert sorted(committed) == IDS[:6]
    assert watch.faults == []


def test_failing_writes_are_tried_again_and_then_reported(start_light_job: StartJob, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, IDS[:4])
    faults = tmp_path / "store.faults"
    faults.mkdir()
    rules = [
        {"match": "objects/object-00/", "times": 3},
        {"match": "objects/object-02/", "times": 10_000},
    ]
    (faults / "rules.json").write_text(json.dumps(rules))
    job = start_light_job(manifest, "--workers", "1", store=f"flaky://{tmp_path}/store")
    done = job.finish()
    assert done.status == 3, done.output
    assert [(line["object_id"], line["code"]) for line in done.rejects] == [("object-02", "store_failed")]
    assert "planned failure" in done.rejects[0]["message"]
    assert_whole(job.store, [IDS[0], IDS[1], IDS[3]])
    assert len(list(faults.glob("failed-0-*"))) == 3


def assert_told(done: Finished, status: int) -> None:
    """The run says how far it has come, in words and in its tables."""
    assert done.status == status, done.output
    found = re.search(r"interrupted: (\d+) committed, (\d+) left; run the same command to go on", done.output)
    assert found, done.output
    committed, left = map(int, found.groups())
    assert (committed, committed + left) == (len(done.results), 6)
    assert 2 <= committed < 6
    assert "object-00" in done.report


def test_a_terminated_run_says_how_far_it_is_and_is_a_rerun(start_light_job: StartJob, tmp_path: Path) -> None:
    manifest, options = write_manifest(tmp_path, IDS[:6]), ("--group-size", "2", "--workers", "1")
    job = start_light_job(manifest, *options)
    wait_for_commits(job, SECOND_GROUP)
    job.process.send_signal(signal.SIGTERM)
    assert_told(job.finish(), 143)
    assert_nothing_left_running()
    again = start_light_job(manifest, *options).finish()
    assert again.status == 0, again.output
    assert_whole(job.store, IDS[:6])


def test_a_run_shows_its_steps_until_ctrl_c_ends_it(start_job: StartJob, tmp_path: Path) -> None:
    fast = (*FAST[1:], "steps=150")
    job = start_job(write_manifest(tmp_path, IDS[:6]), "--group-size", "2", "--workers", "1", fast=fast)
    wait_for_commits(job, SECOND_GROUP)
    job.process.send_signal(signal.SIGINT)
    done = job.finish()
    assert_told(done, 130)
    assert re.search(r"[246] in work \(step [1-9]\d* of \d+\)", done.output), done.output
