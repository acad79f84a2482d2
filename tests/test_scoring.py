"""Scores against definitions written a second time, published examples, and properties that hold for any strings."""

from __future__ import annotations

import random
from fractions import Fraction
from functools import cache

import pytest

from masters.samples import METRICS, Sample
from masters.scoring import anls, choice_match, chosen_letter, contains, exact_match, levenshtein, relaxed_match, score


@cache
def recursive_distance(a: str, b: str) -> int:
    """Edit distance straight from its recursive definition, the other way round from a table."""
    if not a or not b:
        return len(a) + len(b)
    if a[0] == b[0]:
        return recursive_distance(a[1:], b[1:])
    return 1 + min(recursive_distance(a[1:], b), recursive_distance(a, b[1:]), recursive_distance(a[1:], b[1:]))


def random_word(rng: random.Random, longest: int = 9, letters: str = "abcé ") -> str:
    return "".join(rng.choice(letters) for _ in range(rng.randint(0, longest)))


def test_levenshtein_against_the_recursive_definition() -> None:
    rng = random.Random(0)
    for _ in range(400):
        a, b = random_word(rng), random_word(rng)
        assert levenshtein(a, b) == recursive_distance(a, b), (a, b)


def test_levenshtein_is_a_metric() -> None:
    rng = random.Random(1)
    for _ in range(300):
        a, b, c = (random_word(rng, 14) for _ in range(3))
        assert levenshtein(a, b) == levenshtein(b, a)
        assert (levenshtein(a, b) == 0) == (a == b)
        assert levenshtein(a, c) <= levenshtein(a, b) + levenshtein(b, c)


@pytest.mark.parametrize(("a", "b", "distance"), [("kitten", "sitting", 3), ("saturday", "sunday", 3), ("", "abc", 3), ("intention", "execution", 5)])
def test_levenshtein_textbook_examples(a: str, b: str, distance: int) -> None:
    assert levenshtein(a, b) == distance


def anls_as_published(text: str, answer: str) -> float:
    """Biten et al. 2019, equation 1, with the evaluation script's border: s = 1 - NL where NL <= 0.5, else 0; case does not count."""
    a, b = " ".join(text.strip().lower().split()), " ".join(answer.strip().lower().split())
    if not a and not b:
        return 1.0
    normalised = Fraction(recursive_distance(a, b), max(len(a), len(b)))
    return float(1 - normalised) if normalised <= Fraction(1, 2) else 0.0


def test_anls_against_the_published_formula() -> None:
    rng = random.Random(2)
    for _ in range(400):
        answer = random_word(rng, 8, "abC ")
        text = "".join(letter if rng.random() < 0.8 else rng.choice("abC ") for letter in answer) + random_word(rng, 2)
        assert anls(text, answer) == pytest.approx(anls_as_published(text, answer), abs=1e-12), (text, answer)


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("Hello Wrold", "Hello World", 1 - 2 / 11),  # the example of the ANLS* package, printed there as 0.82
        ("hello world", "Hello  World", 1.0),
        ("ab", "ax", 0.5),  # exactly half still counts, in every published evaluation
        ("abc", "axy", 0.0),
        ("abc", "abx", 2 / 3),
        ("completely else", "42", 0.0),
    ],
)
def test_anls_examples(text: str, answer: str, expected: float) -> None:
    assert anls(text, answer) == pytest.approx(expected)


def relaxed_as_published(text: str, answer: str) -> bool:
    """ChartQA's relaxed correctness (Masry et al. 2022), in exact arithmetic."""

    def number(value: str) -> Fraction | None:
        try:
            return Fraction(value[:-1]) / 100 if value.endswith("%") else Fraction(value)
        except ValueError:
            return None

    found, target = number(text), number(answer)
    if found is not None and target:
        return abs(found - target) <= abs(target) / 20
    return text.lower() == answer.lower()


def test_relaxed_against_the_published_rule() -> None:
    rng = random.Random(3)
    verdicts = set()
    for _ in range(2000):
        target = rng.choice([rng.randint(-50, 50), round(rng.uniform(-9, 9), 2)])
        factor = rng.choice([1, 1.03, 0.96, 1.049, 0.951, 1.051, 0.949, 2, -1])
        unit = rng.choice(["", "%"])
        text, answer = f"{float(target) * factor:.6f}{unit}", f"{target}{rng.choice([unit, '%'])}"
        assert bool(relaxed_match(text, answer)) == relaxed_as_published(text, answer), (text, answer)
        verdicts.add(relaxed_as_published(text, answer))
    assert verdicts == {True, False}


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("105", "100", 1),
        ("105.1", "100", 0),
        ("95", "100", 1),
        ("-100", "100", 0),
        ("1,234", "1234", 1),
        ("$5", "5.1", 1),
        ("12%", "0.12", 1),
        ("12", "12%", 0),
        ("0", "0", 1),
        ("0.001", "0", 0),  # nothing is within 5% of zero
        ("Yes", "yes", 1),
        ("nan", "nan", 1),  # a word here, not a number
        ("inf", "5", 0),
        ("about 100", "100", 0),
    ],
)
def test_relaxed_examples(text: str, answer: str, expected: float) -> None:
    assert relaxed_match(text, answer) == expected


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [(" Teal. ", "teal", 1), ("dark  red", "dark red", 1), ("3", "3.", 1), ("red", "red!", 0), ("0.5", "05", 0), ("", "x", 0)],
)
def test_exact_examples(text: str, answer: str, expected: float) -> None:
    assert exact_match(text, answer) == expected


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("It is a red circle.", "Red", 1),
        ("It is a reddish circle", "red", 0),
        ("credit", "red", 0),
        ("cost: $5 (five)", "$5", 1),
        ("it is 15", "5", 0),
        ("made in the U.S. in May", "U.S.", 1),
        ("a+b*c", "b*c", 1),
    ],
)
def test_contains_examples(text: str, answer: str, expected: float) -> None:
    assert contains(text, answer) == expected


COLOURS = ("red", "dark red", "blue", "no colour")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" b ", "B"),
        ("(c)", "C"),
        ("C.", "C"),
        ("C. blue", "C"),
        ("C) it is blue", "C"),
        ("Answer: D", "D"),
        ("answer (a)", "A"),
        ("The answer is C", "C"),
        ("The correct option is: **B**", "B"),
        ("blue", "C"),
        ("Dark Red.", "B"),
        ("I see a blue circle", "C"),
        ("it is dark red", "B"),  # which also holds the word of A
        ("red or blue", None),
        ("A blue circle", "C"),  # an article, no letter
        ("a red thing", "A"),
        ("Bananas", None),
        ("E", None),
        ("", None),
        ("dunno", None),
    ],
)
def test_letter_that_a_text_names(text: str, letter: str | None) -> None:
    assert chosen_letter(text, COLOURS) == letter


def test_choice_match_takes_letters_and_words_on_both_sides() -> None:
    assert choice_match("The answer is C", "blue", COLOURS) == 1
    assert choice_match("blue", "C", COLOURS) == 1
    assert choice_match("blue", "B", COLOURS) == 0
    assert choice_match("red or blue", "A", COLOURS) == 0
    assert choice_match("A", "A", ()) == 0


def test_every_option_is_found_by_letter_and_by_words() -> None:
    rng = random.Random(4)
    for _ in range(100):
        choices = tuple(sorted({random_word(rng, 6, "klmno") for _ in range(rng.randint(2, 26))} - {""}))
        for letter, choice in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", choices, strict=False):
            if choice in "klmno":  # a single letter is a name of an option and an option: either reading is fair
                continue
            assert chosen_letter(f"{letter}. {choice}", choices) == letter
            assert chosen_letter(choice.upper(), choices) == letter


def test_score_takes_the_best_answer_and_none_for_silence() -> None:
    sample = Sample("0", (), "?", ("4", "four"), "exact")
    assert [score(sample, text) for text in ("4", "Four.", "5", "", "  \n")] == [1, 1, 0, 0, 0]


@pytest.mark.parametrize("metric", METRICS)
def test_scores_stay_within_bounds_and_an_answer_scores_one(metric: str) -> None:
    rng = random.Random(5)
    choices = ("ab", "ba", "cc") if metric == "choice" else ()
    for _ in range(200):
        answers = ("B", "cc") if metric == "choice" else ("12", random_word(rng) + "x")
        sample = Sample("0", (), "?", answers, metric, choices)
        assert 0 <= score(sample, random_word(rng)) <= 1
        assert all(score(sample, answer) == 1 for answer in answers)
