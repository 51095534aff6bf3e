"""Masks against their policy: what prep makes passes, and any other token is named."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lettered_sets import kinds_of, mask_of

from prep.config import MaskConfig
from prep.inspection.verification.verify_mask import MaskResult, verify_mask
from prep.selection.loss_mask import loss_mask_of
from prep.store.samples import TRAIN_NO, TRAIN_UNSET, Samples
from shared.shard_format import Kind


def check(
    kinds: str, mask: str, *, flagged: bool = False, offsets: tuple[int, ...] = (), **policy: Any
) -> MaskResult:
    bounds = np.array([0, *offsets, len(kinds)], np.int64)
    return verify_mask(
        kinds_of(kinds), mask_of(mask), bounds, policy=MaskConfig(**policy), may_be_flagged=flagged
    )


@pytest.mark.parametrize(
    ("kinds", "mask", "policy"),
    [
        ("tutAaTt", "0001110", {}),
        ("tutAaTt", "0000110", {"boundary": "inside"}),
        ("aaTutrcT", "01100111", {}),
        ("tutaTtutaTt", "01111111111", {"train_on": "all"}),
        ("tutaTtutaTt", "00000000110", {"train_on": "last_assistant"}),
        ("tutaTtaTu", "000000110", {"train_on": "last_assistant"}),
        ("tutaTtutAaT", "00000000011", {"train_on": "last_assistant", "boundary": "inside"}),
        ("tutAaTt", "0000000", {"train_on": "last_assistant"}),
        ("tusto", "00000", {}),
    ],
)
def test_a_mask_that_follows_its_policy_passes(
    kinds: str, mask: str, policy: dict[str, Any]
) -> None:
    assert check(kinds, mask, **policy) == MaskResult(None, 0)


@pytest.mark.parametrize(
    ("kinds", "mask", "policy", "token"),
    [
        ("tutaT", "00001", {}, 3),
        ("tutaTt", "000111", {}, 5),
        ("tutAaT", "000111", {"boundary": "inside"}, 3),
        ("aT", "11", {}, 0),
        ("tuaT", "0111", {"train_on": "last_assistant"}, 1),
        ("tuaTuaT", "0011000", {"train_on": "last_assistant"}, 5),
        ("tuaTuaT", "0011011", {"train_on": "last_assistant"}, 3),
        ("tuaT", "0010", {"train_on": "last_assistant"}, 3),
        ("tuaT", "0011", {"train_on": "all"}, 1),
    ],
)
def test_a_mask_that_breaks_its_policy_is_reported_at_its_first_token(
    kinds: str, mask: str, policy: dict[str, Any], token: int
) -> None:
    result = check(kinds, mask, **policy)
    assert result.fault is not None
    assert result.fault.token == token


def test_a_turn_is_left_out_whole_or_not_at_all() -> None:
    assert check("tuaaTtuaT", "000000011", flagged=True) == MaskResult(None, 1)
    assert check("aaTaTuaT", "00011000", flagged=True) == MaskResult(None, 2)
    for mask in ("000100011", "000110011"):
        result = check("tuaaTtuaT", mask, flagged=True)
        assert result.fault is not None
        assert result.fault.token == 2


def test_last_assistant_is_judged_sequence_by_sequence() -> None:
    assert check("tuaTtuaT", "00110011", offsets=(4,), train_on="last_assistant") == MaskResult(
        None, 0
    )
    assert check("tuaTtuaT", "00110011", train_on="last_assistant").fault is not None


@st.composite
def conversations(draw: st.DrawFn) -> tuple[str, list[int], list[int], list[bool]]:
    """Samples of messages: (letters, message starts, message roles, train: false)."""
    letters, starts, roles, untrained = "", [], [], []
    for role in draw(st.lists(st.sampled_from("ua"), min_size=1, max_size=6)):
        starts.append(len(letters))
        body = draw(st.text("aAr" if role == "a" else "uU", min_size=1, max_size=4))
        letters += f"t{body}" + ("T" if role == "a" else "")
        roles.append(int(Kind.ASSISTANT if role == "a" else Kind.USER))
        untrained.append(draw(st.booleans()))
    return letters, starts, roles, untrained


@given(
    st.lists(conversations(), min_size=1, max_size=4),
    st.sampled_from(["assistant", "last_assistant", "all"]),
    st.sampled_from(["overlap", "inside"]),
    st.booleans(),
    st.integers(1, 30),
)
@settings(deadline=None, max_examples=200)
def test_every_mask_that_prep_makes_passes_even_cut_short(
    samples: list[tuple[str, list[int], list[int], list[bool]]],
    train_on: Any,
    boundary: Any,
    flags: bool,
    cut: int,
) -> None:
    policy = MaskConfig(train_on=train_on, boundary=boundary)
    kinds, masks, bounds = [], [], [0]
    for letters, starts, roles, untrained in samples:
        train = [TRAIN_NO if flags and out else TRAIN_UNSET for out in untrained]
        kind = kinds_of(letters)
        one = Samples(
            kind,
            np.array([0, len(kind)]),
            np.array([0, len(starts)]),
            np.array(starts),
            np.array(roles, np.uint8),
            np.array(train, np.uint8),
        )
        kinds.append(kind[:cut])
        masks.append(loss_mask_of(one, policy)[:cut])
        bounds.append(bounds[-1] + len(kinds[-1]))
    result = verify_mask(
        np.concatenate(kinds),
        np.concatenate(masks),
        np.array(bounds),
        policy=policy,
        may_be_flagged=flags,
    )
    assert result.fault is None
    assert flags or result.turns_left_out == 0
