"""Why a row cannot become training data."""


class Refused(Exception):
    """A row that cannot become training data; the message is the reason that the ledger counts."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.detail = detail
        """What of the row it is about, such as the path of an image; shown with the first few rows."""


class Unrendered(Refused):
    """A row that the chat template itself refuses."""


class Unplaced(Refused):
    """A row that the chat template shows whole, but in which the trained part cannot be told."""
