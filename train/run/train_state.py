"""What of a run besides weights and optimizer a checkpoint holds."""

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
    """A window over all ranks; part of a checkpoint, so that a resumed run logs what an undisturbed
    one does."""

    losses: list[float]
    """Of each step that had one."""
    balancing: list[float]
    """The load balancing loss of each of these steps; empty where there is none."""
    source_losses: list[float]
    """Sum of the cross-entropies of each source, the fillers before them."""
    source_tokens: list[float]
    """How many those are."""
    loss_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainState:
    """What a checkpoint holds besides the engine's state."""

    step: int
    """Updates done."""
    counters: Counters
    window: WindowSums | None
    """The steps since the last record; None at the start."""
    eval_loss: float | None = None
    """Of these weights, if they were evaluated: written into the checkpoint after it was
    committed."""
