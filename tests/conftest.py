"""Lets tests import helper modules beside them (`shard_sets`): in importlib mode pytest does not add the folder."""

import os
import sys
from pathlib import Path

# One thread here and in every process that a test starts: sums in another order differ in the last bit, and tests
# that compare runs bit by bit share the machine with others. Set before anything imports torch.
os.environ["OMP_NUM_THREADS"] = "1"

sys.path.insert(0, str(Path(__file__).parent))
