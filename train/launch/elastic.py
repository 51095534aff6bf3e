"""torchrun for the ranks of one machine, without its tracebacks: the ranks print why they ended."""

import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> None:
    """Run torchrun with the arguments of this process, and exit with the code of the rank that
    failed first.

    The exit code is 1 if that rank was killed, or if torchrun itself got a signal.
    """
    try:
        run.main()
    except SignalException:
        # torchrun has passed it on to the ranks.
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
