"""Starts the browser app; also the Space's app_file."""

import sys

from lab.errors import LabError

if __name__ == "__main__":
    try:
        from lab.models.environment import check_environment

        check_environment()
        from lab.ui.app import serve

        serve()
    except LabError as problem:
        sys.exit(str(problem))
