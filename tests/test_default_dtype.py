"""The library's own tensors do not depend on PyTorch's default dtype and device."""

import ast
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import p3b
import p3b_ext

ROOT = Path(__file__).parents[next(i for i, p in enumerate(Path(__file__).parents) if (p / "setup.py").exists())]
FACTORIES = {"arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm"}
FACTORIES |= {"tensor", "zeros"}


def calls_without(source):
    """Lines of calls of torch's factory functions that name no dtype or no device."""
    for node in ast.walk(ast.parse(source.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if ast.unparse(node.func.value) != "torch" or node.func.attr not in FACTORIES:
            continue
        named = {keyword.arg for keyword in node.keywords}
        if not {"dtype", "device"} <= named and None not in named:  # None: **options
            yield f"{source.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}"


def test_every_tensor_names_its_dtype_and_device():
    sources = [path for folder in ("p3b_ext", "python/p3b") for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 80 and not [call for source in sources for call in calls_without(source)]


def vit(**options):
    torch.manual_seed(0)
    size = dict(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=3)
    return VisionTransformer(**(size | options)).eval()


@pytest.fixture(params=["float64", "bfloat16"])
def default_dtype(request):
    before = torch.get_default_dtype()
    model, x = vit(), torch.randn(4, 3, 16, 16)
    y = torch.arange(4) % 3
    torch.set_default_dtype(getattr(torch, request.param))
    yield model, x, y
    torch.set_default_dtype(before)


@pytest.mark.parametrize("linear", ["auto", "onednn", "torch"])
def test_patched_models_compute_what_they_did(default_dtype, linear):
    model, x, _ = default_dtype
    expected = model(x)
    torch.testing.assert_close(p3b_ext.patch(model, linear=linear)(x), expected, rtol=1e-4, atol=1e-5)
    for reduction in (p3b_ext.ToMe(1), p3b_ext.PPT(1, blocks=[1]), p3b_ext.EViT(0.5, blocks=[1])):
        assert p3b_ext.patch(model, reduction, linear=linear)(x).dtype == torch.float32


def test_the_choice_of_linear_is_made_by_float32():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        p3b_ext.linear.prefer_onednn.__wrapped__()
    finally:
        torch.set_default_dtype(before)


@pytest.mark.filterwarnings("ignore:importance")
@pytest.mark.parametrize("method", ["p3b", "p3b+", "random", "taylor", "isomorphic", "savit", "wdpruning", "vtp"])
@pytest.mark.parametrize("probe", ["pointwise", "conv"])
def test_methods_prune(default_dtype, method, probe):
    if probe == "conv" and not method.startswith("p3b"):
        pytest.skip("has no probes")
    model, x, y = default_dtype
    config = p3b.Config(method=method, start_epoch=0, sparse_epoch=1, final_epoch=2, finetune_epochs=1, device="cpu")
    config.patch_probe = probe
    result = p3b.prune(model, [(x, y)] * 2, [(x, y)], config)
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}


def test_a_default_device_does_not_reach_patch():
    model, x = vit(), torch.randn(2, 3, 16, 16)
    expected = model(x)
    torch.set_default_device("meta")
    try:
        torch.testing.assert_close(p3b_ext.patch(model)(x), expected, rtol=1e-4, atol=1e-5)
        gates = p3b.gates.attach(model)
        gates.update(torch.full((4,), 0.5, device="cpu"), 0.0, scales=p3b.Config().gate_scales)
        p3b.shrink(model)
        assert model(x).device.type == "cpu"
    finally:
        torch.set_default_device(None)
