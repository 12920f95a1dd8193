"""The kinds of state of a program with a cache."""

# What a rank keeps between the calls of a program with a cache, or is told for each call.
STATE_KINDS = {
    "cache": "kept: keys or values, by slot",
    "sums": "kept: prefix sums, by position",
    "recent": "kept: what a convolution or a shift took in last, by position, in turn",
    "history": "kept: an input, all tokens so far",
    "positions": "of this call: positions of the new tokens",
    "slots": "of this call: where the new tokens are kept on this rank",
    "places": "of this call: positions in the slots that are in use on this rank",
}

# Those that are memory of a rank's own, made once; a history is made where an input is first read.
KEPT = ("cache", "sums", "recent")
