"""Serve's configurations are ones that Serve and the application take as they are written."""

from typing import Any

import pytest
import yaml
from manifests import KUBERAY, OVERLAYS, only, render

from objdrive.errors import ObjdriveError
from serve.settings import Settings

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.parametrize("overlay", OVERLAYS)]


def configuration(overlay: str) -> Any:
    return yaml.safe_load((KUBERAY / overlay / "serve.yaml").read_text())


def understood(config: Any) -> Any:
    """What Serve takes of a configuration. It accepts unknown keys and forgets them."""
    from ray.serve.schema import ServeDeploySchema

    return ServeDeploySchema.model_validate(config).model_dump(exclude_unset=True, mode="json")


def test_serve_knows_every_key(overlay: str) -> None:
    config = configuration(overlay)
    assert understood(config) == config


def test_a_key_that_serve_does_not_know_is_noticed(overlay: str) -> None:
    config = configuration(overlay)
    config["http_options"]["request_time_out_s"] = 150.0
    assert understood(config) != config


def test_the_service_runs_this_configuration(overlay: str) -> None:
    service = only(render(overlay), "RayService")
    assert service["spec"]["serveConfigV2"] == (KUBERAY / overlay / "serve.yaml").read_text()


def test_the_settings_are_right(overlay: str) -> None:
    config = configuration(overlay)
    [application] = config["applications"]
    settings = Settings.of(**application["args"])
    assert settings.draw_seconds < config["http_options"]["request_timeout_s"]
    with pytest.raises(ObjdriveError, match="batchsize"):
        Settings.of(**application["args"], batchsize=4)


def test_the_deployments_are_the_applications(overlay: str) -> None:
    from serve.app import build

    [configured] = configuration(overlay)["applications"]
    assert configured["import_path"] == f"{build.__module__}:{build.__name__}"
    application = build({"store": "memory://none", "base": "tiny64", "no_auth": True})
    names = {application._bound_deployment.name, application._bound_deployment.init_args[2]._bound_deployment.name}
    assert {deployment["name"] for deployment in configured["deployments"]} <= names == {"Api", "Generator"}
