"""A tree of steps towards a solution: which one is to be tried next, and what is known of each.

Upper confidence bounds for trees: Kocsis and Szepesvári, "Bandit based Monte-Carlo Planning", 2006, equation 1.
"""

import math
from collections.abc import Iterator

import attrs


@attrs.define(eq=False)
class Node:
    """A step, with what came before it."""

    text: str = ""
    parent: "Node | None" = attrs.field(default=None, repr=False)
    children: list["Node"] = attrs.field(factory=list, repr=False)
    value: float = 0.0
    """What it was judged to be worth, 0 to 1."""
    total: float = 0.0
    """Sum of the values of all that was tried from here on, its own included."""
    visits: int = 0
    final: bool = False
    """Nothing comes after it."""
    expanded: bool = False

    @property
    def mean(self) -> float:
        """What it has been worth so far."""
        return self.total / self.visits if self.visits else 0.0

    @property
    def path(self) -> list["Node"]:
        """The steps from the first one to this one; the root is none."""
        return [*self.parent.path, self] if self.parent else []

    @property
    def closed(self) -> bool:
        """Whether nothing is left to try from here on."""
        return self.final or (self.expanded and all(child.closed for child in self.children))

    def add(self, text: str, value: float, final: bool) -> None:
        """Take in a step that comes after this one, and what it is worth to all before it."""
        made = Node(text, self, value=value, final=final)
        self.children.append(made)
        node: Node | None = made
        while node is not None:
            node.visits, node.total, node = node.visits + 1, node.total + value, node.parent

    def leaf(self, exploration: float) -> "Node | None":
        """Return the step to go on from; None if all was tried."""
        if self.closed:
            return None
        node = self
        while node.expanded:
            node = max((c for c in node.children if not c.closed), key=lambda child: bound(child, exploration))
        return node

    def finals(self) -> Iterator["Node"]:
        """Yield the last steps of all solutions, in the order in which they were found on each branch."""
        if self.final:
            yield self
        for child in self.children:
            yield from child.finals()


def bound(node: Node, exploration: float) -> float:
    """Return what a step may be worth at most, as far as is known: the less it was tried, the more."""
    assert node.parent is not None
    return node.mean + exploration * math.sqrt(math.log(node.parent.visits) / node.visits)
