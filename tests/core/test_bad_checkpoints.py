"""Damaged checkpoints, one by one: what is wrong is named, and nothing waits, grows or runs."""

from __future__ import annotations

import json
import os
import socket
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from splitlearn_core import SplitModel
from splitlearn_core.errors import CheckpointError, ModelSourceError, UnsupportedModelError
from splitlearn_core.factory import estimate_component, load_component
from splitlearn_core.headers import read_header, read_index
from splitlearn_core.loading.torch_files import read_torch_file
from splitlearn_core.quickstart import load_full_model, load_split_model
from splitlearn_core.regular_files import MAX_JSON_BYTES, open_regular, read_json
from splitlearn_core.shape import MAX_LAYERS, read_shape


def write_safetensors(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def put_in_place(path: Path, kind: str) -> None:
    """Put something that is no regular file in the place of one."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.path.relpath(path))


# Files that are none


@pytest.mark.parametrize("kind", ["pipe", "folder", "socket"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_what_is_no_file_is_neither_read_nor_waited_for(
    name: str, kind: str, damaged: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = damaged("llama").path
    monkeypatch.chdir(folder)
    put_in_place(folder / name, kind)

    with pytest.raises(CheckpointError, match=f"{name} is not a regular file"):
        load_component(folder, "trunk", [2, 4])


def test_a_pipe_is_not_waited_for_whoever_opens_it(tmp_path: Path) -> None:
    put_in_place(tmp_path / "pipe", "pipe")

    for read in (open_regular, read_json, read_header, read_index):
        with pytest.raises(CheckpointError, match="pipe is not a regular file"):
            read(tmp_path / "pipe")


def test_json_without_end(tmp_path: Path) -> None:
    path = tmp_path / "endless.json"
    path.touch()
    os.truncate(path, MAX_JSON_BYTES + 1)

    with pytest.raises(CheckpointError, match=r"endless\.json is too large"):
        read_json(path)


# Headers and indices


@pytest.mark.parametrize(
    "name", ["", "\ud800", "a\0b", "a\nb", "\x1b[2J", "x" * 1001, "layers.².weight"], ids=ascii
)
def test_names_that_no_message_could_show(name: str, tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}
    path = write_safetensors(tmp_path / "f", {name: entry}, bytes(4))
    index = tmp_path / "index.json"
    index.write_text(json.dumps({"weight_map": {name: "f"}}))

    for read, file in ((read_header, path), (read_index, index)):
        with pytest.raises(CheckpointError, match="is no name for a tensor") as caught:
            read(file)
        message = str(caught.value)
        assert str(file) in message
        assert message.isprintable()
        assert len(message) < 500


@pytest.mark.parametrize(
    "shape", [[2**64], [0, 2**64], [1] * 65, [10**4000] * 100, [True, 2]], ids=lambda s: str(s)[:9]
)
def test_sizes_beyond_all_measure(shape: list[int], tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 8]}
    path = write_safetensors(tmp_path / "f", {"t": entry}, bytes(8))

    with pytest.raises(CheckpointError, match="t has no usable shape") as caught:
        read_header(path)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("low_memory", [True, False])
def test_metadata_that_no_message_could_show(low_memory: bool, damaged: Callable[..., Any]) -> None:
    weights = damaged("llama").path / "model.safetensors"
    content = weights.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = "x" * 100_000
    write_safetensors(weights, header, content[8 + length :])

    with pytest.raises(CheckpointError, match=r"model\.safetensors can't be opened: ") as caught:
        load_split_model("auto", [2, 4], weights.parent, low_memory=low_memory)
    assert len(str(caught.value)) < 1000


def test_many_names_of_which_one_is_there_twice(tmp_path: Path) -> None:
    """Found in one pass: one that compares each with each would not end."""
    names = [*(f'"{number}":0' for number in range(300_000)), '"299999":0']
    path = write_safetensors(tmp_path / "f", ("{" + ",".join(names) + "}").encode())

    with pytest.raises(CheckpointError, match="'299999' is there twice"):
        read_header(path)


def test_an_index_that_names_a_tensor_twice(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text('{"weight_map": {"a": "x", "a": "y"}}')

    with pytest.raises(CheckpointError, match=r"index\.json.*'a' is there twice"):
        read_index(path)


@pytest.mark.parametrize("file", ["a\0b", "x" * 300, "\ud800", "/etc/passwd", 3], ids=ascii)
def test_indices_that_name_no_file(file: object, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"tensor": file}}))

    with pytest.raises(CheckpointError, match="tensor is said to lie in") as caught:
        read_index(path)
    assert str(caught.value).isprintable()


# config.json


def shape_with(folder: Path, **changes: object) -> Any:
    config = {"model_type": "llama", "num_hidden_layers": 6, "hidden_size": 32, "vocab_size": 97}
    (folder / "config.json").write_text(json.dumps(config | changes))
    return read_shape(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_hidden_layers": MAX_LAYERS + 1}, "1025 layers, the limit is 1024"),
        ({"num_labels": 10**9}, "num_labels is 1000000000"),
        ({"text_config": {"num_local_experts": 10**12}}, "num_local_experts is 1000000000000"),
        ({"num_hidden_layers": "6"}, "must be a positive integer, found '6'"),
        ({"hidden_size": 0}, "must be a positive integer, found 0"),
        ({"vocab_size": "x" * 10_000}, "must be a positive integer"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
        ({"attn_implementation": "evil/kernel"}, r"code from a hub \(attn_implementation"),
        ({"text_config": {"_attn_implementation": {"": "evil/kernel"}}}, "code from a hub"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_configs_that_ask_for_too_much(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        shape_with(tmp_path, **changes)
    assert str(tmp_path / "config.json") in str(caught.value)
    assert len(str(caught.value)) < 500


def test_an_unknown_architecture_is_named_with_its_file(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"config\.json: unknown model type 'x"):
        shape_with(tmp_path, model_type="x" * 10_000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tie_word_embeddings": "yes"}, r"config\.json makes no sense: .*tie_word_embeddings"),
        ({"layer_types": ["nonsense"] * 6}, r"config\.json makes no sense"),
        ({"text_config": 3}, r"config\.json makes no sense"),
        ({"text_config": {}}, r"config\.json"),
        ({"hidden_act": "nonsense"}, r"no model can be built from config\.json: .*nonsense"),
        ({"num_attention_heads": 0}, r"config\.json"),
        ({"hidden_size": 2**62}, r"config\.json"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_configs_that_transformers_refuses(
    changes: dict[str, object], message: str, damaged: Callable[..., Any]
) -> None:
    folder = damaged("llama", config=changes).path

    for look in (estimate_component, load_component):
        with pytest.raises(CheckpointError, match=message) as caught:
            look(folder, "trunk", [2, 4])
        assert str(folder) in str(caught.value)


def test_tables_that_would_fill_the_memory(damaged: Callable[..., Any]) -> None:
    from tiny_models import tiny_model  # noqa: PLC0415 - slow

    folder = damaged("llama").path
    model = tiny_model("codegen")
    model.config.n_positions = 10**9
    model.save_pretrained(folder)

    with pytest.raises(CheckpointError, match=r"config\.json would take .* bytes, the limit is"):
        load_component(folder, "trunk", [2, 4])


# Links


def link_elsewhere(path: Path, elsewhere: Path) -> Path:
    """Move a file away, and leave a link to where it went."""
    elsewhere.mkdir(parents=True)
    target = elsewhere / path.name
    path.rename(target)
    path.symlink_to(target)
    return target


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_link_that_leaves_the_folder(
    name: str, damaged: Callable[..., Any], tmp_path: Path
) -> None:
    folder = damaged("llama").path
    target = link_elsewhere(folder / name, tmp_path / "elsewhere")

    with pytest.raises(CheckpointError, match=f"{name} is a link that leaves its folder") as caught:
        load_component(folder, "trunk", [2, 4])
    assert str(target) in str(caught.value)


@pytest.mark.parametrize("target", ["/dev/zero", "/etc/passwd", "../x", "nothing", "config.json"])
def test_links_to_what_is_no_model(target: str, damaged: Callable[..., Any]) -> None:
    folder = damaged("llama").path
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(target)

    with pytest.raises(CheckpointError, match=r"config\.json is a link that lea"):
        load_component(folder, "trunk", [2, 4])


def test_links_within_the_folder_and_to_the_hub_cache_s_blobs(
    damaged: Callable[..., Any], tmp_path: Path
) -> None:
    folder = damaged("llama").path
    model = tmp_path / "models--owner--name"
    snapshot = model / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    for path in folder.iterdir():
        (model / "blobs" / path.name).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    (tmp_path / "linked").symlink_to(snapshot)

    for place in (folder, snapshot, tmp_path / "linked"):
        assert load_component(place, "trunk", [2, 4]).num_parameters() > 0


def test_a_blob_that_leaves_the_hub_s_cache(damaged: Callable[..., Any], tmp_path: Path) -> None:
    folder = damaged("llama").path
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.parent.mkdir()
    folder.rename(snapshot)
    (tmp_path / "blobs").mkdir()
    target = link_elsewhere(snapshot / "model.safetensors", tmp_path / "blobs" / "deeper")
    assert target.exists()

    with pytest.raises(CheckpointError, match="leaves its folder"):
        load_component(snapshot, "trunk", [2, 4])


def test_a_file_that_is_named_may_be_a_link(damaged: Callable[..., Any], tmp_path: Path) -> None:
    folder = damaged("llama").path
    torch.save(load_file(folder / "model.safetensors"), folder / "model.pth")
    link_elsewhere(folder / "model.pth", tmp_path / "elsewhere")

    assert load_component(folder / "model.pth", "trunk", [2, 4]).num_parameters() > 0


# Tensors


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8], ids=str)
def test_whole_numbers_are_no_weights(dtype: torch.dtype, damaged: Callable[..., Any]) -> None:
    name = "model.layers.3.mlp.up_proj.weight"
    folder = damaged("llama", replace={name: torch.ones(48, 32, dtype=dtype)}).path

    for look in (estimate_component, load_component):
        with pytest.raises(
            CheckpointError, match=rf"{name} in .*model\.safetensors is \w+, the co"
        ):
            look(folder, "trunk", [2, 4])


EXPERTS = "model.layers.1.block_sparse_moe.experts"


@pytest.fixture
def experts(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a Mixtral with two experts in each layer, some renamed."""
    from tiny_models import tiny_config  # noqa: PLC0415 - slow
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    config = tiny_config("mixtral")
    config.num_local_experts = 2
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)

    def write(old: str, new: str | None, changed: dict[str, torch.Tensor] | None = None) -> Path:
        renamed = {new if name == old else name: tensor for name, tensor in tensors.items()}
        kept = {name: tensor for name, tensor in renamed.items() if name is not None}
        save_file(kept | (changed or {}), path, metadata={"format": "pt"})
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (f"{EXPERTS}.1.w1.weight", None, "can't be made into"),
        (f"{EXPERTS}.1.w2.weight", None, r"make .*down_proj \[1, 64, 96\], the config needs \[2,"),
        (f"{EXPERTS}.0.w2.weight", f"{EXPERTS}.2.w2.weight", "don't count from 0 to 1"),
        (f"{EXPERTS}.0.w2.weight", f"{EXPERTS}.01.w2.weight", "don't count from 0 to 1"),
    ],
    ids=["half of a pair", "one", "a gap", "twice"],
)
def test_single_experts_must_all_be_there(
    old: str, new: str | None, message: str, experts: Callable[..., Path]
) -> None:
    folder = experts(old, new)

    for look in (estimate_component, load_component):
        with pytest.raises(CheckpointError, match=message) as caught:
            look(folder, "bottom", [2, 4])
        assert str(folder / "model.safetensors") in str(caught.value)
        assert EXPERTS in str(caught.value)


def test_single_experts_must_be_alike(experts: Callable[..., Path]) -> None:
    folder = experts("", "", {f"{EXPERTS}.1.w3.weight": torch.zeros(96, 65)})

    with pytest.raises(CheckpointError, match="can't be made into"):
        estimate_component(folder, "bottom", [2, 4])


def test_of_many_wrong_tensors_some_are_named(damaged: Callable[..., Any]) -> None:
    folder = damaged("llama", config={"hidden_size": 64}).path

    with pytest.raises(CheckpointError, match=r"config needs .*; and \d+ more$"):
        load_component(folder, "full")


# Both strategies


@pytest.mark.parametrize(
    "change",
    [
        {"replace": {"model.layers.3.secret": torch.zeros(3)}},
        {"replace": {"model.layers.3.mlp.up_proj.weight": torch.zeros(48, 31)}},
        {"replace": {"model.norm.weight": torch.zeros(32, dtype=torch.int32)}},
        {"drop": ("model.layers.3.mlp.up_proj.weight",)},
    ],
    ids=str,
)
def test_both_strategies_say_the_same(change: dict[str, Any], damaged: Callable[..., Any]) -> None:
    folder = damaged("llama", **change).path
    name = next(iter(change.get("replace") or change["drop"]))

    for low_memory in (False, True):
        with pytest.raises(CheckpointError, match=name) as caught:
            load_split_model("llama", [2, 4], folder, low_memory=low_memory)
        assert str(folder) in str(caught.value)


def test_an_index_that_omits_a_tensor(make_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    """It lies in a file, but nobody may look for it there."""
    for path in make_checkpoint("llama", shard_size="20KB").path.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.layers.3.mlp.up_proj.weight"]
    path.write_text(json.dumps(index))

    for low_memory in (False, True):
        with pytest.raises(CheckpointError, match=r"layers\.3\.mlp\.up_proj"):
            load_split_model("llama", [2, 4], tmp_path, low_memory=low_memory)


def test_both_strategies_read_the_file_that_is_named(damaged: Callable[..., Any]) -> None:
    """Not the one of the usual name beside it."""
    folder = damaged("llama").path
    tensors = load_file(folder / "model.safetensors")
    torch.save({name: tensor + 1 for name, tensor in tensors.items()}, folder / "other.pth")

    for low_memory in (False, True):
        _, _, top = load_split_model("llama", [2, 4], folder / "other.pth", low_memory=low_memory)
        head = top.model.state_dict()["lm_head.weight"]  # type: ignore[union-attr]
        assert torch.equal(head, tensors["lm_head.weight"] + 1)


def test_what_else_lies_in_the_folder_is_left_alone(damaged: Callable[..., Any]) -> None:
    folder = damaged("llama", config={"transformers_weights": "evil.safetensors"}).path
    for name in ("evil.safetensors", "shard-00001-model-00001-of-00001.safetensors"):
        save_file({"lm_head.weight": torch.zeros(1)}, folder / name)

    bottom, _, _ = load_split_model("llama", [2, 4], folder)

    assert bottom is not None


def test_generation_settings_are_the_unsplit_model_s(damaged: Callable[..., Any]) -> None:
    folder = damaged("llama").path
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [7, 8], "pad_token_id": 0}))

    assert load_full_model(folder)[0].generation_config.eos_token_id == [7, 8]
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json is not readable JSON"):
        load_full_model(folder)


# Torch files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({3: torch.ones(1)}, "something by the name 3"),
        ({"a\n": torch.ones(1)}, "no name for a tensor"),
        ({"a": torch.ones(2, 2).to_sparse()}, "without plain values.*: a$"),
        ({"a": torch.ones(2, device="meta")}, "without plain values.*: a$"),
        ({"a": {"b": torch.ones(1)}}, "more than tensors: a$"),
    ],
    ids=["number", "line", "sparse", "meta", "nested"],
)
def test_torch_files_of_strange_things(
    content: dict[Any, Any], message: str, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "model.bin")

    with pytest.raises(CheckpointError, match=rf"model\.bin holds .*{message}|{message}"):
        read_torch_file(tmp_path / "model.bin")


def test_a_compressed_torch_file(tmp_path: Path) -> None:
    """Mapped as it is it would give nonsense; unpacked it might fill the memory."""
    torch.save({"a": torch.zeros(1000)}, tmp_path / "plain.bin")
    path = tmp_path / "packed.bin"
    with (
        zipfile.ZipFile(tmp_path / "plain.bin") as old,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))

    with pytest.raises(CheckpointError, match=r"packed\.bin is compressed"):
        read_torch_file(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty: it has 0 bytes"),
        (b"PK\x03\x04", "is cut off or damaged"),
        (b"PK\x03\x04" + bytes(100), "is cut off or damaged"),
        (b"\x80\x02.", "is not a plain state dict"),
    ],
)
def test_torch_files_that_are_cut_off(content: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(content)

    with pytest.raises(CheckpointError, match=rf"model\.bin {problem}"):
        read_torch_file(tmp_path / "model.bin")


def test_a_torch_file_that_is_a_pipe(tmp_path: Path) -> None:
    put_in_place(tmp_path / "model.bin", "pipe")

    with pytest.raises(CheckpointError, match="not a regular file"):
        read_torch_file(tmp_path / "model.bin")
    with pytest.raises(ModelSourceError):
        read_torch_file(tmp_path / "absent.bin")


# Saved parts


@pytest.fixture
def part(make_checkpoint: Callable[..., Any], tmp_path: Path) -> Path:
    load_component(make_checkpoint("llama").path, "trunk", [2, 4]).save(tmp_path / "part")
    return tmp_path / "part"


def lie(folder: Path, **changes: Any) -> None:
    path = folder / "splitlearn.json"
    manifest = json.loads(path.read_text())
    for key, value in changes.items():
        place = manifest["component"] if key in manifest["component"] else manifest
        place[key] = value
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": True}, "format_version True"),
        ({"format_version": 1.0}, r"format_version 1\.0"),
        ({"name": "middle"}, "is no part"),
        ({"name": "trunk-x"}, "is no part"),
        ({"name": "bottom"}, "is no part"),
        ({"is_last": True}, "is no part"),
        ({"start_layer": -2}, "is no part"),
        ({"end_layer": 7}, "is no part"),
        ({"end_layer": 3}, "parameters"),
        ({"num_layers": 7}, "llama' with 7 layers, config.json beside it of a llama with 6"),
        ({"num_layers": "6"}, "damaged"),
        ({"model_type": "qwen2"}, "qwen2"),
        ({"num_parameters": 1}, "is of 1 parameters"),
        ({"dtype": "float16"}, "in 'float16', the weights beside it are"),
        ({"files": {}}, r"does not vouch for config\.json, model\.safetensors"),
        ({"files": None}, "damaged"),
        ({"files": {"../x": {"bytes": 1, "sha256": ""}}}, "is no file name"),
        ({"more": 1}, "damaged"),
    ],
    ids=str,
)
def test_manifests_that_lie(changes: dict[str, Any], message: str, part: Path) -> None:
    lie(part, **changes)

    with pytest.raises(CheckpointError, match=message) as caught:
        SplitModel.load(part)
    assert str(part / "splitlearn.json") in str(caught.value)


def test_a_config_beside_a_manifest_that_was_changed(part: Path) -> None:
    path = part / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-09'))

    with pytest.raises(CheckpointError, match=r"config\.json is not what was saved"):
        SplitModel.load(part)


@pytest.mark.parametrize("name", ["splitlearn.json", "config.json", "model.safetensors"])
def test_parts_whose_files_lie_elsewhere(name: str, part: Path, tmp_path: Path) -> None:
    link_elsewhere(part / name, tmp_path / "elsewhere")

    with pytest.raises(CheckpointError, match=f"{name} is a link that leaves its folder"):
        SplitModel.load(part)


def test_a_manifest_that_is_a_pipe(part: Path) -> None:
    put_in_place(part / "splitlearn.json", "pipe")

    with pytest.raises(CheckpointError, match=r"splitlearn\.json is not a regular file"):
        SplitModel.load(part)


# What is not, or not only, a model

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("low_memory", [True, False])
def test_a_git_lfs_pointer_says_how_to_get_the_file(
    name: str, low_memory: bool, damaged: Callable[..., Any]
) -> None:
    folder = damaged("llama").path
    (folder / name).write_text(POINTER)

    with pytest.raises(CheckpointError, match=f"{name} is a git-lfs pointer.*git lfs pull"):
        load_split_model("auto", [2, 4], folder, low_memory=low_memory)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.safetensors.index.json", "tokenizer.json"]
)
def test_so_does_one_of_another_file(name: str, damaged: Callable[..., Any]) -> None:
    folder = damaged("llama").path
    (folder / name).write_text(POINTER)
    if name != "tokenizer.json":
        (folder / "model.safetensors").unlink()

    with pytest.raises(CheckpointError, match=f"{name} is a git-lfs pointer.*git lfs pull"):
        load_full_model(folder)


def test_a_git_lfs_pointer_among_a_saved_parts_files(
    make_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    load_component(make_checkpoint("llama").path, "trunk", [2, 4]).save(tmp_path)
    (tmp_path / "model.safetensors").write_text(POINTER)

    with pytest.raises(CheckpointError, match="git lfs pull"):
        SplitModel.load(tmp_path)


# peft asks transformers by the older of two names.
AS_PEFT_ASKS = "ignore:`is_gradient_checkpointing`:FutureWarning"


def add_adapter(folder: Path) -> None:
    """Put an adapter into a folder: one that peft makes, and that changes the model."""
    peft = pytest.importorskip("peft", reason="an extra of development")
    model = AutoModelForCausalLM.from_pretrained(folder.parent / "damaged")
    lora = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(model, lora).save_pretrained(folder)


@pytest.mark.filterwarnings(AS_PEFT_ASKS)
def test_an_adapter_is_no_model(damaged: Callable[..., Any], tmp_path: Path) -> None:
    damaged("llama")
    add_adapter(tmp_path / "adapter")

    with pytest.raises(ModelSourceError, match=r"PEFT adapter.*, no model.*merge_and_unload"):
        load_component(tmp_path / "adapter", "trunk", [2, 4])


@pytest.mark.filterwarnings(AS_PEFT_ASKS)
def test_an_adapter_beside_a_model_is_not_left_out_unseen(damaged: Callable[..., Any]) -> None:
    """Transformers loads it with the model, which then computes something else."""
    folder = damaged("llama").path
    ids = torch.arange(7)[None]
    alone = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    add_adapter(folder)
    assert not torch.equal(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, alone)

    for load in (load_full_model, lambda path: load_split_model("auto", [2, 4], path)):
        with pytest.raises(CheckpointError, match=r"adapter_config\.json\) beside its model"):
            load(folder)

    (folder / "adapter_config.json").unlink()
    assert torch.equal(load_full_model(folder)[0](ids).logits, alone)
