import importlib
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch):
    """Import a script of tools/ by its name, as the scripts import one another."""
    monkeypatch.syspath_prepend(str(TOOLS / "prepare"))
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module
