"""Settings of a run that takes a second."""

import json

import pytest
from toy import SETTINGS


@pytest.fixture(autouse=True)
def small_models_run_on(one_thread):
    """One thread."""


@pytest.fixture
def config(tmp_path):
    """Write SETTINGS and changes to a JSON file; returns the flags that name it."""

    def write(**changes):
        path = tmp_path / "settings.json"
        path.write_text(json.dumps({k: v for k, v in (SETTINGS | changes).items() if v is not None}))
        return ["--config", str(path)]

    return write
