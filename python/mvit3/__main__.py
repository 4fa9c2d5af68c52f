"""`python -m mvit3`, and the command `mvit3`."""

import sys


def main() -> int:
    """The command line; Ctrl-C while it is still being loaded ends it quietly too."""
    try:
        from .cli import main as command
    except KeyboardInterrupt:
        return 130
    return command()


if __name__ == "__main__":
    sys.exit(main())
