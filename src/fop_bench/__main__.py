"""Lets `python -m fop_bench` run the `fop-bench` command."""

from fop_bench.cli import main

if __name__ == "__main__":
    main(prog_name="fop-bench")
