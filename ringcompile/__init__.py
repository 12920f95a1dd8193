"""ringcompile: compile a single-device PyTorch transformer into one program per GPU.

import ringcompile as rc

program = rc.capture(model, (input_ids,))
parallel = rc.transform(program, "ring=4")
print(parallel.rank(0))
parallel.save("out/")
logits = rc.run(parallel, (input_ids,))
"""

from ringcompile.capture.export import capture
from ringcompile.compiler import ParallelProgram, check, load, transform
from ringcompile.errors import RingCompileError
from ringcompile.execution import run, verify
from ringcompile.mesh import Mesh
from ringcompile.tokenwise import tokenwise

__all__ = [
    "Mesh",
    "ParallelProgram",
    "RingCompileError",
    "capture",
    "check",
    "load",
    "run",
    "tokenwise",
    "transform",
    "verify",
]
__version__ = "0.1.0"
