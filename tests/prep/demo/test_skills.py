"""The skills: every answer is that of a second solver, which reads the questions alone."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prep.demo.skills import SKILLS

CHANGES = {
    "reverse": lambda digits: digits[::-1],
    "backwards": lambda digits: digits[::-1],
    "sort": lambda digits: "".join(sorted(digits)),
    "in order": lambda digits: "".join(sorted(digits)),
    "shift": lambda digits: digits.translate(str.maketrans("0123456789", "1234567890")),
    "add 1 to each digit": lambda digits: digits.translate(
        str.maketrans("0123456789", "1234567890")
    ),
    "first": lambda digits: digits[0],
    "last": lambda digits: digits[len(digits) - 1],
    "largest": lambda digits: sorted(digits)[-1],
    "smallest": lambda digits: sorted(digits)[0],
}


def solve(question: str, subject: str) -> str:
    """Return the answer to a question about `subject`, where it does not name digits itself."""
    question = question.lower()
    if addends := re.search(r"(\d+)(?:\+| and )(\d+)", question):
        a, b = map(int, addends.groups())
        ones, tens = a % 10 + b % 10, a // 10 + b // 10
        carry = f", {tens}+1={tens + 1}" if ones > 9 else ""
        return f"{a % 10}+{b % 10}={ones}, {a // 10}+{b // 10}={tens}{carry}: {a + b}"
    (change,) = [change for word, change in CHANGES.items() if word in question]
    return change(subject)


@pytest.mark.parametrize("skill", SKILLS)
@given(seed=st.integers(0, 2**32))
def test_every_answer_is_right(skill: str, seed: int) -> None:
    exercise = SKILLS[skill](random.Random(seed))
    subject = exercise.key
    for question, answer in exercise.turns:
        assert answer == solve(question, subject), question
        # a follow-up is about the answer before it, but those of `pick` are about the same digits
        subject = exercise.key if skill == "pick" else answer


@pytest.mark.parametrize("skill", SKILLS)
@given(seed=st.integers(0, 2**32))
def test_the_key_is_what_the_first_question_asks_about(skill: str, seed: int) -> None:
    exercise = SKILLS[skill](random.Random(seed))
    first = exercise.turns[0][0].replace("Add 1 to each", "")
    numbers = re.findall(r"\d+", first)
    assert " ".join(sorted(numbers, key=int)) == " ".join(exercise.key.split())
