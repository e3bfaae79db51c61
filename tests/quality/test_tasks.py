"""Tasks are what RULER says they are: the answer is in the text, once where it should be, at the depth asked for, and no longer fits."""

import re
from collections import Counter
from random import Random

import pytest
import tasks
from hypothesis import given
from hypothesis import strategies as st
from tasks import Haystack, counting, niah

SEEDS = st.integers(0, 2**32)
LENGTHS = st.integers(2000, 9000)
PROSE = Haystack.text("One two three. Four five! Six?\n\nSeven eight nine ten eleven.\n" * 3, "prose")


def size(text: str) -> int:
    return len(text.encode())


def words(text: str) -> int:
    """A tokenizer unlike bytes."""
    return len(re.findall(r"\w+|\S", text))


@pytest.mark.parametrize("name", tasks.NAMES)
@given(seed=SEEDS, tokens=LENGTHS)
def test_prompt_and_answer_fit_and_a_longer_prompt_would_not(name: str, seed: int, tokens: int) -> None:
    for count, limit in ((size, tokens), (words, tokens // 3)):
        example = tasks.example(name, limit, count, seed)
        assert count(example.prompt) + tasks.new_tokens(name) <= limit
        assert len(tasks.completion(example)) <= tasks.new_tokens(name)
        # One piece of noise, source or list is at most a line or one word of the list (and the repetitions that it brings).
        assert count(example.prompt) + tasks.new_tokens(name) > limit - 250
    assert tasks.example(name, tokens, size, seed) == tasks.example(name, tokens, size, seed)
    assert tasks.example(name, tokens, size, seed).prompt != tasks.example(name, tokens, size, seed + 1).prompt


@pytest.mark.parametrize("name", tasks.NAMES)
@given(seed=SEEDS)
def test_scores_are_shares_of_the_answers_found(name: str, seed: int) -> None:
    example = tasks.example(name, 3000, size, seed)
    assert tasks.score(example, tasks.completion(example)) == 1.0
    assert tasks.score(example, tasks.completion(example).upper()) == 1.0
    assert tasks.score(example, "") == 0.0
    found = tasks.score(example, "it is " + example.answers[0])
    assert found == pytest.approx(1 / len(example.answers))


@pytest.mark.parametrize("name", niah.FORMS)
@given(seed=SEEDS, tokens=LENGTHS)
def test_needles_are_in_the_text_and_the_answers_are_those_of_the_keys_asked_for(name: str, seed: int, tokens: int) -> None:
    form, example = niah.FORMS[name], tasks.example(name, tokens, size, seed)
    text, question = example.prompt.rsplit("\nWhat", 1)
    needles = re.findall(r"One of the special magic numbers for ([a-z]+-[a-z]+) is: ([1-9][0-9]{6})\.", text)
    assert len(needles) == form.keys * form.values and len({key for key, _ in needles}) == form.keys
    asked = [key for key, _ in needles if re.search(rf"\b{key}\b", question)]
    assert len(set(asked)) == form.asked
    assert sorted(example.answers) == sorted(value for key, value in needles if key in asked)
    if form.values > 1:
        assert example.answers == tuple(value for _, value in needles)  # in the order of the text
    for value in example.answers:
        assert value not in question


@given(seed=SEEDS, depth=st.floats(0, 1))
def test_the_needle_asked_for_lies_at_its_depth(seed: int, depth: float) -> None:
    """By the pieces of text before it: the share of characters differs, as lines' lengths do and where other needles lie."""
    for name in ("niah", "niah_single", "niah_multikey"):
        example = tasks.example(name, 6000, size, seed, depth=depth)
        assert example.depth == depth
        text = example.prompt.split(niah.HEADER_ONE)[1].rsplit("\nWhat is", 1)[0]
        pieces = Haystack.text(text).pieces
        hay = [not piece.startswith(niah.NEEDLE.split("{")[0]) for piece in pieces]
        (at,) = [i for i, piece in enumerate(pieces) if not hay[i] and example.answers[0] in piece]
        assert sum(hay[:at]) == round(depth * sum(hay))


def test_a_depth_sweep_moves_the_needle_monotonically() -> None:
    prompts = [tasks.example("niah", 4000, size, 7, depth=depth / 10) for depth in range(11)]
    places = [prompt.prompt.index(prompt.answers[0]) for prompt in prompts]
    assert places == sorted(places) and len(set(places)) == 11
    assert len({prompt.answers for prompt in prompts}) == 1


@given(seed=SEEDS, tokens=st.integers(600, 9000))
def test_the_chain_of_variables_is_whole_in_order_and_the_only_one(seed: int, tokens: int) -> None:
    example = tasks.example("vt", tasks.new_tokens("vt") + tokens, size, seed)
    text = example.prompt.rsplit("Memorize and track", 1)[1].split("\nQuestion:")[0]
    assert ("they are:" in example.prompt.split(text)[0]) == (example.prompt.count("Question:") == 2)
    statements = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)\.", text)
    assert [name for name, _ in statements] == list(example.answers) and len(set(example.answers)) == 5
    value = re.findall(r"assigned the value (\d{5}), they are:$", example.prompt)
    assert [source for _, source in statements] == [*value, *example.answers[:-1]]


@given(seed=SEEDS, tokens=st.integers(1500, 12000))
def test_common_words_are_the_ten_most_common_by_a_wide_margin(seed: int, tokens: int) -> None:
    example = tasks.example("cwe", tokens, size, seed)
    listed = example.prompt.rsplit("most often.\n", 1)[1].split("\nQuestion")[0]
    entries = re.findall(r"(\d+)\. ([a-z-]+)", listed)
    assert [int(place) for place, _ in entries] == list(range(1, len(entries) + 1))
    counts = Counter(word for _, word in entries)
    common = {counts[word] for word in example.answers}
    assert common in ({6}, {30}) and (common == {30} or tokens < 9000) and (common == {6} or tokens > 6000)
    other = 1 if common == {6} else 3
    assert len(set(example.answers)) == 10
    assert {count for word, count in counts.items() if word not in example.answers} == {other}


@given(seed=SEEDS, tokens=st.integers(700, 9000))
def test_frequent_words_come_second_to_fourth_after_the_dots(seed: int, tokens: int) -> None:
    example = tasks.example("fwe", tokens, size, seed)
    coded = example.prompt.split("coded words. ", 1)[1].split("\nQuestion")[0].split(" ")
    ranked = Counter(coded).most_common()
    assert ranked[0][0] == "...."
    counts = dict(ranked)
    asked = [counts[word] for word in example.answers]
    assert asked == sorted(asked, reverse=True) and asked == [count for _, count in ranked[1:4]]
    assert all(re.fullmatch("[a-z]{6}", word) for word in example.answers)
    # The published law: the second rank is a quarter of the first.
    assert counts[example.answers[0]] == pytest.approx(counts["...."] / 4, abs=1)


def test_a_haystack_of_ones_own_is_used_and_wraps_around() -> None:
    example = tasks.example("niah_single", 3000, size, 1, haystack=PROSE)
    assert "Seven eight nine ten eleven." in example.prompt and "The grass is green." not in example.prompt
    assert "The grass is green." in tasks.example("niah_single", 3000, size, 1).prompt


def test_long_lists_of_words_go_on_with_pairs_and_say_when_they_end() -> None:
    words_many = counting._different(5000, Random(0))
    assert len(set(words_many)) == 5000
    with pytest.raises(ValueError, match="different words"):
        counting._different(10**6, Random(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("needle", 4096, size, 1), "no task 'needle'; the tasks are niah, "),
        (("vt", 100, size, 1), "vt takes at least .* tokens, 100 were given"),
        (("vt", 4096, size, 1, 0.5), "vt has no single needle"),
        (("niah_multivalue", 4096, size, 1, 0.5), "these have: niah, niah_single, niah_multikey"),
        (("niah", 4096, size, 1, 1.5), "depth is 1.5; it is a share"),
        (("cwe", 4096, size, 1, None, PROSE), "cwe is a list of words"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tasks.example(*arguments)  # type: ignore[arg-type]


def test_an_empty_haystack_is_refused() -> None:
    with pytest.raises(ValueError, match="holds no text"):
        Haystack.text("\n \n", "nothing")
