"""What well-known chat formats look like, written out by hand, ⟦trained⟧ parts in brackets.

The texts are the formats' published ones, not our templates' output.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prep.config import TemplateConfig
from prep.rendering.template import load_template

Row = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """The special tokens that a template is used with."""

    bos: str
    eos: str
    control: tuple[str, ...]


CHATML = Family("<|endoftext|>", "<|endoftext|>", ("<|im_start|>", "<|im_end|>", "<|endoftext|>"))
QWEN = Family("", "<|im_end|>", CHATML.control)
LLAMA = Family(
    "<|begin_of_text|>",
    "<|eot_id|>",
    (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|eom_id|>",
    ),
)
MISTRAL = Family(
    "<s>",
    "</s>",
    ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
     "[TOOL_RESULTS]",
     "[/TOOL_RESULTS]"),
)  # fmt: skip
GEMMA = Family("<bos>", "<eos>", ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"))
FAMILIES = {
    "gemma": GEMMA,
    "llama3": LLAMA,
    "llama3.1": LLAMA,
    "mistral": MISTRAL,
    "qwen2.5": QWEN,
    "qwen3": QWEN,
}  # fmt: skip  (CHATML for every other)

TALK = [
    ("system", "S"),
    ("user", " Hi "),
    ("assistant", " Yo\n"),
    ("user", "Why?"),
    ("assistant", "So."),
]
PLAIN = TALK[1:]
RUNS = [
    ("assistant", "a"),
    ("user", "b"),
    ("user", "c"),
    ("assistant", "d"),
    ("assistant", "e"),
    ("user", "f"),
]
THOUGHT = [
    ("user", "Q"),
    ("assistant", "<think>\nhm\n</think>\n\nA"),
    ("user", "R"),
    ("assistant", "<think>\nmm\n</think>\n\nB"),
]

R1 = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves "
    "it. The assistant first thinks about the reasoning process in the mind and then provides the "
    "user with the answer. The reasoning process and answer are enclosed within <think> </think> "
    "and <answer> </answer> tags, respectively, i.e., <think> reasoning process here </think> "
    "<answer> answer here </answer>.\n\n"
)
OLMO = (
    "You are OLMo, a helpful function-calling AI assistant built by Ai2. Your date cutoff is "
    "November 2024, and your model weights are available at https://huggingface.co/allenai. You do "
    "not currently have access to any functions. <functions></functions>"
)
OLMO_7B = (
    "You are Olmo, a helpful AI assistant built by Ai2. Your date cutoff is December 2024, and "
    "your model weights are available at https://huggingface.co/allenai."
)
QWEN_SELF = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
LLAMA_DAY = (
    "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: 26 Jul 2024\n\n"
)
OLMO_DEFAULTS = {
    "olmo": OLMO,
    "olmo_old": OLMO,
    "olmo_thinker": "You are a helpful AI assistant.",
    "olmo_thinker_no_think_7b": OLMO_7B,
    "olmo_thinker_no_think_sft_tokenization": "You are a helpful AI assistant.",
    "olmo_thinker_remove_intermediate_thinking": "You are a helpful AI assistant.",
}


def im(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


WITHOUT_ENDS = (
    "simple_chat",
    "simple_concat_with_space",
    "simple_concat_with_new_line",
)  # but for the last message

Case = tuple[str, list[tuple[str, str]], str]

CHATS: list[Case] = [
    ("tulu_thinker", TALK, "<|system|>\nS\n<|user|>\n Hi \n<|assistant|>\n⟦ Yo\n<|endoftext|>⟧\n"
     "<|user|>\nWhy?\n<|assistant|>\n⟦So.<|endoftext|>⟧"),
    ("tulu_thinker", RUNS, "<|assistant|>\n⟦a<|endoftext|>⟧\n<|user|>\nb\n<|user|>\nc\n"
     "<|assistant|>\n⟦d<|endoftext|>⟧\n<|assistant|>\n⟦e<|endoftext|>⟧\n<|user|>\nf\n"),
    ("tulu_thinker", THOUGHT,
     "<|user|>\nQ\n<|assistant|>\n⟦<think>\nhm\n</think>\n\nA<|endoftext|>⟧\n"
     "<|user|>\nR\n<|assistant|>\n⟦<think>\nmm\n</think>\n\nB<|endoftext|>⟧"),
    ("tulu_thinker_r1_style", TALK,
     R1 + "<|system|>\nS\n<|user|>\n Hi \n<|assistant|>\n⟦ Yo\n<|endoftext|>⟧\n"
     "<|user|>\nWhy?\n<|assistant|>\n⟦So.<|endoftext|>⟧"),
    ("simple_concat_with_space", TALK, "S  Hi  ⟦ Yo\n⟧ Why? ⟦So.<|endoftext|>⟧"),
    ("simple_concat_with_space", RUNS, "⟦a⟧ b c ⟦d⟧ ⟦e⟧ f<|endoftext|>"),
    ("simple_concat_with_new_line", TALK, "S\n Hi \n⟦ Yo\n⟧\nWhy?\n⟦So.<|endoftext|>⟧"),
    ("simple_concat_with_new_line", RUNS, "⟦a⟧\nb\nc\n⟦d⟧\n⟦e⟧\nf<|endoftext|>"),
    ("llama3", TALK, "<|begin_of_text|>" + header("system") + "S<|eot_id|>" + header("user")
     + "Hi<|eot_id|>"
     + header("assistant") + "⟦Yo<|eot_id|>⟧" + header("user") + "Why?<|eot_id|>"
     + header("assistant")
     + "⟦So.<|eot_id|>⟧"),
    ("llama3", RUNS[:4], "<|begin_of_text|>" + header("assistant") + "⟦a<|eot_id|>⟧"
     + header("user") + "b<|eot_id|>"
     + header("user") + "c<|eot_id|>" + header("assistant") + "⟦d<|eot_id|>⟧"),
    ("llama3.1", TALK, "<|begin_of_text|>" + LLAMA_DAY + "S<|eot_id|>" + header("user")
     + "Hi<|eot_id|>"
     + header("assistant") + "⟦Yo<|eot_id|>⟧" + header("user") + "Why?<|eot_id|>"
     + header("assistant")
     + "⟦So.<|eot_id|>⟧"),
    ("llama3.1", RUNS[3:], "<|begin_of_text|>" + LLAMA_DAY + "<|eot_id|>" + header("assistant")
     + "⟦d<|eot_id|>⟧"
     + header("assistant") + "⟦e<|eot_id|>⟧" + header("user") + "f<|eot_id|>"),
    ("mistral", PLAIN, "<s>[INST]  Hi [/INST] ⟦Yo</s>⟧[INST] Why?[/INST] ⟦So.</s>⟧"),
    ("mistral", TALK, "<s>[INST]  Hi [/INST] ⟦Yo</s>⟧[INST] S\n\nWhy?[/INST] ⟦So.</s>⟧"),
    ("gemma", PLAIN,
     "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n⟦Yo<end_of_turn>⟧\n"
     "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n⟦So.<end_of_turn>⟧\n"),
    ("gemma", TALK,
     "<bos><start_of_turn>user\nS\n\nHi<end_of_turn>\n<start_of_turn>model\n⟦Yo<end_of_turn>⟧\n"
     "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n⟦So.<end_of_turn>⟧\n"),
    ("qwen2.5", TALK, im("system", "S") + im("user", " Hi ")
     + "<|im_start|>assistant\n⟦ Yo\n<|im_end|>⟧\n"
     + im("user", "Why?") + "<|im_start|>assistant\n⟦So.<|im_end|>⟧\n"),
    ("qwen2.5", RUNS, im("system", QWEN_SELF) + "<|im_start|>assistant\n⟦a<|im_end|>⟧\n"
     + im("user", "b")
     + im("user", "c")
     + "<|im_start|>assistant\n⟦d<|im_end|>⟧\n<|im_start|>assistant\n⟦e<|im_end|>⟧\n"
     + im("user", "f")),
    ("qwen3", TALK, im("system", "S") + im("user", " Hi ")
     + "<|im_start|>assistant\n⟦ Yo\n<|im_end|>⟧\n"
     + im("user", "Why?") + "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nSo.<|im_end|>⟧\n"),
    ("qwen3", RUNS, "<|im_start|>assistant\n⟦a<|im_end|>⟧\n" + im("user", "b") + im("user", "c")
     + "<|im_start|>assistant\n⟦d<|im_end|>⟧\n<|im_start|>assistant\n⟦e<|im_end|>⟧\n"
     + im("user", "f")),
    ("qwen3", THOUGHT, im("user", "Q") + "<|im_start|>assistant\n⟦A<|im_end|>⟧\n" + im("user", "R")
     + "<|im_start|>assistant\n⟦<think>\nmm\n</think>\n\nB<|im_end|>⟧\n"),
    ("olmo_thinker_remove_intermediate_thinking", THOUGHT,
     im("system", "You are a helpful AI assistant.")
     + im("user", "Q") + "<|im_start|>assistant\n⟦A<|im_end|>⟧\n" + im("user", "R")
     + "<|im_start|>assistant\n⟦<think>\nmm\n</think>\n\nB<|endoftext|>⟧"),
]  # fmt: skip
for _name, _default in OLMO_DEFAULTS.items():
    CHATS += [
        (_name, RUNS, im("system", _default) + "<|im_start|>assistant\n⟦a<|im_end|>⟧\n"
         + im("user", "b")
         + im("user", "c")
         + "<|im_start|>assistant\n⟦d<|im_end|>⟧\n<|im_start|>assistant\n⟦e<|im_end|>⟧\n"
         + im("user", "f")),
        (_name, TALK,
         im("system", "S You do not currently have access to any functions."
            " <functions></functions>")
         + im("user", " Hi ") + "<|im_start|>assistant\n⟦ Yo\n<|im_end|>⟧\n" + im("user", "Why?")
         + "<|im_start|>assistant\n⟦So.<|endoftext|>⟧"),
    ]  # fmt: skip

PROMPTS = {
    "tulu_thinker": "<|assistant|>\n<think>",
    "tulu_thinker_r1_style": "<|assistant|>\n<think>",
    "simple_concat_with_space": "",
    "simple_concat_with_new_line": "",
    "llama3": header("assistant"),
    "llama3.1": header("assistant"),
    "mistral": "",
    "gemma": "<start_of_turn>model\n",
    "qwen2.5": "<|im_start|>assistant\n",
    "qwen3": "<|im_start|>assistant\n",
    "olmo_old": "<|im_start|>assistant\n",
    "olmo_thinker": "<|im_start|>assistant\n<think>",
    "olmo_thinker_no_think_7b": "<|im_start|>assistant\n",
    "olmo_thinker_no_think_sft_tokenization": "<|im_start|>assistant\n",
    "olmo_thinker_remove_intermediate_thinking": "<|im_start|>assistant\n<think>",
}

TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object"}},
}
TOOL_JSON = (
    '{"type": "function", "function": {"name": "f", "description": "d", "parameters": '
    '{"type": "object"}}}'
)
TOOL_INDENTED = """{
    "type": "function",
    "function": {
        "name": "f",
        "description": "d",
        "parameters": {
            "type": "object"
        }
    }
}"""
QWEN_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    + TOOL_JSON
    + "\n</tools>\n\nFor each function call, "
    "return a json object with function name and arguments within <tool_call></tool_call> XML "
    "tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
LLAMA_TOOLS = (
    "Given the following functions, please respond with a JSON for a function call with its proper "
    "arguments that best "
    'answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": '
    "dictionary of argument "
    "name and its value}.Do not use variables.\n\n" + TOOL_INDENTED + "\n\n"
)


def call(arguments: Any, identifier: str = "abcdefghi") -> dict[str, Any]:
    return {"id": identifier, "type": "function", "function": {"name": "f", "arguments": arguments}}


def answered(identifier: str, text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": identifier, "content": text}


# one question, two calls at once (one call for Llama), what the tools say, an answer
ASKED = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
TWO_CALLS = [
    *ASKED,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [call({"a": "é"}), call('{"b": 1}', "jklmnopqr")],
    },
    answered("abcdefghi", "1"),
    answered("jklmnopqr", "2"),
    {"role": "assistant", "content": "A"},
]
ONE_CALL = [
    *ASKED,
    {"role": "assistant", "tool_calls": [call({"a": "é"})]},
    answered("abcdefghi", 'x"'),
    TWO_CALLS[-1],
]
TEXT_CALL = [
    *ONE_CALL[:2],
    {"role": "assistant", "tool_calls": [call('{"a": "é"}')]},
    *ONE_CALL[3:],
]
REASONED = [
    ASKED[1],
    {"role": "assistant", "content": "so", "reasoning_content": "hm", "tool_calls": [call({})]},
    answered("abcdefghi", "1"),
    {
        "role": "assistant",
        "content": [{"type": "reasoning", "text": "aha"}, {"type": "text", "text": "A"}],
    },
]
CALLS = (
    '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "f", "arguments": {"b": 1}}\n</tool_call><|im_end|>'
)
RESULTS = "\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"
_LLAMA_TALK = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n"
    "Cutting Knowledge Date: "
    "December 2023\nToday Date: 26 Jul 2024\n\nS<|eot_id|>" + header("user") + LLAMA_TOOLS
    + "Q<|eot_id|>"
    + header("assistant") + '⟦{"name": "f", "parameters": {"a": "é"}}<|eot_id|>⟧'
    + header("ipython")
    + '"x\\""<|eot_id|>' + header("assistant") + "⟦A<|eot_id|>⟧"
)  # fmt: skip

TOOL_CHATS: list[tuple[str, Row, str]] = [
    ("qwen3", {"messages": TWO_CALLS, "tools": [TOOL]}, im("system", "S\n\n" + QWEN_TOOLS)
     + im("user", "Q")
     + f"<|im_start|>assistant\n⟦{CALLS}⟧\n<|im_start|>user{RESULTS}<|im_end|>\n"
     "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nA<|im_end|>⟧\n"),
    ("qwen3", {"messages": REASONED}, im("user", "Q")
     + "<|im_start|>assistant\n⟦<think>\nhm\n</think>\n\nso\n"
     '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>⟧\n'
     "<|im_start|>user\n<tool_response>\n1\n</tool_response><|im_end|>\n"
     "<|im_start|>assistant\n⟦<think>\naha\n</think>\n\nA<|im_end|>⟧\n"),
    ("qwen2.5", {"messages": TWO_CALLS, "tools": [TOOL]}, im("system", "S\n\n" + QWEN_TOOLS)
     + im("user", "Q")
     + f"<|im_start|>assistant\n⟦{CALLS}⟧\n<|im_start|>user{RESULTS}<|im_end|>\n"
     "<|im_start|>assistant\n⟦A<|im_end|>⟧\n"),
    ("qwen2.5", {"messages": TWO_CALLS[1:3], "tools": [TOOL]},
     im("system", f"{QWEN_SELF}\n\n{QWEN_TOOLS}")
     + im("user", "Q") + f"<|im_start|>assistant\n⟦{CALLS}⟧\n"),
    ("mistral", {"messages": TWO_CALLS, "tools": [TOOL, TOOL]},
     f"<s>[AVAILABLE_TOOLS] [{TOOL_JSON}, {TOOL_JSON}][/AVAILABLE_TOOLS][INST] S\n\nQ[/INST]"
     '⟦[TOOL_CALLS] [{"name": "f", "arguments": {"a": "é"}, "id": "abcdefghi"}, '
     '{"name": "f", "arguments": {"b": 1}, "id": "jklmnopqr"}]</s>⟧'
     '[TOOL_RESULTS] {"content": 1, "call_id": "abcdefghi"}[/TOOL_RESULTS]'
     '[TOOL_RESULTS] {"content": 2, "call_id": "jklmnopqr"}[/TOOL_RESULTS] ⟦A</s>⟧'),
    ("llama3.1", {"messages": ONE_CALL, "tools": [TOOL]}, _LLAMA_TALK),
    ("llama3.1", {"messages": TEXT_CALL, "tools": [TOOL]}, _LLAMA_TALK),
]  # fmt: skip


def specials_of(name: str) -> dict[str, str]:
    family = FAMILIES.get(name, CHATML)
    return {"bos_token": family.bos, "eos_token": family.eos}


def text_of(name: str) -> str:
    return load_template(TemplateConfig(name=name), Path(), None).text
