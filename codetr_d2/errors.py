"""The one error type for what a user can mend."""


class InputError(ValueError):
    """A file, a key or an option that the user gave is at fault.

    The message names it and says how to mend it. Command lines print it as one line, without a traceback.
    """
