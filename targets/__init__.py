"""Lowerings, one a file: each takes what was captured and writes the files of a bundle that are its own.

Installed as `nanochat_x.targets`. A target knows no checkpoint and no command line.
"""
