"""How calls that torch writes in several ways are written in one: a table for each subject."""

from ringcompile.passes.rewrites.attention import ATTENTION
from ringcompile.passes.rewrites.common import ALIASES, Rewrite, renamed, short_name
from ringcompile.passes.rewrites.values import VALUES
from ringcompile.passes.rewrites.views import VIEWS

REWRITES: dict[str, Rewrite] = {
    **dict.fromkeys(ALIASES, renamed),
    **VIEWS,
    **VALUES,
    **ATTENTION,
}

__all__ = ["REWRITES", "Rewrite", "short_name"]
