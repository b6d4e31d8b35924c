"""What we use of Ray beyond its public interface is there, and means what we take it for.

A failure here says what a new version of Ray has changed; `jobs/ray_private` is where to mend it.
"""

import importlib
import inspect
from importlib.metadata import requires

import pytest
import ray
from packaging.requirements import Requirement
from ray.exceptions import RayActorError
from ray.train import RunConfig, ScalingConfig

from jobs.ray_private import CHECKED_VERSION, check_ray, was_no_fault
from jobs.ray_private.train import PerWorkerBackend, PerWorkerConfig, PerWorkerTrainer
from objdrive.errors import ObjdriveError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")

CLEANER = "ray.train.v2._internal.callbacks.placement_group_callback"
CONTROLLER = "ray.train.v2._internal.execution.controller.controller"
WORKER_GROUP = "ray.train.v2._internal.execution.worker_group.worker_group"


def part(module, name, purpose):
    """A private part of Ray; says what is broken without it."""
    try:
        found = importlib.import_module(module)
        for step in name.split("."):
            found = getattr(found, step)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"Ray {ray.__version__} has no {module}.{name} any more, so {purpose}: {error}")
    return found


def test_the_installed_ray_was_checked():
    check_ray()


def test_the_version_that_was_checked_is_the_one_that_may_be_installed():
    ours = [Requirement(text) for text in requires("objdrive") or [] if text.startswith("ray[")]
    assert ours
    for requirement in ours:
        assert requirement.specifier.contains(f"{CHECKED_VERSION}.0"), requirement
        assert not requirement.specifier.contains(f"2.{int(CHECKED_VERSION.split('.')[1]) + 1}.0"), requirement


@pytest.mark.parametrize("version", ["2.61.0", "2.6.0", "3.0.0rc1", "2.59.1"])
def test_another_version_is_an_error_that_says_what_to_do(version):
    with pytest.raises(ObjdriveError) as error:
        check_ray(version)
    for word in (f"Ray {version} is installed", f"Ray {CHECKED_VERSION}", "has_replica_groups", "CONTRIBUTING.md"):
        assert word in str(error.value)


def test_a_backend_may_ask_for_dead_ranks_to_be_replaced_alone():
    purpose = "a dead worker restarts all the others, who lose what they work on"
    assert part("ray.train.backend", "Backend.has_replica_groups", purpose) is False
    assert PerWorkerConfig().backend_cls is PerWorkerBackend
    for module, name in ((CONTROLLER, "TrainController.__init__"), (WORKER_GROUP, "WorkerGroup.__init__")):
        source = inspect.getsource(part(module, name, purpose))
        assert "backend_cls.has_replica_groups" in source, (
            f"{name} does not read has_replica_groups any more: {purpose}"
        )
    part(CONTROLLER, "TrainController._replace_bad_workers", purpose)
    part(WORKER_GROUP, "WorkerGroup.replace_replica_group", purpose)


def test_the_cleaner_of_placement_groups_is_left_out_and_nothing_else(tmp_path):
    purpose = "the cleaner can't be left out, and ends runs next to another cluster on one host"
    cleaner = part(CLEANER, "PlacementGroupCleanerCallback", purpose)

    def callbacks(trainer_type):
        trainer = trainer_type(
            print,
            torch_config=PerWorkerConfig(),
            scaling_config=ScalingConfig(num_workers=1),
            run_config=RunConfig(storage_path=str(tmp_path)),
        )
        assert hasattr(trainer, "_create_default_callbacks"), purpose
        return [type(callback) for callback in trainer._create_default_callbacks()]

    stock = callbacks(PerWorkerTrainer.__base__)
    assert cleaner in stock, f"Ray {ray.__version__} has no such cleaner any more: PerWorkerTrainer may go"
    assert callbacks(PerWorkerTrainer) == [one for one in stock if one is not cleaner]


@pytest.mark.parametrize(
    ("words", "no_fault"),
    [
        ("The actor died because its node has died. Node Id: 1234", True),
        ("The actor is dead because it was killed by `ray.kill`.", True),
        ("The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR", False),
    ],
)
def test_the_end_of_a_node_is_told_from_that_of_a_process(words, no_fault):
    assert was_no_fault(RayActorError(error_msg=words)) is no_fault


def test_an_autoscaler_tells_the_kinds_of_its_nodes():
    purpose = "the job can't know whether a larger node may come"
    part("ray._private.state", "state.get_cluster_config", purpose)
    config = part("ray.core.generated.autoscaler_pb2", "ClusterConfig", purpose)()
    group = config.node_group_configs.add(name="gpu", max_count=4)
    group.resources["GPU"] = 8
    assert dict(group.resources) == {"GPU": 8}
