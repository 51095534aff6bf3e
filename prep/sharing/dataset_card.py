"""The README.md of a pushed set: what it is, where it comes from, how to get it. All of it is taken
from the manifests."""

import json

from prep.sharing.wire_format import EVAL_MANIFEST, SetContents
from shared.markdown import sources_table, table_cell

CARD_NAME = "README.md"


def render_set_card(contents: SetContents) -> bytes:
    """Return the card as Markdown with the hub's YAML front matter, in UTF-8."""
    manifest, totals = contents.manifest, contents.manifest.totals
    tokenizer = table_cell(manifest.tokenizer.name)
    if manifest.tokenizer.revision:
        tokenizer += f" at `{manifest.tokenizer.revision}`"
    lines = [
        "---",
        f"pretty_name: {json.dumps(manifest.name)}",
        "viewer: false",
        "tags:",
        "- sft",
        "- sft-shards",
        "---",
        "",
        f"# {table_cell(manifest.name)}\n",
        (
            "Conversations, tokenised once, masked and packed: a shard set for supervised"
            " fine-tuning.\n"
        ),
        "| | |\n|---|---|",
        f"| fingerprint | `{manifest.fingerprint}` |",
        (
            f"| packs | {totals.packs:,} of at most {manifest.max_seq_len:,} tokens, density"
            f" {totals.density:.2%} |"
        ),
        f"| sequences | {totals.sequences:,} |",
        f"| tokens | {totals.tokens:,}, of which {totals.loss_tokens:,} carry loss |",
        f"| tokenizer | {tokenizer} |",
        f"| chat template | {table_cell(manifest.chat_template.name)} |\n",
    ]
    if EVAL_MANIFEST in contents.sets:
        fingerprint = contents.sets[EVAL_MANIFEST].fingerprint
        lines.append(f"An evaluation set lies in `eval/`, fingerprint `{fingerprint}`.\n")
    lines += ["## Sources\n", sources_table(manifest.sources, totals), _USE]
    return "\n".join(lines).encode("utf-8")


_USE = """## Use

```sh
sft-prep pull user/name data_cache/name     # downloads, checks digests, decompresses
sft-prep inspect data_cache/name
sft-train --shards data_cache/name
```

Each column is an ordinary `.npy` file as one zstd frame; `transfer.json` has its sha256 before and
after. A repository
without `manifest.json` is a push that was not finished.

## License

Not determined here: it follows from the sources above.
"""
