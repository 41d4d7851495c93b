"""patch / unpatch on every family of timm's VisionTransformer: logits, state, copies, compilation, export, errors."""

import copy
import importlib
import pickle
import threading

import pytest
import timm
import torch
import vits
from cases import assert_near, assert_same_to_rounding, in_float64
from timm.models.vision_transformer import Block, DiffParallelScalingBlock, ParallelScalingBlock, ParallelThingsBlock
from torch import nn
from vits import FAMILIES, family, images, vit

import p3b_ext
import p3b_ext.linear
from p3b_ext.linear import OneDnnLinear, linear
from p3b_ext.modules import Attention
from p3b_ext.patch import patch, token_map, unpatch
from p3b_ext.reduction import PPT, EViT, ToMe, TopK

REDUCTIONS = {
    "tome": ToMe(9),
    "tome_plain": ToMe((9, -0.5), proportional=False),
    "ppt": PPT(r=12, blocks=(1, 3), threshold=2e-4, score="received"),
    "topk": TopK(0.6, blocks=(0, 2), score="entropy_value"),
    "evit": EViT(0.6, blocks=(1, 2)),
}


@pytest.fixture(autouse=True)
def forget_compilations():
    """Every model here runs through the same timm code; dynamo gives up after eight versions of it."""
    yield
    torch._dynamo.reset()


def usable(reduction, model) -> bool:
    return model.has_class_token or not isinstance(reduction, EViT)


@pytest.mark.parametrize("name", FAMILIES)
def test_dense_patch_keeps_the_logits(name):
    model, x = family(name), images()
    with torch.no_grad():
        before, features, keys = model(x), model.forward_features(x), list(model.state_dict())
        exact = copy.deepcopy(model).double()
        truth, true_features = exact(x.double()), exact.forward_features(x.double())
        assert patch(model) is model
        assert any(isinstance(m, Attention) for m in model.modules())
        assert_same_to_rounding(model(x), before, truth)
        assert_same_to_rounding(model.forward_features(x), features, true_features)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("reduction", REDUCTIONS.values(), ids=REDUCTIONS)
def test_unpatch_is_bit_for_bit(name, reduction):
    model, x = family(name), images()
    if not usable(reduction, model):
        with pytest.raises(
            ValueError, match=r"EViT: score must be one of .* for a model without class token, got 'cls'"
        ):
            patch(model, reduction)
        return
    classes = {key: (type(m), set(m.__dict__)) for key, m in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        before = model(x)
        reduced = patch(model, reduction, trace=True)(x)
        assert reduced.shape == before.shape and reduced.isfinite().all()
        assert not torch.allclose(reduced, before)
        assert unpatch(model) is model
        assert torch.equal(model(x), before)
    assert {key: (type(m), set(m.__dict__)) for key, m in model.named_modules()} == classes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert unpatch(model) is model  # nothing to take back: nothing happens


@pytest.mark.parametrize("name", ["deit", "distilled", "layer_scale", "qk_norm", "registers_dinov2", "res_post"])
def test_a_reduction_of_nothing_changes_nothing(name):
    model, x = family(name), images()
    with torch.no_grad():
        truth, before = in_float64(model, x), patch(model)(x)
        # source=2 and r=0: every block runs the reducing forward, and no token goes.
        assert_same_to_rounding(patch(model, ToMe(0), trace=True)(x), before, truth)
        assert torch.equal(token_map(model), torch.arange(token_map(model).shape[1]).expand(3, -1).int())
        assert_same_to_rounding(patch(model, TopK(1.0, (0, 1, 2, 3), "received"))(x), before, truth)


def test_the_last_patch_wins():
    model, x = vit(), images()
    with torch.no_grad():
        dense, truth = model(x), in_float64(model, x)
        tome = patch(copy.deepcopy(model), ToMe(9))(x)
        patch(model, TopK(0.5, (0,)), trace=True)
        assert torch.equal(patch(model, ToMe(9))(x), tome)
        assert_same_to_rounding(patch(model)(x), dense, truth)
        assert torch.equal(unpatch(model)(x), dense)


def test_a_patch_that_fails_leaves_the_model_as_it_is():
    model, x = patch(vit(), ToMe(9)), images()
    with torch.no_grad():
        before = model(x)
        with pytest.raises(ValueError):
            patch(model, TopK(0.5, (4,)))
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("copies", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", ["deit", "gap", "distilled"])
def test_copies_and_pickles(name, copies):
    model, x = patch(family(name), ToMe(9), trace=True, linear="onednn"), images()
    with torch.no_grad():
        model(x)
        twin = copies(model)
        assert torch.equal(twin(x), model(x))
        assert torch.equal(token_map(twin), token_map(model))
        twin(images(2))
        assert len(token_map(model)) == 3  # the copy's trace is its own
        assert torch.equal(unpatch(twin)(x), unpatch(model)(x))
    assert type(twin) is type(family(name)) and type(twin.blocks[0]) is Block
    assert type(twin.head) is nn.Linear


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "reduction"),
    [
        ("distilled", None),
        ("qk_norm", "tome"),
        ("gap_final_norm", "tome"),
        ("gap", "topk"),
        ("registers_dinov2", "ppt"),
        ("deit", "evit"),
    ],
)
def test_compiles_whole(name, reduction):
    model, x = patch(family(name), REDUCTIONS.get(reduction)), images()
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_near(compiled(x), expected)


@pytest.mark.slow
def test_compiles_whole_for_training_with_a_trace():
    model, x = patch(vit(), PPT(r=12, blocks=(1, 3), threshold=2e-4), trace=True), images()
    model(x).square().sum().backward()
    expected, slots = [p.grad.clone() for p in model.parameters()], token_map(model)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x).square().sum().backward()
    assert torch.equal(token_map(model), slots)
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, atol=1e-3 * grad.abs().max().item(), rtol=1e-3)


@pytest.mark.parametrize("reduction", [None, *REDUCTIONS.values()], ids=["dense", *REDUCTIONS])
def test_exports(reduction):
    model, x = patch(family("gap_final_norm"), reduction), images()
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        assert_near(program.module()(x), model(x))


@pytest.mark.parametrize("name", ["deit", "layer_scale", "gap"])
@pytest.mark.parametrize("reduction", [None, ToMe(9), PPT(r=12, blocks=(1, 3), threshold=2e-4, score="received")])
def test_training_with_drop_path_and_checkpointing(name, reduction):
    x = images()

    def gradients(checkpointing):
        model = family(name, drop_path_rate=0.3, proj_drop_rate=0.1)
        patch(model.train(), reduction)
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(5)
        model(x).square().sum().backward()
        return {key: p.grad for key, p in model.named_parameters()}

    plain = gradients(False)
    assert all(grad is not None and grad.isfinite().all() for grad in plain.values())
    assert all(grad.abs().sum() > 0 for key, grad in plain.items() if "qkv.weight" in key)
    for key, grad in gradients(True).items():
        torch.testing.assert_close(grad, plain[key], atol=1e-4 * plain[key].abs().max().item(), rtol=1e-3)


def test_training_gradients_are_timms():
    x, grads = images(), []
    for dtype, patched in ((torch.float32, True), (torch.float32, False), (torch.float64, False)):
        model = family("layer_scale").to(dtype).train()
        if patched:
            patch(model, linear="onednn")
        model(x.to(dtype)).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for ours, theirs, truth in zip(*grads, strict=True):
        assert_same_to_rounding(ours, theirs, truth)


def test_reentrant_checkpointing_is_refused():
    """timm's switch may be set before the patch or after it."""
    model, x = patch(vit().train(), ToMe(9)), images()
    model.set_grad_checkpointing()
    try:
        timm.layers.set_reentrant_ckpt(True)
        with pytest.raises(NotImplementedError, match=r"not reentrant; .*set_reentrant_ckpt\(False\)"):
            model(x)
        with pytest.raises(NotImplementedError, match="checkpointing that is not reentrant"):
            patch(vit(), ToMe(9))
        model.set_grad_checkpointing(False)
        assert model(x).shape == (3, 10)
    finally:
        timm.layers.set_reentrant_ckpt(False)


def test_checkpointing_survives_two_forwards_before_the_backward():
    one, two = images(2, seed=1), images(2, seed=2)

    def gradients(checkpointing):
        model = patch(vit(class_token=False, global_pool="avg").train(), ToMe(9))
        model.set_grad_checkpointing(checkpointing)
        (model(one).square().sum() + model(two).square().sum()).backward()
        return [p.grad for p in model.parameters()]

    for ours, plain in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-4 * plain.abs().max().item(), rtol=1e-3)


def test_pooling_is_weighted_by_size():
    for name in ("gap", "gap_final_norm", "reg4_gap", "gap_include_prefix"):
        model, x = family(name), images()
        patch(model, ToMe(9), trace=True)
        with torch.no_grad():
            features = model.forward_features(x)
            pooled = model.pool(features)
            slots = token_map(model).long()
            first = 0 if model.pool_include_prefix else model.num_prefix_tokens
            expected = torch.stack([features[b, slots[b, first:]].mean(0) for b in range(3)])
            torch.testing.assert_close(pooled, expected)


@pytest.mark.parametrize("name", ["deit", "registers_dinov2", "gap"])
def test_intermediate_features_lie_on_the_grid(name):
    model, x = family(name), images()
    with torch.no_grad():
        dense = model.forward_intermediates(x, indices=[0, 3], norm=True, intermediates_only=True)
        patch(model, ToMe([0, 9, 9, 9]))
        first, last = model.forward_intermediates(x, indices=[0, 3], norm=True, intermediates_only=True)
        assert_near(first, dense[0])
        assert last.shape == dense[1].shape == (3, 48, 8, 8)
        assert last[0].flatten(1).unique(dim=1).shape[1] < 64  # merged patches share their features
        final, features = model.forward_intermediates(x, indices=1, output_fmt="NLC", return_prefix_tokens=True)[:2]
        torch.testing.assert_close(final, model.forward_features(x))
        assert len(features) == 1
        assert "_p3b_role" in model.blocks[3].__dict__ and not model.blocks[3]._forward_hooks


def test_threads_share_a_model():
    """Another forward between one's last block and its pooling leaves the sizes alone that it pools by."""
    model = patch(family("gap_final_norm"), ToMe(9))
    x, other = images(), images(seed=2)
    expected, real, between = model(x), model.norm.forward, []

    def norm(tokens):
        if not between:
            between.append(threading.Thread(target=model, args=(other,)))
            between[0].start()
            between[0].join()
        return real(tokens)

    model.norm.forward = norm
    assert torch.equal(model(x), expected) and between


def in_thread(function, *args):
    """What function(*args) returns in a thread of its own."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function(*args)))
    thread.start()
    thread.join()
    return found[0]


def test_threads_have_token_maps_of_their_own():
    model, x, other = patch(vit(), ToMe(9), trace=True), images(), images(seed=2)

    def mapped(x):
        model(x)
        return token_map(model)

    with torch.no_grad():
        expected, other_expected = mapped(x), mapped(other)
        assert not torch.equal(expected, other_expected)
        model(x)
        assert torch.equal(in_thread(mapped, other), other_expected)
        assert torch.equal(token_map(model), expected)
        assert torch.equal(in_thread(token_map, model), other_expected)  # ran none: the last of any thread
        assert torch.equal(token_map(copy.deepcopy(model)), expected)


@pytest.mark.slow
def test_the_token_map_of_a_compiled_forward_is_the_last():
    model, x, other = patch(vit(), ToMe(9), trace=True), images(), images(seed=2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        model(other)
        expected = token_map(model)
        model(x)
        compiled(other)
        assert torch.equal(token_map(model), expected)
        model(x)
        assert not torch.equal(token_map(model), expected)


def test_threads_have_intermediates_of_their_own():
    """Another thread runs the whole model between two blocks of forward_intermediates: with and without maps."""
    model, x, other = patch(vit(), ToMe([0, 9, 9, 9])), images(), images(seed=2)
    kinds, real, between = [], model.blocks[3].norm1.forward, []
    model.blocks[2].register_forward_hook(lambda module, inputs, output: kinds.append(len(output.slots)))

    def norm(tokens):
        if not between:
            between.append(None)
            between.append(in_thread(model, other))
            between.append(in_thread(lambda: model.forward_intermediates(other, intermediates_only=True)))
        return real(tokens)

    with torch.no_grad():
        expected = model.forward_intermediates(x, intermediates_only=True)
        logits, others = model(other), model.forward_intermediates(other, intermediates_only=True)
        assert kinds == [2, 0, 2]
        model.blocks[3].norm1.forward = norm
        found = model.forward_intermediates(x, intermediates_only=True)
    assert kinds[3:] == [2, 0, 2]  # the forward of the other thread kept no maps
    for a, b in zip([*found, between[1], *between[2]], [*expected, logits, *others], strict=True):
        assert torch.equal(a, b)


def test_blocks_may_be_cut_off():
    model = patch(vit(), ToMe(9))
    model.prune_intermediate_layers([0, 1], prune_head=False)
    with torch.no_grad():
        assert model(images()).shape == (3, 10)


def test_registry_models():
    for name in ("deit3_small_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_base_patch16_siglip_224"):
        options = {"img_size": 56, "depth": 2, "embed_dim": 96, "num_heads": 3, "num_classes": 5}
        model, x = timm.create_model(name, **options).eval(), images(2, 56)
        with torch.no_grad():
            before, truth = model(x), in_float64(model, x)
            assert_same_to_rounding(patch(model)(x), before, truth)
            assert patch(model, ToMe(2))(x).shape == before.shape


def test_bfloat16_and_autocast():
    model, x = vit(), images()
    with torch.no_grad():
        expected = model.bfloat16()(x.bfloat16())
        close = {"atol": 0.1 * expected.abs().max().item(), "rtol": 0.1}
        torch.testing.assert_close(patch(model)(x.bfloat16()), expected, **close)
        assert patch(model, ToMe(9))(x.bfloat16()).dtype == torch.bfloat16
        model = patch(vit(), ToMe(9), linear="onednn")
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).isfinite().all()


@pytest.mark.slow
def test_the_reference_backend_exports_to_pytorchs_own_operators():
    model, x = patch(vit(), PPT(r=12, blocks=(1, 3), threshold=2e-4)), images()
    with torch.no_grad(), p3b_ext.backend("reference"):
        program = torch.export.export(model, (x,))
        names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert names and all(name.startswith(("aten.", "<built-in")) for name in names), names
        assert_near(program.module()(x), model(x))


class OwnHalves(Block):
    """A block of somebody else, as p3b.surgery makes them, in which the attention may be missing."""

    def forward(self, x, attn_mask=None, is_causal=False):
        return self.mlp_half(self.attention_half(x, attn_mask=attn_mask, is_causal=is_causal)[0])

    def attention_half(self, x, **asked):
        if self.attn is None:
            return x, None
        out = self.attn(self.norm1(x), **asked)
        return x + (out if isinstance(out, torch.Tensor) else out.x), out

    def mlp_half(self, x):
        return x + self.mlp(self.norm2(x))


def test_blocks_with_halves_of_their_own():
    plain, own, x = vit(), vit(block_fn=OwnHalves), images()
    with torch.no_grad():
        for reduction in (None, ToMe(9), PPT(r=12, blocks=(1, 3), threshold=2e-4)):
            assert torch.equal(patch(own, reduction)(x), patch(plain, reduction)(x))
        own.blocks[1].attn = None
        assert patch(own, ToMe(9), trace=True)(x).shape == (3, 10)
        assert token_map(own).max() + 1 == 65 - 3 * 9  # the block without attention merges nothing
        with pytest.raises(ValueError, match=r"patch: blocks.1 has no attention \(pruned away\)"):
            patch(own, PPT(blocks=(1, 3)))


# Linear layers through oneDNN ----------------------------------------------------------------------------------------


def test_layers_made_later_are_pytorchs_until_patched_again():
    model = patch(vit(), ToMe(9), linear="onednn")
    model.reset_classifier(7)
    assert type(model.head) is nn.Linear and type(model.blocks[0].attn.qkv) is OneDnnLinear
    assert model(images()).shape == (3, 7)
    patch(model, ToMe(9), linear="onednn")
    assert type(model.head) is OneDnnLinear and OneDnnLinear.function is linear
    assert type(unpatch(model).head) is nn.Linear


def test_linear_choice(monkeypatch):
    class Gated(nn.Linear):
        pass

    def kinds(**options):
        model = vit()
        model.blocks[0].mlp.fc1.__class__ = Gated
        patch(model, **options)
        return type(model.blocks[0].mlp.fc1), type(model.blocks[0].mlp.fc2), type(model.head)

    assert kinds(linear="torch") == (Gated, nn.Linear, nn.Linear)
    assert kinds(linear="onednn") == (Gated, OneDnnLinear, OneDnnLinear)
    for prefer, expected in ((True, OneDnnLinear), (False, nn.Linear)):
        # p3b_ext.patch, as an attribute, is the function and not the module.
        module = importlib.import_module("p3b_ext.patch")
        monkeypatch.setattr(module, "prefer_onednn", lambda prefer=prefer: prefer)
        assert kinds() == (Gated, expected, expected)


# What cannot be patched --------------------------------------------------------------------------------------------


class OtherAttention(timm.layers.Attention):
    def forward(self, x, attn_mask=None, is_causal=False):
        return x


class OtherBlock(Block):
    def forward(self, x, attn_mask=None, is_causal=False):
        return x


@pytest.mark.parametrize(
    ("options", "reduction", "text"),
    [
        ({"attn_layer": OtherAttention}, None, r"patch: blocks.0.attn is of type OtherAttention; known are"),
        ({"attn_layer": "diff"}, None, r"patch: blocks.0.attn is of type DiffAttention; known are"),
        ({"block_fn": ParallelScalingBlock}, None, r"patch: blocks.0 \(ParallelScalingBlock\) has no Attention"),
        (
            {"block_fn": DiffParallelScalingBlock},
            None,
            r"patch: blocks.0 \(DiffParallelScalingBlock\) has no Attention",
        ),
        ({"block_fn": ParallelThingsBlock}, ToMe(2), r"patch: blocks.0 is of type ParallelThingsBlock; "),
        ({"block_fn": OtherBlock}, PPT(blocks=(2,)), r"patch: blocks.2 is of type OtherBlock; token"),
    ],
)
def test_the_part_that_cannot_be_patched_is_named(options, reduction, text):
    model = vit(**options)
    with pytest.raises(NotImplementedError, match=text):
        patch(model, reduction)
    assert "_p3b_patch" not in model.__dict__


def test_parallel_attentions_can_be_patched_dense():
    model, x = vit(block_fn=ParallelThingsBlock), images()
    with torch.no_grad():
        before, truth = model(x), in_float64(model, x)
        assert_same_to_rounding(patch(model)(x), before, truth)


def test_blocks_that_share_a_module():
    model = vit()
    model.blocks[2] = model.blocks[1]
    with pytest.raises(NotImplementedError, match=r"patch: blocks.1 and blocks.2 are one module"):
        patch(model, ToMe(2))
    x, kept = images(1), type(model.blocks[1].attn)
    expected, truth = model(x), in_float64(model, x)
    assert_same_to_rounding(patch(model)(x), expected, truth)
    assert isinstance(model.blocks[1].attn, Attention)
    assert type(unpatch(model).blocks[1].attn) is kept
    model = vit()
    model.blocks[2].attn = model.blocks[1].attn
    with p3b_ext.backend("cpu"):
        tokens = patch(model, ToMe(2), trace=True)(x)
    assert tokens.isfinite().all() and token_map(model).max() == 56  # of 65 - 4 * 2
    assert type(unpatch(model).blocks[2].attn) is kept


def test_bad_input():
    for call, error, text in [
        (lambda: patch(nn.Linear(2, 2)), NotImplementedError, "patch: model must be a timm VisionTransformer, got Lin"),
        (lambda: patch(vit(), 13), TypeError, "patch: reduction must be ToMe, PPT, EViT, TopK or None, got int"),
        (lambda: patch(vit(), trace=True), ValueError, "patch: trace must be False where reduction is None"),
        (lambda: patch(vit(), linear="mkl"), ValueError, "patch: linear must be one of auto, torch, onednn, got 'mkl'"),
        (lambda: patch(vit(), PPT()), ValueError, "PPT: blocks must be between 0 and 3 for this model, got 6"),
        (lambda: patch(vit(), ToMe([1] * 5)), ValueError, "ToMe: r must have at most 4 entries .*, got 5"),
        (lambda: patch(3), NotImplementedError, "patch: model must be a timm VisionTransformer, got int"),
        (lambda: unpatch(3), TypeError, r"unpatch: model must be an nn.Module, got int"),
        (lambda: token_map(3), TypeError, r"token_map: model must be an nn.Module, got int"),
        (lambda: token_map(vit()), ValueError, "token_map: model must be patched with trace=True"),
        (lambda: token_map(patch(vit(), ToMe(2))), ValueError, "token_map: model must be patched with trace=True"),
        (lambda: token_map(patch(vit(), ToMe(2), trace=True)), ValueError, "token_map: the model has not run"),
    ]:
        with pytest.raises(error, match=text):
            call()
    model = patch(vit(), ToMe(2), trace=True)
    model(images(1))
    with pytest.raises(ValueError, match="token_map: block must be between 0 and 3, got 4"):
        token_map(model, 4)
    with pytest.raises(TypeError, match="token_map: block must be an int, got str"):
        token_map(model, "last")
    with pytest.raises(NotImplementedError, match="patch: attn_mask must be None with token reduction"):
        model.blocks[0](torch.randn(1, 65, 48), attn_mask=torch.zeros(65, 65))


@pytest.mark.parametrize("name", ["gap", "map"])
def test_features_are_pooled_with_their_own_sizes(name):
    model = p3b_ext.patch(vits.family(name), p3b_ext.ToMe(9))
    x, other = vits.images(2, seed=1), vits.images(2, seed=2)
    expected, pooled = model(x), model.forward_head(model.forward_features(x), pre_logits=True)
    features = model.forward_features(x)
    model.forward_features(other)
    assert torch.equal(model.forward_head(features), expected)  # not with the sizes of what ran since
    assert torch.equal(model.forward_head(features), expected)  # nor once only
    assert torch.equal(model.forward_head(features, pre_logits=True), pooled)
    assert torch.equal(model.forward_head(model.forward_features(x).clone()), expected)


def test_a_pooling_that_is_chosen_after_the_patch_knows_the_sizes():
    before, after = vits.family("deit"), vits.family("deit")
    for model, first in ((before, True), (after, False)):
        if not first:
            p3b_ext.patch(model, p3b_ext.ToMe(9))
        torch.manual_seed(0)
        model.reset_classifier(10, "avg")
        if first:
            p3b_ext.patch(model, p3b_ext.ToMe(9))
    x = vits.images(2)
    torch.testing.assert_close(before(x), after(x))  # where patch takes oneDNN's linear, the head made later has not


@pytest.mark.slow
def test_sizes_reach_the_pooling_of_a_model_whose_blocks_are_compiled():
    model = p3b_ext.patch(vits.family("gap"), p3b_ext.ToMe(9))
    x = vits.images(2)
    expected = model(x)
    for block in model.blocks:
        block.compile(backend="eager")
    torch.testing.assert_close(model(x), expected)
