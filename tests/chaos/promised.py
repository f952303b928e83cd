"""What handlers do, and for which groups: what the books are checked against."""

# What is done exactly once in the database: handler -> the groups it is for.
EXACTLY_ONCE = {
    "ledger": "^chaos_(?!new)",
    "flaky": "^chaos_flaky$",
    "rude": "^chaos_rude$",
    "batch": "^chaos_batch$",
    "debit": "^chaos_transfer",
    "credit": "^chaos_transfer",
    "new": "^chaos_new$",
    "untidy": "^chaos_untidy$",
    "outside": "^chaos_(plain|ordered)$",
}
# What is done exactly once in the database by a release that has the handler, once that has tried.
LATE = {"late": "^chaos_flaky$"}
# What is done outside of the database at least once.
AT_LEAST_ONCE = {
    "outside": EXACTLY_ONCE["outside"],
    "quiet": "^chaos_quiet$",
    "detached": "^chaos_detached$",
    "async": "^chaos_async$",
}
DOOMED = "chaos_doomed"
