"""Where the real data of some tests lies, and a mark for tests that need it."""

import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("MMNAS_DATA", Path(__file__).resolve().parents[2] / "shared/data"))


def needs(*names):
    """Skips a test where one of the folders is absent."""
    missing = [name for name in names if not (FOLDER / name).is_dir()]
    return pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)} in {FOLDER}")
