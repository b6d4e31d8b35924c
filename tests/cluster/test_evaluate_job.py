"""The job that measures stores: one run over two objects."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs.evaluation.compose import write_half
from jobs.pretrain.sprites import draw_sprites
from objdrive.adapters.artifact import SourceRecord, Sources
from objdrive.adapters.store import ArtifactStore
from objdrive.evaluation.prompts import read_prompts

ROOT = Path(__file__).parents[2]
PROMPTS = """
- {id: grass, kind: context, text: "a photo of {} on grass", shows: {context: on grass}}
- {id: night, kind: context, text: "a photo of {} in the night sky", shows: {context: in the night sky}}
"""

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def job(cluster, tmp_path, tiny64, put_adapter):
    """Call it with options: the job over two objects with adapters that draw nothing sensible."""
    prompts, half, store = tmp_path / "prompts.yaml", tmp_path / "half", ArtifactStore(str(tmp_path / "store"))
    prompts.write_text(PROMPTS)
    write_half(draw_sprites(0), ("apple", "kite"), read_prompts(prompts), half, resolution=64, scenes=3)
    for seed, word in enumerate(("apple", "kite")):
        paths = [str(half / folder / f"{word}-held.png") for folder in ("images", "masks")]
        image, mask = (SourceRecord(uri=path, size=Path(path).stat().st_size, mark="") for path in paths)
        sources = Sources(image=image, mask=mask)
        put_adapter(store, tiny64, f"{word}-held", seed, class_name=word, sources=sources)

    def run(*options):
        command = [sys.executable, str(ROOT / "jobs" / "evaluate.py"), "--store", f"random={store.url}"]
        command += [
            "--prompts",
            str(prompts),
            "--gallery",
            str(half / "gallery.parquet"),
            "--out",
            str(tmp_path / "out"),
        ]
        return subprocess.run(
            [*command, "--encoder", "clip", "--steps", "2", "--workers", "1", "--seeds", "1", *options],
            env={**os.environ, "RAY_ADDRESS": cluster},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


def test_a_store_is_drawn_scored_and_shown(job, tmp_path):
    done = job("--base-alone", "--controls", "--seeds", "2")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    pictures = pq.read_table(out / "pictures.parquet").to_pylist()
    keys = [(row["method"], row["object_id"], row["prompt_id"], row["number"]) for row in pictures]
    methods, objects = ("copy", "scenes", "random", "base"), ("apple-held", "kite-held")
    assert sorted(keys) == sorted(product(methods, objects, ("grass", "night"), (0, 1)))

    scores = {
        (row["method"], row["object_id"], row["prompt_id"], row["number"]): row
        for row in pq.read_table(out / "scores.parquet").to_pylist()
    }
    assert scores.keys() == set(keys)
    for one in objects:
        assert scores["copy", one, "grass", 0]["whole"] == pytest.approx(1, abs=1e-4)
        assert {
            scores["scenes", one, prompt, number]["context"] for prompt in ("grass", "night") for number in (0, 1)
        } == {1.0}
        assert scores["base", one, "grass", 0]["whole"] != scores["random", one, "grass", 0]["whole"]
    summary = {
        (row["method"], row["metric"]): row
        for row in pq.read_table(out / "summary.parquet").to_pylist()
        if row["kind"] == "all"
    }
    assert summary["scenes", "context"]["value"] == 1
    assert summary["copy", "context"]["value"] == 0.5
    assert summary["copy", "layout copied"]["value"] == 1
    assert summary["scenes", "layout copied"]["value"] < 0.9
    for name in ("similarity.svg", "similarity.png", "recognition.svg", "recognition.png"):
        assert (out / name).stat().st_size > 1000
    page = (out / "report.html").read_text()
    assert page.count("<img") == 2 + 2 + 2 * 3 * 2
    assert "http" not in page.replace("http-equiv", "")
