"""`python -m psftrain` is the `psftrain` command."""

from psftrain.cli import main

main()
