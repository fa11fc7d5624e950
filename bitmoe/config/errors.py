"""The one exception type for bad input: what is wrong, the value, what to do.

``bitmoe.__main__`` prints it once, from rank 0, without a traceback, and exits with status 2.
"""


class InputError(ValueError):
    """Bad input of the user: a config value, a file, a directory, a checkpoint.

    Args:
        what: what is wrong, with the offending value.
        fix: what to do about it.
        key: the config key it is about, where there is one.
    """

    def __init__(self, what: str, *, fix: str = "", key: str = ""):
        self.what, self.fix, self.key = what, fix, key
        lines = [f"{key}: {what}" if key else what]
        if fix:
            lines.append(f"fix: {fix}")
        super().__init__("\n".join(lines))
