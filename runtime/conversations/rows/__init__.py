"""Rows of any known format, read as conversations: `recognise.read_row` is the entry, `shapes` the table of formats."""
