"""Let an exported model answer: free questions, or questions with known answers, which are
counted."""

import gzip
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import ArtifactError, ConfigError, DataError
from train.run.directory import RunDir

Message = dict[str, str]

_BATCH_SIZE = 64


@dataclass(frozen=True, slots=True)
class Question:
    messages: tuple[Message, ...]
    """The conversation up to the answer."""
    expected: str | None
    skill: str


def ask(
    model_dir: Path,
    *,
    prompts: tuple[str, ...],
    questions: Path | None,
    show: int,
    max_new_tokens: int,
) -> list[str]:
    """Return lines that show the answers to `prompts`, and the exact-match accuracy on `questions`
    with `show` samples.

    `questions` is a JSON-lines file of conversations (`messages`) that end in the expected answer;
    a field `skill` or `source` splits the count. Raises ArtifactError, ConfigError or DataError.
    """
    if not prompts and questions is None:
        raise ConfigError("nothing to ask: give --prompt TEXT or --questions FILE")
    known = [] if questions is None else read_questions(questions)
    if RunDir(model_dir).model.is_dir():
        model_dir = RunDir(model_dir).model
    if not (model_dir / "config.json").is_file():
        raise ArtifactError(
            f"{model_dir} holds no config.json; expected a whole model that sft-train exported"
        )
    free = [Question(({"role": "user", "content": text},), None, "") for text in prompts]
    answers = _generate(model_dir, [*free, *known], max_new_tokens=max_new_tokens)
    lines = [
        line
        for question, answer in zip(free, answers, strict=False)
        for line in _dialogue(question, answer)
    ]
    if known:
        lines += _report(known, answers[len(free) :], show=show)
    return lines


def read_questions(path: Path) -> list[Question]:
    """Return the questions of a .jsonl or .jsonl.gz file. Raises DataError that names the line."""
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise DataError(
            f"cannot read {path}: {exc.strerror}; give a JSON-lines file with --questions"
        ) from exc
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    found = [
        _parse(line, f"{path} line {number}")
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]
    if not found:
        raise DataError(f"{path} holds no questions; expected one conversation per line")
    return found


def _parse(line: str, where: str) -> Question:
    try:
        row = json.loads(line)
        messages = [
            {"role": str(item["role"]), "content": str(item["content"])} for item in row["messages"]
        ]
    except (ValueError, KeyError, TypeError) as exc:
        raise DataError(
            f"{where}: expected an object with `messages` of role and content; {exc!r}"
        ) from exc
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise DataError(
            f"{where}: the conversation does not end in an assistant's message, the expected answer"
        )
    return Question(
        tuple(messages[:-1]),
        messages[-1]["content"],
        str(row.get("skill") or row.get("source") or ""),
    )


def _generate(model_dir: Path, questions: Sequence[Question], *, max_new_tokens: int) -> list[str]:
    """Return the greedy answers, in order. Prompts of similar length share a batch, padded on the
    left."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
        model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto").to(device).eval()
    except (OSError, ValueError) as exc:
        raise ArtifactError(f"{model_dir} does not load: {exc}; export the model again") from exc
    texts = [
        tokenizer.apply_chat_template(
            list(question.messages), add_generation_prompt=True, tokenize=False
        )
        for question in questions
    ]
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    answers = [""] * len(texts)
    for start in range(0, len(order), _BATCH_SIZE):
        chosen = order[start : start + _BATCH_SIZE]
        # the template printed every special token: the tokenizer must add none
        batch = tokenizer(
            [texts[index] for index in chosen],
            return_tensors="pt",
            padding=True,
            add_special_tokens=False,
        ).to(device)
        with torch.inference_mode():
            output = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=max_new_tokens,
                do_sample=False,
            )
        new = output[:, batch["input_ids"].shape[1] :]
        for index, text in zip(
            chosen, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True
        ):
            answers[index] = text.strip()
    return answers


def _report(questions: Sequence[Question], answers: Sequence[str], *, show: int) -> list[str]:
    """Samples first, spread over the skills, then the counts."""
    right: dict[str, list[bool]] = defaultdict(list)
    for question, answer in zip(questions, answers, strict=True):
        assert question.expected is not None
        right[question.skill].append(answer == question.expected.strip())
    lines = []
    for index in _spread(questions, show):
        lines += [
            *_dialogue(questions[index], answers[index]),
            f"  expected: {questions[index].expected}",
            "",
        ]
    if len(right) > 1:
        width = max(len(skill) for skill in right)
        lines += [
            f"{skill or '-':{width}}  {_share(hits)}" for skill, hits in sorted(right.items())
        ]
    lines.append(f"exact match: {_share([hit for hits in right.values() for hit in hits])}")
    return lines


def _spread(questions: Sequence[Question], show: int) -> list[int]:
    """Return `show` indices that take one of each skill in turn, longer conversations of a skill
    first."""
    by_skill: dict[str, list[int]] = defaultdict(list)
    for index, question in enumerate(questions):
        by_skill[question.skill].append(index)
    queues = [
        sorted(indices, key=lambda index: -len(questions[index].messages))
        for indices in by_skill.values()
    ]
    turns = [
        queue[turn]
        for turn in range(max(map(len, queues)))
        for queue in queues
        if turn < len(queue)
    ]
    return turns[:show]


def _dialogue(question: Question, answer: str) -> list[str]:
    lines = [f"{message['role']}: {message['content']}" for message in question.messages]
    return [*lines, f"  model: {answer}"]


def _share(hits: Sequence[bool]) -> str:
    return f"{sum(hits) / len(hits):6.1%}  ({sum(hits)} of {len(hits)})"
