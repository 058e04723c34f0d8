"""Makes `python -m fop_bench` the same as `fop-bench`."""

from __future__ import annotations

import sys


def run() -> None:
    """Start the command, or say what it needs."""
    try:
        from fop_bench.cli import main  # noqa: PLC0415 - it imports what the extra brings
    except ModuleNotFoundError as error:
        sys.exit(f"fop-bench needs {error.name}: pip install 'fop-optim[bench]', or '.[bench]' in a clone")
    main()


if __name__ == "__main__":
    run()
