"""The errors crossdock raises; each message names the layer, tensor or rank, what was found and what was expected."""


class CrossdockError(RuntimeError):
    """Base of every error that is crossdock's own."""


class ConfigError(CrossdockError, ValueError):
    """An option, a configuration field or an argument has a value that cannot work."""


class CheckpointError(CrossdockError):
    """A checkpoint directory lacks a file or tensor, or holds one of the wrong shape or dtype."""


class PlanMismatch(CrossdockError):
    """Ranks disagree about the exchange they are in: another step, another row width, another placement."""


class CommTimeout(CrossdockError):
    """A wait on another rank ran out; the message names rank, peer, phase and step."""


class RankFailure(CrossdockError):
    """Another rank died, left, raised an error, aborted or does not answer."""


class CapacityOverflow(CrossdockError):
    """A bounded buffer (rows of an exchange, pages of a cache) is too small for what was asked of it."""
