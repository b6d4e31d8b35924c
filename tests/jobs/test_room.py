"""How many workers a cluster has room for, node by node."""

from dataclasses import replace

import pytest

from jobs.room import Workers, WorkersRequest, fit_workers, idle_gpus
from objdrive.errors import ObjdriveError

HEAD = {"memory": 1e9}
"""A head node without cores, as KubeRay starts it."""


def node(cpus, gpus=0.0):
    return {"CPU": float(cpus), **({"GPU": float(gpus)} if gpus else {})}


def fit(request, nodes, groups=(), *, may_grow=True):
    return fit_workers(request, nodes, groups, may_grow=may_grow)


def request(count=None, gpus=None):
    return WorkersRequest.of(count, gpus)


@pytest.mark.parametrize(
    ("nodes", "gpus", "workers"),
    [
        ([node(4)], None, Workers(4, 4)),
        ([HEAD, node(4), node(2)], None, Workers(6, 6)),
        ([node(8, 2), node(8)], None, Workers(2, 2, 1)),
        ([node(8, 2), node(8)], 0.0, Workers(16, 16)),
        ([node(8, 2), node(8)], 0.5, Workers(4, 4, 0.5)),
        ([node(16, 1)], 0.1, Workers(10, 10, 0.1)),
        # What is left over on one node can't be added to what is left over on another.
        ([node(8, 3), node(8, 3)], 2.0, Workers(2, 2, 2)),
        ([HEAD, node(8, 4), node(8, 2)], 4.0, Workers(1, 1, 4)),
        # Each worker needs a core too.
        ([node(2, 8)], 1.0, Workers(2, 2, 1)),
        ([HEAD | {"GPU": 1.0}, node(2, 1)], 1.0, Workers(1, 1, 1)),
    ],
)
def test_without_a_number_it_is_what_the_nodes_have_room_for(nodes, gpus, workers):
    assert fit(request(gpus=gpus), nodes) == workers


@pytest.mark.parametrize(
    ("nodes", "gpus", "idle"), [([node(8, 3), node(8, 3)], 2.0, 2), ([node(8, 4)], 2.0, 0), ([node(8, 4)], 0.0, 0)]
)
def test_gpus_that_no_worker_can_take_are_counted(nodes, gpus, idle):
    assert idle_gpus(fit(request(gpus=gpus), nodes), nodes) == idle


@pytest.mark.parametrize(
    ("nodes", "count", "workers"),
    [
        ([node(4) | {"memory": 25e9}, node(4) | {"memory": 100e9}], None, Workers(6, 6)),
        ([node(4) | {"memory": 5e9}], None, Workers(1, 1)),
        ([node(4)], None, Workers(4, 4)),
        ([node(4) | {"memory": 25e9}], "3", Workers(3, 3)),
        ([node(4, 2) | {"memory": 5e9}], None, Workers(2, 2, 1)),
    ],
)
def test_without_gpus_memory_bounds_their_number_unless_the_user_names_one(nodes, count, workers):
    assert fit(replace(request(count), memory=10 * 10**9), nodes) == workers


def test_numbers_that_the_user_gives_are_kept():
    assert fit(request("2", 1.0), [node(8, 4)]) == Workers(2, 2, 1)
    assert fit(request("1:8", 1.0), [node(8, 4)]) == Workers(1, 8, 1)


@pytest.mark.parametrize(
    ("wanted", "nodes", "groups", "words"),
    [
        # Scaling up from nothing.
        (request("1:8", 1.0), [HEAD, node(4)], [], ["1 worker(s) of 1 GPU(s) and a core each", "room for 0", "4 core"]),
        (request(gpus=1.0), [HEAD], [node(8, 1)], ["1 worker(s) of 1 GPU(s)", "room for 0"]),
        # Some are there.
        (
            request("4", 1.0),
            [HEAD, node(8, 1), node(8, 1)],
            [],
            ["4 worker(s)", "room for 2", "2 node(s) of 8 core(s)"],
        ),
        # Larger nodes may come.
        (request(gpus=4.0), [node(8, 2)], [node(8, 2), node(64, 8)], ["1 worker(s) of 4 GPU(s)", "room for 0"]),
        (request("6"), [node(4)], [], ["6 worker(s) of a core each", "room for 4"]),
        (request(), [HEAD], [], ["1 worker(s) of a core each", "room for 0"]),
    ],
)
def test_what_is_not_there_yet_is_waited_for(wanted, nodes, groups, words):
    what = fit(wanted, nodes, groups)
    assert isinstance(what, str)
    assert all(word in what for word in words), what


@pytest.mark.parametrize(
    ("wanted", "nodes", "groups", "words"),
    [
        (request(gpus=4.0), [HEAD, node(8, 2), node(8, 2)], [], ["--gpus-per-worker 4", "the largest has 2 GPU(s)"]),
        (request(gpus=4.0), [HEAD, node(8, 2)], [node(8, 2)], ["--gpus-per-worker 4", "the largest has 2 GPU(s)"]),
        (request(gpus=1.0), [HEAD], [node(8)], ["--gpus-per-worker 1", "the largest has 0 GPU(s)"]),
        (request("3", 2.0), [HEAD, node(8, 1)], [], ["--gpus-per-worker 2", "the largest has 1 GPU(s)"]),
    ],
)
def test_what_never_fits_is_an_error(wanted, nodes, groups, words):
    with pytest.raises(ObjdriveError) as error:
        fit(wanted, nodes, groups)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(("count", "gpus"), [("8", None), (None, 1.0)])
def test_on_a_local_cluster_nothing_is_waited_for(count, gpus):
    with pytest.raises(ObjdriveError, match="were asked for, and the cluster has room for"):
        fit(request(count, gpus), [node(2)], may_grow=False)
