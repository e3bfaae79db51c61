"""Needles in a haystack: sentences that give a key a number, one or more of which a question asks for.

Wording, seven-digit numbers and adjective-noun keys are RULER's (arXiv 2404.06654, section 3.1 and appendix B):
single has one needle, multikey four of which one is asked for, multivalue one key with four numbers, multiquery four keys
that are all asked for. `niah` is the same with ten needles, one asked for, whose depth is chosen.
"""

from dataclasses import dataclass
from random import Random

from tasks.haystack import Haystack
from tasks.words import ADJECTIVES, NOUNS

NEEDLE = "One of the special magic numbers for {key} is: {value}."
HEADER_ONE = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the number afterwards.\n"
)
HEADER_MANY = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards.\n"
)
ASK_ONE = (
    "\nWhat is the special magic number for {key} mentioned in the provided text? "
    "The special magic number for {key} mentioned in the provided text is"
)
ASK_MANY = (
    "\nWhat are all the special magic numbers for {key} mentioned in the provided text? "
    "The special magic numbers for {key} mentioned in the provided text are"
)
DIGITS = 7


@dataclass(frozen=True)
class Form:
    """How many keys lie in the text, how many numbers each has, how many keys are asked for; which haystack, unless one is given."""

    keys: int
    values: int
    asked: int
    noise: bool

    @property
    def has_depth(self) -> bool:
        """One number answers: where it lies can be chosen."""
        return self.values * self.asked == 1


FORMS = {
    "niah": Form(keys=10, values=1, asked=1, noise=False),
    "niah_single": Form(keys=1, values=1, asked=1, noise=True),
    "niah_multikey": Form(keys=4, values=1, asked=1, noise=False),
    "niah_multivalue": Form(keys=1, values=4, asked=1, noise=False),
    "niah_multiquery": Form(keys=4, values=1, asked=4, noise=False),
}


def keys(count: int, rng: Random) -> list[str]:
    """`count` different adjective-noun keys."""
    chosen: dict[str, None] = {}
    while len(chosen) < count:
        chosen[f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"] = None
    return list(chosen)


def number(rng: Random) -> str:
    """Seven digits, the first not 0."""
    return str(rng.randrange(10 ** (DIGITS - 1), 10**DIGITS))


def question(asked: list[str], answers: int) -> str:
    """The question about these keys up to where the answer begins."""
    listed = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
    return (ASK_ONE if answers == 1 else ASK_MANY).format(key=listed)


def insert(pieces: list[str], needles: list[str], depths: list[float]) -> str:
    """The pieces with each needle before the piece at its depth (0: first, 1: after the last), as one text without a final break."""
    at = [(round(depth * len(pieces)), text) for depth, text in sorted(zip(depths, needles, strict=True), key=lambda pair: pair[0])]
    out, last = [], 0
    for place, text in at:
        out += pieces[last:place]
        out.append(text + ("\n" if place == 0 or pieces[place - 1].endswith("\n") else " "))
        last = place
    return "".join(out + pieces[last:]).rstrip()


def build(name: str, size: int, rng: Random, depth: float | None, haystack: Haystack | None) -> tuple[str, tuple[str, ...], float | None]:
    """Prompt, answers in the order of the question (values of one key in the order of the text), depth of the needle asked for."""
    form = FORMS[name]
    named = keys(form.keys, rng)
    pairs = [(key, number(rng)) for key in named for _ in range(form.values)]
    asked = named[: form.asked]  # the needles' places are random: the first keys are as good as any
    depths = [rng.random() for _ in pairs]
    if form.has_depth and depth is not None:
        depths[0] = depth
    found = [(place, value) for (key, value), place in zip(pairs, depths, strict=True) if key in asked]
    answers = tuple(value for _, value in (sorted(found) if form.values > 1 else found))
    stack = haystack or (Haystack.noise() if form.noise else Haystack.source())
    text = insert(stack.take(size, rng), [NEEDLE.format(key=key, value=value) for key, value in pairs], depths)
    prompt = (HEADER_ONE if len(answers) == 1 else HEADER_MANY) + text + question(asked, len(answers))
    return prompt, answers, depths[0] if form.has_depth else None
