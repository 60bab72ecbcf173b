"""`python -m switchcli`, and so `torchrun -m switchcli` and `accelerate launch -m switchcli`."""

from switchcli.cli import main

if __name__ == "__main__":
    main()
