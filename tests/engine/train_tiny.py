"""train_net.py with the tiny detector registered, for tests that need processes of their own."""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "../.."))

import tests.tiny_detector  # noqa: E402, F401
import train_net  # noqa: E402

if __name__ == "__main__":
    train_net.main()
