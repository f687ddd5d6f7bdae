"""Words of a raw text, with the characters that each covers."""

from __future__ import annotations

import unicodedata

# Inside a word, between two of its letters, these do not end it: don't, U.S, 3.5, x@y.org, AT&T, state-of-the-art, a_b.
JOINING = frozenset("'\u2019.@&_-+#")
# And these not between two digits: 10,000 and 12:30 and 1/2, but one,two are three words.
JOINING_DIGITS = frozenset(",:/")
# What goes on to the next white space, but for the signs at its end.
ADDRESSES = ("http://", "https://", "www.")


def split_words(text: str) -> list[tuple[int, int]]:
    """The words of a text as (start, end) in characters, the end exclusive.

    A word is a run of letters, digits and their marks, in which signs such as `.`, `-` and `'` may stand between two of
    them (`,` and `:` between digits only), or a sign such as @ or # right before them. Every other sign is a word of its
    own, and so is every Chinese character; a web address is one word. White space and control characters are in no word.

    >>> [text[start:end] for text in ["Don't pay 3,500 to Ada (U.S.)!"] for start, end in split_words(text)]
    ["Don't", 'pay', '3,500', 'to', 'Ada', '(', 'U.S', '.', ')', '!']
    """
    words = []
    place = 0
    while place < len(text):
        end = _end_of_word(text, place)
        if end > place:
            words.append((place, end))
        place = max(end, place + 1)
    return words


def _end_of_word(text: str, start: int) -> int:
    """Where the word that begins at `start` ends; `start` itself where none does."""
    kind = _kind(text[start])
    if kind == "space":
        return start
    if text.startswith(ADDRESSES, start):
        return _end_of_address(text, start)
    end = start + 1
    names_something = text[start] in "@#" and end < len(text) and _kind(text[end]) == "letter"
    if kind == "alone" or (kind == "sign" and not names_something):
        return end
    while end < len(text) and (_kind(text[end]) == "letter" or _joins(text, end)):
        end += 1
    return end


def _end_of_address(text: str, start: int) -> int:
    end = start
    while end < len(text) and _kind(text[end]) != "space":
        end += 1
    while _kind(text[end - 1]) == "sign" and text[end - 1] != "/":
        end -= 1
    return end


def _joins(text: str, place: int) -> bool:
    """Whether the sign at `place` stands between two letters that it does not part."""
    if place + 1 >= len(text):
        return False
    before, after = text[place - 1], text[place + 1]
    if text[place] in JOINING_DIGITS:
        return before.isdigit() and after.isdigit()
    return text[place] in JOINING and _kind(before) == "letter" and _kind(after) == "letter"


def _kind(character: str) -> str:
    """letter (also digits and combining marks), alone (Chinese characters), space (also control characters) or sign."""
    category = unicodedata.category(character)
    if category[0] in "ZC":
        return "space"
    if category[0] in "LNM":
        return "alone" if _is_chinese(ord(character)) else "letter"
    return "sign"


def _is_chinese(code: int) -> bool:
    """The blocks that BERT's tokenizer splits into characters."""
    return (
        0x4E00 <= code <= 0x9FFF or 0x3400 <= code <= 0x4DBF or 0xF900 <= code <= 0xFAFF or 0x20000 <= code <= 0x2FA1F
    )
