"""Steps under torch.compile are the steps without."""

import pytest
import torch
from toy import batches, prune

pytestmark = pytest.mark.filterwarnings("ignore:importance")


@pytest.mark.slow
def test_compiled_steps_are_the_same_steps(monkeypatch):
    compiled = []
    whole = torch.compile

    def traced(model, **_):
        compiled.append(model)
        return whole(model, backend="aot_eager")  # traced and differentiated as for Inductor, without its minutes

    monkeypatch.setattr(torch, "compile", traced)
    short = dict(sparse_epoch=2, final_epoch=2, finetune_epochs=1, probe_every=2)
    plain, fast = prune(**short), prune(compile=True, **short)
    assert len(compiled) == 2  # under gates, and small
    for a, b in zip(plain.history["updates"], fast.history["updates"], strict=True):
        assert a["keep_ratio"] == pytest.approx(b["keep_ratio"], abs=0.05)
    assert plain.history["updates"][0]["benefit"]["cls"] == pytest.approx(
        fast.history["updates"][0]["benefit"]["cls"], abs=1e-3
    )
    assert [e["loss"] for e in fast.history["epochs"]] == pytest.approx(
        [e["loss"] for e in plain.history["epochs"]], rel=1e-2
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["savit", "wdpruning"])  # other gates, and a loss of the method's own
def test_other_methods_compile_too(monkeypatch, method):
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **_: whole(model, backend="eager", fullgraph=True))
    short = dict(start_epoch=0, sparse_epoch=1, final_epoch=1, finetune_epochs=1, method=method, train=batches(2))
    plain, fast = prune(**short), prune(compile=True, **short)
    assert plain.model.p3b_kept == fast.model.p3b_kept
    losses = [[e["loss"] for e in result.history["epochs"]] for result in (plain, fast)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
