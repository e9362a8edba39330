"""The programs of codetr_d2, each a module with its ``main``; ``codetr_d2 COMMAND`` runs them.

They are a package of their own, because what they set for their whole process must be set before torch is loaded, which
importing codetr_d2 does; and so that ``codetr_d2 install-detectron2`` runs where detectron2 is missing.
"""

import os
import warnings

# Where another program wants the cores, OpenMP threads that actively wait for each other make a step many times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
# Of detectron2's libraries, at each start: not for the users of these programs to mend.
warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
