"""Registers ``flaky://``, a real folder whose writes fail by plan, in every process that has this folder on its path.

``flaky:///store`` keeps its files in ``/store``; ``/store.faults/rules.json`` lists ``{"match": ..., "times": ...}``:
that many writes to paths that contain `match` fail, counted over all processes. A rule with `hold` instead of `times`
lets the first such write wait until the file of that name in ``/store.faults`` is gone; ``held`` names its process.
"""

import json
import os
import time
from pathlib import Path

import fsspec
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem


class FlakyFileSystem(DirFileSystem):
    protocol = "flaky"
    cachable = False

    def __init__(self, **options):
        super().__init__("/", LocalFileSystem(auto_mkdir=True))

    @classmethod
    def _strip_protocol(cls, path):
        return path.removeprefix("flaky://").rstrip("/")

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        self._fail_by_plan(path)
        return super().pipe_file(path, value, mode=mode, **kwargs)

    def _fail_by_plan(self, path):
        for folder in list(Path("/" + path.lstrip("/")).parents)[:-1]:
            rules = folder.with_name(folder.name + ".faults") / "rules.json"
            for number, rule in enumerate(json.loads(rules.read_text()) if rules.is_file() else []):
                if "hold" in rule:
                    _hold(rules.parent, rule["hold"], rule["match"] in path)
                elif rule["match"] in path and _one_more(rules.parent, number, rule["times"]):
                    raise OSError(5, f"planned failure of {path}")


def _hold(folder, name, matches):
    if matches and _one_more(folder, name, 1):
        (folder / "held").write_text(str(os.getpid()))
        while (folder / name).exists():
            time.sleep(0.05)


def _one_more(folder, number, times):
    for count in range(times):
        try:
            (folder / f"failed-{number}-{count}").touch(exist_ok=False)
        except FileExistsError:
            continue
        return True
    return False


fsspec.register_implementation("flaky", FlakyFileSystem)
