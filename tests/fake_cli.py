"""The command line over the fake model, as a program of its own: for the tests that need a process."""

from __future__ import annotations

import sys

import helpers_front
import pytest

from flux_sd.cli import main

if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        helpers_front.patch_model(patch)
        sys.exit(main())
