"""Every error that nscmerge raises on purpose, so that callers can tell our words from a crash."""


class NSCMergeError(Exception):
    """Base of all errors below: bad input that the message names, with a way out."""


class ShapeError(NSCMergeError, ValueError):
    """Tensors that must agree in shape do not."""


class AdapterError(NSCMergeError, ValueError):
    """An adapter cannot be read, written, or merged exactly.

    Args:
        message: What was got, what was expected, where, and what to do.
        code: Stable name of the kind of fault, by which ``nscmerge doctor`` lists it.
    """

    def __init__(self, message: str, code: str = "unmergeable") -> None:
        super().__init__(message)
        self.code = code


class MethodError(NSCMergeError, ValueError):
    """A merging method or one of its options is unknown or out of range."""


class TargetError(NSCMergeError, ValueError):
    """The selection of target layers is empty or cannot be reached."""


class ConfigError(NSCMergeError, ValueError):
    """Options contradict each other or the data that they meet."""


class OutputExistsError(NSCMergeError, FileExistsError):
    """An output folder is there already; nothing is ever overwritten."""


class OutputError(NSCMergeError, OSError):
    """An output folder cannot be written: no space, no permission, a read-only disk."""


class DatasetNotFoundError(NSCMergeError, FileNotFoundError):
    """A data set, or the package that carries it, is missing or not the expected one."""


class DataError(NSCMergeError, ValueError):
    """A file of a data set cannot be used: truncated, of the wrong size or bit depth, or with labels out of range."""
