"""Markers of a template are found by their form, in order, and a tokenizer that splits one is
named with the number of tokens."""

import tomllib

import pytest
import tokenizers
from known_templates import CHATML, FAMILIES, specials_of, text_of
from trained_tokenizers import CONTROL, tokenizer_json

from prep.rendering.control.markers import printed_markers, required_markers, split_markers
from prep.rendering.template import ChatTemplate, TemplateText, shipped_templates

MARKERS = ["<|im_start|>", "<\uff5cUser\uff5c>", "<start_of_turn>", "</s>", "[INST]", "[/INST]"]


@pytest.mark.parametrize("name", sorted(shipped_templates()))
def test_the_required_markers_are_printed_and_are_control_tokens_of_the_family(name: str) -> None:
    markers = set(required_markers(name))
    control = set(FAMILIES.get(name, CHATML).control)
    assert markers <= control
    assert all(marker in text_of(name) for marker in markers)
    template = ChatTemplate(TemplateText(name, text_of(name)), specials_of(name))
    opens_and_closes = (set(printed_markers(template)) & control) - set(specials_of(name).values())
    assert opens_and_closes <= markers


def test_every_shipped_template_has_its_line_of_markers() -> None:
    file = next(iter(shipped_templates().values())).with_name("markers.toml")
    assert set(tomllib.loads(file.read_text())) == set(shipped_templates())


@pytest.mark.parametrize(
    "refusal",
    [
        "",
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}",
        "{% if messages | length > 2 %}{{ raise_exception('one question') }}{% endif %}",
    ],
)
def test_markers_of_all_forms_are_found_once_in_order(refusal: str) -> None:
    text = (
        refusal
        + "{% for m in messages %}"
        + " ".join(MARKERS)
        + "{{ m.content }}{{ '<' + m.content + '>' }} a < b > c [x] <|> [1]{% endfor %}"
    )
    markers = printed_markers(ChatTemplate(TemplateText("test", text), {}))
    assert [marker for marker in markers if marker in MARKERS] == MARKERS
    words = {"<alpha>", "<beta>", "<gamma>", "<delta>", "<epsilon>"}
    assert set(markers) - set(MARKERS) <= words
    assert {"<beta>", "<gamma>"} <= set(markers)


def test_a_template_that_refuses_every_conversation_has_no_markers() -> None:
    text = "<|im_start|>{{ raise_exception('never') }}"
    assert printed_markers(ChatTemplate(TemplateText("test", text), {})) == ()


@pytest.mark.parametrize("family", ["byte-level", "sentencepiece, first"])
def test_a_split_marker_is_counted_in_tokens(family: str) -> None:
    tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json(family))
    counts = split_markers([*CONTROL, *MARKERS], tokenizer)
    assert set(counts) == set(MARKERS) - set(CONTROL)
    for marker, count in counts.items():
        ids = tokenizer.encode(marker, add_special_tokens=False).ids
        assert count == len(ids) > 1


def test_a_marker_that_is_unknown_to_the_tokenizer_counts_as_no_token() -> None:
    model = tokenizers.models.WordLevel({"<unk>": 0, "<|a|>": 1}, unk_token="<unk>")
    assert split_markers(["<|a|>", "<|b|>"], tokenizers.Tokenizer(model)) == {"<|b|>": 0}
