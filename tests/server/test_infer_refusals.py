"""Requests that are none, or that fit no model: each is told what is wrong, and nothing runs."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from infer_requests import HEADER_LENGTH, binary_entry, entry, models, post, serving
from serving_fakes import ask

from splitlearn_manager.serving import signature

IDS = np.array([[5, 17, 42]], dtype=np.int64)
HIDDEN = np.ones((1, 3, 32), dtype=np.float32)
LIMIT = 1 << 20


@pytest.fixture(scope="module")
def url(tiny_checkpoint: Any) -> Iterator[str]:
    configs = models(tiny_checkpoint, "float32") + models(tiny_checkpoint, "bfloat16")[1:2]
    with serving(configs, max_frame_bytes=LIMIT) as url:
        yield url


def ids(**changes: Any) -> dict[str, Any]:
    return {"inputs": [entry("input_ids", IDS, **changes)]}


def with_ids(*more: dict[str, Any], **top: Any) -> dict[str, Any]:
    return {"inputs": [entry("input_ids", IDS), *more], **top}


def output(**parameters: Any) -> dict[str, Any]:
    return {"outputs": [{"name": "hidden_states", "parameters": parameters}]}


@pytest.mark.parametrize(
    ("document", "said"),
    [
        # The document
        (b"", "the body is not JSON (Expecting value, at character 0)"),
        (b"{", "the body is not JSON"),
        (b"\xff\xfe\x00", "it is no UTF-8"),
        (b"[" * 60_000, "nested too deeply"),
        (b"[" * 100_000, "the body is not JSON"),
        ([], "the body must be a JSON object, found []"),
        ({}, "inputs must be a list of inputs, found nothing"),
        ({"inputs": []}, "inputs must be a list of inputs"),
        ({"inputs": ["input_ids"]}, "input 0 must be a JSON object, found 'input_ids'"),
        (with_ids(id=7), "id must be a text"),
        (with_ids(id="x" * 2000), "id must be a text"),
        (with_ids(parameters=[]), "parameters of the request must be a JSON object"),
        (with_ids(parameters={"binary_data_output": 1}), "binary_data_output must be true or"),
        (with_ids(parameters={"sequence_id": 7}), "sequence_id: requests have no state here"),
        # An input
        (ids(name=None), "input 0: name must be a text, found nothing"),
        (ids(name=""), "input 0: name must be a text"),
        (with_ids(entry("input_ids", IDS)), "input 'input_ids' comes twice"),
        (ids(datatype=None), "input 'input_ids': datatype must be one of BOOL"),
        (ids(datatype="BYTES"), "found 'BYTES'"),
        (ids(datatype=["INT64"]), "found ['INT64']"),
        (ids(shape=None), "input 'input_ids': shape must be a list"),
        (ids(shape=[1, -3]), "found [1, -3]"),
        (ids(shape=[1, 0], data=[]), "each 1 or more"),
        (ids(shape=[True, 3]), "found [True, 3]"),
        (ids(shape=[1.0, 3]), "found [1.0, 3]"),
        (ids(shape=[1] * 9), "at most 8 sizes"),
        (ids(data=None), "needs data, or the parameter binary_data_size: one of them"),
        (ids(parameters={"binary_data_size": 24}), "one of them"),
        (ids(parameters=3), "parameters of input 'input_ids' must be a JSON object"),
        (ids(parameters={"shared_memory_region": "x"}), "shared memory is not offered"),
        # Its elements
        (ids(data=[1, 2]), "data must have 3 elements, in one list or nested as [1, 3]"),
        (ids(data=[[1, 2, 3], [1, 2, 3]]), "nested as [1, 3]"),
        (ids(data=[[1], [2], [3]]), "nested as [1, 3]"),
        (ids(data=[[[1, 2, 3]]]), "nested as [1, 3]"),
        (ids(data=7), "nested as [1, 3]"),
        (ids(data={"a": 1}), "nested as [1, 3]"),
        (ids(shape=[2**62] * 8), "data must have far too many elements"),
        (ids(data=[1, 2, 3.5]), "data must be elements of INT64, found float"),
        (ids(data=[1, 2, True]), "data must be elements of INT64, found bool"),
        (ids(data=[1, 2, None]), "found NoneType"),
        (ids(data=[1, 2, "3"]), "found str"),
        (ids(data=[1, 2, 2**63]), "a number in data does not fit into INT64"),
        # What the model takes
        (ids(name="ids"), "the model has no input 'ids'; it takes input_ids, attention_mask, posi"),
        ({"inputs": [entry("attention_mask", IDS)]}, "input 'input_ids' is missing: INT64 [batch"),
        (ids(datatype="INT32"), "must be INT64 [batch, positions], found INT32 [1, 3]"),
        (ids(shape=[3]), "must be INT64 [batch, positions], found INT64 [3]"),
        (ids(shape=[1, 3, 1]), "found INT64 [1, 3, 1]"),
        (ids(data=[1, 2, 97]), "input 'input_ids' must be 0 to 96, found 1 to 97"),
        (ids(data=[-1, 2, 3]), "must be 0 to 96, found -1 to 3"),
        (ids(shape=[1, 65], data=[1] * 65), "'input_ids' has 65 positions, the model has 64"),
        (
            with_ids(entry("attention_mask", IDS[:, :2])),
            "input 'attention_mask' must be INT64 [1, 3], found INT64 [1, 2]",
        ),
        (with_ids(entry("attention_mask", IDS)), "'attention_mask' must be 0 to 1, found 5 to 42"),
        (with_ids(entry("position_ids", IDS + 22)), "'position_ids' must be 0 to 63, found 27 to"),
        (with_ids(entry("position_ids", -IDS)), "'position_ids' must be 0 to 63, found -42 to"),
        # Outputs
        (with_ids(outputs={}), "outputs must be a list of outputs"),
        (with_ids(outputs=[{"name": "logits"}]), "no output 'logits'; it gives hidden_states"),
        (with_ids(**output(binary_data="yes")), "binary_data must be true or false"),
        (with_ids(**output(classification=3)), "classification is not offered"),
        (with_ids(**output(shared_memory_region="x")), "shared memory is not offered"),
    ],
)
def test_a_bad_request_is_told_what_is_wrong(url: str, document: Any, said: str) -> None:
    answer = post(url, "bottom-float32", document)

    assert answer.status == 400
    assert said in answer.json["error"]
    assert len(answer.json["error"]) < 600


@pytest.mark.parametrize(
    ("model", "given", "said"),
    [
        ("trunk-float32", entry("hidden_states", HIDDEN[..., :31]), "FP32 [batch, positions, 32]"),
        ("trunk-float32", entry("hidden_states", HIDDEN, datatype="FP64"), "found FP64 [1, 3, 32]"),
        (
            "trunk-float32",
            entry("hidden_states", HIDDEN * 1.0, data=[1e39] * 96),
            "a number in data does not fit into FP32",
        ),
        ("trunk-bfloat16", entry("hidden_states", HIDDEN), "must be BF16"),
        (
            "trunk-bfloat16",
            entry("hidden_states", HIDDEN, datatype="BF16"),
            "BF16 has no form in JSON; send it as binary data",
        ),
        ("trunk-float32", entry("input_ids", IDS), "takes hidden_states, attention_mask"),
    ],
)
def test_hidden_states_must_be_those_of_the_model(
    url: str, model: str, given: Any, said: str
) -> None:
    answer = post(url, model, {"inputs": [given]})

    assert answer.status == 400
    assert said in answer.json["error"]


BINARY = {"inputs": [binary_entry("input_ids", IDS)]}
RAW = IDS.tobytes()


@pytest.mark.parametrize(
    ("document", "raw", "headers", "said"),
    [
        (BINARY, RAW[:-1], {}, "binary_data_size is 24, but only 23 are left"),
        (BINARY, RAW + b"x", {}, "25 bytes follow the JSON, but the inputs' binary_data_size add"),
        (BINARY, b"", {}, "binary_data_size is 24, but only 0 are left"),
        (ids(), RAW, {}, "24 bytes follow the JSON"),
        (BINARY, RAW, {HEADER_LENGTH: "7"}, "the body is not JSON"),
        (BINARY, RAW, {HEADER_LENGTH: "0"}, "raw requests are for models with one input"),
        (BINARY, RAW, {HEADER_LENGTH: "-1"}, "must be a number of bytes, found '-1'"),
        (BINARY, RAW, {HEADER_LENGTH: "9" * 30}, "must be a number of bytes"),
        (BINARY, RAW, {HEADER_LENGTH: "9" * 5000}, "must be a number of bytes"),
        (BINARY, RAW, {HEADER_LENGTH: "100000"}, "but the body has"),
        (BINARY, RAW, {HEADER_LENGTH: "ten"}, "must be a number of bytes"),
        (
            {"inputs": [binary_entry("input_ids", IDS, shape=[1, 4])]},
            RAW,
            {},
            "INT64 [1, 4] takes 32 bytes, but binary_data_size is 24",
        ),
        (
            {"inputs": [binary_entry("input_ids", IDS, shape=[2**40, 2**40])]},
            RAW,
            {},
            "takes far too many bytes",
        ),
        (
            {"inputs": [binary_entry("input_ids", IDS, parameters={"binary_data_size": "24"})]},
            RAW,
            {},
            "binary_data_size is '24'",
        ),
        (
            {"inputs": [binary_entry("input_ids", IDS, parameters={"binary_data_size": -24})]},
            RAW,
            {},
            "binary_data_size is -24",
        ),
        (BINARY, RAW, {"Content-Encoding": "gzip"}, "the body is not gzip"),
        (BINARY, RAW, {"Content-Encoding": "deflate"}, "the body is not deflate"),
    ],
)
def test_a_bad_binary_request_is_told_what_is_wrong(
    url: str, document: Any, raw: bytes, headers: dict[str, str], said: str
) -> None:
    answer = post(url, "bottom-float32", document, raw, **headers)

    assert answer.status == 400
    assert said in answer.json["error"]


def test_json_before_binary_data_needs_its_length(url: str) -> None:
    answer = post(url, "bottom-float32", json.dumps(BINARY).encode() + RAW)

    assert answer.status == 400
    assert f"{HEADER_LENGTH} must say how long" in answer.json["error"]


@pytest.mark.parametrize("nested", [False, True])
def test_elements_may_be_flat_or_nested(url: str, nested: bool) -> None:
    data = [[5, 17], [42, 3]] if nested else [5, 17, 42, 3]
    given = {"inputs": [{"name": "input_ids", "shape": [2, 2], "datatype": "INT64", "data": data}]}

    answer = post(url, "bottom-float32", given)

    assert answer.status == 200
    assert answer.headers["Content-Type"] == "application/json"
    assert HEADER_LENGTH not in answer.headers
    (found,) = answer.json["outputs"]
    assert (found["name"], found["datatype"], found["shape"]) == (
        "hidden_states",
        "FP32",
        [2, 2, 32],
    )


def test_long_json_is_read_and_written_too(url: str) -> None:
    rows = np.tile(np.linspace(-3, 3, 64 * 32, dtype=np.float32).reshape(1, 64, 32), (3, 1, 1))
    nested = entry("hidden_states", rows, data=rows.tolist())
    assert len(json.dumps(nested)) > 64 * 1024

    by_json = post(url, "trunk-float32", {"inputs": [nested]})
    document = {"inputs": [binary_entry("hidden_states", rows)]}
    document["parameters"] = {"binary_data_output": True}
    by_binary = post(url, "trunk-float32", document, rows.tobytes())

    length = int(by_binary.headers[HEADER_LENGTH])
    found = np.array(by_json.json["outputs"][0]["data"], dtype=np.float32)
    assert found.tobytes() == by_binary.body[length:]


@pytest.mark.parametrize("told", [True, False])
def test_a_body_that_is_too_long_is_refused(url: str, told: bool) -> None:
    body: Any = json.dumps(ids(data=[1] * (LIMIT // 2))).encode()
    if not told:  # an iterator's length is not known, so it goes in chunks
        body = iter([body[start : start + 9999] for start in range(0, len(body), 9999)])

    answer = ask(url, "/v2/models/bottom-float32/infer", "POST", body)

    assert answer.status == 413
    assert f"longer than the {LIMIT} bytes" in answer.json["error"]


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
@pytest.mark.parametrize("padding", [LIMIT, 512 << 20])
def test_a_body_that_grows_too_long_is_refused(url: str, coding: str, padding: int) -> None:
    engine = zlib.compressobj(9, zlib.DEFLATED, 31 if coding == "gzip" else 15)
    bomb = b"".join([*(engine.compress(bytes(1 << 20)) for _ in range(padding >> 20))])
    bomb += engine.compress(b"x") + engine.flush()
    assert len(bomb) < LIMIT

    answer = post(url, "bottom-float32", bomb, Content_Encoding=coding)

    assert answer.status == 413
    assert f"the decompressed body is longer than {LIMIT} bytes" in answer.json["error"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (gzip.compress(json.dumps(ids()).encode())[:-9], "the gzip body is cut off"),
        (gzip.compress(json.dumps(ids()).encode()) + b"more", "something follows the gzip body"),
        (b"", "the gzip body is cut off"),
    ],
    ids=["cut off", "followed", "empty"],  # gzip has the time in it
)
def test_a_damaged_gzip_body_is_refused(url: str, body: bytes, said: str) -> None:
    answer = post(url, "bottom-float32", body, Content_Encoding="gzip")

    assert answer.status == 400
    assert said in answer.json["error"]


@pytest.mark.parametrize("coding", ["br", "gzip, gzip", "x" * 500])
def test_another_coding_is_not_read(url: str, coding: str) -> None:
    answer = post(url, "bottom-float32", ids(), Content_Encoding=coding)

    assert answer.status == 415
    assert "Content-Encoding must be gzip or deflate" in answer.json["error"]


@pytest.mark.parametrize(
    ("accepted", "coding"),
    [
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("gzip, deflate", None),
        ("identity", None),
        ("gzip;q=0", None),
        ("gzip;q=0.5", "gzip"),
    ],
)
def test_only_who_asks_for_one_coding_gets_it(url: str, accepted: str, coding: str | None) -> None:
    answer = post(url, "bottom-float32", ids(), Accept_Encoding=accepted)

    assert (answer.status, answer.headers["Content-Encoding"]) == (200, coding)
    unpack: Any = {"gzip": gzip.decompress, "deflate": zlib.decompress, None: bytes}[coding]
    assert json.loads(unpack(answer.body))["outputs"][0]["shape"] == [1, 3, 32]


@pytest.mark.parametrize(
    ("binary", "said"),
    [
        (True, "for 700 x 64 positions would take 17382400 bytes, at most 10000000 are sent"),
        (False, "at most 1048576 are written as JSON: ask for it as binary"),
    ],
)
def test_outputs_that_nobody_could_take_are_not_computed(
    url: str, monkeypatch: pytest.MonkeyPatch, binary: bool, said: str
) -> None:
    monkeypatch.setattr(signature, "MAX_OUTPUT_BYTES", 10_000_000 if binary else 1 << 30)
    rows = np.zeros((700, 64), dtype=np.int64)
    given = {"inputs": [binary_entry("input_ids", rows)]}
    given["parameters"] = {"binary_data_output": binary}

    answer = post(url, "full-float32", given, rows.tobytes())

    assert answer.status == 400
    assert said in answer.json["error"]


@pytest.mark.parametrize("content_type", ["application/octet-stream", "text/plain", "nonsense"])
def test_the_type_of_the_body_does_not_matter(url: str, content_type: str) -> None:
    assert post(url, "bottom-float32", ids(), Content_Type=content_type).status == 200


def test_another_version_is_not_there(url: str) -> None:
    answer = post(url, "bottom-float32/versions/2", ids())

    assert (answer.status, answer.json["error"]) == (
        404,
        "model 'bottom-float32' has no version 2, only 1",
    )


# --- Damage --------------------------------------------------------------------------------

STRANGE = [None, True, -1, 0, 2**70, 1.5, "", "INT64", [], [[]], {}, {"name": "x"}, [1] * 40]


def damaged_document(chance: random.Random, value: Any) -> Any:
    """Return JSON in which a value or two are others."""
    if chance.random() < 0.2:
        return chance.choice(STRANGE)
    if isinstance(value, dict) and value:
        key = chance.choice(sorted(value))
        return {**value, key: damaged_document(chance, value[key])}
    if isinstance(value, list) and value:
        place = chance.randrange(len(value))
        return [*value[:place], damaged_document(chance, value[place]), *value[place + 1 :]]
    return chance.choice(STRANGE)


def damaged_bytes(chance: random.Random, body: bytes) -> bytes:
    """Return bytes of which some are missing, or others, or more."""
    start = chance.randrange(len(body) + 1)
    stop = min(len(body), start + chance.choice((0, 1, 1, 3, 40)))
    return body[:start] + chance.randbytes(chance.choice((0, 1, 1, 5))) + body[stop:]


def damaged_request(chance: random.Random) -> tuple[str, bytes, dict[str, str]]:
    """Return model, body and headers of a request that something is wrong with, mostly."""
    model, name, array = chance.choice(
        [("bottom-float32", "input_ids", IDS), ("trunk-float32", "hidden_states", HIDDEN)]
    )
    binary = chance.random() < 0.5
    given = (binary_entry if binary else entry)(name, array)
    document: Any = {"id": "7", "inputs": [given], "parameters": {"binary_data_output": binary}}
    mask = entry("attention_mask", np.ones((1, 3), dtype=np.int64))
    document["inputs"] += [mask] * (chance.random() < 0.3)
    raw = array.tobytes() if binary else b""
    if chance.random() < 0.5:
        document = damaged_document(chance, document)
    text = json.dumps(document).encode()
    headers = {HEADER_LENGTH: str(len(text))} if binary else {}
    body = text + raw
    if chance.random() < 0.2:
        headers[HEADER_LENGTH] = chance.choice(("", "x", "-3", "1e3", str(chance.randrange(400))))
    packed = chance.random() < 0.2
    if packed:
        headers["Content-Encoding"] = chance.choice(("gzip", "deflate"))
        body = gzip.compress(body) if headers["Content-Encoding"] == "gzip" else zlib.compress(body)
    if chance.random() < 0.5:
        body = damaged_bytes(chance, body)
    return model, body, headers


def test_damaged_requests_are_refused_or_answered(url: str) -> None:
    chance = random.Random(20)  # noqa: S311 - it is to be the same each time
    seen: dict[int, int] = {}
    for _ in range(600):
        model, body, headers = damaged_request(chance)
        answer = post(url, model, body, **headers)
        assert answer.status in {200, 400, 413, 415}, (model, body, headers, answer)
        if answer.status != 200:
            assert isinstance(answer.json["error"], str)
        seen[answer.status] = seen.get(answer.status, 0) + 1

    assert min(seen[200], seen[400]) > 50
    assert post(url, "bottom-float32", ids()).status == 200
