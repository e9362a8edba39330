"""Write a page about a run: what it finds and misses, how it was trained, pictures to look through.

    codetr_d2 report output/my_run                   # writes output/my_run/report.html
    codetr_d2 report output/before output/after      # the two side by side: output/after/comparison.html

The page is one file for a browser, without network or server. It is made of what the training left in the folder; where
the detections of the test dataset are missing, the weights make them. Paths in the config are relative to the folder in
which this is called, as for training. docs/report.md says what the page shows.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import codetr_d2  # noqa: F401 (registers the model)
from codetr_d2.errors import InputError
from codetr_d2.report.run import read_run
from codetr_d2.report.run_page import write_run_page


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="OUTPUT_DIR", help="folder of a run; two are compared")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="the page (default: report.html or comparison.html in the last run)"
    )
    args = parser.parse_args(argv)
    if len(args.runs) > 2:
        parser.error(f"{len(args.runs)} runs are too many; give one, or two to compare")
    folders = [folder.expanduser() for folder in args.runs]
    output = args.output or folders[-1] / ("report.html" if len(folders) == 1 else "comparison.html")
    try:
        write_run_page([read_run(folder) for folder in folders], output.expanduser())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{output}: open it in a browser ({output.expanduser().stat().st_size / 1e6:.1f} MB)")
