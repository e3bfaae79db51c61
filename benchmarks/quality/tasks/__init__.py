"""Needle and RULER tasks as text, for any tokenizer: `example` makes one of a given length, `score` judges a completion."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from tasks import counting, niah, tracking
from tasks.haystack import Haystack

__all__ = ["NAMES", "Example", "Haystack", "completion", "example", "new_tokens", "score"]

NAMES: tuple[str, ...] = (*niah.FORMS, "vt", "cwe", "fwe")
MANY_SHARE = 2  # common words occur thirty times where that takes at most one part in two of the length, else six times
DEMONSTRATION_SHARE = 6  # a worked example may take one part in six of the length
# Characters of the longest completion, with some for a full stop and a line's end: numbers, variables, words with a hyphen.
ANSWER_CHARACTERS = {"vt": 34, "cwe": 100, "fwe": 25}

Built = tuple[str, tuple[str, ...], float | None]


@dataclass(frozen=True)
class Example:
    """A prompt that ends where the answer begins; all `answers` must be found. `depth` in 0..1: where the one needle asked for lies."""

    task: str
    prompt: str
    answers: tuple[str, ...]
    depth: float | None


def new_tokens(name: str) -> int:
    """Characters that a complete answer takes, so at most as many tokens."""
    _check_name(name)
    if name in niah.FORMS:
        form = niah.FORMS[name]
        return (niah.DIGITS + 2) * form.values * form.asked + 3
    return ANSWER_CHARACTERS[name]


def example(
    name: str, tokens: int, count: Callable[[str], int], seed: int, depth: float | None = None, haystack: Haystack | None = None
) -> Example:
    """The longest example of a task whose prompt and answer fit into `tokens`.

    `count` gives a text's length in tokens. `depth` in 0..1 places the needle that is asked for (tasks with one such needle only;
    random without). `haystack` replaces the published one: noise for niah_single and vt, running text for the other needles, which is
    the standard library's source here; cwe and fwe have none. The same arguments give the same example.
    Raises ValueError: unknown task, a depth or haystack that the task has no use for, too few tokens (names the least).
    """
    _check_name(name)
    _check_options(name, depth, haystack)
    budget = tokens - new_tokens(name)
    build = _builder(name, tokens, count, seed, depth, haystack)
    prompt, answers, found_depth = _longest(name, build, count, budget)
    return Example(name, prompt, answers, found_depth)


def score(example: Example, completion: str) -> float:
    """The share of the answers that the completion contains, whatever their case: RULER's string match, 0..1."""
    text = completion.lower()
    return sum(answer.lower() in text for answer in example.answers) / len(example.answers)


def completion(example: Example) -> str:
    """A correct answer in the form that the worked examples show, from the first character after the prompt."""
    return " " + (", " if example.task in niah.FORMS else " ").join(example.answers) + "."


def _builder(
    name: str, tokens: int, count: Callable[[str], int], seed: int, depth: float | None, haystack: Haystack | None
) -> Callable[[int], Built]:
    """From a size (pieces, words) to an example; every size draws from the same seed."""

    def rng() -> Random:
        return Random(f"{name} {seed}")

    if name in niah.FORMS:
        return lambda size: niah.build(name, size, rng(), depth, haystack)
    if name == "fwe":
        return lambda size: (*counting.frequent(size, rng()), None)
    show = tracking.demonstration if name == "vt" else counting.demonstration
    shown = show(Random(f"{name} {seed} demonstration"))
    if count(shown) * DEMONSTRATION_SHARE > tokens:
        shown = ""
    if name == "vt":
        return lambda size: _after(shown, tracking.build(size, rng(), haystack))
    most = counting.common(1, counting.MANY, rng())[0]
    repeats = counting.MANY if count(most) * MANY_SHARE <= tokens else counting.FEW
    return lambda size: _after(shown, counting.common(size, repeats, rng()))


def _after(shown: str, built: tuple[str, tuple[str, ...]]) -> Built:
    return shown + built[0], built[1], None


def _longest(name: str, build: Callable[[int], Built], count: Callable[[str], int], budget: int) -> Built:
    """The example of the largest size that fits, by doubling and then halving the interval."""
    make = functools.lru_cache(maxsize=2)(build)
    low, high = 1, 2
    if (least := count(make(low)[0])) > budget:
        raise ValueError(f"{name} takes at least {least + new_tokens(name)} tokens, {budget + new_tokens(name)} were given")
    while count(make(high)[0]) <= budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(make(middle)[0]) <= budget else (low, middle)
    return build(low)


def _check_name(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"there is no task {name!r}; the tasks are {', '.join(NAMES)}")


def _check_options(name: str, depth: float | None, haystack: Haystack | None) -> None:
    if haystack is not None and name in ("cwe", "fwe"):
        raise ValueError(f"{name} is a list of words: it has no haystack")
    if depth is None:
        return
    if name not in niah.FORMS or not niah.FORMS[name].has_depth:
        allowed = ", ".join(task for task, form in niah.FORMS.items() if form.has_depth)
        raise ValueError(f"{name} has no single needle whose depth could be chosen; these have: {allowed}")
    if not 0 <= depth <= 1:
        raise ValueError(f"depth is {depth}; it is a share of the text, 0 to 1")
