"""The entry point of `switchcli`, and of `python`, `torchrun` and `accelerate launch` with `-m switchcli`."""

from switchcli import startup


def main() -> None:
    """Run the command line."""
    startup.end_with_launcher()  # before the imports, which take seconds
    startup.exit_at_interrupt()
    from switchcli import cli

    cli.main()


if __name__ == "__main__":
    main()
