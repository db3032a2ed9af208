import json

import pytest

from userip_fast.core.config import Config, DataConfig, EMConfig
from userip_fast.core.errors import ConfigError
from userip_fast.prompts.layout import ProfileField


def test_round_trip_through_json_and_yaml(tmp_path):
    config = Config(
        data=DataConfig(rating="stars", loss=(0.25, 1.0), feedback_thresholds=(2.5, 4.0)),
        em=EMConfig(steps=3),
        fields=(ProfileField("hobby", "Likes", 2, 5, ("tea", "coffee")),),
    )
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    import yaml

    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config.to_dict()))
    assert Config.load(tmp_path / "c.yaml") == config


def test_values_are_coerced_by_type():
    config = Config.from_dict({"em": {"lr": "1e-2", "steps": "7"}, "data": {"negatives": 2}})
    assert config.em.lr == 0.01
    assert config.em.steps == 7
    assert Config().override({"data.loss": [0.5, 1], "em.seed": 3}).data.loss == (0.5, 1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"emm": {}}, "unknown key 'emm'"),
        ({"em": {"step": 3}}, "unknown key 'step'.*steps"),
        ({"em": {"steps": 0}}, "em.steps must be at least 1, is 0"),
        ({"em": {"steps": 1.5}}, "em.steps must be int, is 1.5"),
        ({"em": {"lr": "fast"}}, "em.lr must be float"),
        ({"em": {"recipe": "other"}}, "must be one of"),
        ({"data": {"loss": "none"}}, "data.loss"),
        ({"data": {"behaviour": "{title}"}}, r"data.behaviour must be holding \{text\}"),
        ({"data": {"feedback_thresholds": [3, 2]}}, "2 increasing numbers"),
        ({"fields": []}, "at least one profile field"),
        ({"fields": [{"name": "a b", "prompt": ""}]}, "must be an identifier"),
        ({"fields": [{"name": "a", "prompt": "", "codebook_size": 0}]}, "at least 1"),
        ({"fields": [{"name": "a", "prompt": ""}] * 2}, "of different names"),
        ({"em": 3}, "must be a mapping"),
    ],
)
def test_wrong_settings_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        Config.from_dict(values)


def test_override_and_files_name_what_is_wrong(tmp_path):
    with pytest.raises(ConfigError, match="no 'foo'"):
        Config().override({"foo.bar": 1})
    with pytest.raises(ConfigError, match="choose one of"):
        Config().override({"em.foo": 1})
    with pytest.raises(ConfigError, match="cannot be read"):
        Config.load(tmp_path / "absent.yaml")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ConfigError, match="must hold a mapping"):
        Config.load(tmp_path / "list.json")
