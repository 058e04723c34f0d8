"""Makes `python -m fop_bench` the same as `fop-bench`."""

from fop_bench.cli import main as run

if __name__ == "__main__":
    run()
