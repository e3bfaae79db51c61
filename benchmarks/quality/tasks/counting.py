"""Aggregation: which words of a long list are the most frequent (RULER, arXiv 2404.06654, section 3.3).

Common words: ten words occur thirty times each, all others three times (six times and once where thirty take too much of the length, as
RULER does for short contexts), with one worked example where it fits. Frequent words: coded words of six letters whose frequencies fall as
rank to the power -2; the most frequent of all is replaced by dots, and the next three are asked for.
"""

import string
from random import Random

from tasks.words import ADJECTIVES, NOUNS, PLAIN, UNMISTAKABLE

COMMON_HEADER = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear most often.\n"
)
COMMON_ASK = (
    "\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words that appear most often in the list are:"
)
COMMON, FEW, MANY = 10, (6, 1), (30, 3)
DEMONSTRATION_REPEATS, DEMONSTRATION_OTHERS = (3, 1), 10

FREQUENT_HEADER = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded words. "
)
FREQUENT_ASK = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently appeared words in the "
    "above coded text? Answer: According to the coded text above, the three most frequently appeared words are:"
)
ALPHA, ZETA_ALPHA, ASKED, CODE_LETTERS = 2.0, 1.6449340668, 3, 6


def common(others: int, repeats: tuple[int, int], rng: Random) -> tuple[str, tuple[str, ...]]:
    """Prompt and the ten common words, with `others` different words beside them; `repeats`: how often a common and another word occurs."""
    words = _different(COMMON + others, rng)
    entries = words[:COMMON] * repeats[0] + words[COMMON:] * repeats[1]
    rng.shuffle(entries)
    listed = " ".join(f"{place}. {word}" for place, word in enumerate(entries, 1))
    return COMMON_HEADER + listed + COMMON_ASK, tuple(words[:COMMON])


def demonstration(rng: Random) -> str:
    """A short worked example of common words: prompt, answer and an empty line."""
    prompt, answers = common(DEMONSTRATION_OTHERS, DEMONSTRATION_REPEATS, rng)
    return f"{prompt} {' '.join(answers)}\n\n"


def frequent(size: int, rng: Random) -> tuple[str, tuple[str, ...]]:
    """Prompt and the three most frequent coded words of a text of about `size` words (rounded down rank by rank)."""
    text, ranks = [], []
    for rank in range(1, size + 1):
        count = int(size * rank**-ALPHA / ZETA_ALPHA)
        if count < 1 and rank > ASKED + 2:
            break
        word = "...." if rank == 1 else "".join(rng.choices(string.ascii_lowercase, k=CODE_LETTERS))
        ranks.append(word)
        text += [word] * max(count, 1)
    rng.shuffle(text)
    return FREQUENT_HEADER + " ".join(text) + FREQUENT_ASK, tuple(ranks[1 : 1 + ASKED])


def _different(count: int, rng: Random) -> list[str]:
    """Different words in random order: plain ones while they last, then adjective-noun pairs. The first ten are part of no other plain
    word, so that whoever names another has not named them."""
    words = rng.sample(PLAIN, len(PLAIN))
    first = [word for word in words if word in UNMISTAKABLE][:COMMON]
    words = first + [word for word in words if word not in first]
    if count <= len(words):
        return words[:count]
    pairs = [f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS]
    if count - len(words) > len(pairs):
        raise ValueError(f"a list of {count} different words; {len(words) + len(pairs)} exist")
    return words + rng.sample(pairs, count - len(words))
