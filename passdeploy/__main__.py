"""``python -m passdeploy``: the command line."""

from passdeploy.cli import main

main()
