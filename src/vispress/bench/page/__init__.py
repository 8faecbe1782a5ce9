"""One self-contained HTML page from a results folder; `write_page` makes it."""
