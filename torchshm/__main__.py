"""``python -m torchshm``: the command line."""

from torchshm._cli import main

main()
