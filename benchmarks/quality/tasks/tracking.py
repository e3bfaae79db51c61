"""Variable tracking: a chain of assignments lies in noise, and every variable that has the first one's value is asked for.

RULER (arXiv 2404.06654, section 3.2) with its published setting: one chain, four hops, names of five capitals, a value of
five digits, and one worked example before the question where it fits.
"""

import string
from random import Random

from tasks.haystack import Haystack
from tasks.niah import insert

HEADER = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
ASK = (
    "\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: According to the chain(s) of "
    "variable assignment in the text above, {count} variables are assigned the value {value}, they are:"
)
HOPS = 4
NAME_LETTERS = 5
DEMONSTRATION_PIECES = 5


def build(size: int, rng: Random, haystack: Haystack | None) -> tuple[str, tuple[str, ...]]:
    """Prompt and the variables, in the order of the chain, for a text of `size` pieces."""
    names: dict[str, None] = {}
    while len(names) <= HOPS:
        names["".join(rng.choices(string.ascii_uppercase, k=NAME_LETTERS))] = None
    chain, value = tuple(names), str(rng.randrange(10_000, 100_000))
    statements = [f"VAR {name} = {source}." for name, source in zip(chain, [value, *(f"VAR {name}" for name in chain)], strict=False)]
    depths = sorted(rng.random() for _ in chain)
    text = insert((haystack or Haystack.noise()).take(size, rng), statements, depths)
    return HEADER + text + ASK.format(value=value, count=len(chain)), chain


def demonstration(rng: Random) -> str:
    """A short worked example: prompt, answer and an empty line."""
    prompt, chain = build(DEMONSTRATION_PIECES, rng, Haystack.noise())
    return f"{prompt} {' '.join(chain)}\n\n"
