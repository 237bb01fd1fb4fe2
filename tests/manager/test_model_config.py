from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from splitlearn_manager.config import ModelConfig, PartOptions, PipelineOptions, TrunkLink
from splitlearn_manager.config.retry import RetryPolicy
from splitlearn_manager.errors import ConfigError


def config(**changes: Any) -> ModelConfig:
    """Return a valid configuration with some values changed."""
    return ModelConfig(**{"model_id": "m", "model_path": "folder", **changes})


def trunk(**changes: Any) -> ModelConfig:
    """Return the configuration of a Trunk with some of `config`'s values changed."""
    return config(config={"component": "trunk", "split_points": [2, 6], **changes})


def pipeline(**changes: Any) -> ModelConfig:
    """Return the configuration of a pipeline with some of `config`'s values changed."""
    values = {"split_points": [2, 6], "trunk": "http://host:8000", **changes}
    return config(model_type="pipeline", config={k: v for k, v in values.items() if v is not None})


def test_defaults_are_those_of_the_whole_model_on_the_cpu() -> None:
    assert config() == ModelConfig("m", "folder", "auto", "cpu", None, False, {})
    assert config().options == PartOptions(component="full")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model_id", "", "model_id: must be 1 to 128 letters"),
        ("model_id", "a/b", "model_id: must be 1 to 128 letters"),
        ("model_id", "a..b", "found 'a..b' (str)"),
        ("model_id", "é", "model_id: must be 1 to 128 letters"),
        ("model_id", "a\n", "model_id: must be 1 to 128 letters"),
        ("model_id", "a" * 129, "model_id: must be 1 to 128 letters"),
        ("model_id", 7, "found 7 (int)"),
        ("model_path", "", "model_path: must not be empty"),
        ("model_path", 7, "model_path: should be a valid string, found 7 (int)"),
        (
            "model_type",
            "nonesuch",
            "unknown model type; known are auto, pytorch, huggingface, pipel",
        ),
        ("model_type", "custom", "found 'custom' (str)"),
        ("device", "tpu", "device: must be cpu, cuda, cuda:0, cuda:1, … or mps, found 'tpu' (str)"),
        ("device", "cuda:x", "found 'cuda:x' (str)"),
        ("dtype", "int8", "dtype: must be one of float32, float16, bfloat16, float64, found"),
        ("warmup", "yes", "warmup: should be a valid boolean, found 'yes' (str)"),
        ("warmup", 1, "warmup: should be a valid boolean, found 1 (int)"),
        ("config", [1], "config: should be a valid dictionary, found [1] (list)"),
    ],
)
def test_a_wrong_value_is_told_with_its_key(field: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**{field: value})

    assert message in str(caught.value)


def test_all_wrong_values_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig("a b", 5, warmup="no", colour="red")  # type: ignore[arg-type, call-arg]

    assert [problem.path for problem in caught.value.problems] == [
        ("model_id",),
        ("model_path",),
        ("warmup",),
        ("colour",),
    ]


def test_an_unknown_key_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(ConfigError, match=r"^modle_id: unknown key; did you mean 'model_id'\?"):
        config(modle_id="x")
    with pytest.raises(ConfigError, match=r"config\.split_pionts: .* did you mean 'split_points'"):
        config(config={"split_pionts": [2, 6]}).validate()


def test_the_value_of_an_unknown_key_is_not_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        config(token="s3cret")  # noqa: S106 - it is none

    assert "s3cret" not in str(caught.value)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^model_path: is missing$"):
        ModelConfig("m")  # type: ignore[call-arg]


def test_a_configuration_can_not_be_changed() -> None:
    given = {"split_points": [2, 6]}
    made = config(config=given)
    given["split_points"].append(9)

    assert made.config == {"split_points": [2, 6]}
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.device = "mps"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(None, None), ("bf16", "bfloat16"), ("torch.float16", "float16"), ("float32", "float32")],
)
def test_a_dtype_is_kept_by_its_name(dtype: str | None, name: str | None) -> None:
    assert config(dtype=dtype).dtype == name


def test_a_torch_dtype_is_kept_by_its_name() -> None:
    torch = pytest.importorskip("torch")

    assert config(dtype=torch.bfloat16).dtype == "bfloat16"
    assert config(device=torch.device("cuda", 1)).device == "cuda:1"


def test_a_path_object_is_kept_as_text() -> None:
    made = config(model_path=Path("a") / "b", config={"cache_dir": Path("c")})

    assert made.model_path == str(Path("a") / "b")
    assert made.part.cache_dir == "c"


def test_configurations_are_equal_by_what_they_say() -> None:
    assert trunk(split_points=(2, 6)) == trunk()
    assert trunk(split_points=(2, 7)) != trunk()


@pytest.mark.parametrize(
    ("model_type", "given", "component"),
    [
        ("auto", {}, "full"),
        ("auto", {"split_points": [2, 6]}, "trunk"),
        ("llama", {"split_points": [2, 6]}, "trunk"),
        ("llama", {"split_points": [2, 6], "component": "top"}, "top"),
        ("auto", {"split_points": [2, 4, 6], "component": "trunk-1"}, "trunk-1"),
        ("huggingface", {}, "full"),
        ("huggingface", {"split_points": [2, 6], "component": "bottom"}, "bottom"),
        ("auto", {"split_points": [2, 6], "component": "full"}, "full"),
    ],
)
def test_the_component_that_is_meant(
    model_type: str, given: dict[str, object], component: str
) -> None:
    made = config(model_type=model_type, config=given)

    made.validate()

    assert made.part.component == component


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"component": "trunk"}, "config.component: needs split_points, as in [8, 24], found 'tr"),
        ({"component": "middle"}, "config.component: must be bottom, trunk, trunk-0, …, top or f"),
        (
            {"component": "trunk", "split_points": [2, 4, 6]},
            "config.component: must be one of bottom, trunk-0, trunk-1, top, full with these",
        ),
        ({"component": "trunk-0", "split_points": [2, 6]}, "must be one of bottom, trunk, top"),
        ({"split_points": [6, 2]}, "config.split_points: split points must rise"),
        ({"split_points": [2]}, "config.split_points: split points must be at least two"),
        ({"split_points": [2, "6"]}, "found [2, '6'] (list)"),
        ({"split_points": [2, True]}, "config.split_points: split points must be layer numbers"),
        ({"split_points": "2,6"}, "must be a list of layer numbers, as in [8, 24], found '2,6'"),
        ({"mmap": "no"}, "config.mmap: should be a valid boolean, found 'no' (str)"),
        ({"cache_dir": 5}, "config.cache_dir: should be a valid string, found 5 (int)"),
        ({"trunk": "http://h"}, "config.trunk: unknown key"),
    ],
)
def test_what_is_wrong_with_a_part_is_told_with_its_key(
    given: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        config(config=given).validate()

    assert message in str(caught.value)


def test_cuts_without_a_component_are_ambiguous_for_a_whole_model() -> None:
    with pytest.raises(ConfigError, match=r"^config\.component: is needed"):
        config(model_type="huggingface", config={"split_points": [2, 6]}).validate()


def test_pytorch_wants_a_checkpoint_file() -> None:
    config(model_type="pytorch", model_path="a/model.pt").validate()

    with pytest.raises(ConfigError, match=r"model_path: must be a \.pt, \.pth, \.bin file"):
        config(model_type="pytorch", model_path="a/model.safetensors").validate()


def test_a_pipeline_has_one_link_for_each_trunk() -> None:
    both = ("http://a:1", "https://b")

    assert pipeline().pipeline.links == (TrunkLink(("http://host:8000",), "trunk"),)
    assert pipeline(trunk=list(both), trunk_model_id="t").pipeline.links == (TrunkLink(both, "t"),)
    assert pipeline(
        split_points=[2, 4, 6],
        trunk=None,
        chain=[
            {"trunk": "http://a:1", "trunk_model_id": "t-0"},
            {"trunk": list(both), "trunk_model_id": "t-1"},
        ],
    ).pipeline.links == (TrunkLink(("http://a:1",), "t-0"), TrunkLink(both, "t-1"))


def test_a_pipeline_says_how_it_tries_to_go_on() -> None:
    retry = {"attempts": 3, "base": 1, "maximum": 20.5, "total": 300}
    found = pipeline(retry=retry, history_limit="1 GiB").pipeline

    assert found.retry == RetryPolicy(attempts=3, base=1.0, maximum=20.5, total=300.0)
    assert found.history_limit == 2**30
    assert pipeline(retry=None).pipeline.retry == RetryPolicy()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trunk": "host:8000"}, "config.trunk: must be an address such as http://host:8000"),
        ({"trunk": "http://h:99999"}, "config.trunk: must be an address"),
        ({"trunk": "http://a..b"}, "config.trunk: must be an address"),
        ({"trunk": []}, "config.trunk: must name at least one address"),
        ({"trunk": 5}, "found 5 (int)"),
        ({"trunk": None}, "config: needs either trunk (an address) or chain"),
        ({"chain": [{"trunk": "http://a"}]}, "config: needs either trunk (an address) or chain"),
        ({"trunk": None, "chain": []}, "config.chain: must be a list with a trunk"),
        ({"trunk": None, "chain": ["http://a"]}, "config.chain[0]: must be a mapping"),
        (
            {"trunk": None, "chain": [{"trunk": "http://a", "id": "t"}]},
            "config.chain[0].id: unknown key; Known are trunk, trunk_model_id",
        ),
        (
            {"trunk": None, "chain": [{"trunk": "http://a"}], "trunk_model_id": "t"},
            "config.trunk_model_id: belongs into each item of chain",
        ),
        ({"split_points": [2, 4, 6]}, "config.split_points: 3 split_points need 2 Trunk(s), found"),
        ({"split_points": None}, "config.split_points: is missing"),
        ({"retry": {"attempts": 0}}, "config.retry.attempts: must be 1 or more, found 0 (int)"),
        ({"retry": {"atempts": 3}}, "config.retry.atempts: unknown key; did you mean 'attempts'?"),
        ({"retry": {"total": -1}}, "config.retry.total: must be a number of seconds, 0 or more"),
        ({"retry": 5}, "config.retry: must be a mapping"),
        ({"history_limit": "much"}, "config.history_limit: must be a number of bytes"),
        ({"token_file": "a", "token_env": "B"}, "config.token_env: give token_file or token_env"),
        ({"component": "trunk"}, "config.component: unknown key"),
    ],
)
def test_what_is_wrong_with_a_pipeline_is_told_with_its_key(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        pipeline(**changes).validate()

    assert message in str(caught.value)


def test_options_are_asked_for_by_what_the_model_is() -> None:
    assert isinstance(pipeline().options, PipelineOptions)
    with pytest.raises(ConfigError, match="'m' is a pipeline, not a part"):
        _ = pipeline().part
    with pytest.raises(ConfigError, match="'m' is a part, not a pipeline"):
        _ = trunk().pipeline


@pytest.mark.parametrize("made", [config(), trunk(), pipeline()])
def test_a_configuration_is_the_same_after_to_dict_and_back(made: ModelConfig) -> None:
    assert ModelConfig.from_dict(made.to_dict()) == made


def test_from_yaml_names_file_line_and_key(tmp_path: Path) -> None:
    file = tmp_path / "model.yaml"
    file.write_text("model_id: m\nmodel_path: p\nconfig:\n  split_points: [6, 2]\n")

    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_yaml(file)

    assert str(caught.value).startswith(f"{file}:4: config.split_points: split points must rise")


def test_from_yaml_reads_a_model(tmp_path: Path) -> None:
    file = tmp_path / "model.yaml"
    file.write_text("model_id: m\nmodel_path: p\nconfig:\n")

    assert ModelConfig.from_yaml(file) == config(model_path="p")
