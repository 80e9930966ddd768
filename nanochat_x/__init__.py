"""nanochat_x takes a nanochat checkpoint out of Python.

    checkpoint -> model -> capture -> target -> bundle -> C++ runner
    (nanochat's)  (ours)  (torch.export) (lowering) (a folder)

The command line (`python -m nanochat_x --help`) composes the modules; each can be used alone. Importing this package
imports none of them, and so not torch either.
"""

from nanochat_x.errors import NanochatXError

__version__ = "0.1.0"

__all__ = ["NanochatXError", "__version__"]
