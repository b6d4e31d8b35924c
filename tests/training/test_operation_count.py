"""How many operations a step launches: a fast GPU waits for each of them, so that they decide how fast it is."""

import pytest
from documents import ROOT

from objdrive.training.recipe import make_recipe


@pytest.mark.filterwarnings("ignore")
def test_a_training_step_launches_few_operations(tmp_path, catalog_scene, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from operations import training_step, write_base

    base = write_base(tmp_path)
    recipe = make_recipe(overrides=["prototype_steps=1", "mend_masks=false"])
    one = training_step(base, [catalog_scene("rocket-01")], recipe)
    assert 1_000 < one.total() <= 4_100
    # What clips, masks and steps runs over all weights at once.
    per_value = ["aten::_fused_adamw_", "aten::linalg_vector_norm", "aten::masked_fill_"]
    assert all(one[name] < 20 for name in per_value)
