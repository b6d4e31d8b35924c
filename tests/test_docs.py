"""What the documents name is there: links, files, functions, commands, settings."""

import ast
import importlib
import re
import unicodedata
from pathlib import Path

import pytest
import yaml
from documents import DOCUMENTS, ROOT, SHELL, blocks, check_command

from objdrive.catalog.manifest import read_manifest
from objdrive.catalog.rows import Row
from objdrive.training.recipe import make_recipe
from serve.auth import read_keys

ROOMS = ("objdrive", "jobs", "serve", "benchmarks", "tests", "docs", "examples", "infra")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")
_DEFINED_IN = re.compile(r"`(\w+)`(?: in|, which is in) `([\w/]+\.py)`")
BLOCKS = [block for path in DOCUMENTS for block in blocks(path)]
each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def each_block(*languages):
    found = [block for block in BLOCKS if block.language in languages]
    return pytest.mark.parametrize("block", found, ids=lambda block: block.where)


def prose(path):
    """A document without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(path):
    """What GitHub calls a document's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    plain = [re.sub(r"[`*]", "", heading).lower() for heading in headings]
    kept = ["".join(c for c in text if c in " -_" or unicodedata.category(c)[0] in "LN") for text in plain]
    return {text.replace(" ", "-") for text in kept}


@each_document
def test_every_relative_link_leads_somewhere(path):
    for link in _LINK.findall(prose(path)):
        if link.startswith(("http://", "https://")):
            continue
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


@each_document
def test_every_file_that_is_named_is_there(path):
    named = [code for code in _CODE.findall(prose(path)) if re.fullmatch(r"[\w./-]+", code)]
    for name in named:
        if name.partition("/")[0] in ROOMS and "/" in name:
            assert (ROOT / name).exists(), name


@each_document
def test_every_function_is_where_a_document_says(path):
    for name, module in _DEFINED_IN.findall(prose(path)):
        tree = ast.parse((ROOT / module).read_text(encoding="utf-8"))
        defined = {getattr(node, "name", None) for node in tree.body}
        assigned = {
            target.id
            for node in tree.body
            if isinstance(node, ast.Assign | ast.AnnAssign)
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name)
        }
        assert name in defined | assigned, f"{module} defines no {name}"


# Importing Ray Serve warns.
@pytest.mark.filterwarnings("ignore")
@each_block(*SHELL)
def test_every_command_is_taken_by_its_parser(block):
    for words in block.commands:
        check_command(words)


@each_block("python")
def test_every_import_of_a_python_block_is_there(block):
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] in ROOMS:
            module = importlib.import_module(node.module)
            assert all(hasattr(module, one.name) for one in node.names)


@each_block("csv")
def test_every_manifest_is_one(block, tmp_path):
    (tmp_path / "manifest.csv").write_text(block.text)
    rows = list(read_manifest(str(tmp_path / "manifest.csv")))
    assert rows
    assert all(isinstance(row, Row) for row in rows)


@each_block("yaml")
def test_every_yaml_block_is_read_by_what_it_is_for(block, tmp_path):
    path = tmp_path / "block.yaml"
    path.write_text(block.text)
    fields = yaml.safe_load(block.text)
    if "keys" in fields:
        assert read_keys(path)
    elif "presets" in fields:
        assert make_recipe("paper", tuning=fields).lora_lr == fields["presets"]["paper"]["lora_lr"]
    else:
        assert make_recipe(str(path)).steps == fields["steps"]


def test_every_kind_of_block_is_known():
    assert {block.language for block in BLOCKS} <= {"", "bash", "csv", "json", "mermaid", "python", "yaml"}


def test_no_document_links_to_lines_of_code():
    for path in DOCUMENTS:
        assert not re.search(r"\.py(#L|:)\d+", path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if path.parent == ROOT / "docs"], ids=lambda p: p.name)
def test_the_readme_or_another_document_leads_to_every_document(document: Path):
    others = [path for path in DOCUMENTS if path != document]
    assert any(document.name in path.read_text(encoding="utf-8") for path in others)
