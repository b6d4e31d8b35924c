import pytest

from objdrive.adapters.store import ArtifactStore
from objdrive.errors import ObjdriveError
from serve.settings import Settings


def test_takes_text_as_the_command_line_gives_it():
    settings = Settings.of(store="s3://bucket/adapters", no_auth="true", batch_size="4", generators="2:6")
    assert (settings.no_auth, settings.batch_size, settings.generators) == (True, 4, "2:6")


# Pydantic's word on Ray's own fields, where no other test has imported Serve yet.
@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`:DeprecationWarning")
def test_replicas_are_settings(tmp_path):
    from ray.serve._private.build_app import build_app

    from serve.app import build

    key = tmp_path / "key"
    key.write_bytes(b"k" * 32)
    asked = {"store": str(tmp_path), "base": "tiny64", "no_auth": True, "signing_key_file": str(key)}
    built = build(asked | {"generators": "0:3", "ingress": "2:5"})
    schema = {one.name: one for one in build_app(built, name="objdrive").deployments}
    scaled = {name: one._deployment_config.autoscaling_config for name, one in schema.items()}
    assert (scaled["Generator"].min_replicas, scaled["Generator"].max_replicas) == (0, 3)
    assert (scaled["Api"].min_replicas, scaled["Api"].max_replicas) == (2, 5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"no_auth": True}, "store"),
        ({"store": "s", "no_auth": True, "batchsize": 3}, "batchsize"),
        ({"store": "s", "no_auth": True, "batch_size": 0}, "batch_size"),
        ({"store": "s", "no_auth": True, "generators": "0"}, "generators"),
        ({"store": "s", "no_auth": True, "generators": "0:0"}, "generators"),
        ({"store": "s", "no_auth": True, "ingress": "0:2"}, "ingress"),
        ({"store": "s"}, "api_keys"),
        ({"store": "s", "no_auth": True, "api_keys": "keys.yaml"}, "api_keys"),
    ],
)
def test_refuses_what_is_not_right(values, message):
    with pytest.raises(ObjdriveError, match=message):
        Settings.of(**values)


def test_an_empty_store_needs_a_base(tmp_path, small_base, filled):
    assert Settings.of(store=filled.url, no_auth=True).base_name() == "small"
    empty = str(tmp_path / "empty")
    assert Settings.of(store=empty, no_auth=True, base="tiny64").base_name() == "tiny64"
    with pytest.raises(ObjdriveError, match="no objects yet"):
        Settings.of(store=empty, no_auth=True).base_name()
    assert ArtifactStore(empty).url in str(tmp_path / "empty")


def test_the_signing_key_is_a_secret(tmp_path):
    one, other = (Settings.of(store="s", no_auth=True).signing_secret() for _ in range(2))
    assert one != other
    path = tmp_path / "key"
    path.write_text("x" * 40 + "\n")
    kept = Settings.of(store="s", no_auth=True, signing_key_file=path)
    assert kept.signing_secret() == b"x" * 40
    path.write_text("short")
    with pytest.raises(ObjdriveError, match="5 bytes"):
        kept.signing_secret()
    path.unlink()
    with pytest.raises(ObjdriveError, match="signing key"):
        kept.signing_secret()
