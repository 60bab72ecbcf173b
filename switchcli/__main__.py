"""The entry point of `switchcli`, and of `python`, `torchrun` and `accelerate launch` with `-m switchcli`."""

import os
import signal


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGINT, _exit_at_once)  # before and after the handlers of a verb
    from switchcli.system import startup

    startup.end_with_launcher()  # before the imports, which take seconds
    from switchcli import cli

    cli.main()


def _exit_at_once(*_: object) -> None:
    """End this process in one line at a Ctrl-C during the imports, or at the exit."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"stopped: run the same command again\n")
    os._exit(130)


if __name__ == "__main__":
    main()
