"""p3b.Config: the settings of a method, whichever way a Config is made."""

import copy
import dataclasses
import json
import pickle

import pytest

from p3b import Config
from p3b.config import METHOD_DEFAULTS

WAYS = {
    "constructor": lambda: Config(method="p3b+"),
    "from_dict": lambda: Config.from_dict({"method": "p3b+"}),
    "replace": lambda: dataclasses.replace(Config(), method="p3b+"),
    "replaced twice": lambda: dataclasses.replace(dataclasses.replace(Config(), seed=3), method="p3b+", seed=0),
    "deepcopy": lambda: dataclasses.replace(copy.deepcopy(Config()), method="p3b+"),
    "pickle": lambda: dataclasses.replace(pickle.loads(pickle.dumps(Config())), method="p3b+"),
    "to_dict": lambda: Config.from_dict(json.loads(json.dumps(Config(method="p3b+").to_dict()))),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_making_a_config_gives_the_methods_defaults(way):
    config = WAYS[way]()
    assert {name: getattr(config, name) for name in METHOD_DEFAULTS["p3b+"]} == METHOD_DEFAULTS["p3b+"]
    assert config == Config(method="p3b+") and config.rank_across == "block"


def test_a_file_gives_them_too(tmp_path):
    (tmp_path / "settings.toml").write_text('method = "p3b+"')
    assert Config.from_file(tmp_path / "settings.toml") == Config(method="p3b+")


def test_what_is_given_wins():
    assert Config(method="p3b+", rank_across="gate").rank_across == "gate"
    assert dataclasses.replace(Config(rank_across="block"), method="p3b").rank_across == "block"
    assert dataclasses.replace(Config(method="p3b+", rank_across="gate"), seed=1).rank_across == "gate"


def test_other_methods_have_the_general_defaults():
    assert Config().rank_across == "gate"
    assert dataclasses.replace(Config(method="p3b+"), method="p3b").rank_across == "gate"


def test_plain_values_go_into_files():
    assert {type(value) for value in Config(method="p3b+").to_dict().values()} <= {str, int, float, bool}
