"""Options that several verbs share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from nanochat_x.cli_run import Integer
from nanochat_x.find import SOURCE_FOLDERS


def checkpoint_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that choose a checkpoint, named as nanochat names them."""
    options = (
        click.option("-i", "--source", type=click.Choice([*SOURCE_FOLDERS, "demo"]),
                     help="Which training stage. Default: the most finished one that there is; without a nanochat "
                          "folder, the demo model."),
        click.option("-g", "--model-tag", metavar="TAG", help="Which model, as d20. Default: the deepest."),
        click.option("-s", "--step", type=Integer(0), metavar="N", help="Which step. Default: the last."),
        click.option("--base-dir", type=click.Path(path_type=Path), metavar="DIR",
                     help="nanochat's folder. Default: $NANOCHAT_BASE_DIR, else ~/.cache/nanochat."),
        click.option("--tokenizer", "tokenizer_dir", type=click.Path(path_type=Path), metavar="DIR",
                     help="Folder with tokenizer.pkl. Default: tokenizer in the base folder."),
        click.option("--hf", type=click.Path(path_type=Path), metavar="DIR",
                     help="A Hugging Face folder of a NanoChatForCausalLM, in the place of the options above."),
        click.option("--override", "override_pairs", multiple=True, metavar="KEY=VALUE",
                     help="A constant that the checkpoint's files do not tell, as softcap=20. Repeatable."),
    )  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function
