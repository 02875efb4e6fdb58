"""``python -m tokenlab``."""

from tokenlab.cli import main

main()
