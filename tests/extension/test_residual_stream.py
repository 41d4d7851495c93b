"""ResidualStream: errors and threads. What it records is tested where it is used: trainer/pruning/
test_benefit.py, trainer/training/test_under_reduction.py."""

import threading

import pytest
import torch
from cases import assert_near
from torch import nn
from vits import family, images, vit

import p3b_ext


@pytest.mark.parametrize("reduction", [None, p3b_ext.ToMe(9)], ids=["dense", "tome"])
def test_only_this_threads_forwards_are_recorded(reduction):
    model, x, other = p3b_ext.patch(vit(), reduction), images(), images(seed=2)
    with torch.no_grad():
        with p3b_ext.ResidualStream(model) as expected:
            model(x)
        with p3b_ext.ResidualStream(model, rows=2) as recorded:
            model(x)
            thread = threading.Thread(target=model, args=(other,))
            thread.start()
            thread.join()
    assert len(recorded.stream) == len(expected.stream) == 9
    for a, b in zip(recorded.stream, expected.stream, strict=True):
        assert b.shape == (3, 65, 48) and torch.equal(a, b[:2])


@pytest.mark.slow
def test_begin_and_compiled_models():
    model, x = p3b_ext.patch(vit(), p3b_ext.TopK(0.6, blocks=(1, 3))), images()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad(), p3b_ext.ResidualStream(model) as recorded:
        model(x)
        expected = list(recorded.stream)
        recorded.begin(0)
        model(x)
        assert not recorded.stream
        for _ in range(2):
            recorded.begin(2)
            compiled(x)
            for a, b in zip(recorded.stream, expected, strict=True):
                assert_near(a, b[:2])
    compiled(x)
    assert len(recorded.stream) == 9 and not any(block._forward_hooks for block in model.blocks)
    torch._dynamo.reset()


def test_other_models_are_refused():
    with pytest.raises(NotImplementedError, match="ResidualStream: model must be a timm VisionTransformer, got Linear"):
        p3b_ext.ResidualStream(nn.Linear(2, 2))
    with pytest.raises(NotImplementedError, match="ResidualStream: ResPostBlock has no norm between"):
        with p3b_ext.ResidualStream(family("res_post")):
            pass
