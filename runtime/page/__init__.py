"""The page: compare responses by eye, rank them, score files, and see why to trust the scores."""

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported, which would call home

from runtime.page.document import make_page, mount_page

__all__ = ["make_page", "mount_page"]
