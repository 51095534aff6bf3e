"""The skills of the demo mixture: questions that a model of a million parameters learns to answer.

A skill draws an `Exercise`: a first question, and perhaps follow-ups that refer to the answer
before them. Its `key` names what is asked about, whatever the wording: a split by key keeps the
digits of a held-out question out of the training questions of that skill under every wording.
"""

import random
import string
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Exercise:
    """Questions with their answers, in the order of the conversation."""

    key: str
    turns: tuple[tuple[str, str], ...]


Skill = Callable[[random.Random], Exercise]

_FOLLOW_UP_SHARE = 0.5


def reverse(rng: random.Random) -> Exercise:
    """Write digits in the opposite order."""
    digits = _draw_digits(rng)
    wording = rng.choice(("Reverse {}.", "Write {} backwards."))
    turns = [(wording.format(digits), digits[::-1])]
    return Exercise(digits, (*turns, *_follow_up(rng, digits[::-1])))


def sort_digits(rng: random.Random) -> Exercise:
    """Write digits in rising order."""
    digits = _draw_digits(rng)
    wording = rng.choice(("Sort {}.", "Put {} in order."))
    answer = "".join(sorted(digits))
    return Exercise(digits, ((wording.format(digits), answer), *_follow_up(rng, answer)))


def shift(rng: random.Random) -> Exercise:
    """Replace every digit by the next one; 0 follows 9."""
    digits = _draw_digits(rng)
    wording = rng.choice(("Shift {}.", "Add 1 to each digit of {}."))
    answer = _shifted(digits)
    return Exercise(digits, ((wording.format(digits), answer), *_follow_up(rng, answer)))


def pick(rng: random.Random) -> Exercise:
    """Name one digit by its position or its size, then others of the same digits."""
    digits = _draw_digits(rng)
    first, *others = rng.sample(sorted(_PICKS), rng.choice((1, 1, 2)))
    turns = [(f"What is the {first} digit of {digits}?", _PICKS[first](digits))]
    turns += [(f"And the {name}?", _PICKS[name](digits)) for name in others]
    return Exercise(digits, tuple(turns))


def add(rng: random.Random) -> Exercise:
    """Add two numbers below 100, step by step: ones, tens, the carry if there is one, the sum."""
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    ones, tens = a % 10 + b % 10, a // 10 + b // 10
    steps = [f"{a % 10}+{b % 10}={ones}", f"{a // 10}+{b // 10}={tens}"]
    if ones > 9:
        steps.append(f"{tens}+1={tens + 1}")
    wording = rng.choice(("What is {}+{}?", "Add {} and {}."))
    return Exercise(
        f"{min(a, b)} {max(a, b)}", ((wording.format(a, b), f"{', '.join(steps)}: {a + b}"),)
    )


SKILLS: dict[str, Skill] = {
    "add": add,
    "pick": pick,
    "reverse": reverse,
    "shift": shift,
    "sort": sort_digits,
}

_PICKS: dict[str, Callable[[str], str]] = {
    "first": lambda digits: digits[0],
    "last": lambda digits: digits[-1],
    "largest": max,
    "smallest": min,
}


def _draw_digits(rng: random.Random) -> str:
    return "".join(rng.sample(string.digits, rng.choice((3, 4, 4))))


def _follow_up(rng: random.Random, answer: str) -> tuple[tuple[str, str], ...]:
    """Ask about the last answer without naming it again."""
    if rng.random() >= _FOLLOW_UP_SHARE:
        return ()
    # The question does not name the digits: only the conversation tells them.
    kind = rng.choice(("reverse", "sort", "shift", "first", "last"))
    if kind in _PICKS:
        return ((f"Now only the {kind} digit.", _PICKS[kind](answer)),)
    changed = {"reverse": answer[::-1], "sort": "".join(sorted(answer)), "shift": _shifted(answer)}
    return ((f"Now {kind} that.", changed[kind]),)


def _shifted(digits: str) -> str:
    return "".join(str((int(digit) + 1) % 10) for digit in digits)
