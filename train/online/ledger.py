"""Why clips were not trained on: a file of JSON lines in the run's folder, one a rank, so that ranks share no file."""

import json
from dataclasses import asdict
from pathlib import Path

from shared.cache.ledger import Refusal
from shared.stores.files import explained, make_folder
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
        """Adds a sample that is not there yet.

        Raises:
            InputError: if it cannot be written, on a full disk for one; the lines before it stay.
        """
        assert refusal.sample is not None
        if refusal.sample in self._samples:
            return
        line = json.dumps(asdict(refusal), ensure_ascii=False) + "\n"
        with explained(f"writing {self.path.name}", folder=self.path.parent):
            make_folder(self.path.parent)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line)
        self._samples.add(refusal.sample)
