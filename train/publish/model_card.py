"""The README.md of an exported model: what it was trained on, how, with what, and how to use it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.markdown import sources_table
from shared.shard_format import Manifest, SourceEntry, Totals

PLOT_NAME = "loss.png"


@dataclass(frozen=True, kw_only=True, slots=True)
class CardFacts:
    """Where a model comes from. Of local paths only the last part is kept: a card is published."""

    base_model: str
    """Hub id, or the name of a local directory; empty for random weights."""
    base_on_hub: bool
    base_revision: str
    shards_name: str
    fingerprint: str
    max_seq_len: int
    tokenizer: str
    chat_template: str
    sources: tuple[SourceEntry, ...]
    totals: Totals
    recipe: dict[str, Any]
    """The resolved recipe."""
    versions: dict[str, str]
    final: dict[str, Any]
    """The last training record of metrics.jsonl, with the evaluation loss of the same step if there
    is one; empty where nothing was logged."""


def card_facts(
    description: Mapping[str, Any], manifest: Manifest, records: Sequence[Mapping[str, Any]]
) -> CardFacts:
    """Collect the facts from a run's config.json, its shard set and its metrics."""
    recipe = json.loads(json.dumps(description["recipe"]))
    name, on_hub = recipe["model"]["name"], True
    if Path(name).is_absolute():
        name, on_hub = Path(name).name, False
        recipe["model"]["name"] = name
    trained = [record for record in records if "eval_loss" not in record]
    final = dict(trained[-1]) if trained else {}
    for record in records:
        if "eval_loss" in record and record["step"] == final.get("step"):
            final["eval_loss"] = record["eval_loss"]
    return CardFacts(
        base_model=name,
        base_on_hub=bool(name) and on_hub,
        base_revision=recipe["model"]["revision"] if name and on_hub else "",
        shards_name=manifest.name,
        fingerprint=manifest.fingerprint,
        max_seq_len=manifest.max_seq_len,
        tokenizer=manifest.tokenizer.name,
        chat_template=manifest.chat_template.name,
        sources=manifest.sources,
        totals=manifest.totals,
        recipe=recipe,
        versions={key: value for key, value in sorted(description["versions"].items()) if value},
        final=final,
    )


def render_card(facts: CardFacts, *, has_plot: bool = False) -> str:
    """Return the card as Markdown with the hub's YAML front matter."""
    origin = "Trained from random weights.\n"
    if facts.base_model:
        kind = f"revision `{facts.base_revision}`" if facts.base_on_hub else "a local directory"
        origin = f"Fine-tuned from `{facts.base_model}` ({kind}).\n"
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "license: unknown",
        *([f"base_model: {json.dumps(facts.base_model)}"] if facts.base_on_hub else []),
        "tags:",
        "- sft",
        "- conversational",
        "---",
        "",
        f"# {facts.recipe['name']} on {facts.shards_name}\n",
        origin,
        _USE,
        "## Data\n",
        f"Shard set `{facts.shards_name}`, fingerprint `{facts.fingerprint}`.\n",
        sources_table(facts.sources, facts.totals),
        (
            f"Tokenizer `{facts.tokenizer}`, chat template `{facts.chat_template}`, sequences of up"
            f" to {facts.max_seq_len} tokens, packed. Loss tokens are those that the model was"
            " trained to predict.\n"
        ),
        "## Result\n",
        _final_table(facts.final),
        *([f"![curves of the run]({PLOT_NAME})\n"] if has_plot else []),
        "## Recipe\n",
        f"```json\n{json.dumps(facts.recipe, indent=2, sort_keys=True)}\n```\n",
        "## Software\n",
        ", ".join(f"{name} {version}" for name, version in facts.versions.items()) + "\n",
        "## License\n",
        (
            "Not determined here: it follows from the base model and from the sources above. Find"
            " out before you publish the model.\n"
        ),
    ]
    return "\n".join(lines)


_USE = """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # the directory of this file
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
messages = [{"role": "user", "content": "..."}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
output = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

The chat template prints every special token that the model was trained with, BOS included where
there was one: encode its text without adding any.
"""


def _final_table(final: Mapping[str, Any]) -> str:
    names = (
        "step",
        "epoch",
        "train_loss",
        "eval_loss",
        "learning_rate",
        "total_tokens",
        "per_device_tps",
    )
    rows = [
        f"| {name} | {value:{',.6g' if isinstance(value, float) else ','}} |"
        for name in names
        if (value := final.get(name)) is not None
    ]
    if not rows:
        return "Nothing was logged.\n"
    return "\n".join(["| metric | last record |", "|---|---:|", *rows, ""])
