"""All errors that this package raises on purpose, in one tree.

::

    FinetuneError
    ├── RecipeError (ValueError)          a recipe, or a key=value override, that cannot be run
    ├── ModelError (ValueError)           a base model that cannot be loaded or is not supported
    ├── MethodError (ValueError)          a method that cannot be attached to this model
    ├── DataError (ValueError)            a row, image or file of the data that cannot be used
    │   ├── RowError                      one row of many; ``data.on_error: skip`` leaves it out
    │   └── FetchError                    an image's URL that is not allowed, or leads to no image
    ├── TrainingError (RuntimeError)      a run that must stop: dead parameters, a non-finite loss
    │   ├── StoppedError                  a run that was asked to stop, with its state saved
    │   └── FolderInUseError              a folder that another process writes
    ├── AdapterError
    │   ├── AdapterReferenceError (ValueError)  a string that names no adapter
    │   ├── ManifestError (ValueError)    a manifest or adapter config that breaks its schema
    │   ├── IntegrityError (ValueError)   bytes that differ from those that were saved
    │   ├── BaseMismatchError (ValueError)  an adapter and a base that do not belong together
    │   ├── ProbeError (ValueError)       an adapter whose effect differs from the recorded one
    │   └── TrustError (ValueError)       an adapter without an accepted signature; an unusable key or policy
    ├── RegistryError
    │   ├── NotFoundError (LookupError)   an adapter, version or alias that does not exist
    │   ├── YankedError (LookupError)     an alias of a yanked version
    │   ├── ConflictError (RuntimeError)  a write that found another state than it expected
    │   ├── ConditionError (ValueError)   a text that is not a condition on metrics
    │   ├── PromotionError (ValueError)   a version that does not meet the conditions of a promotion
    │   └── StoreError (OSError)          a store that cannot be read or written
    ├── ExportError (ValueError)          an adapter that a target cannot take, or that an export would change
    ├── StreamClosedError (ValueError)    a stopped answer that a program reads further
    ├── RequestError (ValueError)         a request that the server refuses, with the HTTP status
    ├── ImageWorkerError (RuntimeError)   processes that cannot decode any image
    ├── LaunchError (RuntimeError)        an environment that cannot run the requested work
    ├── PluginError (ValueError)          a plug-in that cannot be used
    └── MissingExtraError (ImportError)   a library of an extra of this package that is not installed

Each has a built-in as second parent, so that callers may catch either. A message gives the rule, the value that broke
it, its place, and the next step.
"""


class FinetuneError(Exception):
    """The root of all errors of this package."""

    def __str__(self) -> str:
        # A KeyError would print the repr of the message; these errors print the message.
        return str(self.args[0]) if self.args else ""


class RecipeError(FinetuneError, ValueError):
    """A recipe, or a ``key=value`` override, that cannot be run."""


class ModelError(FinetuneError, ValueError):
    """A base model that cannot be loaded or is not supported."""


class MethodError(FinetuneError, ValueError):
    """A method that cannot be attached to this model."""


class DataError(FinetuneError, ValueError):
    """A row, image or file of the data that cannot be used."""


class RowError(DataError):
    """One row of many that cannot be used; ``data.on_error: skip`` leaves it out.

    Args:
        message: the text of the error: the fault and its place.
        reason: the kind of fault in a few words, by which such rows are counted.
    """

    def __init__(self, message: str, *, reason: str = "unusable row"):
        super().__init__(message)
        self.reason = reason


class ImageWorkerError(FinetuneError, RuntimeError):
    """Processes that cannot decode any image."""


class FetchError(DataError):
    """An image's URL that is not allowed, or leads to no image."""


class TrainingError(FinetuneError, RuntimeError):
    """A run that must stop: dead parameters, a loss that is not finite."""


class StoppedError(TrainingError):
    """A run that was asked to stop by a signal, with its state saved.

    Args:
        message: the text of the error: the last step, and the way to go on.
        signum: the number of the signal.
    """

    def __init__(self, message: str, *, signum: int):
        super().__init__(message)
        self.exit_code = 128 + signum  # as in a shell


class FolderInUseError(TrainingError):
    """A folder that another process writes, or may write."""


class AdapterError(FinetuneError):
    """An error about a finished adapter."""


class AdapterReferenceError(AdapterError, ValueError):
    """A string that names no adapter."""


class ManifestError(AdapterError, ValueError):
    """A manifest or adapter config that breaks its schema."""


class IntegrityError(AdapterError, ValueError):
    """Bytes that differ from those that were saved."""


class BaseMismatchError(AdapterError, ValueError):
    """An adapter and a base model that do not belong together."""


class ProbeError(AdapterError, ValueError):
    """An adapter whose effect on the base differs from the one recorded when it was saved."""


class TrustError(AdapterError, ValueError):
    """An adapter without a signature that the trust policy accepts, or a key or policy that cannot be used."""


class RegistryError(FinetuneError):
    """An error about a registry."""


class NotFoundError(RegistryError, LookupError):
    """An adapter, version or alias that does not exist."""


class YankedError(RegistryError, LookupError):
    """An alias, or a move of one, that leads to a yanked version."""


class ConflictError(RegistryError, RuntimeError):
    """A write that found another state than it expected, because another process wrote in between."""


class ConditionError(RegistryError, ValueError):
    """A text that is not a condition on metrics."""


class PromotionError(RegistryError, ValueError):
    """A version that does not meet the conditions of a promotion."""


class StoreError(RegistryError, OSError):
    """A store that cannot be read or written."""


class ExportError(FinetuneError, ValueError):
    """An adapter that a target cannot take, or that an export would change."""


class StreamClosedError(FinetuneError, ValueError):
    """A stopped answer that a program reads further."""


class RequestError(FinetuneError, ValueError):
    """A request that the server refuses.

    Args:
        message: the text of the error: the fault, and the next step.
        status: the HTTP status of the response.
        code: the short code by which programs recognise the error.
        param: the field of the request with the fault.
        retry_after: the seconds after which the same request may succeed.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str = "invalid_request",
        param: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after


class LaunchError(FinetuneError, RuntimeError):
    """An environment that cannot run the requested work."""


class PluginError(FinetuneError, ValueError):
    """A plug-in that cannot be used: its name is taken, or its package is missing or damaged."""


class MissingExtraError(FinetuneError, ImportError):
    """A library of an extra of this package that is not installed."""


def brief(value: object, limit: int = 120) -> str:
    """Return ``value`` for a message: as Python writes it, on one line, cut to ``limit`` characters."""
    # A value from elsewhere may be long, and hold control sequences of a terminal.
    try:
        text = repr(value[: limit + 1] if isinstance(value, str | bytes) else value)
    except (RecursionError, ValueError):  # nested too deep, or a number of too many digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def plain(text: str, limit: int = 200) -> str:
    """Return ``text`` for a message: unchanged, or as ``brief`` if it is long or not printable."""
    return text if text.isprintable() and len(text) <= limit else brief(text, limit)
