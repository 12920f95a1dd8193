"""What a step costs before there is hardware to run it on: tables, op costs, timelines, plans."""
