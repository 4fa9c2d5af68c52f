"""What ends the reading of images; nothing heavy is imported here."""

from ..errors import Failure


class DataError(Failure):
    """Images or labels that cannot be used; the message names them."""
