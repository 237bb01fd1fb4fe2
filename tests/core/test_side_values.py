"""What goes from part to part besides the hidden state, for architectures that need it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, tiny_model
from transformers import AutoModelForCausalLM

from splitlearn_core import HiddenState, SplitCausalLM, SplitModel
from splitlearn_core.factory import load_component
from splitlearn_core.plan import SplitPlan
from splitlearn_core.report import report_plan
from splitlearn_core.small_model import small_model
from splitlearn_core.verify import verify

LAYERS = 6
# One of each kind: constant, carry, layerwise and shared.
TYPES = ["deepseek_v4", "glm_moe_dsa", "zaya", "gemma3n_text", "gemma4_text"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the folder of a small model of a type."""
    root = tmp_path_factory.mktemp("models")

    def find(model_type: str) -> Path:
        folder = root / model_type
        if not folder.exists():
            tiny_model(model_type).save_pretrained(folder)
        return folder

    return find


def chain(folder: Path, points: list[int], **options: Any) -> list[SplitModel]:
    names = SplitPlan.from_split_points(LAYERS, points, allow_empty=True).names
    return [load_component(folder, name, points, allow_empty=True, **options) for name in names]


def unsplit(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def ids(batch: int = 2, length: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


CROSSING = {
    "deepseek_v4": {"input_ids": [2, 7]},
    "glm_moe_dsa": {"prev_topk_indices": [2, 7, 5]},
    "zaya": {"prev_router_hidden_states": [2, 7, 20]},
    "gemma3n_text": {
        "per_layer_input": [2, 7, 2, 12],
        "shared_kv_states.full_attention.keys": [2, 7, 2, 16],
        "shared_kv_states.full_attention.values": [2, 7, 2, 16],
        "shared_kv_states.sliding_attention.keys": [2, 7, 2, 16],
        "shared_kv_states.sliding_attention.values": [2, 7, 2, 16],
    },
}


@pytest.mark.parametrize("model_type", CROSSING)
def test_a_part_hands_on_what_later_layers_need(
    model_type: str, checkpoint: Callable[[str], Path]
) -> None:
    bottom, trunk, top = chain(checkpoint(model_type), [2, 4])
    with torch.no_grad():
        left = trunk(bottom(ids()))

    assert isinstance(left, HiddenState)
    assert {name: list(value.shape) for name, value in left.side.items()} == CROSSING[model_type]
    assert list(left.tensor.shape) == [2, 7, *trunk.hidden_shape]
    declared = {value.name: value for value in top.side_inputs}
    assert declared.keys() == left.side.keys()
    for name, value in left.side.items():
        assert str(value.dtype) == f"torch.{declared[name].dtype}"
        assert all(
            size.fits(found)
            for size, found in zip(declared[name].sizes, value.shape[2:], strict=True)
        )


@pytest.mark.parametrize("points", [[0, 4], [3, 6], [1, 2, 5]], ids=str)
@pytest.mark.parametrize("model_type", TYPES)
def test_other_cuts_and_empty_ends(
    model_type: str, points: list[int], checkpoint: Callable[[str], Path]
) -> None:
    folder = checkpoint(model_type)
    bottom, *trunks, top = chain(folder, points)
    with torch.no_grad():
        assert torch.equal(
            SplitCausalLM(bottom, trunks, top)(ids()).logits, unsplit(folder)(ids()).logits
        )


@pytest.mark.parametrize("model_type", TYPES)
def test_beams(model_type: str, checkpoint: Callable[[str], Path]) -> None:
    """Rows of the caches are repeated and reordered, those of shared keys and values as well."""
    folder = checkpoint(model_type)
    bottom, *trunks, top = chain(folder, [1, 3, 5])
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    options: dict[str, Any] = {
        "attention_mask": mask,
        "num_beams": 3,
        "do_sample": False,
        "max_new_tokens": 8,
        "pad_token_id": 0,
    }

    expected = unsplit(folder).generate(ids(), **options)
    produced = SplitCausalLM(bottom, trunks, top).generate(ids(), **options)

    assert torch.equal(produced, expected)


@pytest.mark.parametrize("model_type", [*TYPES, "mamba"])
def test_bfloat16(model_type: str, checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint(model_type)
    bottom, trunk, top = chain(folder, [2, 4], dtype="bfloat16")
    whole = unsplit(folder, torch.bfloat16)
    with torch.no_grad():
        hidden = HiddenState.of(bottom(ids()))
        logits = SplitCausalLM(bottom, trunk, top)(ids()).logits
        expected = whole(ids()).logits

    assert hidden.dtype is trunk.hidden_dtype
    assert torch.equal(logits, expected)


def test_the_hidden_state_s_dtype_is_the_config_s_choice(tmp_path: Path) -> None:
    model = tiny_model("mamba")
    model.config.residual_in_fp32 = False
    model.save_pretrained(tmp_path)
    bottom, trunk, _ = chain(tmp_path, [2, 4], dtype="bfloat16")

    with torch.no_grad():
        assert bottom(ids()).dtype is trunk.hidden_dtype is torch.bfloat16


@pytest.mark.parametrize("model_type", TYPES)
def test_without_what_must_go_with_it_the_hidden_state_is_refused(
    model_type: str, checkpoint: Callable[[str], Path]
) -> None:
    bottom, trunk, _ = chain(checkpoint(model_type), [2, 4])
    with torch.no_grad():
        hidden = bottom(ids())
        with pytest.raises(ValueError, match=f"trunk needs .*{trunk.side_inputs[0].name}"):
            trunk(hidden.tensor)


@pytest.mark.parametrize("model_type", ["deepseek_v4", "zaya", "gemma3n_text"])
def test_what_goes_with_it_matters(model_type: str, checkpoint: Callable[[str], Path]) -> None:
    """The control: with other values in its place, other logits come out."""
    bottom, trunk, top = chain(checkpoint(model_type), [2, 4])
    with torch.no_grad():
        hidden = bottom(ids())
        wrong = {name: value.flip(0, 1) for name, value in hidden.side.items()}
        right_logits = top(trunk(hidden)).logits
        wrong_logits = top(trunk(HiddenState(hidden.tensor, wrong))).logits

    assert (right_logits - wrong_logits).abs().max() > 1e-4


def test_two_threads_don_t_mix_what_goes_with_their_hidden_states(
    checkpoint: Callable[[str], Path],
) -> None:
    bottom, trunk, _ = chain(checkpoint("gemma3n_text"), [2, 4])
    entered, go_on = threading.Event(), threading.Event()

    def hold(*_: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            entered.set()
            assert go_on.wait(30)

    with torch.no_grad():
        one, other = bottom(ids()), bottom(ids(3, 4))
        expected = trunk(one)
        handle = trunk.model.model.layers[3].register_forward_pre_hook(hold)
        found: list[HiddenState] = []
        thread = threading.Thread(target=lambda: found.append(torch.no_grad()(trunk)(one)))
        thread.start()
        assert entered.wait(30)
        trunk(other)
        go_on.set()
        thread.join()
        handle.remove()

    assert torch.equal(found[0].tensor, expected.tensor)
    assert all(torch.equal(found[0].side[name], expected.side[name]) for name in expected.side)


@pytest.mark.parametrize("layerwise", [False, True], ids=["whole", "layerwise"])
@pytest.mark.parametrize("model_type", TYPES)
def test_verify(model_type: str, layerwise: bool, checkpoint: Callable[[str], Path]) -> None:
    """Gradients included, which go back through what went with the hidden state."""
    report = verify(checkpoint(model_type), [2, 4], layerwise=layerwise, new_tokens=2)

    assert report.passed, report.checks
    assert {c.name: c.status for c in report.checks}["logits"] == "equal"


def test_a_config_can_turn_it_all_off(tmp_path: Path) -> None:
    off = {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}
    small_model("gemma4_text", off).save_pretrained(tmp_path)
    bottom, trunk, top = chain(tmp_path, [2, 4])

    assert trunk.side_inputs == trunk.side_outputs == ()
    with torch.no_grad():
        assert isinstance(bottom(ids()), torch.Tensor)
        expected = unsplit(tmp_path).generate(ids(), max_new_tokens=4, do_sample=False)
        produced = SplitCausalLM(bottom, trunk, top).generate(
            ids(), max_new_tokens=4, do_sample=False
        )
    assert torch.equal(produced, expected)
    assert report_plan(tmp_path, [2, 4]).cuts[0].crosses == ("hidden_states",)


def test_a_saved_part_is_the_same(tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    bottom, trunk, _ = chain(checkpoint("gemma3n_text"), [2, 4])
    trunk.save(tmp_path / "trunk")
    again = SplitModel.load(tmp_path / "trunk")

    with torch.no_grad():
        hidden = bottom(ids())
        assert torch.equal(again(hidden).tensor, trunk(hidden).tensor)


def test_a_plan_says_what_crosses_and_what_it_reveals(checkpoint: Callable[[str], Path]) -> None:
    plan = report_plan(checkpoint("deepseek_v4"), [2, 4])
    to_trunk, to_top = plan.cuts

    assert to_trunk.crosses == ("hidden_states", "input_ids")
    assert to_trunk.reveals == {"input_ids": "the tokens themselves"}
    assert to_trunk.bytes_per_token == 3 * 64 * 4 + 8
    assert to_top.crosses == ("hidden_states",)
    assert to_top.reveals == {}
    assert json.loads(json.dumps(plan.to_dict()))["cuts"][0]["reveals"] == dict(to_trunk.reveals)


def test_a_plan_counts_rows_of_layers_and_shared_keys(checkpoint: Callable[[str], Path]) -> None:
    plan = report_plan(checkpoint("gemma3n_text"), [2, 3, 4])
    first, second, third = plan.cuts
    hidden, row, shared = 3 * 64 * 4, 12 * 4, 2 * 2 * 16 * 4

    assert first.bytes_per_token == hidden + row
    # layer 2 leaves its keys and values for layer 4, which is Top's: the second Trunk needs none
    assert second.bytes_per_token == hidden + row
    assert third.bytes_per_token == hidden + shared
    assert plan.parts[1].wire_out_bytes_per_token == hidden + shared
    assert list(first.reveals) == ["per_layer_input"]
    assert third.reveals == {}


def test_a_plan_limits_what_has_no_fixed_size(checkpoint: Callable[[str], Path]) -> None:
    first, second = report_plan(checkpoint("glm_moe_dsa"), [2, 4]).cuts

    assert first.bytes_per_token == second.bytes_per_token == 64 * 4 + 5 * 4
    assert first.reveals == {}


def altered(given: HiddenState, name: str, change: Callable[[torch.Tensor], Any]) -> HiddenState:
    return replace(given, side={**given.side, name: change(given.side[name])})


@pytest.mark.parametrize(
    ("model_type", "name", "change"),
    [
        ("deepseek_v4", "input_ids", lambda ids: ids[:1]),
        ("deepseek_v4", "input_ids", lambda ids: ids[:, 1:]),
        ("deepseek_v4", "input_ids", lambda ids: ids.float()),
        ("deepseek_v4", "input_ids", lambda _: None),
        ("glm_moe_dsa", "prev_topk_indices", lambda rows: rows[..., None]),
        ("zaya", "prev_router_hidden_states", lambda rows: rows[..., :-1]),
        ("gemma3n_text", "per_layer_input", lambda rows: rows[:, :, :1]),
        ("gemma3n_text", "per_layer_input", lambda rows: rows[..., 1:]),
    ],
)
def test_a_side_value_of_another_shape_is_named(
    model_type: str, name: str, change: Any, checkpoint: Callable[[str], Path]
) -> None:
    bottom, trunk, _ = chain(checkpoint(model_type), [2, 4])
    given = bottom(ids())
    trunk(given)

    with pytest.raises(ValueError, match=f"trunk needs {name} as .*, found"):
        trunk(altered(given, name, change))


@pytest.mark.parametrize("model_type", TYPES)
def test_a_side_value_that_was_lost_is_named(
    model_type: str, checkpoint: Callable[[str], Path]
) -> None:
    bottom, *later = chain(checkpoint(model_type), [2, 4])
    given = bottom(ids())
    for part in later:
        for value in part.side_inputs:
            others = {name: v for name, v in given.side.items() if name != value.name}
            with pytest.raises(ValueError, match=f"{part.component} needs {value.name} besides"):
                part(replace(given, side=others))
        given = part(given)


@pytest.mark.parametrize(
    "given",
    [
        torch.zeros(2, 7, 33),
        torch.zeros(2, 7),
        torch.zeros(7, 32),
        torch.zeros(2, 7, 32, 1),
        torch.zeros(2, 7, dtype=torch.long),
        torch.zeros(2, 7, 32, dtype=torch.long),
        (torch.zeros(2, 7, 32),),
        None,
    ],
    ids=lambda given: str(tuple(getattr(given, "shape", (type(given).__name__,)))),
)
def test_what_is_no_hidden_state_of_the_model_is_refused(given: Any, tiny_checkpoint: Path) -> None:
    _, trunk, top = chain(tiny_checkpoint, [2, 4])

    for part in (trunk, top):
        with pytest.raises(ValueError, match=f"{part.component} takes .*hidden state.*, found"):
            part(given)


@pytest.mark.parametrize(
    "given",
    [
        torch.zeros(2, 7),
        torch.zeros(7, dtype=torch.long),
        HiddenState(torch.zeros(2, 7, 32)),
        [[1]],
    ],
    ids=["floats", "one row", "hidden state", "list"],
)
def test_bottom_takes_ids_alone(given: Any, tiny_checkpoint: Path) -> None:
    bottom = chain(tiny_checkpoint, [2, 4])[0]

    with pytest.raises(ValueError, match=r"bottom takes input_ids, int64 \[batch, new\]; found"):
        bottom(given)


def test_a_second_input_is_not_left_out_unseen(tiny_checkpoint: Path) -> None:
    bottom, trunk, top = chain(tiny_checkpoint, [2, 4])
    hidden = bottom(ids() % 97)

    for part, given in ((bottom, ids() % 97), (trunk, hidden), (top, hidden)):
        for name in ("inputs_embeds", "input_ids"):
            with pytest.raises(ValueError, match=f"{part.component} .*{name} can't be given"):
                part(given, **{name: hidden})
