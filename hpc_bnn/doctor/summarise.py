"""Group identical findings of ranks or nodes into one message. Every function is Local."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from ..grid import ranges
from .facts import RankFacts
from .problems import Problem

Finding = tuple[Problem, str]
"""A problem of a node, and an example: facts that differ between nodes."""


def by_host(ranks: Iterable[RankFacts]) -> dict[str, list[RankFacts]]:
    """Return the ranks of each node, in the order in which nodes first appear."""
    nodes = defaultdict(list)
    for r in ranks:
        nodes[r.host].append(r)
    return dict(nodes)


def ranks_in_words(ranks: Sequence[RankFacts]) -> str:
    """Return which ranks these are, and where: "ranks 0-3 (n1, n2)"."""
    noun = "rank" if len(ranks) == 1 else "ranks"
    return f"{noun} {ranges(r.rank for r in ranks)} ({counted(by_host(ranks))})"


def same(ranks: Sequence[RankFacts], look: Callable[[RankFacts], Any]) -> Iterator[tuple[Any, str]]:
    """Yield each different finding once, with its ranks; where ``look`` returns nothing, there is none."""
    found = defaultdict(list)
    for r in ranks:
        found[look(r)].append(r)
    for finding, showing in found.items():
        if finding:
            yield finding, ranks_in_words(showing)


def merged(
    nodes: dict[str, list[RankFacts]], look: Callable[[list[RankFacts]], Iterable[Finding]]
) -> Iterator[Problem]:
    """Yield the problems of nodes, one for all nodes that have the same, with the example of the first."""
    alike = defaultdict(list)
    for host, node in nodes.items():
        for problem, example in look(node):
            alike[problem.code, problem.seen].append((host, problem, example))
    for found in alike.values():
        _, problem, example = found[0]
        where = counted(host for host, *_ in found) + (f" ({example})" if example else "")
        yield replace(problem, seen=f"{problem.seen}, on {where}")


def counted(items: Iterable[str]) -> str:
    """Return the first items as text, and the number of the others."""
    items = list(items)
    more = f" and {len(items) - 4} more" if len(items) > 4 else ""
    return ", ".join(items[:4]) + more


def plural(number: int, noun: str) -> str:
    """Return a number of things: "1 rank", "2 ranks"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
