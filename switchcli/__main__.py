"""The entry point of `python -m switchcli`, and of `torchrun -m switchcli` and `accelerate launch -m switchcli`."""

if __name__ == "__main__":
    from switchcli.startup import end_with_launcher

    end_with_launcher()  # before the imports, which take seconds

    from switchcli.cli import main

    main()
