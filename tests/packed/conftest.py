"""torchao is found by these tests only: `make setup` installs it apart from all else.

transformers imports it wherever it finds it, and four lines of warnings come with it.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(sys.prefix) / "apart"))
