"""Why a clip cannot be used."""


class MediaError(Exception):
    """A clip that cannot be used; it goes to the ledger, or is tried again if the reason may pass.

    Args:
        reason: A short name to group by.
        detail: What was found.
        transient: Whether it may pass by itself: throttling, a time-out, a lost connection, an I/O error.
    """

    def __init__(self, reason: str, detail: str, *, transient: bool = False) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail, self.transient = reason, detail, transient

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"
