"""What ends a command before its work is done; nothing heavy is imported here."""


class TrainingError(RuntimeError):
    """Training cannot go on."""


class Stopped(Exception):
    """A signal asked for the end."""
