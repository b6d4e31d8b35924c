"""The two exceptions that callers are expected to handle."""


class ObjdriveError(Exception):
    """Something the user can mend: the message says what was wrong, with which value, and what to do."""


class RowError(ObjdriveError):
    """One manifest row cannot be used; other rows are not affected.

    `code` is a stable reason code such as ``"mask_empty"``; `str(error)` is the message.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type["RowError"], tuple[str, str]]:
        return type(self), (self.code, str(self))
