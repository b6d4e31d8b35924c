"""The deployment's configuration is one that Serve takes as it is written."""

from pathlib import Path

import pytest
import yaml

from serve.settings import Settings

pytestmark = pytest.mark.filterwarnings("ignore")
CONFIG = yaml.safe_load((Path(__file__).parents[2] / "infra" / "serve.yaml").read_text())


def test_serve_knows_every_key():
    from ray.serve.schema import ServeDeploySchema

    # It accepts unknown keys and forgets them: what comes back is what was understood.
    understood = ServeDeploySchema.model_validate(CONFIG).model_dump(exclude_unset=True, mode="json")
    assert understood == CONFIG


def test_the_settings_are_right():
    [application] = CONFIG["applications"]
    settings = Settings.of(**application["args"])
    assert settings.draw_seconds < CONFIG["http_options"]["request_timeout_s"]


def test_the_deployments_are_the_applications():
    from serve.app import build

    application = build({"store": "memory://none", "base": "tiny64", "no_auth": True})
    names = {application._bound_deployment.name, application._bound_deployment.init_args[2]._bound_deployment.name}
    [configured] = CONFIG["applications"]
    assert {deployment["name"] for deployment in configured["deployments"]} == names
