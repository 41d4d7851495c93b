"""The README: its code runs, its links and its map are true."""

import pathlib
import re

import pytest
import torch

import p3b
import p3b_ext

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
def test_python_blocks_run(tmp_path, monkeypatch):
    """All Python blocks in order, in one namespace, on two tiny batches and a schedule of seconds."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    batches = [(torch.randn(2, 3, 224, 224), torch.randint(0, 10, (2,))) for _ in range(2)]
    short = dict(start_epoch=0, sparse_epoch=1, final_epoch=1, finetune_epochs=1, device="cpu")
    config = p3b.Config
    monkeypatch.setattr(p3b, "Config", lambda **settings: config(**short, **settings))
    names = {"images": torch.randn(1, 3, 224, 224), "train_loader": batches, "val_loader": batches}
    assert len(blocks("python")) >= 2
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert sum(p.numel() for p in names["small"].parameters()) < 0.51 * names["result"].history["dense_params"]


def test_links_and_map_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    (house,) = [block for block in blocks("text") if "csrc/" in block]
    for name in re.findall(r"^(\S+?/?)  ", house, re.MULTILINE):
        assert (ROOT / name).exists(), name


def test_make_targets_exist():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"make (\w+)", README):
        assert target in targets, target


def test_public_names():
    """Every name that the README uses of p3b_ext and p3b exists."""
    for module, name in re.findall(r"\b(p3b_ext|p3b)\.([A-Za-z_]\w+)\(", README):
        assert hasattr({"p3b_ext": p3b_ext, "p3b": p3b}[module], name), f"{module}.{name}"
