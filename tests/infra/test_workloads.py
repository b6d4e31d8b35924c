"""What the manifests say fits together: with the job, the service, the image, the versions and each other."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from documents import ROOT, check_command
from manifests import OVERLAYS, Manifest, changed, clusters, only, pod_templates, render

pytestmark = pytest.mark.parametrize("overlay", OVERLAYS)

RAY = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def serve_config(overlay: str) -> Any:
    return yaml.safe_load(only(render(overlay), "RayService")["spec"]["serveConfigV2"])


def all_templates(overlay: str) -> Iterator[Manifest]:
    for manifest in render(overlay):
        yield from pod_templates(manifest)


def containers(template: Manifest) -> list[Manifest]:
    return [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]


def group(service: Manifest, name: str) -> Manifest:
    [cluster] = clusters(service)
    [found] = [one for one in cluster["workerGroupSpecs"] if one["groupName"] == name]
    return found


def environment(container: Manifest) -> dict[str, str]:
    return {variable["name"]: variable.get("value", "") for variable in container["env"]}


def arguments(overlay: str) -> list[str]:
    return shlex.split(only(render(overlay), "RayJob")["spec"]["entrypoint"])


def value(words: list[str], option: str, default: str = "") -> str:
    return words[words.index(option) + 1] if option in words else default


def test_the_job_takes_the_command(overlay: str) -> None:
    check_command(arguments(overlay))
    with pytest.raises(pytest.fail.Exception, match="refuses"):
        check_command([*arguments(overlay), "--retries", "3"])


def test_rejected_rows_are_not_retried(overlay: str) -> None:
    assert "--allow-rejects" in arguments(overlay)
    assert only(render(overlay), "RayJob")["spec"]["backoffLimit"] > 0


def test_the_night_does_what_the_batch_does(overlay: str) -> None:
    manifests = render(overlay)
    batch, nightly = only(manifests, "RayJob")["spec"], only(manifests, "RayCronJob")["spec"]
    assert nightly["jobTemplate"] == batch
    # Once a day, and no two at a time.
    assert re.fullmatch(r"\d+ \d+ \* \* \*", nightly["schedule"])
    assert batch["activeDeadlineSeconds"] + batch["preRunningDeadlineSeconds"] < 24 * 3600


def test_the_service_draws_what_the_batch_makes(overlay: str) -> None:
    [application] = serve_config(overlay)["applications"]
    batch = arguments(overlay)
    assert application["args"]["store"] == value(batch, "--store")
    assert application["args"]["base"] == value(batch, "--base", "tiny64")


def test_pods_load_the_base_that_is_used(overlay: str) -> None:
    base = value(arguments(overlay), "--base", "tiny64")
    loaders = [one for template in all_templates(overlay) for one in template["spec"].get("initContainers", [])]
    # The batch's head and trainers, twice with the nightly run's, and the generators.
    assert [environment(one)["BASE"] for one in loaders] == [base] * 5
    for template in all_templates(overlay):
        for loader in template["spec"].get("initContainers", []):
            [container] = template["spec"]["containers"]
            home = environment(loader)["HF_HOME"]
            assert environment(container)["HF_HOME"] == home
            assert {mount["mountPath"] for mount in loader["volumeMounts"]} == {home}
            assert home in {mount["mountPath"] for mount in container["volumeMounts"]}


def test_the_loader_of_the_base_runs(overlay: str) -> None:
    loaders = [one for template in all_templates(overlay) for one in template["spec"].get("initContainers", [])]
    [command] = {tuple(loader["command"]) for loader in loaders}
    for base, status in (("tiny64", 0), ("nothing-of-this-name", 1)):
        variables = {**os.environ, "BASE": base, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run([sys.executable, *command[1:]], env=variables, capture_output=True, cwd=ROOT, check=False)
        assert done.returncode == status, done.stderr


def test_images_are_the_projects_and_of_its_versions(overlay: str) -> None:
    for manifest in render(overlay):
        for cluster in clusters(manifest):
            assert cluster["rayVersion"] == RAY
            for template in pod_templates(manifest):
                for container in containers(template):
                    name, _, tag = container["image"].rpartition(":")
                    assert name.endswith("objdrive")
                    assert tag in (f"{VERSION}-cpu", f"{VERSION}-gpu")


def test_no_image_floats(overlay: str) -> None:
    for template in all_templates(overlay):
        for container in containers(template):
            assert re.search(r":[\w.-]*\d+\.\d+", container["image"]), container["image"]


def test_gpus_are_asked_for_where_they_are_used(overlay: str) -> None:
    manifests = render(overlay)
    service = only(manifests, "RayService")
    limits = group(service, "generators")["template"]["spec"]["containers"][0]["resources"]["limits"]
    [application] = serve_config(overlay)["applications"]
    [generator] = [one for one in application["deployments"] if one["name"] == "Generator"]
    options = generator["ray_actor_options"]
    assert options["num_cpus"] == float(limits["cpu"])
    assert options.get("num_gpus", 0) == float(limits.get("nvidia.com/gpu", 0))
    trainers = group(only(manifests, "RayJob"), "trainers")
    asked = trainers["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", "0")
    assert float(asked) == float(value(arguments(overlay), "--gpus-per-worker", "0"))
    assert trainers["replicas"] == trainers["minReplicas"] == 0


def test_there_are_nodes_for_all_replicas(overlay: str) -> None:
    [application] = serve_config(overlay)["applications"]
    service = only(render(overlay), "RayService")
    least, _, most = application["args"]["generators"].partition(":")
    generators = group(service, "generators")
    assert generators["minReplicas"] <= int(least)
    assert generators["maxReplicas"] >= int(most or least)
    for deployment in application["deployments"]:
        if deployment.get("max_replicas_per_node"):
            api = group(service, "api")
            scaling = deployment["autoscaling_config"]
            assert (api["minReplicas"], api["maxReplicas"]) == (scaling["min_replicas"], scaling["max_replicas"])


def test_nothing_runs_on_heads(overlay: str) -> None:
    for manifest in render(overlay):
        for cluster in clusters(manifest):
            assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def shutdown_fault(service: Manifest, config: Any) -> str:
    """Why a request may be cut off when a pod or an old cluster goes; empty if none is."""
    [application] = config["applications"]
    drawing = application["args"].get("draw_seconds", 120.0)
    if service["spec"]["rayClusterDeletionDelaySeconds"] <= config["http_options"]["request_timeout_s"]:
        return "the old cluster goes before its last answer"
    for name in ("api", "generators"):
        pod = group(service, name)["template"]["spec"]
        [container] = pod["containers"]
        drain = float(environment(container)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        # As in serve/app.py, and a while to start a replica elsewhere.
        if drain < drawing + 10 + 30:
            return f"{name}: a node drains for less time than a drawing takes"
        stop = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        if stop < 2 * container["readinessProbe"]["periodSeconds"]:
            return f"{name}: the node drains before others know"
        if pod["terminationGracePeriodSeconds"] < stop + drain + 10:
            return f"{name}: killed while it drains"
    return ""


def test_no_request_is_cut_off(overlay: str) -> None:
    service, config = only(render(overlay), "RayService"), serve_config(overlay)
    assert shutdown_fault(service, config) == ""
    assert shutdown_fault(changed(service, "spec/rayClusterDeletionDelaySeconds", 60), config)
    pod = "spec/rayClusterConfig/workerGroupSpecs/1/template/spec"
    assert "killed" in shutdown_fault(changed(service, f"{pod}/terminationGracePeriodSeconds", 30), config)
    assert "drains" in shutdown_fault(changed(service, f"{pod}/containers/0/env/0/value", "30"), config)


def test_a_disruption_leaves_somebody_to_answer(overlay: str) -> None:
    manifests = render(overlay)
    service = only(manifests, "RayService")
    budgets = [one for one in manifests if one["kind"] == "PodDisruptionBudget"]
    for name in ("api", "generators"):
        labels = group(service, name)["template"]["metadata"]["labels"]
        [budget] = [one for one in budgets if one["spec"]["selector"]["matchLabels"].items() <= labels.items()]
        # Of pods that have no controller with a scale of its own, Kubernetes takes a number only.
        assert budget["spec"]["minAvailable"] == 1
        assert "maxUnavailable" not in budget["spec"]


def security_faults(template: Manifest) -> list[str]:
    pod = template["spec"].get("securityContext", {})
    faults = [] if pod.get("runAsNonRoot") and pod.get("runAsUser") else ["may run as root"]
    if pod.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        faults.append("any system call")
    for container in containers(template):
        context = container.get("securityContext", {})
        if context.get("allowPrivilegeEscalation") is not False or context.get("capabilities") != {"drop": ["ALL"]}:
            faults.append(f"{container['name']} may gain rights")
        if "memory" not in container["resources"]["limits"]:
            faults.append(f"{container['name']} may take all memory")
    return faults


def test_pods_have_no_rights(overlay: str) -> None:
    for template in all_templates(overlay):
        assert security_faults(template) == []
        assert security_faults(changed(template, "spec/securityContext", {})) == ["may run as root", "any system call"]
        assert security_faults(changed(template, "spec/containers/0/securityContext", {}))


def test_only_heads_may_ask_kubernetes(overlay: str) -> None:
    heads = [cluster["headGroupSpec"]["template"] for one in render(overlay) for cluster in clusters(one)]
    accounts = {one["metadata"]["name"] for one in render(overlay) if one["kind"] == "ServiceAccount"}
    for template in all_templates(overlay):
        spec = template["spec"]
        assert spec.get("serviceAccountName") in {*accounts, None}
        assert (spec.get("automountServiceAccountToken") is False) is (template not in heads)


def test_volumes_that_are_mounted_are_there(overlay: str) -> None:
    manifests = render(overlay)
    claims = {one["metadata"]["name"] for one in manifests if one["kind"] == "PersistentVolumeClaim"}
    for manifest in manifests:
        of_set = {one["metadata"]["name"] for one in manifest.get("spec", {}).get("volumeClaimTemplates", [])}
        for template in pod_templates(manifest):
            volumes = template["spec"].get("volumes", [])
            mounts = {mount["name"] for one in containers(template) for mount in one.get("volumeMounts", [])}
            assert mounts == {volume["name"] for volume in volumes} | of_set
            asked = {one["persistentVolumeClaim"]["claimName"] for one in volumes if "persistentVolumeClaim" in one}
            assert asked <= claims
