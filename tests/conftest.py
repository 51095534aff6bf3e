"""Lets tests import helper modules beside them (`shard_sets`): in importlib mode pytest does not add the folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
