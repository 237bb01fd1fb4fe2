"""Inference with Triton's own clients: the parts of a model, chained, are the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import tritonclient.http
from infer_requests import NUMPY, call, models, serving, tensor
from serving_fakes import ask
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM
from tritonclient.http import InferRequestedOutput
from tritonclient.utils import InferenceServerException

from splitlearn_manager import ModelConfig

IDS = np.array([[5, 17, 42, 3, 96], [8, 1, 0, 33, 2]], dtype=np.int64)
MASK = np.array([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=np.int64)
POSITIONS = np.array([[0, 0, 1, 2, 3], [0, 1, 2, 3, 4]], dtype=np.int64)

DATATYPES = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16"}


@pytest.fixture(scope="module")
def url(tiny_checkpoint: Any) -> Iterator[str]:
    """Serve a Llama in three dtypes."""
    with serving([one for dtype in DATATYPES for one in models(tiny_checkpoint, dtype)]) as url:
        yield url


@pytest.fixture(scope="module")
def unsplit(tiny_checkpoint: Any) -> Callable[..., torch.Tensor]:
    """Return a function that gives the logits of transformers' own model."""

    def logits(dtype: str, **arguments: Any) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=getattr(torch, dtype))
        given = {name: torch.from_numpy(value) for name, value in arguments.items()}
        with torch.no_grad():
            found: torch.Tensor = model.eval()(**given).logits
        return found

    return logits


def chain(client: str, url: str, dtype: str, *, binary: bool, **options: Any) -> Any:
    """Return the logits that the three parts give, one after the other."""
    beside = [tensor("attention_mask", MASK, binary=binary)]
    beside.append(tensor("position_ids", POSITIONS, binary=binary))
    name, value = "input_ids", IDS
    for part, gives in (("bottom", "hidden_states"), ("trunk", "hidden_states"), ("top", "logits")):
        inputs = [tensor(name, value, binary=binary), *beside]
        wanted = [InferRequestedOutput(gives, binary_data=binary)]
        answer = call(client, url, f"{part}-{dtype}", inputs, outputs=wanted, **options)
        name, value = gives, answer.as_numpy(gives)
    return value


def same(found: Any, expected: torch.Tensor) -> bool:
    """Whether two tensors are equal to the bit."""
    kind = {torch.float32: np.int32, torch.float16: np.int16, torch.bfloat16: np.int16}
    bits = kind[expected.dtype]
    octets = expected.contiguous().view(torch.uint8).numpy()
    return bool(np.array_equal(found.view(bits), octets.view(bits)))


@pytest.mark.parametrize("client", ["http", "aio"])
@pytest.mark.parametrize(
    ("dtype", "binary"),
    [("float32", True), ("float32", False), ("bfloat16", True), ("float16", True)],
)
def test_the_parts_in_a_row_are_the_unsplit_model(
    url: str, unsplit: Any, client: str, dtype: str, binary: bool
) -> None:
    found = chain(client, url, dtype, binary=binary)

    expected = unsplit(dtype, input_ids=IDS, attention_mask=MASK, position_ids=POSITIONS)
    assert found.dtype == NUMPY[DATATYPES[dtype]]
    assert same(found, expected)


@pytest.mark.parametrize("client", ["http", "aio"])
@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_bodies_may_be_compressed_both_ways(
    url: str, unsplit: Any, client: str, coding: str
) -> None:
    both = {"request_compression_algorithm": coding, "response_compression_algorithm": coding}

    found = chain(client, url, "float32", binary=True, **both)

    expected = unsplit("float32", input_ids=IDS, attention_mask=MASK, position_ids=POSITIONS)
    assert same(found, expected)


@pytest.mark.parametrize("client", ["http", "aio"])
def test_the_whole_model_gives_logits_for_ids_alone(url: str, unsplit: Any, client: str) -> None:
    answer = call(client, url, "full-float32", [tensor("input_ids", IDS)], request_id="mine")

    assert same(answer.as_numpy("logits"), unsplit("float32", input_ids=IDS))
    response = answer.get_response()
    assert (response["id"], response["model_name"], response["model_version"]) == (
        "mine",
        "full-float32",
        "1",
    )
    assert answer.get_output("logits")["parameters"]["binary_data_size"] == 2 * 5 * 97 * 4


def test_the_version_can_be_named_and_json_can_be_asked_for(url: str) -> None:
    wanted = [InferRequestedOutput("hidden_states", binary_data=False)]

    answer = call(
        "http",
        url,
        "bottom-float32",
        [tensor("input_ids", IDS)],
        model_version="1",
        outputs=wanted,
    )

    assert len(answer.get_output("hidden_states")["data"]) == 2 * 5 * 32
    assert "id" not in answer.get_response()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_not_given_as_json(url: str, dtype: str) -> None:
    wanted = [InferRequestedOutput("hidden_states", binary_data=False)]

    with pytest.raises(InferenceServerException, match=r"no form in JSON: ask for it as binary"):
        call("http", url, f"bottom-{dtype}", [tensor("input_ids", IDS)], outputs=wanted)


def test_what_is_no_number_goes_through(url: str) -> None:
    hidden = np.ones((2, 2, 32), dtype=np.float32)
    hidden[1, 1, 3] = np.nan

    for binary in (True, False):
        wanted = [InferRequestedOutput("hidden_states", binary_data=binary)]
        given = tensor("hidden_states", hidden, binary=binary)
        answer = call("http", url, "trunk-float32", [given], outputs=wanted)
        found = answer.as_numpy("hidden_states")
        assert np.isnan(found[1, 1]).all()
        assert not np.isnan(found[0]).any()


def test_metadata_and_configuration_fit_what_is_taken_and_given(url: str) -> None:
    address = url.removeprefix("http://")
    with tritonclient.http.InferenceServerClient(address) as client:
        extensions = client.get_server_metadata()["extensions"]
        metadata = client.get_model_metadata("top-bfloat16")
        config = client.get_model_config("top-bfloat16", "1")
        answer = client.infer(
            "top-bfloat16",
            [tensor("hidden_states", np.zeros((1, 2, 32), dtype=ml_dtypes.bfloat16))],
        )

    assert {"binary_tensor_data", "statistics", "model_configuration"} <= set(extensions)
    assert config["max_batch_size"] == 0
    assert config["name"] == "top-bfloat16"
    for entry, configured in zip(metadata["inputs"], config["input"], strict=True):
        assert configured["name"] == entry["name"]
        assert configured["data_type"] == f"TYPE_{entry['datatype']}"
        assert configured["dims"] == entry["shape"]
    assert config["output"] == [{"name": "logits", "data_type": "TYPE_BF16", "dims": [-1, -1, 97]}]
    output = answer.get_output("logits")
    assert (output["datatype"], output["shape"]) == ("BF16", [1, 2, 97])


def test_requests_are_counted(tiny_checkpoint: Any) -> None:
    with serving(models(tiny_checkpoint, "float32")[:1]) as url:
        call("http", url, "bottom-float32", [tensor("input_ids", IDS)])
        call("http", url, "bottom-float32", [tensor("input_ids", IDS[:1])])
        with pytest.raises(InferenceServerException, match="must be 0 to 96"):
            call("http", url, "bottom-float32", [tensor("input_ids", IDS + 90)])
        with tritonclient.http.InferenceServerClient(url.removeprefix("http://")) as client:
            every = client.get_inference_statistics()
            named = client.get_inference_statistics("bottom-float32", "1")
        metrics = ask(url, "/metrics").body.decode()

    assert every == named
    (found,) = every["model_stats"]
    assert (found["name"], found["version"]) == ("bottom-float32", "1")
    assert (found["inference_count"], found["execution_count"]) == (3, 2)
    assert found["last_inference"] > 1_700_000_000_000
    stats = found["inference_stats"]
    assert stats["fail"]["count"] == 1
    stages = [stats[name] for name in ("queue", "compute_input", "compute_infer", "compute_output")]
    assert [stage["count"] for stage in stages] == [2] * 4
    assert all(stage["ns"] > 0 for stage in stages)
    assert stats["success"]["count"] == 2
    assert stats["success"]["ns"] >= sum(stage["ns"] for stage in stages)
    labels = 'model="bottom-float32"'
    assert f'splitlearn_infer_requests_total{{code="ok",{labels}}} 2.0' in metrics
    assert f'splitlearn_infer_requests_total{{code="bad_request",{labels}}} 1.0' in metrics


# Token ids; indices and router states from layer to layer; rows for layers, and shared keys; and
# with nothing beside the hidden states, a recurrent and a hybrid one.
TYPES = ["deepseek_v4", "glm_moe_dsa", "zaya", "gemma3n_text", "mamba2", "bamba"]


@pytest.mark.parametrize("model_type", TYPES)
def test_what_goes_with_the_hidden_states_has_names_of_its_own(
    tmp_path: Any, model_type: str
) -> None:
    """A client that knows nothing but the metadata chains four parts."""
    whole = tiny_model(model_type)
    whole.save_pretrained(tmp_path)
    ids = np.arange(3, 17, dtype=np.int64).reshape(2, 7)
    names = ("bottom", "trunk-0", "trunk-1", "top")
    configs = [
        ModelConfig(name, str(tmp_path), config={"component": name, "split_points": [1, 3, 5]})
        for name in names
    ]
    held = {"input_ids": ids}
    with (
        serving(configs) as url,
        tritonclient.http.InferenceServerClient(url.removeprefix("http://")) as client,
    ):
        for name in names:
            metadata = client.get_model_metadata(name)
            answer = client.infer(name, [tensor(*one) for one in taken(metadata, held)])
            given = [output["name"] for output in metadata["outputs"]]
            assert [output["name"] for output in answer.get_response()["outputs"]] == given
            held |= {output: answer.as_numpy(output) for output in given}

    with torch.no_grad():
        expected = whole.eval()(torch.from_numpy(ids)).logits
    assert same(held["logits"], expected)


def taken(metadata: Any, held: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield a part's inputs; of rows for layers, the first are its own, and the rest for others."""
    layerwise = metadata["properties"].get("layerwise", "").split(",")
    for entry in metadata["inputs"]:
        name = entry["name"]
        if not entry.get("optional"):
            layers = entry["shape"][2] if name in layerwise else None
            yield name, np.ascontiguousarray(held[name][:, :, :layers] if layers else held[name])
            if layers:
                held[name] = held[name][:, :, layers:]


def test_a_pipeline_is_a_whole_model(tiny_checkpoint: Any, unsplit: Any) -> None:
    """Bottom and Top are in one daemon, the Trunk in another."""
    with serving(models(tiny_checkpoint, "float32")[1:2]) as there:
        options = {"split_points": [2, 4], "trunk": there, "trunk_model_id": "trunk-float32"}
        pipeline = ModelConfig(
            "whole", str(tiny_checkpoint), model_type="pipeline", dtype="float32", config=options
        )
        with serving([pipeline]) as here:
            given = [tensor("input_ids", IDS), tensor("attention_mask", MASK)]
            answer = call("http", here, "whole", given)

    assert same(answer.as_numpy("logits"), unsplit("float32", input_ids=IDS, attention_mask=MASK))
