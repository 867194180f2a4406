"""`python -m psfgen` is the `psfgen` command."""

from psfgen.cli import main

main()
