"""Every error that nanochat_x raises on purpose.

    NanochatXError
    ├── UsageError          an option or an argument that cannot be meant
    ├── CheckpointError     a nanochat checkpoint that cannot be found or trusted
    │   └── TokenizerError  its tokenizer cannot be read, or does not fit the model
    ├── CaptureError        torch.export did not give the program of the contract
    ├── LoweringError       a target's compiler refused or failed
    ├── BundleError         a bundle that cannot be written, read or trusted
    ├── RunnerError         the C++ runner cannot be built, started, or failed
    └── ParityError         the artifact computes something other than the model

Each message is one line: what was wrong, where, and what to do. The command line prints it and exits with code 2.
"""

from __future__ import annotations


class NanochatXError(Exception):
    """Base of all errors above; `str(error)` is the one line that a user sees."""

    def __init__(self, what: str, *, remedy: str | None = None) -> None:
        self.what = what
        self.remedy = remedy
        super().__init__(f"{what}; {remedy}" if remedy else what)


class UsageError(NanochatXError):
    """An option or an argument that cannot be meant."""


class CheckpointError(NanochatXError):
    """A nanochat checkpoint that cannot be found, read or trusted."""


class TokenizerError(CheckpointError):
    """A tokenizer that cannot be read or trusted, or does not fit its model."""


class CaptureError(NanochatXError):
    """torch.export did not give the program of the contract."""


class LoweringError(NanochatXError):
    """A target's compiler refused or failed."""


class BundleError(NanochatXError):
    """A bundle that cannot be written, read or trusted."""


class RunnerError(NanochatXError):
    """The C++ runner cannot be built or started, or it failed."""


class ParityError(NanochatXError):
    """The artifact computes something other than the model."""
