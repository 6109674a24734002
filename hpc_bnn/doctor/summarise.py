"""Group identical findings of ranks or nodes into one message. Every function is Local."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .facts import RankFacts
from .problems import Problem


@dataclass(frozen=True)
class Sight:
    """A problem of one node."""

    problem: Problem
    host: str
    example: str = ""
    """Facts that differ between nodes."""


def by_host(ranks: Iterable[RankFacts]) -> dict[str, list[RankFacts]]:
    """Return the ranks of each node, in the order in which nodes first appear."""
    nodes = defaultdict(list)
    for r in ranks:
        nodes[r.host].append(r)
    return dict(nodes)


def ranges(numbers: Iterable[int]) -> str:
    """Return numbers as text, such as "0-3,8"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)


def ranks_in_words(ranks: Sequence[RankFacts]) -> str:
    """Return which ranks these are, and where: "ranks 0-3 (n1, n2)"."""
    noun = "rank" if len(ranks) == 1 else "ranks"
    return f"{noun} {ranges(r.rank for r in ranks)} ({counted(by_host(ranks))})"


def same(ranks: Sequence[RankFacts], look: Callable[[RankFacts], Iterable[Any]]) -> Iterator[tuple[Any, str]]:
    """Yield each different finding once, with its ranks."""
    seen = defaultdict(list)
    for r in ranks:
        for sight in look(r):
            seen[sight].append(r)
    for sight, showing in seen.items():
        yield sight, ranks_in_words(showing)


def merged(nodes: Iterable[Iterable[Sight]]) -> Iterator[Problem]:
    """Yield the problems of nodes, one for all nodes that have the same, with the facts of the first."""
    alike: dict[tuple[str, str], list[Sight]] = defaultdict(list)
    for sight in (sight for node in nodes for sight in node):
        alike[sight.problem.code, sight.problem.seen].append(sight)
    for sights in alike.values():
        problem, example = sights[0].problem, f" ({sights[0].example})" if sights[0].example else ""
        hosts = counted(sight.host for sight in sights)
        yield Problem(problem.code, f"{problem.seen}, on {hosts}{example}", problem.values)


def counted(items: Iterable[str]) -> str:
    """Return the first items as text, and the number of the others."""
    items = list(items)
    more = f" and {len(items) - 4} more" if len(items) > 4 else ""
    return ", ".join(items[:4]) + more


def plural(number: int, noun: str) -> str:
    """Return a number of things: "1 rank", "2 ranks"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
