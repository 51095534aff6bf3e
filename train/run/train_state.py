"""What a checkpoint holds of a run besides its weights and optimizer state.

The names of the fields are keys of the checkpoint's state.json.
"""

from dataclasses import dataclass

from train.data.loader import StepBatch


@dataclass(kw_only=True, slots=True)
class Counters:
    """Totals since the start of the run; part of every checkpoint."""

    tokens: int = 0
    positions: int = 0
    loss_tokens: int = 0
    skipped_steps: int = 0

    def add(self, batch: StepBatch) -> None:
        self.tokens += batch.num_tokens
        self.positions += batch.num_positions
        self.loss_tokens += batch.num_loss_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowSums:
    """The steps since the last record, summed over all ranks.

    It is part of a checkpoint, so that a resumed run logs the same record as an undisturbed one.
    """

    losses: list[float]
    """The loss of each step that had loss tokens and was not skipped."""
    balancing: list[float]
    """The load balancing loss of each of these steps; empty for a model that has none."""
    source_losses: list[float]
    """The sum of the cross-entropies of each source, that of the fillers first."""
    source_tokens: list[float]
    """How many tokens those are."""
    loss_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainState:
    """What a checkpoint holds besides the engine's state."""

    step: int
    """Updates done."""
    counters: Counters
    window: WindowSums | None
    """None at the start of the run."""
    eval_loss: float | None = None
    """Of these weights, if they were evaluated; written into the checkpoint after its commit."""
