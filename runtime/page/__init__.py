"""The web page: compare two responses, rank several, score files, and inspect parity reports."""

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # must be set before gradio is imported

from runtime.page.document import make_page, mount_page

__all__ = ["make_page", "mount_page"]
