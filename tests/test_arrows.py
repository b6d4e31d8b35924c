"""The rooms' arrows point one way: the contracts in pyproject.toml, lazy imports included."""

from importlinter.cli import lint_imports


def test_no_import_runs_against_the_arrows(capsys):
    status = lint_imports(no_cache=True)
    assert status == 0, capsys.readouterr().out
