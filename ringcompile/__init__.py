"""ringcompile: compile a single-device PyTorch transformer into one program per GPU.

import ringcompile as rc

program = rc.capture(model, (input_ids,))
parallel = rc.transform(program, "ring=4")
print(parallel.rank(0))
parallel.save("out/")
logits = rc.run(parallel, (input_ids,))

parallel = rc.transform(program, "ring=4", cache=8192)
tokens = rc.generate(parallel, input_ids, max_new_tokens=64)
"""

import sys
from typing import TYPE_CHECKING

from ringcompile.errors import RingCompileError
from ringcompile.later import package_with
from ringcompile.mesh import Mesh

if TYPE_CHECKING:
    from ringcompile.capture.export import capture
    from ringcompile.capture.loaders import load_model
    from ringcompile.compiler import check, load, transform
    from ringcompile.execution import run, verify
    from ringcompile.extension import register_op
    from ringcompile.generation import generate
    from ringcompile.kernel_extension import register_kernel
    from ringcompile.linear_attention import linear_attention
    from ringcompile.parallel_program import ParallelProgram
    from ringcompile.parallelize import parallelize
    from ringcompile.planning import plan, simulate
    from ringcompile.session import Session
    from ringcompile.tokenwise import tokenwise

__all__ = [
    "Mesh",
    "ParallelProgram",
    "RingCompileError",
    "Session",
    "capture",
    "check",
    "generate",
    "linear_attention",
    "load",
    "load_model",
    "parallelize",
    "plan",
    "register_kernel",
    "register_op",
    "run",
    "simulate",
    "tokenwise",
    "transform",
    "verify",
]
__version__ = "0.2.0"

# What needs torch is imported when it is first used; tests hold this table against the imports.
_MODULES = {
    "ParallelProgram": "ringcompile.parallel_program",
    "Session": "ringcompile.session",
    "capture": "ringcompile.capture.export",
    "check": "ringcompile.compiler",
    "generate": "ringcompile.generation",
    "linear_attention": "ringcompile.linear_attention",
    "load": "ringcompile.compiler",
    "load_model": "ringcompile.capture.loaders",
    "parallelize": "ringcompile.parallelize",
    "plan": "ringcompile.planning",
    "register_kernel": "ringcompile.kernel_extension",
    "register_op": "ringcompile.extension",
    "run": "ringcompile.execution",
    "simulate": "ringcompile.planning",
    "tokenwise": "ringcompile.tokenwise",
    "transform": "ringcompile.compiler",
    "verify": "ringcompile.execution",
}
sys.modules[__name__].__class__ = package_with(_MODULES)
