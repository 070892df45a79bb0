"""The one exception that means: the user can mend this, and here is how."""


class UserError(Exception):
    """A mistake or a condition that the user can mend.

    Its message is one line that names what was wrong and what would be right. Entry points print it
    without a stack trace and exit with code 2.
    """


class NotApplicableError(UserError):
    """A method is not for this checkpoint: no failure, and nothing to mend but the choice of either."""
