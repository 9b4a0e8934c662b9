"""``python -m train`` whose second rank fails in its second step, and where leaving a group waits for the others.

So NCCL's groups are left; gloo's, which a CPU has, are not. A program of its own, for its processes die.
"""

import os
import sys
import time
from typing import Any, NoReturn

import torch
import torch.distributed as dist

import train.step
from train.__main__ import main
from train.ending import end_process

ERRORS = {
    "device": OSError(5, "Input/output error", "a device that is gone"),
    "memory": torch.OutOfMemoryError("CUDA out of memory"),
}


def wait_for_others(*_: Any) -> NoReturn:
    print("waits for the others", flush=True)
    while True:
        time.sleep(1)


def fail_in_second(step: Any) -> Any:
    taken = 0

    def take(*args: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == 2 and dist.get_rank() == 1:
            raise ERRORS[os.environ["FAILS_WITH"]]
        return step(*args)

    return take


if __name__ == "__main__":
    dist.destroy_process_group = wait_for_others
    train.step.TrainingStep.take = fail_in_second(train.step.TrainingStep.take)  # type: ignore[method-assign]
    sys.argv[0] = "train"
    end_process(main)
