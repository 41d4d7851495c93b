"""torch.fx, feature extractors and torch.jit.trace on pruned, patched and reduced models."""

import pytest
import torch
from cases import assert_near
from timm.layers import create_feature_extractor as timms
from timm.models.vision_transformer import VisionTransformer
from torchvision.models.feature_extraction import create_feature_extractor as torchvisions

import p3b
import p3b_ext

pytestmark = pytest.mark.filterwarnings("ignore")


def vit(**options):
    torch.manual_seed(0)
    size = dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=3)
    return VisionTransformer(**(size | options)).eval()


def images(batch=2):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def pruned(emptied, **options):
    """A pruned model that is not patched; emptied: "attn" or "mlp" of the second block has nothing left."""
    model = vit(**options)
    gates = p3b.gates.attach(model)
    gates.values[::3] = 0
    for block in gates.blocks:
        if block.name == f"blocks.1.{emptied}":
            gates.values[block.slices()[2]] = 0
    return p3b.shrink(model)


@pytest.mark.parametrize("options", [{}, {"init_values": 0.1}, {"qk_norm": True}, {"scale_attn_norm": True}], ids=str)
@pytest.mark.parametrize("emptied", ["", "attn", "mlp"])
def test_a_pruned_model_is_an_ordinary_module(emptied, options):
    model, x = pruned(emptied, **options), images()
    stages = {
        f"blocks.{i}": stage for i, stage in enumerate(model.get_intermediate_layers(x, n=3, return_prefix_tokens=True))
    }
    for extractor in (timms, torchvisions):
        found = extractor(model, list(stages))(x)
        for name, (patches, prefix) in stages.items():
            torch.testing.assert_close(found[name], torch.cat((prefix, patches), 1))
    with torch.no_grad():
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))
        torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))


def test_timms_extractor_keeps_the_attention_of_a_patched_model():
    model, x = p3b_ext.patch(vit()), images()
    extractor = timms(model, ["blocks.1", "norm"])
    assert {"blocks.0.attn", "blocks.1.attn"} <= {str(node.target) for node in extractor.graph.nodes}
    with torch.no_grad():
        assert torch.equal(extractor(x)["norm"], model.forward_features(x))


@pytest.mark.parametrize(
    "reduction",
    [None, p3b_ext.ToMe(3), p3b_ext.TopK(0.5, [1]), p3b_ext.EViT(0.5, [1]), p3b_ext.PPT(3, [1])],
    ids=lambda reduction: type(reduction).__name__,
)
def test_jit_trace_of_fixed_shapes(reduction):
    model, x = p3b_ext.patch(vit(), reduction), images()
    with torch.no_grad():
        traced = torch.jit.trace(model, x, check_trace=False)
        torch.testing.assert_close(traced(images()), model(x))


def test_attention_maps_are_to_be_had():
    """Hooks on attn_drop see the maps where the docstring of p3b_ext.Attention says."""
    model, x, seen = p3b_ext.patch(vit()), images(), []
    expected = model(x)
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(x)
    assert not seen
    with p3b_ext.backend("reference"):
        assert_near(model(x), expected)
    assert [tuple(each.shape) for each in seen] == [(2, 2, 17, 17)] * 3
