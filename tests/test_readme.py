"""The README says what is true: its table is the registry, its files and verbs exist, CI runs its command."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_techniques_is_the_registry():
    from lab.cli.techniques import markdown

    table = README.split("<!-- techniques -->")[1].split("<!-- /techniques -->")[0].strip()
    assert table == markdown().strip(), "run: python -m lab techniques --markdown"


def test_the_catalogue_table_is_the_measured_one():
    import json
    import sys

    sys.path.insert(0, str(ROOT))
    from benchmarks.catalogue_table import MARKS, table

    result = json.loads((ROOT / "benchmarks" / "results" / "catalogue.json").read_text())
    shown = README.split(MARKS[0])[1].split(MARKS[1])[0].strip()
    assert shown == table(result), "run: python benchmarks/catalogue_table.py --readme"


@pytest.mark.parametrize("name", ["catalogue_read", "catalogue_prefill"])
def test_the_tables_of_the_read_side_are_the_measured_ones(name):
    import json
    import sys

    sys.path.insert(0, str(ROOT))
    from benchmarks.catalogue_read_table import TABLES, marks, table

    result = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    first, last = marks(name)
    assert README.split(first)[1].split(last)[0].strip() == table(result, TABLES[name]), (
        "run: python benchmarks/catalogue_read_table.py --readme"
    )


def test_linked_files_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_ci_finds_the_readmes_test_command():
    script = (ROOT / ".ci" / "run").read_text()
    program = re.search(r"awk '(.*?)' README", script).group(1)
    found = subprocess.run(["awk", program, "README.md"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert found.startswith("python3 -m venv .venv") and "-m pytest" in found
    assert found in README


def test_the_five_lines_of_the_readme_run(monkeypatch):
    """The script under "Your own script", on a tiny model in place of NAME, with a prompt as short as its own."""
    import sys

    sys.path.insert(0, str(ROOT / "tests" / "measure"))
    import toy
    import transformers
    import torch

    code = re.search(r"## Your own script.*?```python\n(.*?)```", README, re.S).group(1)
    stand = toy.loaded()

    class Tokenizer(toy.Words):
        def __call__(self, text, return_tensors=None):
            return {"input_ids": torch.tensor([[5 + len(word) for word in text.split()]])}

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", classmethod(lambda cls, name: stand.model))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", classmethod(lambda cls, name: Tokenizer()))
    scope = {"NAME": "tiny"}
    exec(code, scope)
    assert 0 < scope["cache"].kv_bytes and scope["cache"].kept_fraction < 1


def test_import_contracts():
    """import-linter's contracts of pyproject.toml hold."""
    pytest.importorskip("importlinter")
    import sys

    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
        cwd=ROOT, capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:]
