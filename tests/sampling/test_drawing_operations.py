"""How many operations a step of drawing launches: a fast GPU waits for each of them."""

import pytest
from documents import ROOT


@pytest.mark.filterwarnings("ignore")
def test_a_step_of_drawing_launches_few_operations(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from operations import drawing_step, write_base

    base = write_base(tmp_path)
    alone, eight = drawing_step(base, 0), drawing_step(base, 8)
    assert 700 < alone.total() <= 736
    # Two products for each layer with LoRA, and one that puts those of a kernel together: of one object or of eight.
    assert eight.total() - alone.total() <= 540
    # The scheduler's and guidance's arithmetic is not done picture by picture.
    assert eight["aten::mul"] == alone["aten::mul"]
    assert eight["aten::pow"] == 0
