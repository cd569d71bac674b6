"""dalle2-jax [COMMAND ...], or python -m dalle2_jax [COMMAND ...]: lists the commands, or runs one.

`dalle2-jax generate "a red star"` is `python -m dalle2_jax.generate "a red star"`.
"""

import runpy
import sys

import dalle2_jax
from dalle2_jax.runtime.names import nearest

COMMANDS = {
    "train": "train one stage, or go on with it",
    "generate": "captions to pictures",
    "edit": "pictures to pictures: variations, paths, inpainting, inversion",
    "evaluate": "measure a model directory, or pictures: FID, CLIP score and more",
    "embed": "compute the CLIP embeddings of a dataset, to train from",
    "convert": "make a model directory of workdirs or of weights of others; and out again",
    "preflight": "compile a training step for devices that are not there: memory and time",
    "benchmark": "measure how fast a stage is on this machine",
    "studio": "a page in the browser to draw and edit with",
}


def main() -> None:
    """Run the command that the arguments name; without one, or with --help, list all."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        print(f"dalle2_jax {dalle2_jax.__version__}\n")
        print("dalle2-jax COMMAND --help, or python -m dalle2_jax.COMMAND --help: its flags\n")
        for command, text in COMMANDS.items():
            print(f"  {command:10} {text}")
    elif name == "--version":
        print(dalle2_jax.__version__)
    elif name in COMMANDS:
        sys.argv[1:] = arguments
        runpy.run_module(f"dalle2_jax.{name}", run_name="__main__", alter_sys=True)
    else:
        near = nearest(name, COMMANDS)
        hint = f"did you mean {near}?" if near else f"the commands are {', '.join(COMMANDS)}"
        sys.exit(f"error: there is no command {name!r}; {hint}")


if __name__ == "__main__":
    main()
