"""How many operations a step of drawing launches: a fast GPU waits for each of them."""

import pytest
from documents import ROOT


@pytest.mark.filterwarnings("ignore")
def test_a_step_of_drawing_launches_few_operations(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from operations import drawing_step, write_base

    base = write_base(tmp_path)
    alone, one, eight = (drawing_step(base, objects).total() for objects in (0, 1, 8))
    # The network's own, and two products for each layer with LoRA.
    assert 700 < alone <= 745
    assert one <= 1_245
    # More objects are larger operations, not more of them.
    assert eight - one <= 2
