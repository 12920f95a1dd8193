"""Programs and what is known of them: sizes, types, layouts, rules, checks, and their text."""
