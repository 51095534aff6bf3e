"""Chat templates in the shape of well-known ones, each beside a hand-written account of what it
prints.

An account yields (text, trained): what the definition of a mask says, told without any rendering.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Messages = list[dict[str, Any]]
Account = Callable[[Messages], Iterator[tuple[str, bool]]]


@dataclass(frozen=True)
class Foreign:
    text: str
    account: Account
    special_tokens: dict[str, str]
    control: tuple[str, ...]
    strips: bool = False  # it trims contents


def chatml(messages: Messages) -> Iterator[tuple[str, bool]]:
    if messages[0]["role"] != "system":
        yield "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", False
    for message in messages:
        trained = message["role"] == "assistant"
        yield f"<|im_start|>{message['role']}\n", False
        yield message["content"] + "<|im_end|>", trained
        yield "\n", False


CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% "
    "endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def llama3(messages: Messages) -> Iterator[tuple[str, bool]]:
    yield "<|begin_of_text|>", False
    for message in messages:
        yield f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n", False
        yield message["content"].strip() + "<|eot_id|>", message["role"] == "assistant"


LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% "
    "endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% "
    "endif %}"
)


def mistral(messages: Messages) -> Iterator[tuple[str, bool]]:
    system = messages[0]["content"] + "\n\n" if messages[0]["role"] == "system" else ""
    turns = messages[1:] if system else messages
    yield "<s>", False
    for index, message in enumerate(turns):
        if message["role"] == "user":
            merged = (
                system
                if index == max(i for i, m in enumerate(turns) if m["role"] == "user")
                else ""
            )
            yield f"[INST] {merged}{message['content']} [/INST]", False
        else:
            yield " ", False
            yield message["content"] + "</s>", True


MISTRAL = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- "
    "endif %}"
    "{{- bos_token }}{%- for message in loop_messages %}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('After the optional system message, conversation roles must alternate') "
    "}}{%- endif %}"
    "{%- if message['role'] == 'user' %}"
    "{%- if system_message is defined and loop.index0 >= loop_messages | length - 2 and "
    "loop_messages[loop.index0 + 2] is not defined %}"
    "{{- '[INST] ' + system_message + '\\n\\n' + message['content'] + ' [/INST]' }}"
    "{%- else %}{{- '[INST] ' + message['content'] + ' [/INST]' }}{%- endif %}"
    "{%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] + eos_token }}"
    "{%- else %}{{- raise_exception('Only user and assistant roles are supported') }}{%- endif %}"
    "{%- endfor %}"
)


def gemma(messages: Messages) -> Iterator[tuple[str, bool]]:
    yield "<bos>", False
    for message in messages:
        role = "model" if message["role"] == "assistant" else message["role"]
        yield f"<start_of_turn>{role}\n", False
        yield message["content"].strip() + "<end_of_turn>", role == "model"
        yield "\n", False


GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not "
    "supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % "
    "2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% "
    "endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
)


def zephyr(messages: Messages) -> Iterator[tuple[str, bool]]:
    for message in messages:
        yield f"<|{message['role']}|>\n", False
        yield message["content"] + "</s>", message["role"] == "assistant"
        yield "\n", False


ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\\n' + message['content'] + eos_token }}\n{% elif message['role'] == "
    "'assistant' %}\n"
    "{{ '<|assistant|>\\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)


def phi(messages: Messages) -> Iterator[tuple[str, bool]]:
    for message in messages:
        yield f"<|{message['role']}|>\n", False
        yield message["content"] + "<|end|>", message["role"] == "assistant"
        yield "\n", False
    yield "<|endoftext|>", False


PHI = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + "
    "'<|end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}"
    "{% endif %}"
)


def deepseek(messages: Messages) -> Iterator[tuple[str, bool]]:
    yield "<begin>", False
    yield "".join(message["content"] for message in messages if message["role"] == "system"), False
    for message in messages:
        if message["role"] == "user":
            yield "<User>" + message["content"], False
        elif message["role"] == "assistant":
            yield "<Assistant>", False
            yield message["content"] + "<end>", True


DEEPSEEK = (
    "{% set ns = namespace(system='') %}{%- for message in messages %}{%- if message['role'] == "
    "'system' %}"
    "{% set ns.system = ns.system + message['content'] %}{%- endif %}{%- endfor %}{{ bos_token }}"
    "{{ ns.system }}"
    "{%- for message in messages %}{%- if message['role'] == 'user' %}{{ '<User>' + "
    "message['content'] }}"
    "{%- elif message['role'] == 'assistant' %}"
    "{%- set content = message['content'] %}{%- if '</think>' in content %}"
    "{%- set content = content.split('</think>')[-1] %}{%- endif %}"
    "{{ '<Assistant>' + content + eos_token }}{%- endif %}{%- endfor %}"
    "{% if add_generation_prompt %}{{ '<Assistant><think>\\n' }}{% endif %}"
)


def olmo2(messages: Messages) -> Iterator[tuple[str, bool]]:
    yield "<|endoftext|>", False
    for index, message in enumerate(messages):
        yield f"<|{message['role']}|>\n", False
        if message["role"] != "assistant":
            yield message["content"] + "\n", False
        else:
            yield message["content"] + "<|endoftext|>", True
            yield "" if index == len(messages) - 1 else "\n", False


OLMO2 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ '<|system|>\\n' + message['content'] + '\\n' }}{% elif message['role'] == 'user' %}"
    "{{ '<|user|>\\n' + message['content'] + '\\n' }}{% elif message['role'] == 'assistant' %}"
    "{% if not loop.last %}{{ '<|assistant|>\\n'  + message['content'] + eos_token + '\\n' }}"
    "{% else %}{{ '<|assistant|>\\n'  + message['content'] + eos_token }}{% endif %}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}"
)

FOREIGN = {
    "chatml": Foreign(
        CHATML, chatml, {"eos_token": "<|im_end|>"}, ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    ),
    "chatml, another eos": Foreign(
        CHATML,
        chatml,
        {"eos_token": "<|endoftext|>"},
        ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    ),
    "llama3": Foreign(
        LLAMA3,
        llama3,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
        (
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ),
        strips=True,
    ),
    "mistral": Foreign(
        MISTRAL, mistral, {"bos_token": "<s>", "eos_token": "</s>"}, ("<s>", "</s>")
    ),
    "gemma": Foreign(
        GEMMA,
        gemma,
        {"bos_token": "<bos>", "eos_token": "<eos>"},
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        strips=True,
    ),
    "zephyr": Foreign(ZEPHYR, zephyr, {"bos_token": "<s>", "eos_token": "</s>"}, ("<s>", "</s>")),
    "phi": Foreign(
        PHI,
        phi,
        {"eos_token": "<|endoftext|>"},
        ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    ),
    "deepseek": Foreign(
        DEEPSEEK,
        deepseek,
        {"bos_token": "<begin>", "eos_token": "<end>"},
        ("<begin>", "<end>", "<User>", "<Assistant>"),
    ),
    "olmo2": Foreign(
        OLMO2,
        olmo2,
        {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
        ("<|endoftext|>", "<|pad|>"),
    ),
}
