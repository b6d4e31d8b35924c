"""The manifests as kustomize renders them, and their schemas."""

import copy
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from documents import ROOT

KUBERAY = ROOT / "infra" / "kuberay"
OVERLAYS = ("gpu", "dev-cpu")
KUBECTL = Path(sys.executable).with_name("kubectl")
KUBERNETES = "1.37"
RAY_SCHEMA = yaml.safe_load((Path(__file__).parent / "ray-io-v1.yaml").read_text())

Manifest = dict[str, Any]


class Refused(Exception):
    """A document does not meet its kind's schema."""


@cache
def _rendered(folder: Path) -> str:
    done = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def render(overlay: str) -> list[Manifest]:
    """An overlay's documents, anew for each caller."""
    return list(yaml.load_all(_rendered(KUBERAY / overlay), Loader=yaml.CSafeLoader))


def only(manifests: list[Manifest], kind: str, name: str = "") -> Manifest:
    """The one document of a kind (and name)."""
    [found] = [one for one in manifests if one["kind"] == kind and name in ("", one["metadata"]["name"])]
    return found


def clusters(manifest: Manifest) -> list[Manifest]:
    """The Ray cluster that a document of ray.io describes; none of other documents."""
    spec = manifest.get("spec", {})
    job = spec.get("jobTemplate", spec)
    return [job[name] for name in ("rayClusterSpec", "rayClusterConfig") if name in job]


def pod_templates(manifest: Manifest) -> Iterator[Manifest]:
    """Every pod template in a document."""
    for cluster in clusters(manifest):
        yield cluster["headGroupSpec"]["template"]
        yield from (group["template"] for group in cluster["workerGroupSpecs"])
    if "template" in manifest.get("spec", {}):
        yield manifest["spec"]["template"]


def check(manifest: Manifest) -> None:
    """Check a document against its kind's schema.

    Raises:
        Refused: a field is unknown, missing or wrong.
    """
    try:
        if manifest["apiVersion"] != "ray.io/v1":
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
            return
        kind = {"$ref": f"#/$defs/{manifest['kind']}", "$defs": RAY_SCHEMA["$defs"]}
        jsonschema.validate(manifest, kind, cls=jsonschema.Draft202012Validator)
        for template in [*pod_templates(manifest), *_autoscalers(manifest)]:
            pod = {"apiVersion": "v1", "kind": "PodTemplate", "template": template}
            kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    except (jsonschema.ValidationError, kubernetes_validate.ValidationError) as error:
        raise Refused(f"{manifest['kind']} {manifest['metadata']['name']}: {error}") from error


def _autoscalers(manifest: Manifest) -> Iterator[Manifest]:
    for cluster in clusters(manifest):
        options = cluster["autoscalerOptions"]
        container = {name: options[name] for name in ("resources", "securityContext")} | {"name": "autoscaler"}
        yield {"spec": {"containers": [container]}}


def changed(manifest: Manifest, path: str, value: Any) -> Manifest:
    """A copy of a document with a value put in, at names and numbers with slashes between."""
    manifest = copy.deepcopy(manifest)
    *way, last = [int(step) if step.isdigit() else step for step in path.split("/")]
    at: Any = manifest
    for step in way:
        at = at[step]
    at[last] = value
    return manifest
