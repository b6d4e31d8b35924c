"""The job that makes a base, in its smoke configuration: all stages, on two workers, and going on from checkpoints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from objdrive.base import Base
from objdrive.sampler import Request, draw_pictures

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.cluster


def pretrain(cluster: str, out: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "jobs" / "pretrain_base.py"), "--out", str(out), "--config", "smoke"]
    return subprocess.run(
        [*command, *options],
        env={**os.environ, "RAY_ADDRESS": cluster},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def steps(out: Path, stage: str) -> list[int]:
    return [json.loads(line)["step"] for line in (out / stage / "judged.jsonl").read_text().splitlines()]


def test_all_stages_make_a_base_and_more_workers_go_on_from_a_checkpoint(cluster, tmp_path):
    out = tmp_path / "out"
    made = pretrain(cluster, out, "--minutes", "0.1", "--workers", "1", "--threads", "1")
    assert made.returncode == 0, made.stderr
    base = Base.load(str(out / "snapshot"), device="cpu")
    assert base.files.classes == {"apple", "book", "kite"}
    request = Request("a photo of a kite on grass", 0, steps=2, guidance_scale=2.0)
    (picture,) = draw_pictures(base, [request])
    assert picture.size == (32, 32)
    for stage in ("vae", "clip", "unet"):
        assert steps(out, stage)[-1] > 0
        assert (out / stage / "curve.png").is_file()
        assert list((out / stage).glob("samples-*.png"))

    before, weights = steps(out, "unet")[-1], base.unet.conv_in.weight
    refused = pretrain(cluster, out, "--stage", "unet", "--minutes", "0.02")
    assert refused.returncode == 1
    assert "--resume" in refused.stderr
    options = ("--stage", "unet", "--minutes", "0.02", "--resume", "--workers", "2", "--threads", "1")
    resumed = pretrain(cluster, out, *options)
    assert resumed.returncode == 0, resumed.stderr
    assert steps(out, "unet")[-1] > before
    again = Base.load(str(out / "snapshot"), device="cpu").unet.conv_in.weight
    assert not torch.equal(again, weights)
