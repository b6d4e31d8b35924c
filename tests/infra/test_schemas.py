"""Every manifest meets its kind's schema, as far as that can be told without a cluster."""

import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from documents import ROOT
from manifests import KUBECTL, KUBERAY, OVERLAYS, RAY_SCHEMA, Refused, changed, check, render

each_overlay = pytest.mark.parametrize("overlay", OVERLAYS)
CRDS = ROOT.parent / "shared" / "kuberay-crds"
HEAD = "spec/rayClusterSpec/headGroupSpec"
CONTAINER = f"{HEAD}/template/spec/containers/0"
YAMLLINT = [Path(sys.executable).with_name("yamllint"), "--strict", "--config-file", ROOT / "infra" / ".yamllint"]


@each_overlay
def test_every_document_meets_its_schema(overlay: str) -> None:
    kinds = []
    for manifest in render(overlay):
        check(manifest)
        kinds.append(manifest["kind"])
    assert {"RayJob", "RayService", "RayCronJob", "NetworkPolicy", "PodDisruptionBudget"} <= set(kinds)
    # It is only there for kustomize.
    assert "ConfigMap" not in kinds


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("RayJob", "spec/backofLimit", 3),
        ("RayJob", "spec/backoffLimit", "3"),
        ("RayJob", "spec/shutdownAfterJobFinishes", False),
        ("RayJob", "metadata/name", "a" * 48),
        ("RayJob", "metadata/name", "1-batch"),
        ("RayJob", f"{HEAD}/rayStartParams/num-cpus", 0),
        ("RayJob", f"{HEAD}/template/spec/restartPolicy", "Always"),
        ("RayJob", f"{CONTAINER}/imagePolicy", "Always"),
        ("RayJob", f"{CONTAINER}/ports/0/containerPort", "6379"),
        ("RayJob", "spec/rayClusterSpec/autoscalerOptions/resources/limit", {}),
        ("RayService", "spec/rayClusterConfig/authOptions/mode", "disabled"),
        ("RayService", "spec/rayClusterConfig/gcsFaultToleranceOptions/redisPassword/value", "secret"),
        ("RayService", "spec/serveConfigV2", {}),
        ("RayCronJob", "spec/schedule", "0 1 * *"),
        ("RayCronJob", "spec/jobTemplate/entrypoint", ""),
        ("NetworkPolicy", "spec/ingres", []),
        ("StatefulSet", "spec/replicas", "1"),
    ],
)
def test_a_wrong_field_is_refused(kind: str, path: str, value: Any) -> None:
    manifest = next(one for one in render("gpu") if one["kind"] == kind)
    with pytest.raises(Refused, match=path.rpartition("/")[2]):
        check(changed(manifest, path, value))


def test_the_schema_has_no_field_that_nothing_uses() -> None:
    used: set[int] = set()
    for manifest in (one for overlay in OVERLAYS for one in render(overlay) if one["apiVersion"] == "ray.io/v1"):
        _use(RAY_SCHEMA["$defs"][manifest["kind"]], manifest, used)
    unused = [name for name, part in _fields(RAY_SCHEMA) if id(part) not in used]
    assert unused == ["restartPolicy"], "only that one is there to refuse other values"


def _resolved(schema: Any) -> Any:
    return RAY_SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def _use(schema: Any, value: Any, used: set[int]) -> None:
    schema = _resolved(schema)
    for name, part in schema.get("properties", {}).items():
        if isinstance(value, dict) and name in value:
            used.add(id(part))
            _use(part, value[name], used)
    for item in value if isinstance(value, list) and "items" in schema else []:
        _use(schema["items"], item, used)


def _fields(schema: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(schema, dict):
        yield from schema.get("properties", {}).items()
        for part in schema.values():
            yield from _fields(part)


@pytest.mark.skipif(not CRDS.is_dir(), reason="KubeRay's own definitions are not beside the checkout")
@each_overlay
def test_kuberay_knows_every_field(overlay: str) -> None:
    for manifest in render(overlay):
        if manifest["apiVersion"] == "ray.io/v1":
            # Not by jsonschema.validate: it checks these very large schemas themselves, every time.
            definition = jsonschema.Draft202012Validator(_definition(f"{manifest['kind'].lower()}s"))
            definition.validate(manifest)
            assert not definition.is_valid(changed(manifest, "spec/unknown", 1))


@cache
def _definition(plural: str) -> Any:
    definition = yaml.load((CRDS / f"ray.io_{plural}.yaml").read_text(), Loader=yaml.CSafeLoader)
    [version] = [one for one in definition["spec"]["versions"] if one["name"] == "v1"]
    schema = version["schema"]["openAPIV3Schema"]
    _close(schema)
    # Kubernetes' own, whose fields the definition does not repeat.
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def _close(schema: Any) -> None:
    """Let it refuse unknown fields, as Kubernetes' API does."""
    if isinstance(schema, list):
        for part in schema:
            _close(part)
    if not isinstance(schema, dict):
        return
    for part in schema.values():
        _close(part)
    if schema.get("x-kubernetes-int-or-string"):
        schema["type"] = ["integer", "string"]
    elif "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)


def test_kubectl_refuses_a_broken_overlay(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("resources: [nothing.yaml]\n")
    done = subprocess.run([KUBECTL, "kustomize", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode
    assert "nothing.yaml" in done.stderr


def test_yamllint_has_no_complaint() -> None:
    linted = subprocess.run([*YAMLLINT, ROOT / "infra"], capture_output=True, text=True, check=False)
    assert linted.returncode == 0, linted.stdout


def test_yamllint_complains_of_a_key_that_is_there_twice(tmp_path: Path) -> None:
    (tmp_path / "twice.yaml").write_text("spec:\n  replicas: 1\n  replicas: 2\n")
    linted = subprocess.run([*YAMLLINT, tmp_path], capture_output=True, text=True, check=False)
    assert "duplication of key" in linted.stdout
    assert linted.returncode


def test_every_overlay_is_tested() -> None:
    folders = {path.parent.name for path in KUBERAY.glob("*/kustomization.yaml")}
    assert folders - {"base", "monitoring"} == set(OVERLAYS)
