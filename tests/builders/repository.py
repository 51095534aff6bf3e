"""Where the repository lies, for tests at any depth of it."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
SHARED_DATA = ROOT.parent / "shared" / "data"
"""Real conversations and tokenizers; tests that need them skip where it is absent."""
HELPERS = (TESTS / "builders", TESTS / "doubles")
"""What a test's own processes put on their path to import the helpers."""
