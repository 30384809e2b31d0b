"""Regular expressions from untrusted files, matched in bounded time.

Python's `re` tries one alternative after another: an expression such as (a+)+! takes years for a name of forty letters. Here all
alternatives are followed at the same time, as a set of states (Thompson 1968, doi:10.1145/363347.363387). Each set is built only
once, so each letter costs one lookup in a table. Look-ahead and back references, which this method cannot express, are refused.

Checked against `re` in tests/layers/test_patterns.py.
"""

import re

MAX_LETTERS = 1000  # characters of an expression
MAX_STATES = 2000  # states of the automaton of an expression; (a{1000}){1000} would have a million
MAX_VISITS = 200_000  # visits to states while the sets of one expression are built; a long expression needs about 10,000
MAX_DEPTH = 40  # nested brackets
# A set of letters, an escaped letter, a number of repetitions, (?: or any single letter.
PIECE = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]|\\.|\{\d{1,4}(?:,\d{0,4})?\}|\(\?:|.", re.DOTALL)
ESCAPES = "dDwWsS"


class Pattern:
    """A compiled expression, which is matched against whole names.

    Raises: ValueError for an expression that is wrong, too large, or not supported.
    """

    def __init__(self, text: str):
        if len(text) > MAX_LETTERS:
            raise ValueError(f"a pattern has {len(text)} letters; {MAX_LETTERS} is the limit.")
        self.text, self.pieces, self.position, self.depth = text, PIECE.findall(text), 0, 0
        self.states: list[tuple[re.Pattern | None, list[int]]] = []  # (test for the next letter or None, next states)
        self.start = self.build(self.alternatives(), self.state(None, []))
        if self.position < len(self.pieces):
            raise self.refuse("it closes a bracket that was not opened")
        self.visits = 0
        self.sets: dict[tuple[frozenset[int], str], frozenset[int]] = {}
        self.first = self.closure([self.start])

    def fullmatch(self, name: str) -> bool:
        """Whether the expression matches the whole name. Raises: ValueError if that takes too long."""
        now = self.first
        for letter in name:
            if (now, letter) not in self.sets:
                read = (self.states[state] for state in now)
                self.sets[now, letter] = self.closure(to[0] for test, to in read if test is not None and test.match(letter))
            now = self.sets[now, letter]
        return 0 in now  # state 0, which was created first, is the accepting state

    def refuse(self, reason: str) -> ValueError:
        return ValueError(f"the pattern {self.text!r} is not usable: {reason}.")

    # The parser: text -> ("letter", test), ("all", [...]), ("any", [...]) or ("repeat", tree, minimum, maximum or None)

    def next(self) -> str:
        return self.pieces[self.position] if self.position < len(self.pieces) else ""

    def alternatives(self) -> tuple:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.refuse("its brackets are nested too deeply")
        ways = [self.sequence()]
        while self.next() == "|":
            self.position += 1
            ways.append(self.sequence())
        self.depth -= 1
        return ("any", ways)

    def sequence(self) -> tuple:
        parts = []
        while self.next() not in ("", "|", ")"):
            parts.append(self.repeated(self.atom()))
        return ("all", parts)

    def atom(self) -> tuple:
        piece = self.next()
        self.position += 1
        if piece in ("(", "(?:"):
            if self.next() == "?":
                raise self.refuse("(?: is the only bracket with ? that is supported")
            inner = self.alternatives()
            if self.next() != ")":
                raise self.refuse("a bracket is not closed")
            self.position += 1
            return inner
        if piece in ("*", "+", "?", "^", "$", "[", "{", "\\") or (piece[0] == "{" and len(piece) > 1):
            raise self.refuse(f"{piece} has no meaning at its position")
        if piece[0] == "\\" and piece[1].isalnum() and piece[1] not in ESCAPES:
            raise self.refuse(f"{piece} is not supported")
        if piece[0] == "[" and re.search(r"\[\[|--|&&|~~|\|\|", piece):
            raise self.refuse(f"{piece} is not supported")
        is_special = piece == "." or len(piece) > 1
        try:
            return ("letter", re.compile(piece if is_special else re.escape(piece)))
        except re.error as error:
            raise self.refuse(str(error)) from error

    def repeated(self, tree: tuple) -> tuple:
        piece = self.next()
        ranges = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        if piece not in ranges and not (len(piece) > 2 and piece[0] == "{"):
            return tree
        self.position += 1
        if piece in ranges:
            minimum, maximum = ranges[piece]
        else:
            low, comma, high = piece[1:-1].partition(",")
            minimum, maximum = int(low), int(high) if high else None if comma else int(low)
        if maximum is not None and maximum < minimum:
            raise self.refuse(f"{piece} has a maximum below its minimum")
        if self.next() == "?":  # whether a repetition is lazy makes no difference for fullmatch
            self.position += 1
        elif self.next() in ("*", "+") or self.next()[:1] == "{" and len(self.next()) > 1:
            raise self.refuse(f"{self.next()} may not follow {piece}")
        return ("repeat", tree, minimum, maximum)

    # The automaton: tree -> states

    def state(self, test: re.Pattern | None, to: list[int]) -> int:
        if len(self.states) == MAX_STATES:
            raise self.refuse("it is too large")
        self.states.append((test, to))
        return len(self.states) - 1

    def build(self, tree: tuple, after: int) -> int:
        """The start state of an automaton that reads `tree` and continues in the state `after`."""
        kind = tree[0]
        if kind == "letter":
            return self.state(tree[1], [after])
        if kind == "any":
            return self.state(None, [self.build(way, after) for way in tree[1]])
        if kind == "all":
            for part in reversed(tree[1]):
                after = self.build(part, after)
            return after
        _, inner, minimum, maximum = tree
        entry = after
        if maximum is None:
            entry = self.state(None, [after])
            self.states[entry][1].append(self.build(inner, entry))
        else:
            for _ in range(maximum - minimum):
                entry = self.state(None, [self.build(inner, entry), after])
        for _ in range(minimum):
            entry = self.build(inner, entry)
        return entry

    def closure(self, states) -> frozenset[int]:
        """The states that can be reached from `states` without reading a letter."""
        found, todo = set(), list(states)
        while todo:
            state = todo.pop()
            if state not in found:
                found.add(state)
                test, to = self.states[state]
                todo += to if test is None else []
        self.visits += len(found)
        if self.visits > MAX_VISITS:
            raise self.refuse("it takes too long to match")
        return frozenset(found)
