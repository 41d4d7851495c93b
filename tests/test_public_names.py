"""The public names of both packages and their signatures: what others' code relies on."""

import inspect

import p3b
import p3b_ext

# Adding a name adds a line; changing one is a break that the changelog must say.
P3B_EXT = {
    "Attention": "(dim, num_heads=8, attn_head_dim=None, dim_out=None, qkv_bias=False, qk_norm=False, "
    "scale_norm=False, proj_bias=True, gated=False, attn_drop=0.0, proj_drop=0.0, norm_layer=None, "
    "device=None, dtype=None)",
    "AttentionAux": "(lse=None, cls_attention=None, entropy=None, value_norm=None, to_cls=None, received=None)",
    "EViT": "(keep_rate=0.7, blocks=(3, 6, 9), fuse=True)",
    "PPT": "(r=50, blocks=(3, 6, 9), threshold=None, score='cls_value', proportional=True, criterion='variance')",
    "Patch": "(reduction, trace, linear)",
    "ResidualStream": "(model, rows=None)",
    "ToMe": "(r=13, proportional=True, source=None)",
    "TokenPlan": "(slot, num_out, weight=None, normalize=True, index=None)",
    "TopK": "(keep_rate=0.7, blocks=(3, 6, 9), score='cls_value')",
    "at_cost": "(model, macs_ratio, reduction)",
    "backend": "(name)",
    "build_info": "()",
    "calibrate": "(model, loader, prune_share, *, per_block=False)",
    "check_exact": "(op, name, module, *known)",
    "check_unshared": "(op, modules)",
    "count_macs": "(model, reduction=None)",
    "current_patch": "(model)",
    "current_reduction": "(model)",
    "draw_tokens": "(image, slot, *, num_prefix=1, grid=None)",
    "masked_attention": "(q, k, v, *, key_mask=None, token_size=None, channel_gate=None, scale=None, aux=None)",
    "patch": "(model, reduction=None, *, trace=False, linear='auto')",
    "plan_fuse": "(scores, keep, num_prefix=1, weight=None)",
    "plan_merge": "(metric, r, num_prefix=1, *, source=None, generator=None)",
    "plan_ppt": "(scores, metric, r, threshold, num_prefix=1, *, criterion='variance')",
    "plan_prune": "(scores, r, num_prefix=1, order='position')",
    "scaled_dot_product_attention": "(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, "
    "enable_gqa=False)",
    "score_spreads": "(model, loader, ppt)",
    "select_tokens": "(x, index)",
    "solve_r": "(model, macs_ratio, reduction=None)",
    "token_counts": "(model, reduction=None)",
    "token_map": "(model, block=None)",
    "token_scores": "(aux, method, num_prefix=1)",
    "topk_tokens": "(scores, keep, num_prefix=1, order='position')",
    "unpatch": "(model)",
}
P3B = {
    "Config": "(method='p3b', prune_ratio=0.5, budget='params', floor=0.0, round_to=1, compensate=False, "
    "start_epoch=2, sparse_epoch=7, final_epoch=10, finetune_epochs=14, updates_per_epoch=3, alpha=0.5, "
    "gamma=0.2, momentum='published', temperature=10.0, min_kept_share=0.05, tau_max=0.1, "
    "scale_attn_in=1.0, scale_attn_qkv=1.0, scale_attn_out=1.5, scale_mlp_in=1.0, scale_mlp_hid=0.75, "
    "scale_mlp_out=1.5, rank_across='gate', rank_zero_by='gradient', benefit_targets='train', "
    "patch_probe='pointwise', patch_probe_width=0, probe_share=1.0, probe_every=1, probe_lr=0.0005, "
    "probe_weight_decay=0.05, opt='adamw', lr=0.0005, weight_decay=0.05, finetune_lr=0.001, "
    "schedule='one-cycle', warmup_epochs=0, min_lr=0.0, label_smoothing=0.1, mixup=0.0, cutmix=0.0, "
    "mix_prob=1.0, mix_switch_prob=0.5, distill=0.0, distill_temperature=2.0, ema=0.0, select='last', "
    "clip_grad=0.0, accumulate=1, seed=0, amp='none', compile=False, device='auto')",
    "Diverged": "exception",
    "Result": "(model, history, config, summary)",
    "budget": "module",
    "finetune": "(model, train_loader, val_loader, config=None, *, epochs=None, progress=None, teacher=None, "
    "state_dir=None, resume=False)",
    "gates": "module",
    "load": "(folder)",
    "prune": "(model, train_loader, val_loader, config=None, *, progress=None, reduction=None, teacher=None, "
    "state_dir=None, resume=False)",
    "recipes": "()",
    "save": "(result, folder, meta=None)",
    "shrink": "(model)",
}


def signatures(package) -> dict[str, str]:
    """Name -> signature of what a package exports, without annotations; a module's name for a module."""
    return {name: signature(getattr(package, name)) for name in sorted(package.__all__)}


def signature(value) -> str:
    if inspect.ismodule(value):
        return "module"
    if isinstance(value, type) and issubclass(value, Exception):
        return "exception"
    parameters = [p.replace(annotation=p.empty) for p in inspect.signature(value).parameters.values()]
    return str(inspect.Signature(parameters))


def test_of_p3b_ext():
    assert signatures(p3b_ext) == P3B_EXT


def test_of_p3b():
    assert signatures(p3b) == P3B


def test_of_the_modules_that_p3b_exports():
    for module, promised in {
        p3b.budget: {
            "importance": "(benefit, kept_params, temperature=10.0)",
            "keep_ratios": "(importance, block_params, outside_params, prune_ratio, floor=0.0)",
        },
        p3b.gates: {
            "attach": "(model, *, granularity='channels', embedding=False)",
            "detach": "(model)",
            "soft_mask": "(ranks, threshold_rank, tau)",
            "sharpening": "(step, sparse_step, final_step, tau_max)",
        },
    }.items():
        assert {name: signature(getattr(module, name)) for name in promised} == promised
