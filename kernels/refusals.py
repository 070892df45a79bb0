"""What a kernel raises for operands that it does not take."""


class UnsupportedError(ValueError):
    """reason: why, in a phrase, as a kernel's `unsupported` says it."""

    def __init__(self, kernel: str, reason: str) -> None:
        super().__init__(f"{kernel} {reason}")
        self.reason = reason
