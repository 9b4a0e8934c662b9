"""Why clips were not trained on: a file of JSON lines in the run's folder, one a rank, so that ranks share no file."""

import json
from dataclasses import asdict
from pathlib import Path

from shared.cache.ledger import Refusal
from train.run_folder import write_durably


class OnlineLedger:
    """The ledger of one rank.

    Args:
        path: Of the file, made when there is something to say.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._samples = {json.loads(line)["sample"] for line in self._whole_lines().splitlines()}

    def _whole_lines(self) -> bytes:
        """Returns the lines of the file, which loses what a process that was killed left of another."""
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            write_durably(self.path, whole)
        return whole

    def __contains__(self, sample: str) -> bool:
        return sample in self._samples

    def add(self, refusal: Refusal) -> None:
        """Adds a sample that is not there yet."""
        assert refusal.sample is not None
        if refusal.sample in self._samples:
            return
        self._samples.add(refusal.sample)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as file:
            file.write(json.dumps(asdict(refusal), ensure_ascii=False) + "\n")
