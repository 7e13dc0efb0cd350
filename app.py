"""Serve the page and the HTTP API: `python app.py`; same as `python -m runtime.serve`."""

from __future__ import annotations

import sys

from runtime.serve import main

if __name__ == "__main__":
    sys.exit(main())
