"""``python -m tascade.cli``."""

from tascade.cli.verbs import main

main()
