"""What ends a command before its work is done; nothing heavy is imported here."""


class Failure(RuntimeError):
    """A command cannot do what it was told; the message is all that the user sees."""


class TrainingError(Failure):
    """Training cannot go on."""


class Stopped(Exception):
    """A signal asked for the end."""
