"""The README's Python blocks run one after another."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pyro
import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_names_that_the_blocks_import_exist():
    nodes = [node for block in BLOCKS for node in ast.parse(block).body]
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    assert len(imports) > 20
    exec(compile(ast.Module(imports, type_ignores=[]), "README.md", "exec"), {})


@pytest.mark.slow
def test_the_blocks_run(tmp_path, monkeypatch):
    """About five minutes."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    for block in BLOCKS:
        pyro.clear_param_store()
        exec(compile(block, "README.md", "exec"), namespace)
    assert (tmp_path / "flow.safetensors").exists()
