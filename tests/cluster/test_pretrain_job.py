"""The job that makes a base, in its smoke configuration: all stages on one worker, then on two from a checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from objdrive.base.stable_diffusion import Base
from objdrive.sampling.sampler import SampleSpec, draw_pictures

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.cluster


def pretrain(cluster: str, out: Path, *options: str) -> None:
    command = [sys.executable, str(ROOT / "jobs" / "pretrain_base.py"), "--out", str(out), "--config", "smoke"]
    run = subprocess.run(
        [*command, "--minutes", "0.02", "--threads", "1", *options],
        env={**os.environ, "RAY_ADDRESS": cluster},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def steps(out: Path, stage: str) -> list[int]:
    return [json.loads(line)["step"] for line in (out / stage / "judged.jsonl").read_text().splitlines()]


def test_all_stages_make_a_base_and_more_workers_go_on_from_a_checkpoint(cluster: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pretrain(cluster, out)
    base = Base.load(str(out / "snapshot"), device="cpu")
    assert base.files.classes == {"apple", "book", "kite"}
    request = SampleSpec("a photo of a kite on grass", 0, steps=2, guidance_scale=2.0)
    (picture,) = draw_pictures(base, [request])
    assert picture.size == (32, 32)
    for stage in ("vae", "clip", "unet"):
        assert steps(out, stage)[-1] > 0
        assert (out / stage / "curve.png").is_file()
        assert list((out / stage).glob("samples-*.png"))

    before, weights = steps(out, "unet")[-1], base.unet.conv_in.weight
    pretrain(cluster, out, "--stage", "unet", "--resume", "--workers", "2")
    assert steps(out, "unet")[-1] > before
    again = Base.load(str(out / "snapshot"), device="cpu").unet.conv_in.weight
    assert not torch.equal(again, weights)
