"""What PyTorch's allocator is told before a run touches a GPU."""

import subprocess
import sys

import pytest

from train.parallel.ranks import let_segments_grow

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


@pytest.mark.gpu
def test_it_is_told_in_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    run = subprocess.run([sys.executable, "-c", JOINS], capture_output=True, text=True, check=True)
    assert run.stdout.split()[-1] == "True"
