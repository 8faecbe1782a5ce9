"""Every error vispress raises on purpose; each is also a fitting builtin."""


class VispressError(Exception):
    """Base of all errors that vispress raises on purpose."""


class UnsupportedModelError(VispressError, TypeError):
    """No adapter knows this model, cache or attention; the message lists what works."""


class UnsupportedMethodError(VispressError, ValueError):
    """The method cannot run on this model (a signal is missing), or no method has this name."""


class BudgetError(VispressError, ValueError):
    """A budget is missing, doubled, out of range, or was not met exactly."""


class ConfigError(VispressError, ValueError):
    """A hyper-parameter or a configuration file is wrong; the message names the valid keys."""


class CompressionStateError(VispressError, RuntimeError):
    """The call does not fit the model's state (compressed twice, a foreign cache, no
    prefill yet).
    """


class UnsupportedVersionError(VispressError, RuntimeError):
    """An installed dependency is too old or too new."""


class CheckpointError(VispressError, RuntimeError):
    """A checkpoint of the reference model is missing or damaged."""
