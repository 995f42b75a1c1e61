"""Starts the browser app; also the Space's app_file. It takes the options of `python -m lab serve`."""

import sys

if __name__ == "__main__":
    from lab.cli import app

    sys.exit(app())
