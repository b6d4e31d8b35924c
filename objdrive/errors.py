"""The exceptions that callers are expected to handle, each with a stable reason code."""


class ObjdriveError(Exception):
    """Something the user can mend: the message says what was wrong, with which value, and what to do.

    `code` is a stable reason code, which a server can put into its answers.
    """

    code: str = "invalid_request"


class RowError(ObjdriveError):
    """One manifest row cannot be used; other rows are not affected.

    `code` is a stable reason code such as ``"mask_empty"``; `str(error)` is the message.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type["RowError"], tuple[str, str]]:
        return type(self), (self.code, str(self))


class StoreError(ObjdriveError):
    """The storage failed, and kept failing when tried again."""

    code = "store_unreachable"


class UnknownObject(ObjdriveError):
    """The store has no such object, or no such artifact of it."""

    code = "unknown_object"


class CorruptArtifact(ObjdriveError):
    """What is stored is not what was committed, or no adapter. Unlike a StoreError, asking again does not help."""

    code = "corrupt_artifact"


class WrongBase(ObjdriveError):
    """The artifact was made on another base."""

    code = "wrong_base"


class AdapterTooLarge(ObjdriveError):
    """The adapter's rank is higher than the bank's slots take."""

    code = "adapter_too_large"


class InvalidPrompt(ObjdriveError):
    """The prompt cannot be drawn: too long, or its places and objects do not match."""

    code = "invalid_prompt"


class QueueFull(ObjdriveError):
    """As many requests wait as may; ask again after `retry_after` seconds."""

    code = "queue_full"

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type["QueueFull"], tuple[str, float]]:
        return type(self), (str(self), self.retry_after)


class Draining(ObjdriveError):
    """The engine finishes what it has admitted and takes nothing new."""

    code = "draining"


class Cancelled(ObjdriveError):
    """The request was cancelled before its picture was drawn."""

    code = "cancelled"


class DrawingFailed(ObjdriveError):
    """The picture could not be drawn through no fault of the request: the device failed, or values are not finite."""

    code = "drawing_failed"
