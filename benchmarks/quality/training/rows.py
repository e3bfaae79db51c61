"""Rows of training text: pieces with the weight that each byte's loss has.

Text that can be predicted is worth little here: what trains retrieval is bytes that nothing but the context foretells. So besides plain
text and the tasks themselves there are rows with many questions about one text, and drills in which most bytes are such.
"""

import string
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import corpus
from tasks import NAMES, Haystack, completion, example, niah
from tasks.words import ADJECTIVES, NOUNS, PLAIN
from vocabulary import END

END_TEXT = chr(END)  # one code point: ids are read off the text's UTF-16
PROMPT_WEIGHT, TEXT_WEIGHT, ANSWER_WEIGHT_MAX = 0.3, 1.0, 60.0
ANSWER_SHARE = 0.3  # of a row's length is what its answers weigh together, where the cap allows it
# The least length at which a task is set: below it the text would be a line or two.
LEAST = {"niah": 1500, "niah_single": 400, "niah_multikey": 900, "niah_multivalue": 900, "niah_multiquery": 1000, "vt": 600}
LEAST |= {"cwe": 1024, "fwe": 400}
SEPARATORS = (": ", " = ", " is ", " -> ", ", ", " is: ")
ALPHABETS = (string.digits, string.ascii_lowercase, string.ascii_uppercase, string.hexdigits[:16], string.ascii_letters + string.digits)


@dataclass(frozen=True)
class Piece:
    """Text; `answer`: it can be known from the context alone; `weight`: of each other byte."""

    text: str
    answer: bool = False
    weight: float = PROMPT_WEIGHT


Row = list[Piece]


def text(length: int, rng: Random) -> Row:
    """Consecutive documents of the training part, from a random place in the first."""
    documents = corpus.documents("train")
    at = rng.choices(range(len(documents)), cum_weights=_sizes())[0]
    start = rng.randrange(max(1, len(documents[at]) - length // 2))
    out, room = [documents[at][start:]], length
    while (room := room - len(out[-1]) - 1) > 0:
        at = (at + 1) % len(documents)
        out.append(documents[at])
    return [Piece(END_TEXT.join(out), weight=TEXT_WEIGHT)]


def task(length: int, rng: Random) -> Row:
    """One example of a task, or several shorter ones."""
    parts = rng.choice((1, 1, 1, 2, 4))
    while length // parts < min(LEAST.values()):
        parts //= 2
    out: Row = []
    for _ in range(parts):
        name = rng.choice([name for name in NAMES if LEAST[name] <= length // parts])
        stack = None if name in ("cwe", "fwe") else haystack(rng)
        made = example(name, length // parts - 1, len, rng.getrandbits(40), haystack=stack)
        out += [Piece(made.prompt), Piece(completion(made) + END_TEXT, answer=True)]
    return out


def questions(length: int, rng: Random) -> Row:
    """Many needles in one text, then question after question about them."""
    asked = max(1, length // rng.choice((400, 800, 1600)))
    pairs = [(key, niah.number(rng)) for key in niah.keys(max(asked, min(length // rng.choice((200, 400, 800)), 60)), rng)]
    asks: Row = []
    for key, value in rng.sample(pairs, asked):
        asks += [Piece(niah.question([key], 1)), Piece(f" {value}.{END_TEXT}", answer=True)]
    needles = [niah.NEEDLE.format(key=key, value=value) for key, value in pairs]
    room = length - len(niah.HEADER_MANY) - sum(len(piece.text) for piece in asks) - sum(map(len, needles)) - len(needles)
    pieces = _fill(haystack(rng), max(room, 0), rng)
    return [Piece(niah.HEADER_MANY + niah.insert(pieces, needles, [rng.random() for _ in needles])), *asks]


def pairs(length: int, rng: Random) -> Row:
    """Keys with values, then the same keys in another order, whose values are the answers."""
    form = rng.choice((_line, _line, _needle, _assignment))
    key_of, value_of = _keys(rng), _values(rng)
    sep = rng.choice(SEPARATORS)
    out, room = Row(), length
    while room > 0:
        known = {key_of(): value_of() for _ in range(rng.choice((3, 6, 12, 24, 48, max(3, length // 50))))}
        again = rng.sample(sorted(known), rng.randint(2, len(known)) if len(known) > 2 else len(known))
        made = [Piece("".join("".join(form(key, value, sep)) for key, value in known.items()))]
        for key in again:
            before, value, after = form(key, known[key], sep)
            made += [Piece(before), Piece(value, answer=True), Piece(after)]
        out += made
        room -= sum(len(piece.text) for piece in made)
    return out


def copies(length: int, rng: Random) -> Row:
    """Random strings that come again: one over and over, or several in any order, of which all but the first bytes are answers."""
    alphabet = rng.choice(ALPHABETS)
    if rng.random() < 0.5:
        period = "".join(rng.choices(alphabet, k=rng.randint(length // 8, length // 2)))
        again = period * (length // len(period))
        return [Piece(period + period[:1]), Piece((again + period)[1 : length + 1 - len(period)], answer=True)]
    out, room = Row(), length
    while room > 0:
        count = rng.choice((1, 2, 4, 8, max(1, length // 100)))
        strings = ["".join(rng.choices(alphabet, k=rng.choice((8, 16, 32)))) for _ in range(count)]
        made = [Piece(" ".join(strings) + " ")]
        for copied in rng.choices(strings, k=2 * count):
            made += [Piece(copied[:3]), Piece(copied[3:], answer=True), Piece(" ")]
        out += made
        room -= sum(len(piece.text) for piece in made)
    return out


def haystack(rng: Random) -> Haystack:
    """Noise or the source that is trained on."""
    return Haystack.noise() if rng.random() < 0.4 else Haystack.source("train")


def _fill(stack: Haystack, room: int, rng: Random) -> list[str]:
    out: list[str] = []
    for piece in stack.take(room // 8 + 1, rng):
        if (room := room - len(piece)) < 0:
            break
        out.append(piece)
    return out


def _line(key: str, value: str, sep: str) -> tuple[str, str, str]:
    return key + sep, value, "\n"


def _needle(key: str, value: str, _: str) -> tuple[str, str, str]:
    before, after = niah.NEEDLE.split("{value}")
    return before.format(key=key), value, after + "\n"


def _assignment(key: str, value: str, _: str) -> tuple[str, str, str]:
    return f"VAR {key} = ", value, ". "


def _keys(rng: Random) -> Callable[[], str]:
    return rng.choice(
        (
            lambda: rng.choice(PLAIN),
            lambda: f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}",
            lambda: f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}",
            lambda: "".join(rng.choices(string.ascii_uppercase, k=5)),
        )
    )


def _values(rng: Random) -> Callable[[], str]:
    return rng.choice(
        (lambda: niah.number(rng), lambda: niah.number(rng), lambda: str(rng.randrange(10_000, 100_000)), lambda: rng.choice(PLAIN))
    )


def _sizes() -> list[int]:
    total, out = 0, []
    for document in corpus.documents("train"):
        out.append(total := total + len(document))
    return out
