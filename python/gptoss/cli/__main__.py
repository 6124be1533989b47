"""`python -m gptoss.cli`, for where the `gptoss` script is not on the path."""

from . import main

main()
