"""``python -m ffgym`` is the command ``ffgym``."""

from ffgym.cli import main

main()
