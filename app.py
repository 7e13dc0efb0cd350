"""The page and the API: `python app.py` opens both; `runtime.serve` is the story."""

from __future__ import annotations

import sys

from runtime.serve import main

if __name__ == "__main__":
    sys.exit(main())
