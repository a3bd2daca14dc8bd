"""Dollars: what a reply cost, what a plan may cost, and the bounds that are held before anything is sent.

posttrain ships no prices: they change, and a stale table is worse than none. Give your provider's.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import attrs
from attrs.validators import ge

from posttrain.registry import key
from posttrain.synth.errors import TaskStopped
from posttrain.synth.ledger.keys import BYTES_PER_TOKEN, Request


@attrs.frozen(kw_only=True, slots=False)
class Price:
    """What a model costs, in dollars per million tokens.

    >>> Price(input=2.5, output=10).micros(1000, 100)
    3500
    """

    input: float = key(check=ge(0))
    """Prompt tokens."""
    output: float = key(check=ge(0))
    """Reply tokens."""
    cached: float | None = None
    """Prompt tokens that the provider had cached; as `input` unless given."""
    batch: float = key(0.5, check=ge(0))
    """Factor on everything in batch mode."""

    def micros(self, input_tokens: int, output_tokens: int, cached_tokens: int = 0, batch: bool = False) -> int:
        """Return millionths of a dollar."""
        cached = self.input if self.cached is None else self.cached
        whole = (input_tokens - cached_tokens) * self.input + cached_tokens * cached + output_tokens * self.output
        return round(whole * (self.batch if batch else 1))


def usage(reply: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return (prompt, reply, cached prompt) tokens that a reply says it used; 0 where it does not say."""
    said = _object(reply.get("usage"))
    details = _object(said.get("prompt_tokens_details") or said.get("input_tokens_details"))
    given = said.get("prompt_tokens") or said.get("input_tokens")
    made = said.get("completion_tokens") or said.get("output_tokens")
    return _count(given), _count(made), _count(details.get("cached_tokens"))


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> int:
    """Return a number of tokens; 0 for anything that is none, and for what no ledger could hold."""
    return int(value) if isinstance(value, int | float) and 0 <= value < 2**40 else 0


class Budget:
    """What a run may still spend. What a request may cost is reserved before it is sent."""

    def __init__(
        self, prices: Mapping[str, Price], batch: bool, spent: float, max_cost: float | None, max_requests: int | None
    ) -> None:
        self.prices, self.batch = prices, batch
        self.spent = round(spent * 1e6)
        self.reserved = 0
        self.in_flight = 0
        """Requests that were reserved and are not back; what is in batches is reserved, and comes back in no run."""
        self.lost = 0
        """Micros that requests without an answer may have cost."""
        self.sent = 0
        self.max_micros = None if max_cost is None else round(max_cost * 1e6)
        self.max_requests = max_requests

    def worst(self, request: Request) -> int:
        """Return what a request may cost at most, in micros; 0 if its price is not known. One by one, a token for each
        byte of the prompt; in batches, where all of them are under way at once, as estimated."""
        price = self.prices.get(request.model)
        tokens = request.tokens if self.batch else (request.tokens + 1) * BYTES_PER_TOKEN
        return price.micros(tokens, request.reserve, batch=self.batch) if price else 0

    def full(self, request: Request) -> bool:
        """Whether a request has to wait until others are back, because all together could pass the bound."""
        if self.max_micros is None or not self.in_flight:
            return False
        return self.spent + self.lost + self.reserved + self.worst(request) > self.max_micros

    def reserve(self, request: Request) -> None:
        """Take note that a request is about to be sent.

        Raises:
            TaskStopped: a bound would be passed.
        """
        if self.max_requests is not None and self.sent >= self.max_requests:
            raise TaskStopped(
                f"max_requests={self.max_requests:,} is used up, repeated attempts included; what came is kept. "
                "Run again to go on, with a larger bound if it is to be finished in one go"
            )
        worst = self.worst(request)
        if self.max_micros is not None and self.spent + self.lost + self.reserved + worst > self.max_micros:
            lost = f", ${self.lost / 1e6:.4f} may have been charged for answers that did not come" if self.lost else ""
            raise TaskStopped(
                f"the next request could pass max_cost=${self.max_micros / 1e6:g}: ${self.spent / 1e6:.4f} are spent"
                f"{lost}, and it may cost ${(self.reserved + worst) / 1e6:.4f}. What came is kept; give a larger "
                "max_cost, or a smaller max_tokens, and run again"
            )
        self.sent += 1
        self.in_flight += 1
        self.reserved += worst

    def release(self, request: Request, sent: bool = True) -> None:
        """Take back the reservation of a request that has come back, or could not be sent; what it cost is added where
        it is recorded."""
        self.in_flight -= 1
        self.sent -= not sent
        self.reserved -= self.worst(request)

    def charged(self, request: Request) -> None:
        """Take note that an answer did not come, or is of no use, which may be charged all the same."""
        self.lost += self.worst(request)

    def under_way(self, waiting: Iterable[tuple[str, int, int, int]]) -> None:
        """Reserve what is in batches: (model, requests, prompt tokens, reply tokens) each."""
        self.reserved = estimated(self.prices, waiting, self.batch)

    def cost(self, model: str, tokens: tuple[int, int, int]) -> int | None:
        """Return micros, or None if the model's price is not known."""
        price = self.prices.get(model)
        return None if price is None else price.micros(*tokens, batch=self.batch)


def estimated(prices: Mapping[str, Price], rows: Iterable[tuple[str, int, int, int]], batch: bool) -> int:
    """Return micros of (model, requests, prompt tokens, reply tokens) each; a model without a price counts nothing."""
    known = [(prices[model], given, made) for model, _, given, made in rows if model in prices]
    return sum(price.micros(given, made, batch=batch) for price, given, made in known)


@attrs.frozen
class Plan:
    """What a run would send."""

    total: int
    """Requests of the task."""
    cached: int
    """Of them, those whose result is in the ledger."""
    waiting: int
    """Those in a batch that is under way."""
    failed: int
    """Those that were refused for good; sent again only with `retry_failed`."""
    new: int
    """Those that would be sent."""
    input_tokens: int
    """Estimated tokens of the prompts to be sent (a quarter of their bytes)."""
    output_tokens: int
    """Tokens that their replies may have (their `max_tokens`, or 1024)."""
    cost: float | None
    """Dollars at most, by these estimates; None if the price of a model is not known."""
    spent: float | None
    """Dollars spent on the results that are there."""
    unpriced: list[str]
    """Models without a price."""
    under_way: float = 0.0
    """Dollars that what is in batches may cost."""
    unbounded: int = 0
    """Of the new requests, those that set no bound on their reply."""

    def __str__(self) -> str:
        cost = (
            f"up to ${self.cost:.4f}"
            if self.cost is not None
            else f"cost unknown (no price: {', '.join(self.unpriced)})"
        )
        return (
            f"{self.total:,} requests: {self.cached:,} cached, {self.waiting:,} under way, {self.failed:,} refused, "
            f"{self.new:,} new (about {self.input_tokens:,} prompt tokens, "
            f"at most {self.output_tokens:,} reply tokens, "
            f"{cost})"
        )


def within(plan: Plan, max_cost: float | None, max_requests: int | None) -> None:
    """Refuse a plan that passes a bound, before anything is sent.

    Raises:
        TaskStopped: it does, or its cost cannot be known.
    """
    if max_requests is not None and plan.new > max_requests:
        raise TaskStopped(
            f"{plan.new:,} requests are to be sent, which passes max_requests={max_requests:,}; nothing was sent"
        )
    if max_cost is None or plan.new == 0:
        return
    if plan.cost is None:
        raise TaskStopped(
            f"max_cost cannot be held: there is no price for {', '.join(plan.unpriced)}; nothing was sent. Give "
            "prices={'" + plan.unpriced[0] + "': Price(input=..., output=...)} in dollars per million tokens"
        )
    if plan.unbounded:
        raise TaskStopped(
            f"max_cost cannot be held: {plan.unbounded:,} requests set no max_tokens, so that nothing bounds what "
            "their replies cost; nothing was sent. Say `max_tokens` in the body of each step or request"
        )
    known = (plan.spent or 0) + plan.under_way
    if plan.cost + known > max_cost:
        way = f", ${plan.under_way:.4f} under way" if plan.under_way else ""
        raise TaskStopped(
            f"the task may cost ${plan.cost + known:.4f} (${plan.spent or 0:.4f} of it spent already{way}), "
            f"which passes max_cost=${max_cost:g}; nothing was sent. Set max_tokens, or give a larger max_cost"
        )
