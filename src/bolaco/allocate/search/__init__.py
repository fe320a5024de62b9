"""Search: allocations are proposed, evaluated on text, and kept in a ledger."""
