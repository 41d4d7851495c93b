"""Names of models."""

import re

import pytest

from p3b.models.create import check_model_name


def test_hints_name_models_that_can_be_pruned():
    with pytest.raises(ValueError, match="did you mean") as caught:
        check_model_name("mobilevit_tiny_patch16_224")
    hints = re.findall(r"\w+", str(caught.value).partition("did you mean ")[2])
    assert hints and all(name.startswith(("vit_", "deit")) for name in hints if name != "or")
