"""Regular expressions that come with a file from a stranger, matched in bounded time.

Python's `re` tries one way after another, so that an expression like (a+)+! takes years for a name of forty letters. Here all
ways are followed at once, as sets of states (Thompson 1968, doi:10.1145/363347.363387), and each set is built only once: a
letter costs one look into a table. What this cannot express (look-ahead, back references) is refused.

Checked against `re` in tests/layers/test_patterns.py.
"""

import re

MOST_LETTERS = 1000  # of an expression
MOST_STATES = 2000  # of its automaton: a{1000} repeated a thousand times stays out
MOST_VISITS = 200_000  # of states, while the sets of one expression are built; a long one needs about 10,000
MOST_DEPTH = 40  # of brackets in brackets
PIECE = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]|\\.|\{\d{1,4}(?:,\d{0,4})?\}|\(\?:|.", re.DOTALL)
ESCAPES = "dDwWsS"


class Pattern:
    """An expression to compare whole names with.

    Raises: ValueError for one that is wrong, too large, or uses what is not implemented here.
    """

    def __init__(self, text: str):
        if len(text) > MOST_LETTERS:
            raise ValueError(f"a pattern has {len(text)} letters; {MOST_LETTERS} are the limit.")
        self.text, self.pieces, self.place, self.depth = text, PIECE.findall(text), 0, 0
        self.states: list[tuple[re.Pattern | None, list[int]]] = []  # what a letter must be (None: no letter is read), where to
        self.start = self.build(self.alternatives(), self.state(None, []))
        if self.place < len(self.pieces):
            raise self.refuse("a bracket is closed that was not opened")
        self.visits = 0
        self.sets: dict[tuple[frozenset[int], str], frozenset[int]] = {}
        self.first = self.closure([self.start])

    def fullmatch(self, name: str) -> bool:
        """Whether the whole name fits. Raises: ValueError if that takes too long."""
        now = self.first
        for letter in name:
            if (now, letter) not in self.sets:
                read = (self.states[state] for state in now)
                self.sets[now, letter] = self.closure(to[0] for test, to in read if test is not None and test.match(letter))
            now = self.sets[now, letter]
        return 0 in now  # the state that was made first ends every way

    def refuse(self, reason: str) -> ValueError:
        return ValueError(f"the pattern {self.text!r} is not usable: {reason}.")

    # Text to a tree: ("letter", test), ("all", [...]), ("any", [...]), ("repeat", tree, least, most or None)

    def next(self) -> str:
        return self.pieces[self.place] if self.place < len(self.pieces) else ""

    def alternatives(self) -> tuple:
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise self.refuse("its brackets are nested too deep")
        ways = [self.sequence()]
        while self.next() == "|":
            self.place += 1
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
        self.place += 1
        if piece in ("(", "(?:"):
            if self.next() == "?":
                raise self.refuse("brackets that begin with ? are not implemented, (?: excepted")
            inner = self.alternatives()
            if self.next() != ")":
                raise self.refuse("a bracket is not closed")
            self.place += 1
            return inner
        if piece in ("*", "+", "?", "^", "$", "[", "{", "\\") or (piece[0] == "{" and len(piece) > 1):
            raise self.refuse(f"{piece} stands where it has no meaning here")
        if piece[0] == "\\" and piece[1].isalnum() and piece[1] not in ESCAPES:
            raise self.refuse(f"{piece} is not implemented")
        if piece[0] == "[" and re.search(r"\[\[|--|&&|~~|\|\|", piece):
            raise self.refuse(f"{piece} is not implemented")
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
        self.place += 1
        if piece in ranges:
            least, most = ranges[piece]
        else:
            low, comma, high = piece[1:-1].partition(",")
            least, most = int(low), int(high) if high else None if comma else int(low)
        if most is not None and most < least:
            raise self.refuse(f"{piece} asks for nothing that there is")
        if self.next() == "?":  # as few as possible: the same names fit
            self.place += 1
        elif self.next() in ("*", "+") or self.next()[:1] == "{" and len(self.next()) > 1:
            raise self.refuse(f"{self.next()} stands after {piece}")
        return ("repeat", tree, least, most)

    # The tree to states

    def state(self, test: re.Pattern | None, to: list[int]) -> int:
        if len(self.states) == MOST_STATES:
            raise self.refuse("it is too large")
        self.states.append((test, to))
        return len(self.states) - 1

    def build(self, tree: tuple, after: int) -> int:
        """The state from which this tree is read, and then what comes from the state `after`."""
        kind = tree[0]
        if kind == "letter":
            return self.state(tree[1], [after])
        if kind == "any":
            return self.state(None, [self.build(way, after) for way in tree[1]])
        if kind == "all":
            for part in reversed(tree[1]):
                after = self.build(part, after)
            return after
        _, inner, least, most = tree
        entry = after
        if most is None:
            entry = self.state(None, [after])
            self.states[entry][1].append(self.build(inner, entry))
        else:
            for _ in range(most - least):
                entry = self.state(None, [self.build(inner, entry), after])
        for _ in range(least):
            entry = self.build(inner, entry)
        return entry

    def closure(self, states) -> frozenset[int]:
        """The states that are reached from these without reading a letter."""
        found, todo = set(), list(states)
        while todo:
            state = todo.pop()
            if state not in found:
                found.add(state)
                test, to = self.states[state]
                todo += to if test is None else []
        self.visits += len(found)
        if self.visits > MOST_VISITS:
            raise self.refuse("it takes too long to match")
        return frozenset(found)
