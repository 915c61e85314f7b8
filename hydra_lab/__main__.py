"""`python -m hydra_lab`: the command line, also where the package is not installed."""

from hydra_lab.cli import main

if __name__ == "__main__":
    main()
