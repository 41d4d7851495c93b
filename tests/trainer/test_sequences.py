"""Calls in any order keep the logits, or raise an error that names the call.

P3B_EXAMPLES=2000 runs more sequences than the suite does.
"""

import copy
import os
import pickle
import tempfile

import torch
from cases import assert_near
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import KINDS_OF_GATES, gated_vit

import p3b
import p3b_ext

FAMILIES = [
    "deit",
    "distilled",
    "augreg_no_qkv_bias",
    "gap",
    "layer_scale",
    "qk_norm",
    "registers_dinov2",
    "glu_norm",
    "map",
]
REDUCTIONS = [p3b_ext.ToMe(1), p3b_ext.PPT(1, blocks=[1]), p3b_ext.EViT(0.7, blocks=[1])]
CLEAN = (ValueError, NotImplementedError)


class Session:
    """A model, and what it must compute: `expected` [B, K], of images `x` [B, C, H, W]."""

    def __init__(self, name, seed):
        self.model = gated_vit(name).eval()
        self.x = torch.randn(2, 3, 32, 24, generator=torch.Generator().manual_seed(seed))
        self.seed = seed
        self.expected = self.logits()

    @torch.no_grad()
    def logits(self):
        return self.model.eval()(self.x)

    def run(self, step, value):
        changes = getattr(self, step)(value)
        if changes:
            self.expected = self.logits()
        assert_near(self.logits(), self.expected, roundings=1024)

    def reduced(self):
        return p3b_ext.current_reduction(self.model) is not None

    # Each returns whether the logits may change. Token reductions select by scores, which rounding can turn around.

    def patch(self, value):
        was = self.reduced()
        p3b_ext.patch(self.model, linear=("auto", "torch", "onednn")[value % 3])
        return was

    def reduce(self, value):
        p3b_ext.patch(self.model, REDUCTIONS[value % 3])
        return True

    def unpatch(self, value):
        was = self.reduced()
        p3b_ext.unpatch(self.model)
        return was

    def deepcopy(self, value):
        self.model = copy.deepcopy(self.model)

    def pickle(self, value):
        self.model = pickle.loads(pickle.dumps(self.model))

    def save(self, value):
        with tempfile.TemporaryDirectory() as folder:
            self.model = p3b.load(p3b.save(self.model, folder + "/model"))
        return self.reduced()

    def state_dict(self, value):
        self.model.load_state_dict(copy.deepcopy(self.model.state_dict()))

    def head(self, value):
        """timm asserts what a model has no pooling for, after it has taken the number of classes."""
        pools = [None] if hasattr(self.model, "head_dist") else [None, "avg"]
        pools += ["token"] * (self.model.has_class_token and len(pools) > 1)
        self.model.reset_classifier(2 + value, global_pool=pools[value % len(pools)])
        return True

    def resize(self, value):
        size = (32, 24 + 8 * (value % 2))
        self.model.set_input_size(size)
        self.x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(self.seed))
        return True

    def mask(self, value):
        gates = p3b.gates.attach(self.model, **[*KINDS_OF_GATES.values()][value % 2])
        draws = torch.rand(gates.values.shape, generator=torch.Generator().manual_seed(value))
        gates.set((draws < 0.7).float())
        return True

    def shrink(self, value):
        p3b.shrink(self.model)
        return self.reduced()


STEPS = [name for name in vars(Session) if name not in ("run", "logits", "reduced") and not name.startswith("_")]


@settings(max_examples=int(os.environ.get("P3B_EXAMPLES", 60)), deadline=None, derandomize=True, database=None)
@given(
    name=st.sampled_from(FAMILIES),
    seed=st.integers(0, 99),
    steps=st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 5)), min_size=3, max_size=8),
)
def test_calls_in_any_order(name, seed, steps):
    session = Session(name, seed)
    for step, value in steps:
        before = session.expected
        try:
            session.run(step, value)
        except CLEAN as error:
            message = str(error)
            assert ": " in message and "\n" not in message
            session.expected = before
            assert_near(session.logits(), before, roundings=1024)  # a call that is refused changes nothing
