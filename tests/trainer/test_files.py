"""Files are written whole or not at all."""

import json

import pytest

from p3b.files import write_atomically, write_json


def test_a_failing_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "record.json"
    write_json(path, [1])

    def half(target):
        target.write_text("[2")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, half)
    assert json.loads(path.read_text()) == [1] and list(tmp_path.iterdir()) == [path]


def test_numbers_that_are_not_finite_become_null(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1.5, float("nan")], "b": {"c": float("-inf")}, "d": (1, "x", None)})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1.5, None], "b": {"c": None}, "d": [1, "x", None]}
