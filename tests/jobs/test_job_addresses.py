"""Addresses and names that mean the same to workers in folders of their own."""

from jobs.command import absolute, absolute_model


def test_paths_become_absolute_and_addresses_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute("store") == str(tmp_path / "store")
    assert absolute("s3://bucket/store") == "s3://bucket/store"


def test_a_folder_of_a_model_becomes_absolute_and_names_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bases" / "mine").mkdir(parents=True)
    assert absolute_model("bases/mine") == str(tmp_path / "bases" / "mine")
    (tmp_path / "mine").mkdir()
    assert absolute_model("mine") == str(tmp_path / "mine")
    (tmp_path / "tiny64").mkdir()
    assert (
        absolute_model("stable-diffusion-v1-5/stable-diffusion-v1-5") == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    )
    assert absolute_model("tiny64") == "tiny64"
