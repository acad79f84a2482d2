"""The rule judge's verdicts."""

from __future__ import annotations

import pytest

from masters.distill.judge import Verdict, is_repetitive, judge
from masters.samples import Sample

OPEN = Sample("1", (), "which colour?", ("teal", "green"))
CHOICE = Sample("2", (), "which?", ("B",), "choice", ("red", "blue", "teal"))


@pytest.mark.parametrize("text", ["teal", "Green.", " TEAL "])
def test_any_accepted_answer_is_right(text: str):
    assert judge(OPEN, text) == Verdict(1.0, "exact 1.00")


@pytest.mark.parametrize(("text", "right"), [("B", 1.0), ("blue", 1.0), ("A", 0.0), ("red", 0.0), ("no idea", 0.0)])
def test_the_samples_own_metric_decides(text: str, right: float):
    assert judge(CHOICE, text).value == right


def test_parts_of_a_score_round_to_a_verdict():
    near = Sample("3", (), "which word?", ("metamorphosis",), "anls")
    assert judge(near, "metamorphosys") == Verdict(1.0, "anls 0.92")
    assert judge(near, "butterfly") == Verdict(0.0, "anls 0.00")


@pytest.mark.parametrize("text", ["", "  \n\t"])
def test_an_empty_response_is_wrong(text: str):
    assert judge(OPEN, text) == Verdict(0.0, "empty")
    assert judge(Sample("4", (), "describe"), text) == Verdict(0.0, "empty"), "with or without ground truth"


def test_a_repetitive_response_is_wrong_even_if_it_holds_the_answer():
    text = "the answer is teal " * 6
    sample = Sample("5", (), "which colour?", ("teal",), "contains")
    assert judge(sample, "the answer is teal").value == 1.0
    assert judge(sample, text) == Verdict(0.0, "repetitive")


def test_without_ground_truth_there_is_no_verdict():
    assert judge(Sample("6", (), "describe the picture"), "a red circle") == Verdict(None, "no ground truth")


def test_what_counts_as_repetitive():
    assert is_repetitive("no " * 12)
    assert not is_repetitive("no " * 11), "short texts are not judged"
    assert is_repetitive("a red circle on a white ground " * 4)
    assert not is_repetitive("a red circle on a white ground, left of a smaller teal triangle that touches the lower edge of the picture")
    # Six words said twice make 9 runs of four, of which 6 are distinct; said three times 15, of which 6 are: under half.
    words = "one two three four five six "
    assert not is_repetitive(words * 2)
    assert is_repetitive(words * 3)
