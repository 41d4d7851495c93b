"""Rows, relative figures and the tables that show them."""

import pytest
import torch
from toy import vit

from p3b.metrics.accuracy import evaluate
from p3b.metrics.cost import count_params
from p3b.metrics.table import Row, measure, metrics, relative, tables


def test_relative_figures_by_hand():
    dense = Row("dense", 80.0, 1000, 4000, 10, 100.0)
    pruned = Row("pruned", 78.5, 250, 1000, 5, 150.0)
    assert relative(dense, pruned) == {
        "accuracy_improvement": -1.5,
        "parameter_reduction": 75,
        "flops_reduction": 75,
        "throughput_improvement": 50,
    }
    assert relative(Row("dense", None, 1000, 4000, 10, 100.0), pruned)["accuracy_improvement"] is None


def test_tables_show_the_rows():
    rows = [
        Row("dense", 80.0, 22_050_664, 4_598_882_304, 2**20, 100.0),
        Row("small", None, 11_025_332, 10**9, 2**19, 150.4),
    ]
    text = tables(rows)
    assert text.splitlines()[2].split() == ["dense", "80.00", "22.051", "4.5989", "1.0", "100"]
    assert text.splitlines()[3].split() == ["small", "–", "11.025", "1.0000", "0.5", "150"]
    assert text.splitlines()[-1].split() == ["small", "–", "+50.0", "%", "+78.3", "%", "+50.4", "%"]
    assert all(line.startswith("|") for line in tables(rows, markdown=True).splitlines() if line)
    assert metrics(rows)["relative"]["small"]["flops_reduction"] == pytest.approx(78.2556, abs=1e-3)


def test_measure_makes_a_row_for_each_model():
    loader = [(torch.randn(6, 3, 16, 16), torch.arange(6) % 4)]
    rows = measure(
        {"wide": vit().eval(), "narrow": vit(embed_dim=12).eval()}, loader, batch_size=8, repeats=1, unscored=["wide"]
    )
    assert [row.name for row in rows] == ["wide", "narrow"] and rows[0].top1 is None
    assert rows[1].top1 == evaluate(vit(embed_dim=12).eval(), loader)["top1"]
    assert rows[0].params == count_params(vit().eval()) and rows[0].macs > rows[1].macs
    assert rows[0].peak_memory > rows[1].peak_memory and rows[1].images_per_second > 0
