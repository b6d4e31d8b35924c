"""The guide makes the secrets that the manifests want, and the manifests hold none."""

import base64
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from documents import ROOT, blocks
from manifests import KUBECTL, KUBERAY, OVERLAYS, render

GUIDE = ROOT / "docs" / "kuberay.md"
FILES = {"keys.yaml": "keys: []\n", "signing.key": "k" * 64}
CERTIFICATE = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=pictures.example.com"]


def wanted(value: Any) -> set[tuple[str, str]]:
    """Names of secrets with their keys, wherever a manifest refers to them; an empty key: all of the secret."""
    if isinstance(value, list):
        return set().union(*map(wanted, value))
    if not isinstance(value, dict):
        return set()
    found = set().union(*map(wanted, value.values()))
    for name, part in value.items():
        if name == "secretKeyRef":
            found.add((part["name"], part["key"]))
        elif name == "secretRef":
            found.add((part["name"], ""))
        elif name == "secretName":
            found.add((part, ""))
        elif name == "secret" and isinstance(part, dict):
            found.add((part["secretName"], ""))
        elif name == "authOptions":
            # The key's name is KubeRay's.
            found.add((part["secretName"], "auth_token"))
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """What the guide's commands make, without a cluster: a secret's content by its name."""
    folder = tmp_path_factory.mktemp("secrets")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    subprocess.run([*CERTIFICATE, "-keyout", "tls.key", "-out", "tls.crt"], cwd=folder, capture_output=True, check=True)
    commands = [words for block in blocks(GUIDE) if block.language == "bash" for words in block.commands]
    found = {}
    for words in commands:
        if "create" in words and "secret" in words:
            options = [] if "--dry-run=client" in words else ["--dry-run=client", "-o", "yaml"]
            run = [KUBECTL, *words[1:], *options]
            secret = yaml.safe_load(subprocess.run(run, cwd=folder, capture_output=True, check=True).stdout)
            assert secret["metadata"]["namespace"] == "objdrive"
            found[secret["metadata"]["name"]] = {key: base64.b64decode(text) for key, text in secret["data"].items()}
    return found


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_guide_makes_what_the_manifests_want(overlay: str, made: dict[str, dict[str, bytes]]) -> None:
    asked = wanted(render(overlay))
    assert {"objdrive-keys", "objdrive-ray", "objdrive-redis"} <= {name for name, _ in asked}
    assert {name for name, _ in asked} <= made.keys()
    assert [(name, key) for name, key in asked if key and key not in made[name]] == []


def test_the_guide_makes_nothing_that_no_manifest_wants(made: dict[str, dict[str, bytes]]) -> None:
    assert made.keys() == {name for name, _ in wanted(render("gpu"))}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_files_of_keys_lie_where_the_server_looks(overlay: str, made: dict[str, dict[str, bytes]]) -> None:
    config = yaml.safe_load((KUBERAY / overlay / "serve.yaml").read_text())
    [application] = config["applications"]
    files = [Path(application["args"][name]) for name in ("api_keys", "signing_key_file")]
    assert {file.name for file in files} == made["objdrive-keys"].keys()
    [service] = [one for one in render(overlay) if one["kind"] == "RayService"]
    cluster = service["spec"]["rayClusterConfig"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        [volume] = [one["name"] for one in pod["volumes"] if one.get("secret", {}).get("secretName") == "objdrive-keys"]
        [mount] = [one for one in pod["containers"][0]["volumeMounts"] if one["name"] == volume]
        assert {str(file.parent) for file in files} == {mount["mountPath"]}
        assert mount["readOnly"]


def secrets_in(text: str) -> list[str]:
    return re.findall(
        r"kind: Secret\b|stringData|secretGenerator|BEGIN [A-Z ]*PRIVATE KEY|AKIA[0-9A-Z]{16}|\bod-\w{20,}", text
    )


def test_no_manifest_holds_a_secret() -> None:
    files = [path for path in (ROOT / "infra").rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if secrets_in(path.read_text())] == []
    assert secrets_in("kind: Secret\nstringData: {key: od-abcdefghijklmnopqrstuvw}")
