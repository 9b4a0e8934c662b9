"""The benchmark of products: rows and table, on a CPU, where both ways are PyTorch's."""

import pytest
import torch

from shared.errors import InputError
from train.benchmark.products import ProductRow, main, measure, table


def test_each_product_has_a_row_with_both_times_and_whether_bits_are_equal():
    rows = measure(8, 0.0001, torch.device("cpu"))
    assert [row.product for row in rows[:5]] == ["qkv", "proj", "fc1", "fc2", "qkv, gradient of inputs"]
    assert len(rows) == 8
    assert all(row.equal and row.rows == 8 and row.ours_ms > 0 and row.pytorch_ms > 0 for row in rows)


def test_the_table_says_where_bits_differ():
    row = ProductRow(product="fc1", rows=32768, ours_ms=0.5, pytorch_ms=0.53, times_as_fast=1.06, equal=False)
    assert table([row]).splitlines()[2] == "| fc1 | 32,768 | 0.530 | 0.500 | 1.060 | DIFFERENT |"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(InputError, match="on a GPU: found none"):
        main([])
