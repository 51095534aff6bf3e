"""The card of a pushed set survives any name."""

from pathlib import Path

from pushed_sets import (
    make_set,
)

from prep.sharing.dataset_card import render_set_card
from prep.sharing.wire_format import contents_of_set


def test_a_card_survives_any_name(tmp_path: Path) -> None:
    made = make_set(tmp_path / "tiny", name='a "b" | <script>\n# c')
    card = render_set_card(contents_of_set(made)).decode()
    assert '\npretty_name: "a \\"b\\" | <script>\\n# c"\n' in card
    assert '\n# a "b" \\| &lt;script> # c\n' in card
