"""Let an exported model answer prompts, and questions whose answers are known and counted."""

import gzip
import itertools
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
    expected: str = ""
    """Empty for a prompt, whose answer is only shown."""
    skill: str = ""


def ask(
    model_dir: Path,
    *,
    prompts: tuple[str, ...],
    questions: Path | None,
    show: int,
    max_new_tokens: int,
) -> list[str]:
    """Return lines with the answers to `prompts`, with `show` of the questions, and the accuracy.

    `questions` is a JSON-lines file of conversations (`messages`) that end in the expected answer.
    An answer counts if it matches exactly; a field `skill` or `source` splits the count. Raises
    ArtifactError, ConfigError or DataError.
    """
    if not prompts and questions is None:
        raise ConfigError("nothing to ask: give --prompt TEXT or --questions FILE")
    known = [] if questions is None else read_questions(questions)
    # The directory of a run will do for that of its model.
    if RunDir(model_dir).model.is_dir():
        model_dir = RunDir(model_dir).model
    if not (model_dir / "config.json").is_file():
        raise ArtifactError(
            f"{model_dir} holds no config.json; expected a whole model that sft-train exported"
        )
    free = [Question(({"role": "user", "content": text},)) for text in prompts]
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
    """Return the questions of a .jsonl or .jsonl.gz file. Raises DataError with the bad line."""
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise DataError(
            f"cannot read {path}: {exc.strerror}; give a JSON-lines file with --questions"
        ) from exc
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    questions = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            messages = [
                {"role": str(message["role"]), "content": str(message["content"])}
                for message in row["messages"]
            ]
        except (ValueError, KeyError, TypeError) as exc:
            raise DataError(
                f"{path} line {number}: expected an object with `messages` of role and content;"
                f" {exc!r}"
            ) from exc
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise DataError(
                f"{path} line {number}: the conversation does not end in an assistant's message,"
                " the expected answer"
            )
        skill = str(row.get("skill") or row.get("source") or "")
        questions.append(Question(tuple(messages[:-1]), messages[-1]["content"], skill))
    if not questions:
        raise DataError(f"{path} holds no questions; expected one conversation per line")
    return questions


def _generate(model_dir: Path, questions: Sequence[Question], *, max_new_tokens: int) -> list[str]:
    """Return the greedy answer to each question, in order."""
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
    # Prompts of similar length share a batch, padded on the left.
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    answers = [""] * len(texts)
    for start in range(0, len(order), _BATCH_SIZE):
        indices = order[start : start + _BATCH_SIZE]
        # The template has printed every special token: the tokenizer must add none.
        batch = tokenizer(
            [texts[index] for index in indices],
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
        decoded = tokenizer.batch_decode(new, skip_special_tokens=True)
        for index, answer in zip(indices, decoded, strict=True):
            answers[index] = answer.strip()
    return answers


def _report(questions: Sequence[Question], answers: Sequence[str], *, show: int) -> list[str]:
    """Return the lines of `show` questions, then the accuracy of each skill and of all."""
    by_skill: dict[str, list[tuple[Question, str]]] = defaultdict(list)
    for question, answer in zip(questions, answers, strict=True):
        by_skill[question.skill].append((question, answer))
    # The shown questions take one of each skill in turn, longer conversations of a skill first.
    queues = [sorted(pairs, key=lambda pair: -len(pair[0].messages)) for pairs in by_skill.values()]
    turns = [pair for turn in itertools.zip_longest(*queues) for pair in turn if pair is not None]
    lines = []
    for question, answer in turns[:show]:
        lines += [*_dialogue(question, answer), f"  expected: {question.expected}", ""]

    hits = {
        skill: [answer == question.expected.strip() for question, answer in pairs]
        for skill, pairs in by_skill.items()
    }
    if len(hits) > 1:
        width = max(map(len, hits))
        lines += [f"{skill or '-':{width}}  {_share(hits[skill])}" for skill in sorted(hits)]
    lines.append(f"exact match: {_share(list(itertools.chain(*hits.values())))}")
    return lines


def _dialogue(question: Question, answer: str) -> list[str]:
    lines = [f"{message['role']}: {message['content']}" for message in question.messages]
    return [*lines, f"  model: {answer}"]


def _share(hits: Sequence[bool]) -> str:
    return f"{sum(hits) / len(hits):6.1%}  ({sum(hits)} of {len(hits)})"
