"""``codetr_d2 COMMAND``: the command line of the installed package."""

import argparse
import importlib
import importlib.metadata
import sys

__all__ = ["COMMANDS", "main"]

# By command: the module, the arguments that stand before the user's, and what it does.
COMMANDS = {
    "prepare-dataset": ("prepare_dataset", [], "a labelling tool's export -> a dataset and a config that fits it"),
    "train": ("train", [], "train a model that a config describes"),
    "evaluate": ("train", ["--eval-only"], "average precision of a trained model"),
    "predict": ("predict", [], "detect objects in pictures, folders and videos, and draw them"),
    "report": ("report", [], "a page about a run, or about two side by side"),
    "analyze": ("analyze", [], "measure on trained models what the paper measures; what a model costs"),
    "export": ("export", [], "a file that runs without PyTorch or without this package"),
    "convert-checkpoint": ("convert_checkpoint", [], "the published layout of weights -> this project's, and back"),
    "prepare-efficientnet": ("prepare_efficientnet", [], "fetch the weights that the small models start from"),
    "install-detectron2": ("install_detectron2", [], "install detectron2 where it is missing"),
}


def main() -> None:
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="codetr_d2",
        description="Co-DETR for detectron2.",
        epilog="\n".join(
            ["commands:"]
            + [f"  {name:{width}}  {what}" for name, (_, _, what) in COMMANDS.items()]
            + ["", "codetr_d2 COMMAND --help describes a command."]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=importlib.metadata.version("codetr_d2"))
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="one of those below")
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="what it takes")
    args = parser.parse_args()
    module, first, _ = COMMANDS[args.command]
    sys.argv = [f"codetr_d2 {args.command}", *first, *args.arguments]  # the first is its name in help and errors
    try:
        program = importlib.import_module(f"codetr_d2_programs.{module}")  # only now, as torch takes seconds to load
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "detectron2"):
            raise
        print(f"error: {error}", file=sys.stderr)  # of codetr_d2, with the command that installs it
        sys.exit(2)
    program.main()


if __name__ == "__main__":
    main()
