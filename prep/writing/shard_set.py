"""What a set takes of its sources -> packs, columns and tokenizer: all files except the manifest,
which the caller writes last.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from prep.inputs import Inputs
from prep.progress import progress
from prep.selection.best_fit import pack_best_fit
from prep.selection.source import SelectedSource
from prep.tokenization.encoder import Encoder
from prep.tokenization.tokenizer import LoadedTokenizer, write_tokenizer
from prep.writing.columns import assemble
from prep.writing.manifest import make_manifest
from shared.shard_format import TOKENIZER_DIR, Manifest

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PackedSequences:
    sequences: npt.NDArray[np.void]  # SEQUENCE [S] of all sources, in pack order
    source_of: Ints  # [S]
    pack_offsets: Ints  # [P+1] in sequences


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokenizer of a build, its encoder, and how well it fits the template."""

    tokenizer: LoadedTokenizer
    encoder: Encoder
    # markers of the template that are not one token -> how many (prep/rendering/control/markers.py)
    split_markers: dict[str, int]


def pack_sequences(sources: Sequence[SelectedSource], max_seq_len: int) -> PackedSequences:
    """Put the sequences of all sources into packs."""
    sequences = np.concatenate([source.selection.sequences for source in sources])
    counts = [len(source.selection.sequences) for source in sources]
    source_of = np.repeat(np.arange(len(sources)), counts)
    order, pack_offsets = pack_best_fit(
        sequences["length"].astype(np.int64), capacity=max_seq_len, tie_break=sequences["tie_break"]
    )
    return PackedSequences(sequences[order], source_of[order], pack_offsets)


def write_set(
    out: Path,
    inputs: Inputs,
    vocabulary: Vocabulary,
    sources: Sequence[SelectedSource],
    packed: PackedSequences,
) -> Manifest:
    """Write columns and tokenizer into the directory `out` and return the manifest."""
    with progress(f"writing {inputs.mixture.name}", len(packed.sequences), "sequences") as advance:
        written = assemble(
            out,
            stores=[selected.source.samples for selected in sources],
            sequences=packed.sequences,
            source_of=packed.source_of,
            pack_offsets=packed.pack_offsets,
            policy=inputs.mixture.mask,
            is_added=vocabulary.encoder.is_added,
            on_sequences=advance,
        )
    files = write_tokenizer(
        out / TOKENIZER_DIR,
        vocabulary.tokenizer,
        vocabulary.encoder.spec.tokenizer_json,
        inputs.template,
    )
    return make_manifest(
        inputs,
        vocabulary.tokenizer,
        vocabulary.encoder,
        files,
        written,
        sources,
        vocabulary.split_markers,
    )
