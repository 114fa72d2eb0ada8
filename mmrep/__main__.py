"""``python -m mmrep`` and ``torchrun -m mmrep`` are the command line."""

from mmrep.cli import main

if __name__ == "__main__":
    main()
