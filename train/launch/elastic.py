"""torchrun for the ranks of one machine, without its tracebacks: their own last words say why they
ended."""

import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> None:
    """Run torchrun with the arguments of this process; exit code of the rank that failed first, or
    1."""
    try:
        run.main()
    except SignalException:  # it was passed on to the ranks
        raise SystemExit(1) from None
    except ChildFailedError as exc:
        for rank, failure in sorted(exc.failures.items()):
            if failure.exitcode < 0:
                sys.stderr.write(
                    f"rank {rank} was killed by {signal.Signals(-failure.exitcode).name}\n"
                )
        _, first = exc.get_first_failure()
        raise SystemExit(max(1, first.exitcode)) from None


if __name__ == "__main__":
    main()
