"""Model definitions, one file per dataflow, and the table that says which architecture runs on which."""
