"""The windowed softmax kernel against the fp64 reference: output, log-sum-exp and every gradient."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DEVICE, TOLERANCE, Draw, gradients, worst_chunk
from torch import Tensor

from linearize.kernels.window import window_attention
from linearize.modeling.reference import window_attention as reference

NAMES = ["out", "lse", "dq", "dk", "dv", "dsink_k", "dsink_v"]


def settle(out: Tensor, lse: Tensor, empty: list[Tensor]) -> list[Tensor]:
    """Output and log-sum-exp with 0 for its -inf, whose places are kept in `empty`."""
    empty.append(lse.isinf())
    return [out, lse.masked_fill(lse.isinf(), 0)]


def leaves_of(draw: Draw, batch=1, tokens=83, keys=None, heads=2, groups=1, k_dim=16, v_dim=None, given=0):
    keys, v_dim = keys or tokens, v_dim or k_dim
    leaves = [
        draw(batch, tokens, heads, k_dim),
        draw(batch, keys, groups, k_dim),
        draw(batch, keys, groups, v_dim),
    ]
    if given:
        leaves += [draw(batch, given, groups, k_dim), draw(batch, given, groups, v_dim)]
    return leaves


SLOPES = (1.0, 0.3, 0.05, 0.004, 0.5, 0.0, 0.2, 0.01)


def check(
    dtype=torch.float32,
    *,
    window,
    sinks=1,
    scale=0.3,
    bounds=None,
    position=None,
    seed=0,
    cap=0.0,
    alibi=False,
    **shape,
):
    """Compares everything on fresh inputs; `shape` as in `leaves_of`."""
    draw = Draw(dtype, seed)
    leaves = leaves_of(draw, **shape)
    batch, tokens, heads = leaves[0].shape[:3]
    seeds = [draw(batch, tokens, heads, leaves[2].shape[3]), draw(batch, tokens, heads, dtype=torch.float32)]
    options = {
        "window": window,
        "sinks": sinks,
        "scale": scale,
        "cu_seqlens": None if bounds is None else torch.as_tensor(bounds, device=DEVICE),
        "position": None if position is None else torch.as_tensor(position, device=DEVICE),
        "cap": cap,
        "slopes": torch.tensor(SLOPES[:heads], device=DEVICE) if alibi else None,
    }
    empty: list[Tensor] = []

    def run(function):
        def call(q, k, v, *given):
            named = dict(zip(("sink_k", "sink_v"), given, strict=False))
            return settle(*function(q, k, v, **options, **named), empty)

        return call

    ours = gradients(run(window_attention), leaves, seeds)
    exact = gradients(run(reference), [leaf.double() for leaf in leaves], seeds)
    assert torch.equal(empty[0], empty[1])
    assert ours[0].dtype == dtype and ours[1].dtype == torch.float32
    for name, a, b in zip(NAMES, ours, exact, strict=False):
        assert worst_chunk(a, b) < TOLERANCE[dtype], f"{name}: {worst_chunk(a, b):.2e}"


@pytest.mark.parametrize("sinks", [0, 1, 3])
@pytest.mark.parametrize("window", [1, 7, 64, 200])
def test_windows_and_sinks(window, sinks, poisoned):
    check(window=window, sinks=sinks)


@pytest.mark.parametrize("tokens", [1, 15, 17, 64, 65, 129])
def test_lengths(tokens, poisoned):
    check(window=16, sinks=2, tokens=tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sinks", [0, 1, 5])
def test_half_precision(dtype, sinks, poisoned):
    check(dtype, window=20, sinks=sinks, heads=4, groups=2)


@pytest.mark.parametrize("dims", [(20, 12), (80, 80), (48, 96), (128, 64), (256, 256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_head_dims(dims, dtype, poisoned):
    check(dtype, window=9, tokens=40, k_dim=dims[0], v_dim=dims[1], scale=dims[0] ** -0.5)


def test_query_heads_share_key_heads(poisoned):
    check(window=20, sinks=2, batch=2, heads=6, groups=2, tokens=35)


@pytest.mark.parametrize(("sinks", "dtype"), [(70, torch.bfloat16), (17, torch.float32)])
def test_many_sinks(sinks, dtype, poisoned):
    check(dtype, window=5, sinks=sinks, tokens=100)


@pytest.mark.parametrize("scale", [0.0, -0.4, 1.0])
def test_any_scale(scale, poisoned):
    check(window=12, sinks=2, scale=scale)


@pytest.mark.parametrize(
    "bounds",
    [[0, 83], [0, 3, 40, 83], [0, 0, 1, 2, 2, 66, 83, 83], [0, 9, 20, 31, 83], [0, 64, 83]],
)
@pytest.mark.parametrize("window", [2, 16])
def test_packed_documents(bounds, window, poisoned):
    check(window=window, sinks=2, bounds=bounds)


BENT = [{"cap": 1.5}, {"cap": 30.0}, {"alibi": True}, {"cap": 2.0, "alibi": True}]


@pytest.mark.parametrize("bend", BENT)
@pytest.mark.parametrize("sinks", [0, 1, 3])
def test_bent_logits(bend, sinks, poisoned):
    check(window=20, sinks=sinks, heads=4, groups=2, scale=0.7, **bend)


@pytest.mark.parametrize("bend", BENT)
def test_bent_logits_of_documents_pads_and_pieces(bend, poisoned):
    check(window=9, sinks=2, bounds=[0, 3, 40, 83], **bend)
    check(window=9, sinks=2, batch=3, position=[0, -19, -83], **bend)
    check(window=16, sinks=2, batch=2, tokens=5, keys=21, position=[63, 14], given=2, **bend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sinks", [1, 5])
def test_bent_logits_in_half_precision(dtype, sinks, poisoned):
    check(dtype, window=20, sinks=sinks, heads=4, groups=2, cap=2.0, alibi=True)


def test_logits_far_above_their_bound(poisoned):
    """e^(2 s / cap) is beyond any float there."""
    check(window=20, sinks=2, scale=20.0, cap=1.0)


def test_many_packed_documents_of_one_token(poisoned):
    check(window=4, tokens=8, bounds=torch.arange(9, dtype=torch.int32))


@pytest.mark.parametrize("sinks", [0, 2])
def test_pads(sinks, poisoned):
    check(window=9, sinks=sinks, batch=3, position=[0, -19, -83])


@pytest.mark.parametrize("tokens", [1, 5, 30])
@pytest.mark.parametrize("given", [0, 2])
def test_continues_a_document(tokens, given, poisoned):
    """Keys before the first query; the second row's document begins among them, behind two pads."""
    position = [63, 14] if given else [16, 14]
    check(window=16, sinks=2, batch=2, tokens=tokens, keys=tokens + 16, position=position, given=given)


def test_more_keys_than_the_window_reaches(poisoned):
    check(window=5, sinks=1, tokens=20, keys=90)


def test_sinks_that_are_not_among_the_keys(poisoned):
    """The reference takes the first key for them; nothing outside the keys is read or written."""
    check(window=16, sinks=3, batch=2, tokens=20, keys=36, position=[63, 17])


def test_strided_inputs_and_gradients(poisoned):
    draw = Draw(torch.float32)
    q, k, v = draw(2, 4, 50, 16).transpose(1, 2), draw(2, 50, 2, 32)[..., ::2], draw(2, 50, 2, 40)[..., 8:24]
    seeds = [draw(16, 4, 50, 2).permute(3, 2, 1, 0), draw(4, 50, 2).permute(2, 1, 0)]

    def run(function, cast):
        leaves = [cast(x).detach().requires_grad_() for x in (q, k, v)]
        outputs = function(*leaves, window=7, sinks=2, scale=0.3)
        torch.autograd.backward(outputs, [seed.to(o.dtype) for seed, o in zip(seeds, outputs, strict=True)])
        return [o.detach() for o in outputs] + [x.grad for x in leaves]

    strided = run(window_attention, lambda x: x)
    exact = run(reference, lambda x: x.double())
    for name, a, b in zip(NAMES, strided, exact, strict=False):
        assert worst_chunk(a, b) < 1e-5, name


@pytest.mark.parametrize("used", ["out", "lse"])
def test_only_one_output_used(used, poisoned):
    draw = Draw(torch.float32)
    leaves = leaves_of(draw, tokens=40)
    seed = draw(1, 40, 2, 16) if used == "out" else draw(1, 40, 2)

    def run(function):
        return lambda *x: [function(*x, window=7, sinks=1)[used == "lse"]]

    ours = gradients(run(window_attention), leaves, [seed])
    exact = gradients(run(reference), [leaf.double() for leaf in leaves], [seed])
    for index, (a, b) in enumerate(zip(ours, exact, strict=True)):
        if b is None or (used == "lse" and index == 3):
            assert a is None or (a == 0).all()  # the log-sum-exp does not depend on v
        else:
            assert worst_chunk(a, b) < 1e-5


def test_gradient_of_a_pads_log_sum_exp_stays_out():
    """It is -inf, and what a caller computes from it may have any gradient."""
    q, k, v = (x.requires_grad_() for x in leaves_of(Draw(torch.float32), tokens=30))
    out, lse = window_attention(q, k, v, window=7, sinks=1, position=torch.tensor([-9], device=DEVICE))
    seed = torch.ones_like(lse)
    seed[:, :9] = float("nan")
    torch.autograd.backward([out, lse], [torch.ones_like(out), seed])
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v))


def test_mixed_dtypes(poisoned):
    draw = Draw(torch.bfloat16)
    q, k, v = leaves_of(draw, tokens=40)
    leaves = [q.float(), k.float(), v]
    seeds = [draw(1, 40, 2, 16), draw(1, 40, 2)]
    ours = gradients(lambda *x: list(window_attention(*x, window=7, sinks=1, scale=0.3)), leaves, seeds)
    exact = gradients(lambda *x: list(reference(*x, window=7, sinks=1, scale=0.3)), [x.double() for x in leaves], seeds)
    assert [x.dtype for x in ours] == [torch.bfloat16, *[torch.float32] * 3, torch.bfloat16]
    for name, a, b in zip(NAMES, ours, exact, strict=False):
        assert worst_chunk(a, b) < 1e-2, name


def test_same_gradients_twice():
    draw = Draw(torch.bfloat16)
    leaves = leaves_of(draw, tokens=70)
    seeds = [draw(1, 70, 2, 16), draw(1, 70, 2)]
    runs = [gradients(lambda *x: list(window_attention(*x, window=7, sinks=2)), leaves, seeds) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_no_tokens():
    draw = Draw(torch.float32)
    q, k, v = (x.requires_grad_() for x in (draw(1, 0, 2, 16), draw(1, 9, 1, 16), draw(1, 9, 1, 16)))
    out, lse = window_attention(q, k, v, window=4, sinks=1)
    assert out.shape == (1, 0, 2, 16) and lse.shape == (1, 0, 2)
    (out.sum() + lse.sum()).backward()
    assert (k.grad == 0).all() and (v.grad == 0).all()


def test_compiled():
    draw = Draw(torch.float32)
    leaves = leaves_of(draw, tokens=40, given=1)
    seeds = [draw(1, 40, 2, 16), draw(1, 40, 2)]

    def run(q, k, v, sink_k, sink_v):
        out, lse = window_attention(q * 2, k, v, window=7, sinks=1, sink_k=sink_k, sink_v=sink_v)
        return [out + 1, lse]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(run, leaves, seeds), gradients(compiled, leaves, seeds), strict=True):
        torch.testing.assert_close(a, b)


def wrong_arguments():
    yield "window", {"window": 0}
    yield "sinks", {"sinks": -1}
    yield "scale", {"scale": float("inf")}
    yield "cap", {"cap": -1.0}
    yield "cap", {"cap": float("nan")}
    yield "slopes", {"slopes": torch.ones(3)}
    yield "cu_seqlens", {"cu_seqlens": torch.tensor([0, 20])}
    yield "position", {"position": torch.zeros(3, dtype=torch.long)}
    yield "position", {"position": torch.zeros(2)}
    yield "sink_k", {"sink_k": torch.zeros(2, 2, 1, 16), "sink_v": torch.zeros(2, 1, 1, 16)}
    yield "sink_v", {"sink_k": torch.zeros(2, 1, 1, 16), "sink_v": torch.zeros(2, 1, 1, 8)}
    yield "together", {"sink_k": torch.zeros(2, 1, 1, 16)}
    yield "q is torch.float64", {"q": torch.zeros(2, 20, 2, 16, dtype=torch.float64)}
    yield "k has 20 tokens", {"q": torch.zeros(2, 21, 2, 16)}
    yield "3 heads", {"q": torch.zeros(2, 20, 3, 16), "k": torch.zeros(2, 20, 2, 16), "v": torch.zeros(2, 20, 2, 16)}
    yield "k has 8 channels", {"k": torch.zeros(2, 20, 1, 8)}


@pytest.mark.parametrize(("message", "wrong"), list(wrong_arguments()))
def test_wrong_arguments_are_named(message, wrong):
    arguments = {
        "q": torch.zeros(2, 20, 2, 16),
        "k": torch.zeros(2, 20, 1, 16),
        "v": torch.zeros(2, 20, 1, 16),
        "window": 4,
        "sinks": 1,
    }
    arguments = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in (arguments | wrong).items()}
    with pytest.raises(ValueError, match=message):
        window_attention(**arguments)


def test_packed_documents_exclude_position_and_given_sinks():
    q, k, v = leaves_of(Draw(torch.float32), tokens=20)
    bounds = torch.tensor([0, 20], device=DEVICE)
    with pytest.raises(ValueError, match="cu_seqlens"):
        window_attention(q, k, v, window=4, cu_seqlens=bounds, position=torch.zeros(1, dtype=torch.long, device=DEVICE))
    with pytest.raises(ValueError, match="cu_seqlens"):
        window_attention(q, k, v, window=4, sinks=1, cu_seqlens=bounds, sink_k=k[:, :1], sink_v=v[:, :1])
    with pytest.raises(ValueError, match="cu_seqlens"):
        window_attention(q[:, :9], k, v, window=4, cu_seqlens=bounds)


# On the GPU: real sizes, every tile of the table.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("sinks", [0, 1, 4])
def test_gpu_tiles(dtype, dim, sinks, poisoned):
    check(dtype, window=64, sinks=sinks, tokens=1100, heads=4, groups=2, k_dim=dim, scale=dim**-0.5)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("window", "dtype"),
    [(1, torch.float32), *[(w, dtype) for w in (33, 64, 100, 128, 1000) for dtype in (torch.bfloat16, torch.float32)]],
)
def test_gpu_windows(window, dtype, poisoned):
    check(dtype, window=window, sinks=2, tokens=2113, heads=3, groups=3, k_dim=128, scale=128**-0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gpu_packed_documents(dtype, poisoned):
    lengths = [1, 700, 0, 63, 64, 65, 300, 2, 5, 1200, 128]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    shape = {"tokens": int(bounds[-1]), "heads": 8, "groups": 2, "k_dim": 64}
    check(dtype, window=64, sinks=2, bounds=bounds, scale=0.125, **shape)
    check(dtype, window=3, sinks=2, bounds=bounds.int(), scale=0.125, **shape)


@pytest.mark.gpu
def test_gpu_pads_and_pieces(poisoned):
    shape = {"batch": 3, "tokens": 500, "heads": 8, "groups": 2, "k_dim": 64}
    check(torch.bfloat16, window=64, sinks=1, position=[0, -100, -500], scale=0.125, **shape)
    check(torch.bfloat16, window=64, sinks=1, position=[900, 64, 30], keys=564, given=1, scale=0.125, **shape)
    shape["tokens"] = 1
    check(torch.bfloat16, window=64, sinks=1, position=[900, 64, 30], keys=65, given=1, scale=0.125, **shape)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("sinks", [0, 1, 4])
@pytest.mark.parametrize("bend", BENT)
def test_gpu_bent_logits(dtype, dim, sinks, bend, poisoned):
    shape = {"tokens": 600, "heads": 4, "groups": 2, "k_dim": dim}
    check(dtype, window=100, sinks=sinks, scale=3 * dim**-0.5, **shape, **bend)
    check(dtype, window=33, sinks=sinks, bounds=[0, 1, 300, 600], scale=dim**-0.5, **shape, **bend)


@pytest.mark.gpu
def test_gpu_many_programs(poisoned):
    check(torch.bfloat16, window=64, sinks=1, tokens=16384, heads=8, groups=8, k_dim=128, scale=128**-0.5)
