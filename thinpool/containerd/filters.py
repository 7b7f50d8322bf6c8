"""containerd's filters, by which ``List`` chooses snapshots (containerd's package ``filters`` describes them).

::

    filter   = selector *("," selector)           all must hold
    selector = path [("==" | "!=" | "~=") value]  nothing after the path: it must be there
    path     = field *("." field)
    field    = letters, digits, "_", or quoted
    value    = anything up to a comma or blank, or quoted; after "~=", a regular expression, also quoted by / or |

Of several filters one must match; none, or an empty one, matches all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

Lookup = Callable[[Sequence[str]], str | None]
"""Gives the value of a field, by its path; ``None``: it is not there."""
Match = Callable[[Lookup], bool]

_FIELD, _OPERATOR, _VALUE = re.compile(r"[A-Za-z0-9_]+"), re.compile(r"[=!~]+"), re.compile(r"[^\s,]+")
_BLANKS = re.compile(r"\s*")
_QUOTED = {quote: re.compile(rf"{re.escape(quote)}((?:[^{re.escape(quote)}\\\n]|\\.)*){re.escape(quote)}") for quote in '"/|'}
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-7]{3})|(.))", re.DOTALL)
_LETTERS = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\\": "\\"}


class BadFilter(ValueError):
    """A filter that does not keep to the syntax."""


def parse(filters: Iterable[str]) -> Match:
    """Whether any of the filters matches, as a function. Raises BadFilter."""
    alternatives = [_Parser(text).selectors() if text else [] for text in filters]

    def matches(lookup: Lookup) -> bool:
        return not alternatives or any(all(selector(lookup) for selector in selectors) for selectors in alternatives)

    return matches


class _Parser:
    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0

    def selectors(self) -> list[Match]:
        found = [self._selector()]
        while self._peek() == ",":
            self._at += 1
            found.append(self._selector())
        if self._peek():
            raise self._bad("a comma was expected")
        return found

    def _selector(self) -> Match:
        path = [self._field()]
        while self._peek() == ".":
            self._at += 1
            path.append(self._field())
        if self._peek() in ("", ","):
            return lambda lookup: lookup(path) is not None
        operator = self._take(_OPERATOR)
        if operator == "==":
            wanted = self._value('"')
            return lambda lookup: lookup(path) == wanted
        if operator == "!=":
            unwanted = self._value('"')
            return lambda lookup: lookup(path) != unwanted
        if operator == "~=":
            pattern = self._pattern(self._value('"/|'))
            return lambda lookup: pattern.search(lookup(path) or "") is not None
        raise self._bad("==, != or ~= was expected")

    def _pattern(self, text: str) -> re.Pattern[str]:
        try:
            return re.compile(text)
        except re.error as error:
            raise self._bad(f"no regular expression: {error}") from None

    def _field(self) -> str:
        return self._quoted('"') if self._peek() == '"' else self._take(_FIELD) or self._fail("a field was expected")

    def _value(self, quotes: str) -> str:
        quote = self._peek()
        return self._quoted(quotes) if quote and quote in '"/|' else self._take(_VALUE) or self._fail("a value was expected")

    def _quoted(self, allowed: str) -> str:
        quote = self._peek()
        if quote not in allowed:
            raise self._bad(f"{quote} does not quote here")
        match = _QUOTED[quote].match(self._text, self._at)
        if match is None:
            raise self._bad("a quote does not end")
        self._at = match.end()
        return _ESCAPE.sub(lambda escape: self._unescaped(escape, quote), match[1])

    def _unescaped(self, escape: re.Match[str], quote: str) -> str:
        *digits, octal, letter = escape.groups()
        code = next((int(number, 16) for number in digits if number), None)
        if code is None and octal:
            code = int(octal, 8)
        if code is not None:
            return chr(code) if code <= 0x10FFFF else self._fail("no such character")
        return quote if letter == quote else _LETTERS.get(letter) or self._fail(f"no escape: \\{letter}")

    def _peek(self) -> str:
        """The next character that is no blank; the empty text at the end."""
        match = _BLANKS.match(self._text, self._at)
        assert match is not None
        self._at = match.end()
        return self._text[self._at : self._at + 1]

    def _take(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self._text, self._at)
        if match is None:
            return ""
        self._at = match.end()
        return match[0]

    def _fail(self, what: str) -> str:
        raise self._bad(what)

    def _bad(self, what: str) -> BadFilter:
        return BadFilter(f"filter {self._text!r}, at {self._at}: {what}")
