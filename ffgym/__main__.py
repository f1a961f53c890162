"""``python -m ffgym`` is the command ``ffgym``."""

from ffgym.cli.app import main

main()
