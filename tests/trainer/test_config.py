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


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"prune_ratio": 1.0}, ValueError, r"config: prune_ratio must be in \(0, 1\), got 1.0"),
        ({"prune_ratio": "half"}, TypeError, "config: prune_ratio must be float, got 'half'"),
        ({"final_epoch": 2.5}, TypeError, "config: final_epoch must be int, got 2.5"),
        ({"lr": float("nan")}, ValueError, "config: lr must be finite, got nan"),
        ({"start_epoch": 7}, ValueError, "config: sparse_epoch must be above start_epoch = 7, got 7"),
        ({"final_epoch": 3}, ValueError, "config: final_epoch must be at least sparse_epoch = 7, got 3"),
        ({"budget": "flops"}, ValueError, "config: budget must be one of params, macs, got 'flops'"),
        ({"rank_zero_by": "luck"}, ValueError, "config: rank_zero_by must be one of gradient, last"),
        ({"gama": 0.2}, ValueError, "config: key must be one of .*gamma.*, got gama"),
    ],
)
def test_settings_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        Config.from_dict(options)


def test_settings_go_through_a_dictionary():
    made = Config(prune_ratio=0.7, lr=1)
    assert made.lr == 1.0 and isinstance(made.lr, float)
    assert Config.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_recipe_that_does_not_exist(tmp_path):
    with pytest.raises(ValueError, match=r"recipe must be a TOML file or one of .*paper.*, got 'nothing'"):
        Config.from_file("nothing")
    broken = tmp_path / "broken.toml"
    broken.write_text("lr = = 1")
    with pytest.raises(ValueError, match=r"broken\.toml cannot be read as TOML"):
        Config.from_file(broken)
