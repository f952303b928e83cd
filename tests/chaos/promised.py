"""The promised effects: handlers, and the groups of each. The books are checked against them."""

# Effects in the database, exactly once: handler -> its groups.
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
# Effects in the database, exactly once, if the new release has tried the handler on the event.
LATE = {"late": "^chaos_flaky$"}
# Effects outside of the database, at least once.
AT_LEAST_ONCE = {
    "outside": EXACTLY_ONCE["outside"],
    "quiet": "^chaos_quiet$",
    "detached": "^chaos_detached$",
    "async": "^chaos_async$",
}
DOOMED = "chaos_doomed"
