"""A disassembled kernel: its instructions, its control flow, its loops.

sass.py reads disassemblies; here is what does not depend on the instruction set. A loop is a natural loop: a block that
dominates one of its predecessors, and all that reaches this predecessor without passing the block (Aho, Lam, Sethi and
Ullman, 9.6). Text between a label and a backward branch would not do, as compilers put rare paths elsewhere.
"""

import heapq
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple


class Instruction(NamedTuple):
    """One line of a disassembly."""

    opcode: str  # HGMMA.64x128x16.F32.BF16
    operands: str
    labels: tuple[str, ...] = ()  # that stand before it
    jumps: tuple[str, ...] = ()  # labels that may come next
    falls: bool = True  # whether the instruction below may come next

    @property
    def name(self) -> str:
        """The opcode without what refines it."""
        return self.opcode.split(".")[0]


Code = Sequence[Instruction]


def innermost(code: Code, marks: Callable[[Instruction], bool]) -> list[list[Instruction]]:
    """The loops that hold a marked instruction and no smaller loop that does, in the order of the text.

    What waits in a small loop of its own (for a barrier, say) counts as one round of that.
    """
    blocks, after = _blocks(code)
    bodies = [
        body for body in _natural_loops(after).values() if any(marks(code[n]) for block in body for n in blocks[block])
    ]
    smallest = [body for body in bodies if not any(other < body for other in bodies)]
    return [[code[n] for block in sorted(body) for n in blocks[block]] for body in sorted(smallest, key=min)]


def leanest(code: Code, marks: Callable[[Instruction], bool]) -> list[list[Instruction]]:
    """Of each of the same loops, the shortest way around: what an iteration costs at least, rare paths left out."""
    blocks, after = _blocks(code)
    loops = _natural_loops(after)
    holding = {
        head: body for head, body in loops.items() if any(marks(code[n]) for block in body for n in blocks[block])
    }
    smallest = {head: body for head, body in holding.items() if not any(other < body for other in holding.values())}
    ways = []
    for head, body in sorted(smallest.items()):
        done: dict[int, list[int]] = {}
        front = [(len(blocks[head]), [head])]
        while front:
            length, way = heapq.heappop(front)
            if way[-1] in done:
                continue
            done[way[-1]] = way
            for each in after[way[-1]]:
                if each in body and each not in done:
                    heapq.heappush(front, (length + len(blocks[each]), [*way, each]))
        tails = [done[block] for block in body if block in done and head in after[block]]
        shortest = min(tails, key=lambda way: sum(len(blocks[block]) for block in way))
        ways.append([code[n] for block in shortest for n in blocks[block]])
    return ways


def _blocks(code: Code) -> tuple[list[range], list[list[int]]]:
    """Straight runs of instructions, and which may follow which."""
    starts = {0, len(code)}
    at = {label: n for n, each in enumerate(code) for label in each.labels}
    for n, each in enumerate(code):
        if each.labels:
            starts.add(n)
        if each.jumps or not each.falls:
            starts.add(n + 1)
    edges = sorted(starts)
    blocks = [range(start, stop) for start, stop in pairwise(edges)]
    number = {block.start: n for n, block in enumerate(blocks)}
    after = []
    for n, block in enumerate(blocks):
        last = code[block[-1]]
        follows = [number[at[label]] for label in last.jumps if label in at]
        after.append(follows + ([n + 1] if last.falls and n + 1 < len(blocks) else []))
    return blocks, after


def _natural_loops(after: list[list[int]]) -> dict[int, set[int]]:
    """By its head, the blocks of each loop; loops with one head are one."""
    before: list[list[int]] = [[] for _ in after]
    for block, follows in enumerate(after):
        for each in follows:
            before[each].append(block)
    dominators = _dominators(after, before)
    loops: dict[int, set[int]] = {}
    for tail, follows in enumerate(after):
        for head in follows:
            if tail in dominators and head in dominators[tail]:
                body = loops.setdefault(head, {head})
                reached = [tail]
                while reached:
                    block = reached.pop()
                    if block not in body:
                        body.add(block)
                        reached += [each for each in before[block] if each in dominators]
    return loops


def _dominators(after: list[list[int]], before: list[list[int]]) -> dict[int, set[int]]:
    """For each block that can be reached, the blocks on every way to it, itself among them."""
    reachable = {0} if after else set()
    front = list(reachable)
    while front:
        for each in after[front.pop()]:
            if each not in reachable:
                reachable.add(each)
                front.append(each)
    dominators = {block: {0} if block == 0 else reachable for block in sorted(reachable)}
    changed = True
    while changed:
        changed = False
        for block in dominators:
            if block:
                ways = [dominators[each] for each in before[block] if each in dominators]
                through = set.intersection(*ways) | {block}
                changed |= through != dominators[block]
                dominators[block] = through
    return dominators
