"""Whatever the OpenAPI document allows, and what it does not, is answered as it says."""

import pytest
import schemathesis
from conftest import OBJECTS, serving
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import ignored_auth, positive_data_acceptance

BOUNDED = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)

EXCLUDED = [
    ignored_auth,  # the key is in the configuration's headers, where the check cannot take it out
    positive_data_acceptance,  # not all that is well-formed can be drawn: a size must be the base's
]
CAN_BE_ASKED_WRONGLY = {"POST /v1/images/generations", "POST /v1/images/edits", "GET /v1/models", "GET /objects"}


@pytest.fixture(scope="module")
def schema(small_base, filled, tmp_path_factory):
    keys = [("shop", {"requests_per_minute": 1e6, "burst": 100_000})]
    with serving(small_base, filled, tmp_path_factory.mktemp("fuzz"), keys=keys, queue_limit=64) as server:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        schema.config.update(headers={"authorization": f"Bearer {server.secrets['shop']}"})
        yield schema


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_the_document_holds(schema, mode):
    checked = []
    for operation in (result.ok() for result in schema.get_all_operations()):
        if mode is GenerationMode.NEGATIVE and operation.label not in CAN_BE_ASKED_WRONGLY:
            continue

        @BOUNDED
        @given(case=operation.as_strategy(generation_mode=mode))
        def answers_as_it_says(case):
            if mode is GenerationMode.POSITIVE:
                _aim(case)
            case.call_and_validate(excluded_checks=EXCLUDED)

        answers_as_it_says()
        checked.append(operation.label)
    assert set(checked) >= CAN_BE_ASKED_WRONGLY


def _aim(case):
    """Half of the cases at objects that are there; few steps."""
    for name in {"model", "object_id"} & set(case.path_parameters or {}):
        if len(str(case.path_parameters[name])) % 2:
            case.path_parameters[name] = next(iter(OBJECTS))
    if isinstance(case.body, dict):
        if isinstance(case.body.get("model"), str) and len(case.body["model"]) % 2:
            case.body["model"] = next(iter(OBJECTS))
        if type(case.body.get("steps")) is int and case.body["steps"] > 2:
            case.body["steps"] = 2
        case.body.setdefault("steps", 1)
