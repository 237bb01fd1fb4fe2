"""Packed linear layers: what they compute, what they hold, and what they can't do."""

from __future__ import annotations

import copy
import ctypes
import gc
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from splitlearn_core import linear_kernels
from splitlearn_core.errors import PackedWeightsError, QuantizationError
from splitlearn_core.linear_kernels import KERNELS, check_kernel, packed_nbytes
from splitlearn_core.packed_linear import PackedLinear
from splitlearn_core.quantization import QUANTIZATIONS, check_quantization

MODES = [
    ("prepacked", torch.float32, 1e-6),
    ("prepacked", torch.bfloat16, 1e-2),
    ("fp16", torch.float32, 1e-3),
    ("int8", torch.float32, 2e-2),
    ("int8", torch.bfloat16, 2e-2),
]


def linear(rows: int = 96, columns: int = 160, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(columns, rows, bias=bias).requires_grad_(requires_grad=False)


def pack(layer: nn.Linear, quantization: str) -> PackedLinear:
    return PackedLinear(layer.weight, layer.bias, quantization)


@pytest.mark.parametrize(("quantization", "dtype", "tolerance"), MODES)
@pytest.mark.parametrize("shape", [(1, 160), (8, 1, 160), (2, 37, 160), (0, 3, 160)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_computes_what_a_plain_one_does(
    quantization: str, dtype: torch.dtype, tolerance: float, shape: tuple[int, ...], bias: bool
) -> None:
    layer = linear(bias=bias).to(dtype)
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    found = pack(layer, quantization)(inputs)

    wanted = layer(inputs)
    assert (found.shape, found.dtype) == (wanted.shape, dtype)
    assert (found - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_inputs_may_lie_anyhow_in_memory(quantization: str) -> None:
    packed = pack(linear(), quantization)
    inputs = torch.randn(160, 4, 3).permute(2, 1, 0)

    assert torch.equal(packed(inputs), packed(inputs.contiguous()))


def test_int8_has_a_scale_for_each_output() -> None:
    layer = linear(bias=False)
    layer.weight[0] *= 1000
    packed = pack(layer, "int8")
    inputs = torch.randn(1, 160)

    others = (packed(inputs) - layer(inputs))[0, 1:]
    assert others.norm() <= 2e-2 * layer(inputs)[0, 1:].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("company", [1, 7, 31, 300, 3000])
def test_what_int8_makes_of_a_position_does_not_depend_on_others(
    company: int, dtype: torch.dtype
) -> None:
    packed = pack(linear().to(dtype), "int8")
    mine = torch.randn(3, 160).to(dtype)
    others = 1000 * torch.randn(company, 160).to(dtype)

    assert torch.equal(packed(torch.cat([others, mine]))[company:], packed(mine))
    assert torch.equal(packed(mine), torch.cat([packed(one[None]) for one in mine]))


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_inputs_of_another_dtype_are_refused(quantization: str) -> None:
    with pytest.raises(PackedWeightsError, match="compute in float32, not in float64"):
        pack(linear(), quantization)(torch.ones(2, 160, dtype=torch.float64))


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_result_can_be_changed_in_place(quantization: str) -> None:
    packed = pack(linear(), quantization)
    inputs = torch.ones(1, 2, 160, requires_grad=True)
    plain = packed(inputs).detach() + 1

    result = packed(inputs)
    result += 1

    assert torch.equal(result, plain)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_copy_computes_the_same_and_has_its_own_bias(quantization: str) -> None:
    packed = pack(linear(), quantization)
    inputs = torch.randn(2, 160)
    before = packed(inputs)

    other = copy.deepcopy(nn.Sequential(packed))[0]
    assert torch.equal(other(inputs), before)
    assert other.bias is not packed.bias
    assert repr(other) == repr(packed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_makes_no_difference(dtype: torch.dtype) -> None:
    layer, inputs = linear(), torch.ones(2, 160)
    before = pack(layer, "int8")(inputs)
    torch.set_default_dtype(dtype)
    try:
        found = pack(layer, "int8")(inputs)
    finally:
        torch.set_default_dtype(torch.float32)

    assert torch.equal(found, before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_shows_in_its_own_position_alone(value: float) -> None:
    packed = pack(linear(), "int8")
    inputs = torch.randn(3, 160)
    spoilt = inputs.clone()
    spoilt[1, 5] = value

    found = packed(spoilt)

    assert not found[1].isfinite().any()
    assert torch.equal(found[[0, 2]], packed(inputs)[[0, 2]])


def test_int8_keeps_positions_of_nothing_but_zeros_or_almost() -> None:
    layer = linear()
    packed = pack(layer, "int8")

    assert torch.equal(packed(torch.zeros(2, 160)), layer.bias.expand(2, -1))
    assert torch.allclose(packed(torch.full((2, 160), 1e-40)), layer.bias.expand(2, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_input_is_not_cut_off(dtype: torch.dtype) -> None:
    one = torch.ones(1, 1, dtype=dtype)
    packed = PackedLinear(one, None, "int8")
    values = torch.linspace(1, 2, 500).to(dtype)[:, None]

    assert torch.allclose(packed(values).float(), values.float(), rtol=1e-2)
    assert torch.allclose(packed(-values).float(), -values.float(), rtol=1e-2)


def test_more_inputs_than_32_bits_can_sum_are_refused() -> None:
    with pytest.raises(QuantizationError, match="70,000 inputs: int8 sums up to 66,311"):
        PackedLinear(torch.ones(1, 70_000), None, "int8")


@pytest.mark.parametrize("value", [65505.0, -1e30, math.inf, math.nan])
def test_a_value_that_float16_can_not_hold_is_refused(value: float) -> None:
    layer = linear()
    layer.weight[3, 7] = value

    with pytest.raises(QuantizationError, match="float16 holds up to 65,504"):
        pack(layer, "fp16")


def test_float16s_largest_value_is_kept() -> None:
    layer = linear()
    layer.weight[3, 7] = 65504.0

    assert pack(layer, "fp16")(torch.ones(1, 160))[0, 3] > 65_000


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_value_that_int8_can_not_hold_is_refused(value: float) -> None:
    layer = linear()
    layer.weight[3, 7] = value

    with pytest.raises(QuantizationError, match="int8 has no such"):
        pack(layer, "int8")


def test_weights_of_nothing_but_zeros() -> None:
    layer = linear()
    layer.weight.zero_()

    assert torch.allclose(pack(layer, "int8")(torch.randn(2, 160)), layer.bias)


@pytest.mark.parametrize(
    ("quantization", "dtype", "allowed"),
    [
        ("fp16", torch.bfloat16, "float32, not in bfloat16"),
        ("int8", torch.float16, "float32 or bfloat16, not in float16"),
    ],
)
def test_another_dtype_is_refused(quantization: str, dtype: torch.dtype, allowed: str) -> None:
    with pytest.raises(QuantizationError, match=f"computes in {allowed}: set dtype"):
        pack(linear().to(dtype), quantization)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc's own figures")
@pytest.mark.parametrize(("quantization", "dtype", "_"), MODES)
@pytest.mark.parametrize(("rows", "columns"), [(896, 4864), (4864, 896), (2304, 768), (128, 704)])
def test_the_size_told_is_what_the_allocator_gave(
    quantization: str, dtype: torch.dtype, _: float, rows: int, columns: int
) -> None:
    layer = linear(rows, columns, bias=False).to(dtype)
    pack(layer, quantization)
    gc.collect()

    before = allocated()
    packed = pack(layer, quantization)
    gc.collect()

    assert allocated() - before == pytest.approx(packed.nbytes, rel=0.02, abs=20_000)


class MallInfo(ctypes.Structure):
    """mallinfo(3)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")
    ] + [(name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")]


def allocated() -> int:
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = MallInfo
    told = ask()
    return int(told.uordblks + told.hblkhd)


def test_sizes() -> None:
    rows, columns = 4864, 896
    plain = rows * columns * 4

    sizes = [packed_nbytes(q, rows, columns, torch.float32) / plain for q in QUANTIZATIONS]

    assert sizes == pytest.approx([1, 0.571, 0.252], abs=1e-3)


# --- what is for training, saving and moving ---


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_forward_with_gradients_on_works_and_its_backward_says_why_not(quantization: str) -> None:
    packed = pack(linear(), quantization)
    inputs = torch.randn(2, 160, requires_grad=True)

    output = packed(inputs)

    with torch.no_grad():
        assert torch.equal(output, packed(inputs))
    with pytest.raises(PackedWeightsError, match=f"quantization {quantization}.*to train"):
        output.sum().backward()


def test_no_state_dict_is_made_or_taken() -> None:
    model = nn.Sequential(pack(linear(), "int8"))

    with pytest.raises(PackedWeightsError, match="without quantization"):
        model.state_dict()
    with pytest.raises(PackedWeightsError, match="other weights can't be put in their place"):
        model.load_state_dict({})


def test_it_stays_what_and_where_it_is() -> None:
    packed = pack(linear(), "int8")

    assert packed.to("cpu", torch.float32) is packed
    with pytest.raises(PackedWeightsError, match="can't become bfloat16"):
        packed.bfloat16()
    with pytest.raises(PackedWeightsError, match="can't become float32 on meta"):
        packed.to("meta")


def test_code_that_looks_for_the_weight_is_told_why_there_is_none() -> None:
    packed = pack(linear(), "int8")

    with pytest.raises(AttributeError, match="no weight of its own: the weights are packed"):
        _ = packed.weight
    with pytest.raises(AttributeError, match="nothing"):
        _ = packed.nothing


def test_its_repr_says_how_it_is_packed() -> None:
    assert repr(pack(linear(), "fp16")) == (
        "PackedLinear(in_features=160, out_features=96, bias=True, quantization=fp16)"
    )


# --- the self-test ---


@pytest.fixture
def untested(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let kernels be tested anew, and again after the test."""
    monkeypatch.setattr(linear_kernels, "_tested", set())


@pytest.mark.usefixtures("untested")
@pytest.mark.parametrize(("quantization", "dtype", "_"), MODES)
def test_a_kernel_that_computes_wrongly_is_an_error(
    quantization: str, dtype: torch.dtype, _: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = copy.copy(KERNELS[quantization])
    right = kernel.run
    monkeypatch.setattr(kernel, "run", lambda *given: right(*given) * 1.1, raising=False)
    monkeypatch.setitem(KERNELS, quantization, kernel)

    with pytest.raises(QuantizationError, match=rf"{quantization} can't be used here:.*is wrong"):
        check_kernel(quantization, dtype)


@pytest.mark.usefixtures("untested")
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("error", [RuntimeError, AttributeError, NotImplementedError])
def test_an_operator_that_is_missing_is_an_error(
    quantization: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> None:
        raise error("no such operator")

    monkeypatch.setattr(KERNELS[quantization], "pack", missing)

    for _ in range(2):  # it is not forgotten
        with pytest.raises(QuantizationError, match="no such operator; leave quantization out"):
            pack(linear(), quantization)


@pytest.mark.usefixtures("untested")
def test_activations_get_by_with_7_bits_where_8_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = linear_kernels.Int8()
    monkeypatch.setattr(linear_kernels, "_INT8", kernel)
    monkeypatch.setitem(KERNELS, "int8", kernel)
    right = kernel.run

    def overflowing(*given: torch.Tensor) -> torch.Tensor:
        result = right(*given)
        return result if kernel.reduce_range else result.clamp(max=32)

    monkeypatch.setattr(kernel, "run", overflowing)
    check_kernel("int8", torch.float32)

    assert kernel.reduce_range


def test_a_processor_without_vnni_gets_by_with_7_bits() -> None:
    """With oneDNN a process can have less of the processor than there is.

    It has a plain loop for what it has no kernel for, which takes a thousand times as long.
    """
    script = (
        "import torch; from splitlearn_core import linear_kernels as kernels\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        "    kernels.check_kernel('int8', dtype); print(kernels.KERNELS['int8'].reduce_range)\n"
        "    kernel = kernels.KERNELS['int8']\n"
        "    packed = kernel.pack(torch.ones(64, 64, dtype=dtype), None)\n"
        "    kernel.run(torch.ones(8, 64, dtype=dtype), packed, None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ONEDNN_VERBOSE": "profile_exec"},
        capture_output=True,
        text=True,
        check=False,
    )

    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert [line for line in lines if not line.startswith("onednn")] == ["True", "True"]
    multiplied = [line for line in lines if ",matmul," in line or ",inner_product," in line]
    assert multiplied
    assert not any(",ref" in line for line in multiplied), multiplied


@pytest.mark.usefixtures("untested")
def test_layers_that_run_meanwhile_do_not_notice_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = linear_kernels.Int8()
    kernel.reduce_range = True
    monkeypatch.setattr(linear_kernels, "_INT8", kernel)
    seen: list[bool] = []
    monkeypatch.setattr(
        linear_kernels, "_saturates", lambda tried: seen.append(tried is kernel) or False
    )
    check_kernel("int8", torch.bfloat16)
    kernel.reduce_range = False
    linear_kernels._tested.clear()
    check_kernel("int8", torch.bfloat16)

    assert seen == [False]  # what is known is not asked again, and tried with another


@pytest.mark.usefixtures("untested")
def test_a_kernel_is_tested_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tested: list[str] = []
    monkeypatch.setattr(linear_kernels, "_test", lambda name, _: tested.append(name))

    for _ in range(3):
        check_kernel("fp16", torch.float32)

    assert tested == ["fp16"]


@pytest.mark.parametrize("name", ["int4", "", "INT8", "none"])
def test_a_name_that_there_is_not(name: str) -> None:
    with pytest.raises(ValueError, match=r"unknown quantization.*prepacked, fp16, int8"):
        check_quantization(name)


def test_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="for the cpu, not for cuda:0"):
        check_quantization("int8", "cuda:0")
