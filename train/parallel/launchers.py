"""How ranks find each other: what a launcher says in the environment.

torchrun and DeepSpeed's launcher set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Slurm's ``srun`` with a
task a GPU says the same in words of its own, and no launcher is needed: then signals reach every rank directly.
"""

import re
from collections.abc import MutableMapping

from shared.errors import InputError

_FIRST_PORT, _NUM_PORTS = 20_000, 20_000
_TASKS = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


def ranks_from_slurm(environment: MutableMapping[str, str]) -> None:
    """Sets torchrun's variables from those of a Slurm step, unless another launcher set them or there is one task.

    The first node of the step is where ranks meet; the port follows from the job's number, so that jobs on one node do
    not meet each other. MASTER_ADDR and MASTER_PORT go before, if they are set.

    Raises:
        InputError: if Slurm's variables do not say all of it.
    """
    in_a_step = "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment  # a batch script has no step's tasks
    if "WORLD_SIZE" in environment or not in_a_step or environment.get("SLURM_NTASKS", "1") == "1":
        return
    missing = [name for name in (*_TASKS.values(), "SLURM_JOB_ID") if name not in environment]
    if missing:
        raise InputError(f"this is a task of a Slurm step without {', '.join(missing)}: start it by srun, or torchrun")
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_NODELIST", environment.get("HOSTNAME", "")))
    environment.update({ours: environment[theirs] for ours, theirs in _TASKS.items()})
    environment.setdefault("MASTER_ADDR", first_node(nodes))
    environment.setdefault("MASTER_PORT", str(_FIRST_PORT + int(environment["SLURM_JOB_ID"]) % _NUM_PORTS))


def first_node(nodes: str) -> str:
    """Returns the first name of Slurm's list of nodes, such as ``gpu[03-05,9],login1``.

    Raises:
        InputError: if there is none.
    """
    match = re.match(r"([^\[,\s]+)(?:\[([^\],-]+)[^\]]*\])?([^\[,\s]*)", nodes.strip())
    if match is None:
        raise InputError(f"SLURM_NODELIST={nodes!r} names no node: set MASTER_ADDR")
    before, number, after = match.groups()
    return before + (number or "") + after
