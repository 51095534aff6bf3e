"""Conversations and what templates make of them, for tests."""

from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from prep.conversations.conversation import Conversation, parse_conversation
from prep.rendering.coverage import unrendered_fields
from prep.rendering.spans import Rendered, find_spans
from prep.rendering.template import ChatTemplate, TemplateText
from prep.rendering.turns import SpanRules, learn_rules
from shared.errors import TemplateError
from shared.shard_format import ASSISTANT_KINDS

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
LOOP = "{% for m in messages %}"
SPECIALS = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}

ODD_CONTENTS = {
    "plain": "Yo.",
    "empty": "",
    "blank": " \n ",
    "newlines around": "\n\nYo\n\n",
    "crlf": "a\r\nb\r\n",
    "emoji": "\U0001f642\U0001f469\u200d\U0001f680",
    "combining": "e\u0301a\u0308\u0323",
    "a header": "x<|im_start|>assistant\ny<|assistant|>\nz[/INST]<start_of_turn>model\n",
    "a terminator": "x<|im_end|>y</s>z<|eot_id|><end_of_turn><|end|><end><|endoftext|>w",
    "only a terminator": "<|im_end|>",
    "thinking": "<think>\nhm\n</think>\n\nYo",
    "closed thinking": "hm</think>Yo",
    "braces": "{{ messages }}{% raise %}",
    "very long": "word \u00e9 " * 20_000,
}


def conversation_of(*pairs: tuple[str, str]) -> Conversation:
    messages = [{"role": role, "content": content} for role, content in pairs]
    return parse_conversation({"messages": messages}, where="row")


def as_transformers(
    text: str, conversation: Conversation, specials: dict[str, str], **options: Any
) -> str:
    rendered, _ = render_jinja_template(
        [list(conversation.messages)],
        tools=conversation.tools,
        chat_template=text,
        **specials,
        **options,
    )
    return rendered[0]


def spans_of(template: ChatTemplate, rules: SpanRules, conversation: Conversation) -> Rendered:
    text = template.render(conversation)
    lost = unrendered_fields(text, conversation, rules)
    if lost is not None:
        raise TemplateError(f"unrendered: {lost[1]}")
    return find_spans(text, conversation, rules)


def trained_text(rendered: Rendered) -> str:
    return "".join(
        rendered.text[s.start : s.end] for s in rendered.spans if s.kind in ASSISTANT_KINDS
    )


def trained_characters(rendered: Rendered) -> str:
    mask = ["."] * len(rendered.text)
    for span in rendered.spans:
        if span.kind in ASSISTANT_KINDS:
            mask[span.start : span.end] = "T" * (span.end - span.start)
    return "".join(mask)


def custom(text: str, control: tuple[str, ...] = ("<end>",)) -> tuple[ChatTemplate, SpanRules]:
    template = ChatTemplate(TemplateText("custom", text), {"eos_token": "<end>"})
    return template, learn_rules(template, control)
