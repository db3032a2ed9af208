"""`userip`, also as `python -m userip_fast`."""

import sys


def main() -> None:
    """Entry point. An interrupt before the command line is there ends in its exit code as well."""
    try:
        from userip_fast.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
