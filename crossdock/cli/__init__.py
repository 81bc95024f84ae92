"""The command line, one file a command. Nothing here imports torch until a command needs it."""

from crossdock.cli.app import main

__all__ = ["main"]
