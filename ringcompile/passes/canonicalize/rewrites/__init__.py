"""How calls that torch writes in several ways are written in one: a table for each subject."""

from ringcompile.passes.canonicalize.rewrites.attention import ATTENTION
from ringcompile.passes.canonicalize.rewrites.common import ALIASES, Rewrite, renamed, short_name
from ringcompile.passes.canonicalize.rewrites.values import VALUES
from ringcompile.passes.canonicalize.rewrites.views import VIEWS

REWRITES: dict[str, Rewrite] = {
    **dict.fromkeys(ALIASES, renamed),
    **VIEWS,
    **VALUES,
    **ATTENTION,
}

__all__ = ["REWRITES", "Rewrite", "short_name"]
