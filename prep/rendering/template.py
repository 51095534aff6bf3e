"""Chat templates: find one, compile it in a sandbox, render a conversation once and keep the origin
of every character.

The text is the one that `apply_chat_template` of transformers prints: the same sandbox settings,
filters and globals. One thing differs: `strftime_now` prints the day of `template.date`, or the
shards would depend on the day they are built.
"""

import datetime
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import BuiltinMethodType
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from prep.config import TemplateConfig
from prep.conversations.conversation import Conversation
from prep.rendering.traced_str import Traced, join, json_marked, traced
from shared.config import shipped_files
from shared.errors import ConfigError, TemplateError
from shared.hashing import sha256_bytes

# two private-use characters, printed around generation blocks by `generation_blocks` alone
BLOCK_BRACKETS = "\U0010fffc\U0010fffd"
REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")

_QUESTION = Conversation(messages=({"role": "user", "content": "x"},), tools=None, train=(None,))


@dataclass(frozen=True, slots=True)
class TemplateText:
    name: str
    text: str
    is_shipped: bool = False

    @property
    def sha256(self) -> str:
        return sha256_bytes(self.text.encode("utf-8"))

    @property
    def asks_for_date(self) -> bool:
        return "strftime_now" in self.text


def shipped_templates() -> dict[str, Path]:
    """Return the chat templates that ship with the package: name -> file."""
    return shipped_files("prep", "templates", ".jinja")


def load_template(
    config: TemplateConfig, base: Path, tokenizer_template: str | None
) -> TemplateText:
    """Return the text of the configured template, with a BOS in front if `add_bos` is set.

    Raises ConfigError for an unknown name, or if the tokenizer has no template.
    """
    shipped = shipped_templates()
    if config.name == "tokenizer":
        if not tokenizer_template:
            raise ConfigError(
                'template.name = "tokenizer", but this tokenizer has no chat template; '
                f"use one of {', '.join(shipped)} or a .jinja file"
            )
        text = tokenizer_template
    elif config.name in shipped:
        text = shipped[config.name].read_text(encoding="utf-8").removesuffix("\n")
    elif config.name.endswith(".jinja"):
        try:
            text = (base / config.name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigError(f"template.name = {config.name!r}: {exc}") from exc
    else:
        raise ConfigError(
            f'template.name = {config.name!r}; expected one of {", ".join(shipped)}, "tokenizer" or'
            " a .jinja file"
        )
    name = Path(config.name).stem if config.name.endswith(".jinja") else config.name
    return TemplateText(
        name, "{{ bos_token }}" + text if config.add_bos else text, config.name in shipped
    )


def today() -> str:
    """Return the local day as YYYY-MM-DD, the one that `strftime_now` of transformers prints."""
    return datetime.datetime.now().date().isoformat()


class ChatTemplate:
    """A compiled template. `render` gives traced text; `render_plain` gives the same characters
    without tracing."""

    def __init__(
        self, template: TemplateText, special_tokens: Mapping[str, str], date: str = ""
    ) -> None:
        self.name = template.name
        self._text = template.text
        self._date = date
        self._variables = dict(special_tokens)
        plain = _environment(ImmutableSandboxedEnvironment, date)
        try:
            tree = plain.parse(template.text)
            self.has_generation_marks = any(
                node.identifier == _GenerationBlocks.identifier
                for node in tree.find_all(jinja2.nodes.ExtensionAttribute)
            )
            self._plain = plain.from_string(tree)
            self._traced = _environment(TracingEnvironment, date).from_string(template.text)
        except jinja2.TemplateSyntaxError as exc:
            raise ConfigError(
                f"template {template.name!r}, line {exc.lineno}: {exc.message}"
            ) from exc

    def render(self, conversation: Conversation) -> Traced:
        """Render once, with every character of the conversation traced. Raises TemplateError if the
        template refuses the conversation."""
        messages = [
            {
                key: (
                    value
                    if key == "role"
                    else traced(
                        value, index, "reasoning_content" if key in REASONING_NAMES else key
                    )
                )
                for key, value in _with_reasoning_names(message).items()
            }
            for index, message in enumerate(conversation.messages)
        ]
        tools = None if conversation.tools is None else traced(conversation.tools, -1, "tools")
        text = self._render(self._traced, messages, tools, add_generation_prompt=False)
        return text if isinstance(text, Traced) else Traced(text)

    def render_plain(
        self, conversation: Conversation, *, add_generation_prompt: bool = False
    ) -> str:
        """Render as transformers does."""
        messages = [_with_reasoning_names(message) for message in conversation.messages]
        return self._render(
            self._plain, messages, conversation.tools, add_generation_prompt=add_generation_prompt
        )

    def generation_blocks(self, conversation: Conversation) -> list[tuple[int, int]]:
        """Return the character ranges that generation blocks print, in order, without tracing.
        Raises TemplateError."""
        template = _environment(
            ImmutableSandboxedEnvironment, self._date, _BracketedBlocks
        ).from_string(self._text)
        messages = [_with_reasoning_names(message) for message in conversation.messages]
        text = self._render(template, messages, conversation.tools, add_generation_prompt=False)
        # brackets nest; they do not count as characters of the text
        blocks, starts, position = [], [], 0
        for piece in re.split(f"([{BLOCK_BRACKETS}])", text):
            if piece == BLOCK_BRACKETS[0]:
                starts.append(position)
            elif piece == BLOCK_BRACKETS[1]:
                blocks.append((starts.pop(), position))
            else:
                position += len(piece)
        return sorted(blocks)

    def render_messages(
        self, messages: list[dict[str, Any]], environment: type["TracingEnvironment"]
    ) -> str:
        """Render messages that are traced already, in an environment of that class. Raises
        TemplateError."""
        template = _environment(environment, self._date).from_string(self._text)
        return self._render(template, messages, None, add_generation_prompt=False)

    def literals(self) -> list[str]:
        """Return the strings that the template itself contains, those of its variables included."""
        tree = _environment(ImmutableSandboxedEnvironment, self._date).parse(self._text)
        constants = [
            node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)
        ]
        return [
            *constants,
            *(n.data for n in tree.find_all(jinja2.nodes.TemplateData)),
            *self._variables.values(),
        ]

    def generation_prompt(self) -> str:
        """Return what the template prints to open an assistant's turn, "" if it prints nothing."""
        try:
            closed = self.render_plain(_QUESTION)
            opened = self.render_plain(_QUESTION, add_generation_prompt=True)
        except TemplateError:
            return ""
        return opened.removeprefix(closed) if opened.startswith(closed) else ""

    def opening(self) -> str:
        """Return how the template prints a first question, "" if it refuses one."""
        return self.render_or_empty(*_QUESTION.messages)

    def render_or_empty(self, *messages: dict[str, Any]) -> str:
        """Return what the template prints for messages that probe it, "" if it refuses them."""
        try:
            return self.render_plain(
                Conversation(messages=messages, tools=None, train=(None,) * len(messages))
            )
        except TemplateError:
            return ""

    def _render(
        self,
        template: jinja2.Template,
        messages: list[dict[str, Any]],
        tools: Any,
        *,
        add_generation_prompt: bool,
    ) -> str:
        try:
            return template.render(
                **self._variables,
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        # Whatever a template trips over in a row (a missing key, a division by zero) is a refusal
        # of this row. Errors of the machine, such as MemoryError, are not.
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as exc:
            raise TemplateError(f"the template {self.name!r} refuses it: {exc}") from exc


def reasoning_of(message: Mapping[str, Any]) -> Any:
    """Return the reasoning of a message under whatever name it came; None if there is none."""
    return next((message[name] for name in REASONING_NAMES if message.get(name) is not None), None)


def _with_reasoning_names(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return the message with its reasoning under the names that templates read, as transformers
    does."""
    reasoning = reasoning_of(message)
    if reasoning is None:
        return dict(message)
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


class TracingCodeGenerator(CodeGenerator):
    """Compiles `a ~ b` to the environment's `concat`, which keeps marks."""

    def visit_Concat(self, node: jinja2.nodes.Concat, frame: Frame) -> None:
        self.write("concat((")
        for part in node.nodes:
            self.write("str(")
            self.visit(part, frame)
            self.write("), ")
        self.write("))")


# Python's `"".join` runs in C and returns a plain str without marks. Jinja's generated code calls
# `environment.concat` for its output; the three other joins of a template are replaced here: `~`,
# the filter, and the method of a literal.
class TracingEnvironment(ImmutableSandboxedEnvironment):
    code_generator_class = TracingCodeGenerator

    @staticmethod
    def join_marked(separator: str, parts: Iterable[str]) -> str:
        return join(separator, parts)

    def concat(self, parts: Iterable[str]) -> str:
        return self.join_marked("", parts)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if (
            isinstance(function, BuiltinMethodType)
            and function.__name__ == "join"
            and type(function.__self__) is str
        ):
            # Jinja hands the variables of a loop to every call within it, and drops them itself
            arguments = {k: v for k, v in kwargs.items() if k not in ("_loop_vars", "_block_vars")}
            return self.join_marked(function.__self__, *args, **arguments)
        return super().call(context, function, *args, **kwargs)

    def replace_filters(self) -> None:
        """Replace filters of Jinja's by ones that keep marks."""
        self.filters["join"] = _join_filter


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: what an assistant wrote, marked as one block."""

    tags = {"generation"}  # noqa: RUF012  (declared so by jinja)

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Macro) -> str:
        text = caller()
        return (text if isinstance(text, Traced) else Traced(text)).in_block()


class _BracketedBlocks(_GenerationBlocks):
    """Generation blocks between two characters of Unicode's private use."""

    def _mark(self, caller: Macro) -> str:
        return f"{BLOCK_BRACKETS[0]}{caller()}{BLOCK_BRACKETS[1]}"


def _environment(
    cls: type[ImmutableSandboxedEnvironment],
    date: str,
    blocks: type[_GenerationBlocks] = _GenerationBlocks,
) -> ImmutableSandboxedEnvironment:
    environment = cls(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[blocks, jinja2.ext.loopcontrols],
        cache_size=0,
    )

    def strftime_now(form: str) -> str:
        if not date:
            raise jinja2.TemplateError(
                'it prints today\'s date; set template.date = "YYYY-MM-DD" to fix the day'
            )
        return datetime.datetime.fromisoformat(date).strftime(form)

    environment.filters["tojson"] = _to_json
    if isinstance(environment, TracingEnvironment):
        environment.replace_filters()
    environment.globals["namespace"] = _Namespace
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without names that begin with an underscore, a rule of transformers: they
    could reach Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        for name in dict(*args[1:], **kwargs):
            _check_plain_name(name)
        jinja2.utils.Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_plain_name(name)
        super().__setitem__(name, value)


def _check_plain_name(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(
            f"a namespace cannot have the attribute {name!r}; rename it"
        )


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    text = json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    return json_marked(text, value)


@jinja2.pass_environment
def _join_filter(
    environment: TracingEnvironment, value: Any, d: str = "", attribute: str | int | None = None
) -> str:
    if attribute is not None:
        value = map(jinja2.filters.make_attrgetter(environment, attribute), value)
    return environment.join_marked(str(d), map(str, value))


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(str(message))
