"""What PyTorch's allocator is told before a run touches a GPU."""

import subprocess
import sys

import pytest

from train.parallel.allocator import let_segments_grow, segments_grow

JOINS = """
import torch
from train.parallel.ranks import join_ranks
with join_ranks() as ranks:
    torch.zeros(1, device=ranks.device)
    print(torch.cuda.memory._snapshot()["allocator_settings"]["expandable_segments"])
"""


def test_segments_grow_unless_the_user_has_told_the_allocator_anything():
    environment: dict[str, str] = {}
    let_segments_grow(environment)
    assert environment == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        environment = {name: "max_split_size_mb:512"}
        let_segments_grow(environment)
        assert environment == {name: "max_split_size_mb:512"}


@pytest.mark.parametrize(
    ("environment", "grow"),
    [
        ({}, True),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, True),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:512, expandable_segments: True"}, True),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, True),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, False),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}, False),
        ({"PYTORCH_ALLOC_CONF": "", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, False),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True,expandable_segments:False"}, False),
    ],
)
def test_whether_segments_grow_is_known(environment: dict[str, str], grow: bool):
    let_segments_grow(environment)
    assert segments_grow(environment) == grow


@pytest.mark.gpu
def test_it_is_told_in_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    run = subprocess.run([sys.executable, "-c", JOINS], capture_output=True, text=True, check=True)
    assert run.stdout.split()[-1] == "True"
