"""The PTX that one assembler gets wrong, and what is written in its place."""

from __future__ import annotations

import re

import pytest
import torch

from linearize.kernels.assembler import reassembled, separated

WIDE, NARROW = 0x40000040_00010000, 0x80000020_00010000  # descriptors of 128 and 64 bytes a row


def signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def program(*lines: tuple[str, str, str, int]) -> str:
    body = [f"\t{op} \t{made}, {address}, {signed(constant)};" for op, made, address, constant in lines]
    return "\n".join(["\tcvt.u64.u32 \t%rd1, %r1;", *body, "\tret;"])


def test_one_address_with_two_layouts_is_made_of_words():
    ptx = program(("or.b64", "%rd2", "%rd1", WIDE), ("add.s64", "%rd3", "%rd1", NARROW + 2))
    better = separated(ptx)
    assert "add.s64" not in better and "or.b64" not in better
    found = re.findall(
        r"cvt.u32.u64 %low, (%rd\d+); add.s32 %low, %low, (\d+); mov.b64 (%rd\d+), {%low, (\d+)};", better
    )
    assert [(made, address, int(high) << 32 | int(low)) for address, low, made, high in found] == [
        ("%rd2", "%rd1", WIDE),
        ("%rd3", "%rd1", NARROW + 2),
    ]
    assert better.startswith("\tcvt.u64.u32") and better.endswith("\tret;")
    assert better.count("{ .reg") == better.count("; }") == 2


@pytest.mark.parametrize(
    "lines",
    [
        [("or.b64", "%rd2", "%rd1", WIDE), ("add.s64", "%rd3", "%rd1", WIDE + 64)],
        [("or.b64", "%rd2", "%rd1", WIDE), ("or.b64", "%rd4", "%rd3", NARROW)],
        [("or.b64", "%rd2", "%rd1", WIDE), ("add.s64", "%rd3", "%rd1", 4096), ("add.s64", "%rd4", "%rd1", -8)],
    ],
    ids=["one layout", "two addresses", "sums of other kinds"],
)
def test_what_is_right_stays(lines):
    assert separated(program(*lines)) == program(*lines)


def test_a_layout_without_a_stride_counts():
    """A product 8 wide has one group of rows and a stride of 0."""
    ptx = program(("or.b64", "%rd2", "%rd1", 0x40000000_00010000), ("add.s64", "%rd3", "%rd1", NARROW))
    assert separated(ptx).count("mov.b64") == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_faulty_kernel_is_right():
    """The delta rule at 32 channels, whose keys' gradient was NaN."""
    from linearize.kernels import delta_rule
    from linearize.modeling.delta_reference import delta_rule as exact

    torch.manual_seed(0)
    q, v = (torch.randn(2, 300, 4, 32, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    k = torch.nn.functional.normalize(torch.randn(2, 300, 4, 32, device="cuda"), dim=-1).bfloat16().requires_grad_()
    beta = torch.rand(2, 300, 4, device="cuda")
    ours = torch.autograd.grad(delta_rule(q, k, v, beta=beta)[0].float().square().sum(), k)[0].double()
    theirs = torch.autograd.grad(exact(q.double(), k.double(), v.double(), beta=beta.double())[0].square().sum(), k)[0]
    assert float((ours - theirs).norm() / theirs.norm()) < 2e-2


def test_other_devices_are_left_alone():
    class Compiled:
        class metadata:
            class target:
                backend, arch = "cuda", 80

    assert reassembled(Compiled()) is None
