"""torch.compile(fullgraph=True), opcheck and CUDA-graph capture of the ops on a GPU, compiled and Triton backends."""

import argparse
import sys
import traceback

import torch
from cases import AttentionCase
from timm.models.vision_transformer import VisionTransformer

import p3b_ext
from p3b_ext import PPT, EViT, ToMe, TopK
from p3b_ext.ops.merge import match_tokens, merge_tokens, unmerge_tokens
from p3b_ext.ops.select import keep_tokens, select_tokens, topk_tokens
from p3b_ext.plan import plan_ppt


def everything(q, k, v, size, gate, x, scores, metric):
    """One of each: attention with side outputs, selection, matching, merging and back."""
    out, aux = p3b_ext.masked_attention(q, k, v, token_size=size, channel_gate=gate, aux=("cls_attention", "entropy"))
    kept = select_tokens(x, topk_tokens(scores, 9))
    chosen, _ = keep_tokens(x, aux.cls_attention, None, 9)
    mixed = plan_ppt(scores, metric, 6, 0.08).slot
    slot = match_tokens(metric, 6)
    y, sizes = merge_tokens(x, slot, x.shape[1] - 6, size=size)
    return out, aux.entropy, kept, chosen, mixed, y, sizes, unmerge_tokens(y, slot)


def arguments(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    case = AttentionCase(2, 2, 19, 40, sizes=4, gate="HD").inputs(dtype, device=device)
    x = torch.randn(2, 19, 48, device=device).to(dtype)
    scores, metric = torch.rand(2, 18, device=device), torch.randn(2, 19, 40, device=device)
    return [case["q"], case["k"], case["v"], case["token_size"], case["channel_gate"], x, scores, metric]


def check_compile(backend: str, device: str) -> None:
    inputs = arguments(device, torch.bfloat16)
    with p3b_ext.backend(backend):
        want = everything(*inputs)
        got = torch.compile(everything, fullgraph=True)(*inputs)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def check_graph(backend: str, device: str) -> None:
    """Captured once, replayed on other values: no synchronisation, no host pointer, the current stream."""
    inputs, other = arguments(device, torch.bfloat16), arguments(device, torch.bfloat16)
    with p3b_ext.backend(backend):
        want = everything(*other)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            everything(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = everything(*inputs)
    for to, value in zip(inputs, other, strict=True):
        to.copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=0)


def check_models(backend: str, device: str) -> None:
    """Whole models with every reduction, one of them compiled, against the reference: logits and a gradient."""
    images = torch.randn(3, 3, 32, 32, device=device)
    ppt, received = PPT(r=4, blocks=(1,), threshold=1e-4), TopK(0.6, (1,), "received")
    for reduction in (None, ToMe(r=3), ppt, EViT(0.6, (1,)), TopK(0.6, (1,)), received):
        torch.manual_seed(0)
        model = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=5)
        p3b_ext.patch(model.to(device), reduction)
        runs = {"reference": model, backend: model}
        if isinstance(reduction, ToMe):
            runs[f"{backend} compiled"] = torch.compile(model)
        found = {}
        for name, run in runs.items():
            model.zero_grad()
            with p3b_ext.backend(name.split()[0]):
                logits = run(images)
                logits.square().sum().backward()
            found[name] = logits.detach(), model.blocks[0].attn.qkv.weight.grad.clone()
            for got, want in zip(found[name], found["reference"], strict=True):
                torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)
        print(f"{backend}: {reduction} agrees", flush=True)


def check_ops(namespace: str, device: str) -> None:
    ops = getattr(torch.ops, namespace)
    q, k, v, size, gate, x, scores, metric = arguments(device, torch.float32)
    for t in (q, k, v, size, gate, x):
        t.requires_grad_()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    slot, index = ops.match_tokens(metric, 6, 1, None), ops.topk_tokens(scores, 9, 1, False)
    fused = [
        (ops.keep_tokens, (x, scores.new_ones(2, 3, 19), None, 9, 1, True)),
        (ops.match_or_prune, (metric[:, None], scores, 0.08, None, 6, 1, False)),
    ]
    for op, inputs in [
        *(fused if namespace == "p3b_ext" and device == "cuda" else []),
        (ops.masked_attention, (q, k, v, None, size, gate, 0.2, 7)),
        (ops.topk_tokens, (scores, 9, 1, False)),
        (ops.prune_slots, (scores, 5, 1, True)),
        (ops.select_tokens, (x, index)),
        (ops.match_tokens, (metric, 6, 1, None)),
        (ops.merge_tokens, (x, slot, 13, size, None, True)),
        (ops.unmerge_tokens, (x[:, :13], slot, 0.5)),
    ]:
        torch.library.opcheck(op.default, inputs, test_utils=tests)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    backends = {"cuda": "p3b_ext", "triton": "p3b_ext_triton"} if device == "cuda" else {"cpu": "p3b_ext"}
    failed = 0
    for backend, namespace in backends.items():
        if backend == "triton":
            import p3b_ext.kernels  # noqa: F401  (registers the ops)
        checks = {
            "compile": lambda b=backend: check_compile(b, device),
            "opcheck": lambda n=namespace: check_ops(n, device),
            "models": lambda b=backend: check_models(b, device),
        }
        if device == "cuda":
            checks["cuda graph"] = lambda b=backend: check_graph(b, device)
        for name, check in checks.items():
            torch.manual_seed(0)
            try:
                check()
                print(f"{backend} {name}: passed", flush=True)
            except Exception:
                failed += 1
                traceback.print_exc()
                print(f"{backend} {name}: FAILED", flush=True)
    print(f"{failed} checks failed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
