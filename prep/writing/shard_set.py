"""Selections -> the files of one shard set, all but manifest.json: packs, columns, tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from prep.inputs import Inputs
from prep.progress import progress
from prep.selection.best_fit import pack_best_fit
from prep.selection.sequences import Selection
from prep.store.sample_store import SampleStore
from prep.store.source_counts import Tally
from prep.tokenization.encoder import Encoder
from prep.tokenization.tokenizer import LoadedTokenizer, write_tokenizer
from prep.writing.columns import assemble
from prep.writing.manifest import make_manifest
from shared.shard_format import TOKENIZER_DIR, Manifest

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Packed:
    sequences: npt.NDArray[np.void]  # SEQUENCE [S] of all sources, in pack order
    source_of: Ints  # [S]
    pack_offsets: Ints  # [P+1] in sequences


@dataclass(frozen=True, slots=True)
class Material:
    """What both sets of a build, its own and the one that is held out, are made from."""

    loaded: LoadedTokenizer
    encoder: Encoder
    stores: Sequence[SampleStore]
    tallies: list[Tally]
    split_markers: dict[
        str, int
    ]  # markers of the template -> their tokens, where several; see prep/rendering/control/markers.py


def pack(inputs: Inputs, selections: Sequence[Selection]) -> Packed:
    """Return the sequences of all sources in packs."""
    sequences = np.concatenate([selection.sequences for selection in selections])
    counts = [len(selection.sequences) for selection in selections]
    source_of = np.repeat(np.arange(len(selections)), counts)
    order, pack_offsets = pack_best_fit(
        sequences["length"].astype(np.int64),
        capacity=inputs.mixture.max_seq_len,
        tie=sequences["tie"],
    )
    return Packed(sequences[order], source_of[order], pack_offsets)


def write_set(
    out: Path, inputs: Inputs, material: Material, selections: list[Selection], packed: Packed
) -> Manifest:
    """Write columns and tokenizer into the directory `out` and return the manifest that is to be
    written last."""
    with progress(f"writing {inputs.mixture.name}", len(packed.sequences), "sequences") as advance:
        assembled = assemble(
            out,
            stores=material.stores,
            sequences=packed.sequences,
            source_of=packed.source_of,
            pack_offsets=packed.pack_offsets,
            policy=inputs.mixture.mask,
            is_added=material.encoder.is_added,
            on_sequences=advance,
        )
    tokenizer_json = material.encoder.spec.tokenizer_json
    files = write_tokenizer(out / TOKENIZER_DIR, material.loaded, tokenizer_json, inputs.template)
    return make_manifest(
        inputs,
        material.loaded,
        material.encoder,
        files,
        assembled,
        material.tallies,
        selections,
        material.split_markers,
    )
