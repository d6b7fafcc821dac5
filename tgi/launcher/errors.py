"""How a start or a run ends badly. The class's name is what TGI prints behind ``Error:``; alerts may match on it."""

from tgi.core.errors import StartupError


class ArgumentValidation(StartupError):
    """The flags contradict each other, or the machine and the model don't have what they ask for."""


class NotEnoughCUDADevices(StartupError):
    """The model is to be split over more devices than there are."""


class DownloadError(StartupError):
    """The model's files can't be had."""


class ShardCannotStart(StartupError):
    """The engine ended before it was ready."""


class ShardFailed(StartupError):
    """The engine ended while it served."""


class WebserverCannotStart(StartupError):
    """The router ended before it was ready, or its port can't be had."""


class WebserverFailed(StartupError):
    """The router ended while it served."""
