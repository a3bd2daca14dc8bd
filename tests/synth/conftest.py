import pytest

from posttrain.synth.sending import endpoints, limits, online
from posttrain.synth.sending.batches import calls


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for long before asking again."""
    monkeypatch.setattr(online, "FIRST_BACKOFF", 0.01)
    monkeypatch.setattr(calls, "FIRST_BACKOFF", 0.01)
    monkeypatch.setattr(endpoints, "SHORTEST_EJECTION", 0.02)
    monkeypatch.setattr(limits, "FIRST_WAIT", 0.02)
