"""The kernels of one token against the fp64 reference: outputs and everything that is written in place."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DEVICE, TOLERANCE, Draw, worst_chunk

from linearize.kernels.step import choose_tile, features_of
from linearize.kernels.step import delta_step as delta_kernel
from linearize.kernels.step import linear_step as linear_kernel
from linearize.kernels.step_window import window_step as window_kernel
from linearize.modeling import reference
from linearize.modeling import step_reference as steps

pytestmark = pytest.mark.usefixtures("poisoned")
GPU = torch.cuda.is_available()
ON_GPU = pytest.param("gpu", marks=[pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device")])
DTYPES = [torch.float32, torch.bfloat16]


def doubled(arguments: dict) -> dict:
    """Deep copies, floats in fp64."""
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }  # fmt: skip


def copied(arguments: dict) -> dict:
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


def close(ours, exact, tolerance: float) -> None:
    """Relative L2 of each row."""
    if exact is None:
        assert ours is None
        return
    if not exact.is_floating_point():
        assert torch.equal(ours, exact)
        return
    rows = ours.flatten(1) if ours.dim() > 1 else ours[:, None]
    assert worst_chunk(rows, exact.reshape(rows.shape), chunk=1, dim=0) < tolerance


def linear_arguments(
    dtype,
    *,
    feature="none",
    decay=None,
    join="none",
    near=True,
    extras=(),
    batch=2,
    heads=4,
    groups=2,
    channels=8,
    values=16,
):
    draw = Draw(dtype)
    features = features_of(feature, channels)
    arguments = {
        "q": draw(batch, heads, channels),
        "k": draw(batch, groups, channels),
        "v": draw(batch, groups, values),
        "kv": draw(batch, groups, features, values, dtype=torch.float32),
        "feature": feature,
        "join": join,
    }
    if decay == "scalar":
        arguments["log_decay"] = draw.log_decay(batch, groups)
    elif decay == "vector":
        arguments["log_decay"] = draw.log_decay(batch, groups, features)
    if join == "share" or "normalizer" in extras:
        arguments["k_state"] = draw(batch, groups, features, dtype=torch.float32)
    if join == "share":  # a normaliser is positive, or there is none
        arguments["k_state"] = arguments["k_state"].abs()
        arguments["q"], arguments["k"] = arguments["q"].abs(), arguments["k"].abs()
    if join != "none" and near:
        arguments["near"] = draw(batch, heads, values, dtype=torch.float32)
        if join == "share" or "lse" in extras:
            arguments["lse"] = draw(batch, heads, dtype=torch.float32)
        else:
            arguments["window_scale"] = draw(heads, dtype=torch.float32)
    if join == "norm":
        arguments["norm_weight"] = draw(heads, values, dtype=torch.float32)
        arguments["linear_scale"] = draw(heads, dtype=torch.float32)
    if "weight" in extras:
        arguments["weight"] = draw(batch, groups, dtype=torch.float32).abs()
        arguments["weight"][0, 0] = 0
    for name in ("beta", "value_scale"):
        if name in extras:
            arguments[name] = draw(batch, groups, dtype=torch.float32).sigmoid()
    if "skip" in extras:
        arguments["skip"] = draw(heads, dtype=torch.float32)
    if "count" in extras:
        arguments["count"] = torch.arange(batch, device=DEVICE)
    return arguments


def compare_linear(arguments, dtype) -> None:
    exact, ours = doubled(arguments), copied(arguments)
    out, z = steps.linear_step(**exact)
    our_out, our_z = linear_kernel(**ours)
    assert our_out.dtype == (torch.float32 if arguments["join"] == "none" else dtype)
    tolerance = 1e-5 if arguments["join"] == "none" else TOLERANCE[dtype]  # what is kept is fp32 whatever came in
    close(our_out, out, tolerance)
    close(our_z, z, 1e-5)
    for name in ("kv", "k_state", "count"):
        close(ours.get(name), exact.get(name), 1e-5)


LINEAR_CASES = [
    {},
    {"decay": "scalar", "extras": ("weight",)},
    {"decay": "vector", "extras": ("weight", "count")},
    {"extras": ("normalizer",), "feature": "elu"},
    {"feature": "softmax", "decay": "scalar", "join": "norm", "extras": ("weight", "value_scale", "skip", "count")},
    {"feature": "softmax", "decay": "vector", "join": "norm", "near": False},
    {"feature": "hedgehog", "join": "share", "extras": ("weight", "count")},
    {"feature": "hedgehog", "join": "share", "near": False},
    {"feature": "relu", "join": "share", "extras": ("weight",)},
    {"feature": "taylor", "join": "share", "extras": ("weight",), "channels": 5},
    {"feature": "unit", "decay": "scalar", "join": "norm", "extras": ("weight", "beta", "count")},
    {"feature": "softmax", "decay": "scalar", "join": "norm", "extras": ("weight", "value_scale", "skip", "lse")},
    {"feature": "unit", "decay": "scalar", "join": "norm", "extras": ("weight", "beta", "count", "lse"), "values": 20},
    {"decay": "scalar", "extras": ("beta",), "channels": 19, "values": 20},
    {"heads": 3, "groups": 3, "channels": 16, "values": 40, "decay": "scalar"},
    {"heads": 6, "groups": 2, "channels": 33, "values": 17, "feature": "hedgehog", "join": "share"},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", LINEAR_CASES, ids=range(len(LINEAR_CASES)))
def test_linear_step(case, dtype):
    arguments = linear_arguments(dtype, **case)
    if arguments["feature"] == "taylor":
        arguments["q_scale"] = 0.3
    compare_linear(arguments, dtype)


@pytest.mark.parametrize("extras", [(), ("lse",)])
@pytest.mark.parametrize("shared", ["none", "share", "norm"])
def test_value_tiles(shared, extras, monkeypatch):
    """Several tiles a state, over programs or inside one; a norm over values that do not fit is torch's."""
    from linearize.kernels import step

    monkeypatch.setitem(step.TILES, shared, (256, 256))
    if shared == "norm":
        monkeypatch.setattr(step, "LARGEST_TILE", 512)
    assert choose_tile(16, 64, shared).split == (4 if shared == "none" else 1)
    join = "none" if shared == "none" else shared
    case = {"channels": 16, "values": 60, "join": join, "decay": "scalar", "extras": extras}
    compare_linear(linear_arguments(torch.float32, **case), torch.float32)


def test_a_step_is_the_recurrence():
    """Token by token, the step gives what the operation over the whole sequence gives."""
    draw = Draw(torch.float64)
    q, k, v = draw(2, 6, 4, 8).cpu(), draw(2, 6, 2, 8).cpu(), draw(2, 6, 2, 8).cpu()
    decay = draw.log_decay(2, 6, 2).double().cpu()
    whole, z, last = reference.linear_attention(q, k, v, log_decay=decay, normalizer=True, output_final_state=True)
    kv, k_state = torch.zeros(2, 2, 8, 8).double(), torch.zeros(2, 2, 8).double()
    for t in range(6):
        out, norm = steps.linear_step(q[:, t], k[:, t], v[:, t], kv, k_state, log_decay=decay[:, t])
        torch.testing.assert_close(out, whole[:, t])
        torch.testing.assert_close(norm, z[:, t])
    torch.testing.assert_close(kv, last.kv)
    torch.testing.assert_close(k_state, last.k)


def test_delta_step():
    arguments = linear_arguments(torch.float32, decay="scalar", extras=("beta",))
    for name in ("feature", "join"):
        del arguments[name]
    exact, ours = doubled(arguments), copied(arguments)
    out, _ = steps.delta_step(**exact)
    close(delta_kernel(**ours)[0], out, 1e-5)
    close(ours["kv"], exact["kv"], 1e-5)


def window_arguments(
    dtype, *, window=8, sinks=0, places=(0, 21), heads=4, groups=2, dim=16, gates=(), gains=False, horizon=(), bend=()
):
    draw = Draw(dtype, 3)
    batch = len(places)
    arguments = {
        "q": draw(batch, heads, dim),
        "k": draw(batch, groups, dim),
        "v": draw(batch, groups, dim),
        "window_k": draw(batch, window, groups, dim),
        "window_v": draw(batch, window, groups, dim),
        "place": torch.tensor(places, device=DEVICE),
        "scale": 0.3,
    }
    if sinks:
        arguments["sink_k"], arguments["sink_v"] = (draw(batch, sinks, groups, dim) for _ in range(2))
    shapes = {"log_decay": (), "value_scale": (), "beta": (), "vector": (dim,)}
    rings = {"log_decay": "window_decay", "value_scale": "window_scale", "beta": "window_beta"}
    for gate in gates:
        name, extra = ("log_decay" if gate == "vector" else gate), shapes[gate]
        arguments[name] = draw(batch, groups, *extra, dtype=torch.float32)
        arguments[rings[name]] = draw(batch, window, groups, *extra, dtype=torch.float32)
    if gains:
        arguments["gain"] = draw(heads, dtype=torch.float32)
        arguments["gain_q"] = draw(heads, dim, dtype=torch.float32)
        arguments["gain_k"] = draw(groups, dim, dtype=torch.float32)
    if horizon:
        arguments["log_horizon"] = torch.tensor(horizon, device=DEVICE).log()
    if "cap" in bend:
        arguments["cap"] = 1.5
    if "slopes" in bend:
        arguments["slopes"] = draw(heads, dtype=torch.float32).abs()
    if "null" in bend:
        arguments["null"] = 3 * draw(heads)
    return arguments


def compare_window(arguments) -> None:
    exact, ours = doubled(arguments), copied(arguments)
    theirs, made = steps.window_step(**exact), window_kernel(**ours)
    for name, tensor in theirs._asdict().items():
        close(getattr(made, name), tensor, 1e-5)
    for name in arguments:
        if name.startswith(("window_", "sink_", "place")):
            assert torch.equal(ours[name], exact[name].to(ours[name].dtype)), name


WINDOW_CASES = [
    {},
    {"sinks": 2, "places": (0, 1, 2, 5, 9, 10, 40)},
    {"window": 1, "places": (0, 3)},
    {"window": 24, "sinks": 1, "places": (3, 100), "gains": True, "dim": 20},
    {"gates": ("log_decay", "value_scale")},
    {"gates": ("vector",), "heads": 2},
    {"gates": ("log_decay", "beta"), "sinks": 3, "gains": True, "heads": 6},
    *[{"sinks": 2, "places": (0, 1, 9, 40), "bend": (name,)} for name in ("cap", "slopes", "null")],
    {"sinks": 1, "places": (0, 9, 40), "gains": True, "dim": 20, "bend": ("cap", "slopes", "null")},
    {"sinks": 1, "gains": True, "horizon": (1.0, 30.0, 4096.0, 1e6), "places": (0, 7, 8, 9, 40, 3000)},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", WINDOW_CASES, ids=range(len(WINDOW_CASES)))
def test_window_step(case, dtype):
    compare_window(window_arguments(dtype, **case))


def test_a_window_step_is_window_attention():
    draw = Draw(torch.float64)
    tokens, window, sinks = 21, 6, 2
    q, k, v = (draw(2, tokens, heads, 8).cpu() for heads in (4, 2, 2))
    whole, lse = reference.window_attention(q, k, v, window=window, sinks=sinks, scale=0.4)
    ring_k, ring_v = torch.zeros(2, window, 2, 8).double(), torch.zeros(2, window, 2, 8).double()
    sink_k, sink_v = torch.zeros(2, sinks, 2, 8).double(), torch.zeros(2, sinks, 2, 8).double()
    for t in range(tokens):
        place = torch.full((2,), t)
        step = steps.window_step(
            q[:, t], k[:, t], v[:, t], ring_k, ring_v, place, scale=0.4, sink_k=sink_k, sink_v=sink_v
        )
        torch.testing.assert_close(step.near, whole[:, t])
        torch.testing.assert_close(step.lse, lse[:, t])
        torch.testing.assert_close(step.weight, torch.full((2, 2), float(t - window >= sinks)).double())
        if t >= window:
            assert torch.equal(step.k, k[:, t - window]) and torch.equal(step.v, v[:, t - window])


@pytest.mark.parametrize(
    "name", ["q", "kv", "weight", "log_decay", "count", "join", "feature", "k_state", "norm_weight"]
)
def test_linear_step_names_what_is_wrong(name):
    arguments = linear_arguments(torch.float32, decay="scalar", extras=("weight", "count"))
    wrong = {
        "q": arguments["q"][:, :3],
        "kv": arguments["kv"].mT.contiguous().mT,
        "weight": arguments["weight"][:1],
        "log_decay": arguments["log_decay"][:, :1],
        "count": arguments["count"].int(),
        "join": "mix",
        "feature": "cosine",
    }
    arguments.update({"k_state": {"join": "share"}, "norm_weight": {"join": "norm"}}.get(name) or {name: wrong[name]})
    with pytest.raises(ValueError, match=name):
        linear_kernel(**arguments)


@pytest.mark.parametrize("name", ["v", "window_k", "place", "sink_v", "window_beta", "gain_q", "scale"])
def test_window_step_names_what_is_wrong(name):
    arguments = window_arguments(torch.float32, sinks=1)
    wrong = {
        "v": arguments["v"][..., :4],
        "window_k": arguments["window_k"][:1],
        "place": arguments["place"].int(),
        "sink_v": None,
        "window_beta": arguments["window_k"][..., 0],
        "gain_q": torch.ones(3, 3, device=DEVICE),
        "scale": float("inf"),
    }
    arguments[name] = wrong[name]
    with pytest.raises(ValueError, match=name):
        window_kernel(**arguments)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_whole(backend):
    """Under torch.compile the steps are operators that say what they write."""

    def run(q, k, v, kv, k_state, ring_k, ring_v, place):
        near = window_kernel(q, k, v, ring_k, ring_v, place, scale=0.5)
        out, _ = linear_kernel(
            q, near.k, near.v, kv, k_state, weight=near.weight, feature="elu", join="share",
            near=near.near, lse=near.lse, count=place,
        )  # fmt: skip
        return out

    draw = Draw(torch.float32)
    inputs = [draw(2, 4, 16), draw(2, 2, 16), draw(2, 2, 16), draw(2, 2, 16, 16), draw(2, 2, 16).abs()]
    inputs += [draw(2, 4, 2, 16), draw(2, 4, 2, 16), torch.tensor([1, 9], device=DEVICE)]
    plain, compiled = [t.clone() for t in inputs], [t.clone() for t in inputs]
    torch._dynamo.reset()
    function = torch.compile(run, backend=backend, fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(function(*compiled), run(*plain))
        torch.testing.assert_close(compiled, plain)


@pytest.mark.parametrize("device", [ON_GPU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_at_size(device, dtype):
    for case in (
        {"decay": "scalar", "feature": "softmax", "join": "norm", "extras": ("weight", "value_scale", "skip", "count")},
        {"decay": "vector"},
        {"extras": ("beta", "weight"), "feature": "unit", "decay": "scalar", "join": "norm"},
        {"feature": "hedgehog", "join": "share", "extras": ("weight",)},
    ):
        compare_linear(linear_arguments(dtype, batch=8, heads=32, groups=8, channels=128, values=128, **case), dtype)
    taylor = linear_arguments(
        dtype, batch=8, heads=32, groups=8, channels=16, values=128, feature="taylor", join="share"
    )
    compare_linear(taylor, dtype)
    compare_linear(linear_arguments(dtype, batch=2, heads=4, groups=2, channels=256, values=256, join="norm"), dtype)
    places = (0, 1, 7, 63, 64, 65, 130, 100_000)
    for window in (64, 100, 256):
        compare_window(
            window_arguments(
                dtype, window=window, sinks=2, places=places, heads=32, groups=8, dim=128, gates=("vector",), gains=True
            )
        )


@pytest.mark.parametrize("device", [ON_GPU])
def test_offsets_beyond_32_bits(device):
    """A state of more than 2^31 numbers: the last sequence's is updated as the first's."""
    batch, groups = 4100, 32
    kv = torch.zeros(batch, groups, 128, 128, device="cuda")
    q, k, v = (torch.randn(1, groups, 128, device="cuda").expand(batch, -1, -1).contiguous() for _ in range(3))
    out, _ = linear_kernel(q, k, v, kv)
    assert torch.equal(out[0], out[-1]) and torch.equal(kv[0], kv[-1]) and kv[-1].abs().sum() > 0
