"""masked_attention: values, gradients, side outputs, compile, errors, on every backend that runs here."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import ATTENTION, AttentionCase, acc, assert_within, float64
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import p3b_ext
from p3b_ext import backends, reference
from p3b_ext.ops import attention
from p3b_ext.ops.attention import packed_attention

pytestmark = pytest.mark.usefixtures("poison")

NAMES = ("lse", "cls_attention", "entropy", "value_norm", "to_cls", "received")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEVICE_BACKENDS = [("cpu", "cpu"), ("cpu", "reference")]
if torch.cuda.is_available():
    DEVICE_BACKENDS += [("cuda", "cuda"), ("cuda", "triton"), ("cuda", "reference")]
FLOATS = ("q", "k", "v", "token_size", "channel_gate")


def name(value):
    return str(value).removeprefix("torch.")


def leaves(inputs: dict) -> dict:
    """The same tensors (and strides) with gradients."""
    return {n: t.detach().requires_grad_() if t is not None and t.is_floating_point() else t for n, t in inputs.items()}


def run(inputs: dict, backend: str, grad_out: torch.Tensor):
    """out, aux and the gradients of masked_attention."""
    inputs = leaves(inputs)
    with p3b_ext.backend(backend):
        q, k, v = inputs["q"], inputs["k"], inputs["v"]
        rest = {n: inputs[n] for n in ("key_mask", "token_size", "channel_gate")}
        out, aux = p3b_ext.masked_attention(q, k, v, **rest, aux=NAMES)
        wanted = [n for n in FLOATS if inputs[n] is not None]
        grads = torch.autograd.grad(out, [inputs[n] for n in wanted], grad_out)
    return out, aux, dict(zip(wanted, grads, strict=True))


def eager(inputs: dict, grad_out: torch.Tensor):
    """What a PyTorch user writes, in the inputs' dtype: the yardstick of the error budget."""
    inputs = leaves(inputs)
    q, k, v, gate = inputs["q"], inputs["k"], inputs["v"], inputs["channel_gate"]
    if gate is not None:
        g = (gate if gate.dim() == 1 else gate[:, None]).to(q.dtype)
        q, k, v = q * g, k * g, v * g
    s = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if inputs["token_size"] is not None:
        s = s + inputs["token_size"].log()[:, None, None, :].to(s.dtype)
    if inputs["key_mask"] is not None:
        s = s.masked_fill(~inputs["key_mask"][:, None, None, :], torch.finfo(s.dtype).min)
    p = s.softmax(-1)
    if inputs["key_mask"] is not None:
        p = p * inputs["key_mask"].any(-1)[:, None, None, None]
    out = p @ v
    wanted = [n for n in FLOATS if inputs[n] is not None]
    grads = torch.autograd.grad(out, [inputs[n] for n in wanted], grad_out)
    s, p = s.detach(), p.detach()
    aux = p3b_ext.AttentionAux(
        lse=s.logsumexp(-1),
        cls_attention=p[:, :, 0],
        entropy=-(p * p.clamp_min(1e-30).log()).sum(-1),
        value_norm=v.detach().square().sum((1, 3)).sqrt(),
        to_cls=p[..., 0],
        received=p.mean(2),
    )
    return out.detach(), aux, dict(zip(wanted, grads, strict=True))


@pytest.mark.parametrize("device,backend", DEVICE_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_values_and_gradients(case, dtype, device, backend):
    """Against float64: at most twice PyTorch's error in the same dtype, for every output and gradient."""
    if dtype == torch.float64 and backend in ("cuda", "triton"):
        pytest.skip("no float64 on this backend")
    if dtype == torch.float16 and case.logits > 1:
        pytest.skip("logits of 1e4 overflow PyTorch's own float16")
    inputs = case.inputs(dtype, device=device)
    grad_out = torch.randn(inputs["q"].shape, dtype=torch.float64).to(device)
    truth_out, truth_aux, truth_grads = run(float64(inputs), "reference", grad_out)
    torch_out, torch_aux, torch_grads = eager(inputs, grad_out.to(dtype))
    out, aux, grads = run(inputs, backend, grad_out.to(dtype))

    # Probabilities recomputed as exp(logit - lse) carry the rounding of logits of this size.
    slack = 2 * torch.finfo(acc(dtype)).eps * case.logits * case.D**0.5 if case.logits > 1 else 0.0
    assert out.dtype == dtype and out.transpose(1, 2).is_contiguous()
    assert_within("out", out, truth_out, torch_out, dtype)
    for n in NAMES:
        value, truth, yard = getattr(aux, n), getattr(truth_aux, n), getattr(torch_aux, n)
        assert value.dtype == acc(dtype), n
        if dtype in (torch.bfloat16, torch.float16) and n == "entropy":
            yard = truth  # side outputs are float32 whatever the inputs are ...
            assert_within(n, value, truth, truth + 1e-2 * truth.abs().max(), torch.float32)
            continue
        assert_within(n, value, truth, yard, dtype, slack if n in ("to_cls", "received") else 0.0)
    for n, grad in grads.items():
        assert grad.isfinite().all(), n
        assert_within(f"grad_{n}", grad, truth_grads[n], torch_grads[n], dtype, slack)


@pytest.mark.slow
@pytest.mark.parametrize("N,D", [(1025, 24), (4096, 8)])
def test_many_tokens(N, D):
    """The longest lengths that are promised, where whole rows of logits leave the caches; one head, both directions."""
    inputs, grad_out = AttentionCase(1, 1, N, D, mask="some", sizes=3).inputs(torch.float32), torch.randn(1, 1, N, D)
    out, aux, grads = run(inputs, "cpu", grad_out)
    truth, true_aux, true_grads = run(float64(inputs), "reference", grad_out.double())
    yard, yard_aux, yard_grads = eager(inputs, grad_out)
    # A sum of N terms, one after the other, rounds about sqrt(N) / 2 times as far as one addition; into how many parts
    # PyTorch splits its own depends on the CPU.
    slack = 0.5 * N**0.5 * torch.finfo(torch.float32).eps
    assert_within("out", out, truth, yard, torch.float32, slack)
    for n in NAMES:
        assert_within(n, getattr(aux, n), getattr(true_aux, n), getattr(yard_aux, n), torch.float32, slack)
    for n in grads:
        assert_within(n, grads[n], true_grads[n], yard_grads[n], torch.float32, slack)


@pytest.mark.parametrize("device,backend", DEVICE_BACKENDS)
def test_row_without_key(device, backend):
    case = AttentionCase(2, 2, 9, 16, mask="all", sizes=3, gate="HD")
    inputs = case.inputs(torch.float32, device=device)
    out, aux, grads = run(inputs, backend, torch.ones(2, 2, 9, 16, device=device))
    assert (out[0] == 0).all() and (aux.entropy[0] == 0).all() and (aux.lse[0] == -torch.inf).all()
    assert (aux.cls_attention[0] == 0).all() and (aux.received[0] == 0).all() and (aux.to_cls[0] == 0).all()
    assert all(g.isfinite().all() for g in grads.values())
    assert all((grads[n][0] == 0).all() for n in ("q", "k", "v"))
    assert all(t.isfinite().all() for t in aux[1:])


@pytest.mark.parametrize("device,backend", DEVICE_BACKENDS)
def test_empty_batch(device, backend):
    case = AttentionCase(0, 2, 5, 8, mask="some", sizes=2, gate="D")
    out, aux, grads = run(case.inputs(torch.float32, device=device), backend, torch.ones(0, 2, 5, 8, device=device))
    assert out.shape == (0, 2, 5, 8) and aux.lse.shape == (0, 2, 5)
    assert grads["q"].shape == (0, 2, 5, 8) and (grads["channel_gate"] == 0).all()


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("packed", [False, True], ids=["views", "packed"])
def test_a_last_axis_with_a_stride(batch, packed):
    x = torch.randn(8, 2, 3, 5, batch).permute(4, 3, 2, 1, 0)  # [B, N, 3, H, D]
    views = x.permute(2, 0, 3, 1, 4).unbind(0)
    out = packed_attention(x) if packed else p3b_ext.masked_attention(*views)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*views))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nan_in_a_query_shows_in_every_answer_about_it(backend):
    q, k, v = torch.randn(3, 1, 2, 5, 8).unbind(0)
    q[0, 1, 2, 3] = torch.nan
    with p3b_ext.backend(backend):
        out, aux = p3b_ext.masked_attention(q, k, v, aux=("lse", "entropy", "to_cls", "received"))
    bad = torch.zeros(1, 2, 5, dtype=torch.bool)
    bad[0, 1, 2] = True
    assert torch.equal(out.isnan().all(-1), bad)
    assert all(torch.equal(x.isnan(), bad) for x in (aux.lse, aux.entropy, aux.to_cls))
    assert torch.equal(aux.received.isnan(), torch.tensor([False, True])[None, :, None].expand(1, 2, 5))


def test_out_is_a_view_that_projects_without_a_copy():
    q = torch.randn(2, 3, 17, 8)
    out = p3b_ext.masked_attention(q, q, q)
    flat = out.transpose(1, 2).reshape(2, 17, 24)
    assert flat.data_ptr() == out.data_ptr()


def test_aux_holds_only_what_was_asked_for():
    q = torch.randn(1, 1, 4, 8)
    _, aux = p3b_ext.masked_attention(q, q, q, aux=("entropy",))
    assert aux.entropy is not None
    assert all(getattr(aux, n) is None for n in NAMES if n != "entropy")


def test_aux_is_not_differentiable():
    q = torch.randn(1, 2, 4, 8, requires_grad=True)
    out, aux = p3b_ext.masked_attention(q, q, q, aux=NAMES)
    assert out.requires_grad and not any(t.requires_grad for t in aux)


@pytest.mark.parametrize("case", [*ATTENTION[:5], AttentionCase(1, 2, 7, 16, mask="all")], ids=str)
def test_packed_equals_views(case):
    """packed_attention: same output; its gradient is that of the three views in one buffer."""
    inputs = case.inputs(torch.float32)
    stack = torch.stack([inputs[n].transpose(1, 2) for n in "qkv"], 2)
    rest = {n: inputs[n] for n in ("key_mask", "token_size", "channel_gate")}
    grad_out = torch.randn_like(inputs["q"])
    out, _, grads = run(inputs, "cpu", grad_out)
    qkv = stack.requires_grad_()
    packed, aux = packed_attention(qkv, **rest, aux=("lse", "received"))
    (grad,) = torch.autograd.grad(packed, qkv, grad_out)
    assert torch.equal(packed, out)
    for i, n in enumerate("qkv"):
        assert torch.equal(grad[:, :, i].transpose(1, 2), grads[n]), n
    assert aux.lse is not None and aux.received is not None


THREADED = [
    AttentionCase(3, 2, 67, 40, mask="some", sizes=5, gate="HD"),
    AttentionCase(1, 1, 301, 24, sizes=5, gate="D"),  # one head, whose rows are shared out in both directions
]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("case", THREADED, ids=str)
def test_bitwise_equal_for_every_thread_count(case, threads, dtype):
    inputs, grad_out = case.inputs(dtype), torch.randn(case.B, case.H, case.N, case.D, dtype=dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        out, aux, grads = run(inputs, "cpu", grad_out)
        torch.set_num_threads(threads)
        for _ in range(3):
            again, aux_again, grads_again = run(inputs, "cpu", grad_out)
            assert torch.equal(out, again)
            assert all(torch.equal(a, b) for a, b in zip(aux, aux_again, strict=True))
            assert all(torch.equal(grads[n], grads_again[n]) for n in grads)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", p3b_ext.backends._C.isa_available())
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_every_instruction_set(isa, dtype):
    """Each path that this machine can run is forced once; the paths differ by rounding only."""
    case = AttentionCase(2, 2, 83, 24, mask="some", sizes=5, gate="HD")
    inputs, grad_out = case.inputs(dtype), torch.randn(2, 2, 83, 24, dtype=torch.float64)
    truth, _, truth_grads = run(float64(inputs), "reference", grad_out)
    yard, _, yard_grads = eager(inputs, grad_out.to(dtype))
    p3b_ext.backends._C.set_isa(isa)
    try:
        assert p3b_ext.build_info()["cpu_isa"] == isa
        out, _, grads = run(inputs, "cpu", grad_out.to(dtype))
    finally:
        p3b_ext.backends._C.set_isa("auto")
    assert_within("out", out, truth, yard, dtype)
    for n in grads:
        assert_within(n, grads[n], truth_grads[n], yard_grads[n], dtype)


def test_unknown_instruction_set():
    with pytest.raises(ValueError, match="set_isa: name must be one of auto, portable"):
        p3b_ext.backends._C.set_isa("mmx")


# Gradients and registration -----------------------------------------------------------------------------------------

SMALL = [
    AttentionCase(1, 2, 5, 3),
    AttentionCase(2, 1, 4, 2, mask="all", sizes=3, gate="D"),
    AttentionCase(2, 2, 3, 4, "contiguous", mask="some", sizes=2, gate="HD"),
]


def flat_args(inputs: dict) -> tuple:
    return tuple(inputs[n] for n in ("q", "k", "v", "key_mask", "token_size", "channel_gate"))


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradcheck(case, backend):
    inputs = leaves(case.inputs(torch.float64))

    def f(q, k, v, key_mask, token_size, channel_gate):
        return p3b_ext.masked_attention(
            q, k, v, key_mask=key_mask, token_size=token_size, channel_gate=channel_gate, scale=0.7
        )

    with p3b_ext.backend(backend):
        assert torch.autograd.gradcheck(f, flat_args(inputs), fast_mode=False)


def test_second_derivatives():
    q = torch.randn(1, 1, 4, 2, dtype=torch.float64, requires_grad=True)
    with p3b_ext.backend("cpu"), pytest.raises(NotImplementedError, match=r'p3b_ext.backend\("reference"\)'):
        (grad,) = torch.autograd.grad(p3b_ext.masked_attention(q, q, q).sum(), q, create_graph=True)
        grad.sum().backward()
    with p3b_ext.backend("reference"):
        assert torch.autograd.gradgradcheck(lambda t: p3b_ext.masked_attention(t, t, t), (q,))


class Asked(TorchDispatchMode):
    """What the backward op was asked for."""

    def __init__(self):
        super().__init__()
        self.which = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.p3b_ext.masked_attention_backward.default:
            self.which.append(args[-1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", sorted({device for device, _ in DEVICE_BACKENDS}))
def test_gradients_that_nobody_wants_are_not_computed(device):
    inputs = leaves(AttentionCase(2, 3, 7, 8, mask="some", sizes=3, gate="HD").inputs(torch.float32, device=device))
    args = [None if t is None else t.detach() for t in flat_args(inputs)]
    out, lse, *_ = torch.ops.p3b_ext.masked_attention(*args, 0.3, 0)
    op, grad = torch.ops.p3b_ext.masked_attention_backward, torch.randn_like(out)
    everything = op(grad, *args[:3], out, lse, *args[3:], 0.3, 3)
    for which in range(3):
        grads = op(grad, *args[:3], out, lse, *args[3:], 0.3, which)
        for found, want, wanted in zip(grads, everything, (True, which & 1, which & 2), strict=True):
            assert torch.equal(found, want) if wanted else found.shape == (0,)
    names = ("token_size", "channel_gate")
    for which in range(4):
        for number, key in enumerate(names):
            inputs[key] = inputs[key].detach().requires_grad_(bool(which & 1 << number))
        with Asked() as asked, p3b_ext.backend(device):
            p3b_ext.masked_attention(**inputs, scale=0.3).sum().backward()
        assert asked.which == [which]
        for number, key in enumerate(names):
            assert (inputs[key].grad is not None) == bool(which & 1 << number)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_opcheck(case, dtype):
    inputs = leaves(case.inputs(dtype))
    args = (*flat_args(inputs), 0.3, 7)
    torch.library.opcheck(torch.ops.p3b_ext.masked_attention, args)
    with torch.no_grad():
        out, lse, *_ = torch.ops.p3b_ext.masked_attention(*args)
        plain = [t.detach() if t is not None else None for t in flat_args(inputs)]
        backward = (torch.randn_like(out), *plain[:3], out, lse, *plain[3:], 0.3, 3)
        torch.library.opcheck(torch.ops.p3b_ext.masked_attention_backward, backward)
        torch.library.opcheck(torch.ops.p3b_ext.attention_columns, (*plain[:2], lse, *plain[3:], 0.3, 3))
    qkv = torch.stack([inputs[n].detach().transpose(1, 2) for n in "qkv"], 2).requires_grad_()
    torch.library.opcheck(torch.ops.p3b_ext.masked_attention_packed, (qkv, *args[3:]))


# Compile, export, autocast, checkpointing -----------------------------------------------------------------------------


class Probe(torch.nn.Module):
    def __init__(self, packed: bool):
        super().__init__()
        self.qkv, self.packed = torch.nn.Linear(16, 48), packed

    def forward(self, x, size):
        qkv = self.qkv(x).unflatten(-1, (3, 2, 8))
        if self.packed:
            out, aux = packed_attention(qkv, token_size=size, aux=("entropy", "received"))
        else:
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            out, aux = p3b_ext.masked_attention(q, k, v, token_size=size, aux=("entropy", "received"))
        return out.transpose(1, 2).flatten(2), aux.entropy, aux.received


@pytest.mark.parametrize("packed", [False, True], ids=["views", "packed"])
def test_compile_fullgraph(packed):
    torch._dynamo.reset()
    model, x, size = Probe(packed), torch.randn(2, 9, 16), torch.rand(2, 9) + 1
    expected = model(x, size)
    expected[0].square().sum().backward()
    grad = model.qkv.weight.grad.clone()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    result = compiled(x, size)
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b)
    model.qkv.weight.grad = None
    compiled._orig_mod.zero_grad()
    result[0].square().sum().backward()
    torch.testing.assert_close(compiled._orig_mod.qkv.weight.grad, grad)


@pytest.mark.slow
def test_inductor():
    torch._dynamo.reset()
    model, x, size = Probe(True), torch.randn(2, 9, 16), torch.rand(2, 9) + 1
    with torch.no_grad():
        for a, b in zip(torch.compile(model, fullgraph=True)(x, size), model(x, size), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("packed", [False, True], ids=["views", "packed"])
def test_export(packed):
    model, x, size = Probe(packed).eval(), torch.randn(2, 9, 16), torch.rand(2, 9) + 1
    batch, tokens = torch.export.Dim("B", min=1, max=64), torch.export.Dim("N", min=2, max=4096)
    program = torch.export.export(model, (x, size), dynamic_shapes=({0: batch, 1: tokens}, {0: batch, 1: tokens}))
    for shape in ((2, 9), (5, 17)):
        x, size = torch.randn(*shape, 16), torch.rand(*shape) + 1
        for a, b in zip(program.module()(x, size), model(x, size), strict=True):
            torch.testing.assert_close(a, b)


def test_compile_with_dynamic_shapes():
    torch._dynamo.reset()
    model = Probe(True)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, dynamic=True, backend="aot_eager")
    for B, N in ((2, 9), (3, 9), (3, 17)):
        x, size = torch.randn(B, N, 16), torch.rand(B, N) + 1
        for m in (model, compiled):
            m.zero_grad()
            m(x, size)[0].square().sum().backward()
        torch.testing.assert_close(compiled._orig_mod.qkv.weight.grad, model.qkv.weight.grad)


def test_autocast_and_inference_mode():
    q = torch.randn(2, 2, 17, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert p3b_ext.masked_attention(q, q, q).dtype == torch.bfloat16
    with torch.inference_mode():
        out, aux = p3b_ext.masked_attention(q, q, q, aux=NAMES)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, q, q))
    assert all(t.isfinite().all() for t in aux)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name)
@pytest.mark.parametrize("packed", [False, True], ids=["views", "packed"])
def test_training_under_autocast(packed, dtype):
    """Half-precision products, gradients in the parameters' own float32, those of sizes and gates too."""
    model, x = Probe(packed), torch.randn(2, 9, 16)
    size = (torch.rand(2, 9) + 1).requires_grad_()
    with torch.autocast("cpu", dtype):
        out = model(x, size)[0]
    out.float().square().sum().backward()
    half = model.qkv.weight.grad.clone(), size.grad.clone()
    assert out.dtype == dtype and all(g.dtype == torch.float32 for g in half)
    model.zero_grad()
    size.grad = None
    model(x, size)[0].square().sum().backward()
    for a, b in zip(half, (model.qkv.weight.grad, size.grad), strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02 * b.abs().max().item())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("packed", [False, True], ids=["views", "packed"])
def test_activation_checkpointing(packed, reentrant):
    model, x, size = Probe(packed), torch.randn(2, 9, 16), torch.rand(2, 9) + 1
    model(x, size)[0].sum().backward()
    grad = model.qkv.weight.grad.clone()
    model.zero_grad()
    checkpoint(lambda t: model(t, size)[0], x.requires_grad_(), use_reentrant=reentrant).sum().backward()
    assert torch.equal(grad, model.qkv.weight.grad)


# Drop-in scaled_dot_product_attention ---------------------------------------------------------------------------------


def _masks(B, H, N):
    keys = torch.rand(B, 1, 1, N) < 0.7
    keys[..., 0] = True
    return {
        "none": None,
        "keys": keys,
        "keys_2d": keys[0, 0],
        "one_image": keys[:1],
        "full": (torch.rand(B, H, N, N) < 0.7) | torch.eye(N, dtype=torch.bool),
        "float": torch.randn(B, 1, N, N),
        "float_keys": torch.randn(B, 1, 1, N),
    }


@pytest.mark.parametrize("mask", list(_masks(1, 1, 2)))
def test_sdpa_equals_torch(mask):
    q, k, v = torch.randn(3, 2, 3, 19, 16).unbind(0)
    attn_mask = _masks(2, 3, 19)[mask]
    ours = p3b_ext.scaled_dot_product_attention(q, k, v, attn_mask, scale=0.2)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, attn_mask, scale=0.2))


def test_sdpa_hands_over_what_it_cannot_fuse():
    q, k, v = torch.randn(3, 2, 4, 7, 16).unbind(0)
    calls = [
        dict(query=q, key=k, value=v, is_causal=True),
        dict(query=q[:, :, :3], key=k, value=v),
        dict(query=q, key=k[:, :2], value=v[:, :2], enable_gqa=True),
        dict(query=q[0], key=k[0], value=v[0]),
        dict(query=q, key=k, value=v[..., :5]),
        dict(query=q, key=k, value=v, scale=float("inf")),
    ]
    for call in calls:
        torch.testing.assert_close(
            p3b_ext.scaled_dot_product_attention(**call), F.scaled_dot_product_attention(**call), equal_nan=True
        )
    with pytest.raises(RuntimeError, match="dropout"):
        p3b_ext.scaled_dot_product_attention(q, k, v, dropout_p=-0.5)
    torch.manual_seed(3)
    ours = p3b_ext.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(ours, F.scaled_dot_product_attention(q, k, v, dropout_p=0.5))


def test_sdpa_hands_over_unusual_tensors():
    q, scale = torch.randn(2, 4, 7, 16), torch.tensor(0.3)
    expected = F.scaled_dot_product_attention(q, q, q, scale=0.3)
    torch.testing.assert_close(p3b_ext.scaled_dot_product_attention(q, q, q, scale=scale), expected)
    nested = torch.nested.nested_tensor([torch.randn(n, 4, 16) for n in (3, 7)], layout=torch.jagged).transpose(1, 2)
    ours = p3b_ext.scaled_dot_product_attention(nested, nested, nested)
    torch.testing.assert_close(ours.values(), F.scaled_dot_product_attention(nested, nested, nested).values())


@pytest.mark.parametrize("device,backend", DEVICE_BACKENDS)
def test_masked_keys_are_never_read(device, backend):
    """NaN in a masked key, its value or both reaches neither the output nor another token's gradient."""
    q, k, v = torch.randn(3, 2, 3, 5, 8, device=device).unbind(0)
    mask = torch.ones(2, 5, dtype=torch.bool, device=device)
    mask[:, 3] = False
    gate = torch.rand(8, device=device)

    def run(k, v):
        inputs = [t.detach().clone().requires_grad_() for t in (q, k, v, gate)]
        with p3b_ext.backend(backend):
            out = p3b_ext.masked_attention(*inputs[:3], key_mask=mask, channel_gate=inputs[3])
            return out, torch.autograd.grad(out.square().sum(), inputs)

    out, grads = run(k, v)
    bad_k, bad_v = k.clone(), v.clone()
    bad_k[:, :, 3], bad_v[:, :, 3] = torch.nan, torch.nan
    bad_out, bad_grads = run(bad_k, bad_v)
    torch.testing.assert_close(bad_out, out)
    torch.testing.assert_close(bad_grads, grads)


# Errors ---------------------------------------------------------------------------------------------------------------

Q = torch.randn(2, 3, 5, 8)
BAD = [
    (dict(q=None), TypeError, r"masked_attention: q must be a tensor \[B H N D\], got NoneType"),
    (dict(q=Q[0]), ValueError, r"q must be \[B, H, N, D\], got shape \[3, 5, 8\]"),
    (dict(q=Q.long()), TypeError, "q must be float32, bfloat16, float16 or float64, got torch.int64"),
    (dict(k=Q[:, :, :4]), ValueError, r"k must have shape \[2, 3, 5, 8\], got \[2, 3, 4, 8\]"),
    (dict(v=Q.double()), TypeError, "v must have q's dtype torch.float32, got torch.float64"),
    (dict(v=Q.to("meta")), ValueError, "v must be on cpu, got meta"),
    (dict(q=Q[:, :, :0], k=Q[:, :, :0], v=Q[:, :, :0]), ValueError, "at least one head, token and channel"),
    (dict(key_mask=torch.ones(2, 5)), TypeError, "key_mask must have dtype torch.bool, got torch.float32"),
    (dict(key_mask=torch.ones(2, 4, dtype=torch.bool)), ValueError, r"key_mask must have shape \[2, 5\], got \[2, 4\]"),
    (dict(token_size=torch.ones(2, 5, dtype=torch.int64)), TypeError, "token_size must be float32"),
    (dict(token_size=torch.ones(5)), ValueError, r"token_size must be \[B, N\], got shape \[5\]"),
    (dict(token_size=torch.zeros(2, 5)), ValueError, "token_size must be > 0"),
    (dict(token_size=torch.full((2, 5), torch.nan)), ValueError, "token_size must be > 0"),
    (dict(token_size=torch.full((2, 5), torch.inf)), ValueError, "token_size must be > 0 and finite"),
    (dict(q=Q.to_sparse()), TypeError, r"masked_attention: q must be a dense tensor, got torch.sparse_coo; convert"),
    (dict(key_mask=torch.ones(2, 5).bool().to_sparse()), TypeError, "key_mask must be a dense tensor"),
    (dict(aux=[["lse"]]), TypeError, "aux must be a sequence of names, got list in it"),
    (dict(aux=3), TypeError, "aux must be a sequence of names, got int"),
    (dict(channel_gate=torch.ones(3)), ValueError, r"channel_gate must be \[8\] or \[3, 8\], got shape \[3\]"),
    (dict(channel_gate=[1.0] * 8), TypeError, "channel_gate must be a floating-point tensor, got list"),
    (dict(scale="1"), TypeError, "scale must be a number, got str"),
    (dict(scale=float("nan")), ValueError, "scale must be finite, got nan"),
    (dict(aux=("lse", "rows")), ValueError, "aux must be names out of lse, .*, got 'rows'"),
    (dict(aux="lse"), TypeError, r"aux must be a sequence of names, got the string 'lse'; write \('lse',\)"),
]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("change,error,text", BAD, ids=[b[2][:40] for b in BAD])
def test_bad_input(change, error, text, backend):
    arguments = dict(q=Q, k=Q, v=Q) | change
    with p3b_ext.backend(backend), pytest.raises(error, match=text):
        p3b_ext.masked_attention(**arguments)


@pytest.mark.parametrize("change,error,text", BAD, ids=[b[2][:40] for b in BAD])
def test_bad_input_under_compile(change, error, text):
    """The same sentence reaches a user of torch.compile, from the tracer or from the op."""
    torch._dynamo.reset()
    arguments = dict(q=Q, k=Q, v=Q) | change
    compiled = torch.compile(lambda **kw: p3b_ext.masked_attention(**kw), backend="eager")
    with pytest.raises(Exception, match=text):
        compiled(**arguments)


def test_raw_op_checks_what_it_reads():
    """Wrong shapes never reach memory, also not through torch.ops."""
    args = [Q, Q, Q, None, None, None, 1.0, 0]
    for at, bad in (
        (1, Q[:1]),
        (2, Q.double()),
        (3, torch.ones(2, 4, dtype=torch.bool)),
        (4, torch.ones(2, 5).double()),
    ):
        call = list(args)
        call[at] = bad
        with pytest.raises((RuntimeError, ValueError), match=r"masked_attention: .* must"):
            torch.ops.p3b_ext.masked_attention(*call)
    qkv = torch.ones(2, 5, 3, 2, 8)
    for bad in (qkv[0], qkv[:, :, :2], qkv.int(), qkv.mT, qkv[:, :, :, :0]):
        with pytest.raises((RuntimeError, ValueError), match=r"masked_attention: qkv must"):
            torch.ops.p3b_ext.masked_attention_packed(bad, *args[3:])


def test_backend_errors():
    with pytest.raises(ValueError, match=r"backend: name must be one of cpu, cuda, .*, got 'gpu'"):
        with p3b_ext.backend("gpu"):
            pass
    if not torch.cuda.is_available():
        with p3b_ext.backend("cuda"), pytest.raises(NotImplementedError, match="backend 'cuda' cannot run this call"):
            p3b_ext.masked_attention(Q, Q, Q)


def test_forced_backends_nest():
    seen = []
    for outer, inner in itertools.product(("cpu", "reference"), repeat=2):
        with p3b_ext.backend(outer):
            with p3b_ext.backend(inner):
                seen.append(p3b_ext.backends.choose("x", Q, "attention"))
            seen.append(p3b_ext.backends.choose("x", Q, "attention"))
    assert seen == ["cpu", "cpu", "reference", "cpu", "cpu", "reference", "reference", "reference"]
    assert p3b_ext.backends.choose("x", Q, "attention") == "cpu"


def test_forced_backends_end_in_any_order():
    """As those of two threads may."""
    first, second = p3b_ext.backend("cpu"), p3b_ext.backend("reference")
    for context in (first, second):
        context.__enter__()
    first.__exit__(None, None, None)
    assert p3b_ext.backends.choose("x", Q, "attention") == "reference"
    second.__exit__(None, None, None)
    assert "forced" not in p3b_ext.build_info()


def test_backend_inside_a_compiled_function():
    def attention(q):
        with p3b_ext.backend("reference"), p3b_ext.backend("cpu"):
            out = p3b_ext.masked_attention(q, q, q)
        with p3b_ext.backend("reference"):
            return out, p3b_ext.masked_attention(q, q, q)

    got = torch.compile(attention, fullgraph=True, backend="aot_eager")(Q)
    torch.testing.assert_close(got, attention(Q))
    assert "forced" not in p3b_ext.build_info()


def test_reference_states_the_formula():
    """The oracle itself, against a direct transcription on one small case."""
    inputs = AttentionCase(1, 2, 4, 3, sizes=4, gate="HD").inputs(torch.float64)
    q, k, v = (inputs[n] * inputs["channel_gate"][None, :, None] for n in "qkv")
    p = (torch.einsum("bhid,bhjd->bhij", q, k) * 0.5).exp() * inputs["token_size"][:, None, None]
    z = p.sum(-1, keepdim=True)
    p = p / z
    out, lse, cls, entropy, norm = reference.masked_attention(*flat_args(inputs), 0.5, 7)
    torch.testing.assert_close(out, torch.einsum("bhij,bhjd->bihd", p, v))
    torch.testing.assert_close(lse, z.squeeze(-1).log())
    torch.testing.assert_close(cls, p[:, :, 0])
    torch.testing.assert_close(entropy, -(p * p.log()).sum(-1))
    torch.testing.assert_close(norm, v.transpose(1, 2).flatten(2).norm(dim=-1))


@pytest.mark.skipif(backends.UNAVAILABLE["cpu"] != "", reason="the extension is not built")
def test_usual_calls_take_the_quick_way(monkeypatch):
    """Nothing else would notice if they did not: the longer way gives the same."""
    monkeypatch.setattr(attention, "_check", lambda *args: pytest.fail("the longer way"))
    qkv = torch.randn(2, 5, 3, 2, 8)
    more = {"key_mask": torch.ones(2, 5) > 0, "token_size": torch.ones(2, 5), "channel_gate": torch.ones(2, 8)}
    for options in ({}, more, {"scale": 0.3}, {"aux": ["entropy", "lse"]}, more | {"aux": ("value_norm",)}):
        for wanted in (False, True):
            packed = qkv.clone().requires_grad_(wanted)
            results = [p3b_ext.masked_attention(*packed.permute(2, 0, 3, 1, 4), **options)]
            results.append(packed_attention(packed, **options))
            for found in results:
                assert (found[0] if "aux" in options else found).requires_grad is wanted
                if "aux" in options:
                    assert {name for name, x in found[1]._asdict().items() if x is not None} == set(options["aux"])
    with pytest.raises(pytest.fail.Exception, match="the longer way"):
        p3b_ext.masked_attention(*qkv.permute(2, 0, 3, 1, 4), aux=("received",))


def test_checkpointing_where_attention_saves_last():
    """torch ends the second forward of a checkpoint by an exception, which is nobody's but its own."""
    q = torch.randn(2, 2, 5, 8, requires_grad=True)
    (expected,) = torch.autograd.grad(p3b_ext.masked_attention(q, q, q).square().sum(), q)
    out = checkpoint(p3b_ext.masked_attention, q, q, q, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(out.square().sum(), q)[0], expected)
    nested = checkpoint(
        lambda x: checkpoint(p3b_ext.masked_attention, x, x, x, use_reentrant=False), q, use_reentrant=False
    )
    assert torch.equal(torch.autograd.grad(nested.square().sum(), q)[0], expected)


def test_errors_of_saved_tensor_hooks_pass():
    def refuse(tensor):
        calls.append(tensor)
        raise RuntimeError("no room")

    calls = []
    q = torch.randn(2, 2, 5, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(refuse, lambda x: x), pytest.raises(RuntimeError, match="no room"):
        p3b_ext.masked_attention(q, q, q)
    assert len(calls) == 1


@pytest.mark.parametrize("which", ["k", "v", "key_mask", "token_size", "channel_gate"])
def test_a_meta_tensor_beside_others_is_refused(which):
    q = torch.randn(2, 2, 5, 8)
    inputs = {"k": q, "v": q, "key_mask": torch.ones(2, 5) > 0, "token_size": torch.ones(2, 5)}
    inputs |= {"channel_gate": torch.ones(8)}
    inputs[which] = inputs[which].to("meta")
    with pytest.raises(ValueError, match=f"{which} must be on cpu, got meta"):
        p3b_ext.masked_attention(q, **inputs)


def test_tracers_see_the_copy_that_strides_need():
    q = torch.randn(2, 2, 8, 5).transpose(2, 3)
    expected = p3b_ext.masked_attention(q, q, q)
    for mode in ("real", "fake", "symbolic"):
        traced = make_fx(lambda x: p3b_ext.masked_attention(x, x, x), tracing_mode=mode)(q)
        assert torch.equal(traced(q), expected)
        assert torch.equal(
            make_fx(torch.func.functionalize(lambda x: p3b_ext.masked_attention(x, x, x)))(q)(q), expected
        )
    with FakeTensorMode() as mode, pytest.raises(ValueError, match="k must have shape"):
        fake = mode.from_tensor(q)
        p3b_ext.masked_attention(fake, fake[:, :, :3], fake)


def test_functionalize_and_trace_with_gradients():
    q = torch.randn(2, 2, 5, 8, requires_grad=True)
    expected = p3b_ext.masked_attention(q, q, q)
    assert torch.equal(torch.func.functionalize(lambda x: p3b_ext.masked_attention(x, x, x))(q), expected)
    traced = torch.jit.trace(lambda x: p3b_ext.masked_attention(x, x, x), (q,))
    assert torch.equal(traced(q), expected)


def test_arguments_that_are_no_tensors_under_autocast():
    q = torch.randn(2, 2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="k must be a tensor"):
        p3b_ext.masked_attention(q, q.tolist(), q)
    for aux in ({"lse"}, iter(["lse"])):
        with pytest.raises(TypeError, match="aux must be a sequence of names"):
            p3b_ext.masked_attention(q, q, q, aux=aux)
